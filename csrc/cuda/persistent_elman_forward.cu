#include "persistent_launch.h"

namespace rnn_ext::cuda {

void persistent_elman_forward(CellKind cell, const CudaPlan& plan, const PersistentForward& args,
                              const Stream& stream) {
  switch (cell) {
    case CellKind::kRnnTanh:
      return start_forward<PersistentElman<Tanh>>("persistent_elman_forward", plan, args, stream);
    case CellKind::kRnnRelu:
      return start_forward<PersistentElman<Relu>>("persistent_elman_forward", plan, args, stream);
    default:
      return start_forward<PersistentElman<Sigmoid>>("persistent_elman_forward", plan, args,
                                                     stream);
  }
}

}  // namespace rnn_ext::cuda
