#include "persistent_launch.h"

namespace rnn_ext::cuda {

void persistent_elman_backward(CellKind cell, const CudaPlan& plan, const PersistentBackward& args,
                               const Stream& stream) {
  switch (cell) {
    case CellKind::kRnnTanh:
      return start_backward<PersistentElman<Tanh>>("persistent_elman_backward", plan, args, stream);
    case CellKind::kRnnRelu:
      return start_backward<PersistentElman<Relu>>("persistent_elman_backward", plan, args, stream);
    default:
      return start_backward<PersistentElman<Sigmoid>>("persistent_elman_backward", plan, args,
                                                      stream);
  }
}

}  // namespace rnn_ext::cuda
