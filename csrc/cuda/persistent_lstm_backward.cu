#include "persistent_launch.h"

namespace rnn_ext::cuda {

void persistent_lstm_backward(const CudaPlan& plan, const PersistentBackward& args,
                              const Stream& stream) {
  start_backward<PersistentLstm>("persistent_lstm_backward", plan, args, stream);
}

}  // namespace rnn_ext::cuda
