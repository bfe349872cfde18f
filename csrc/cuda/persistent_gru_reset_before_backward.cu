#include "persistent_launch.h"

namespace rnn_ext::cuda {

void persistent_gru_reset_before_backward(const CudaPlan& plan, const PersistentBackward& args,
                                          const Stream& stream) {
  start_backward<PersistentGruResetBefore>("persistent_gru_reset_before_backward", plan, args,
                                           stream);
}

}  // namespace rnn_ext::cuda
