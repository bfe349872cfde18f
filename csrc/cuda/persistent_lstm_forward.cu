#include "persistent_launch.h"

namespace rnn_ext::cuda {

void persistent_lstm_forward(const CudaPlan& plan, const PersistentForward& args,
                             const Stream& stream) {
  start_forward<PersistentLstm>("persistent_lstm_forward", plan, args, stream);
}

}  // namespace rnn_ext::cuda
