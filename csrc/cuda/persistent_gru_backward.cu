#include "persistent_launch.h"

namespace rnn_ext::cuda {

void persistent_gru_backward(const CudaPlan& plan, const PersistentBackward& args,
                             const Stream& stream) {
  start_backward<PersistentGru>("persistent_gru_backward", plan, args, stream);
}

}  // namespace rnn_ext::cuda
