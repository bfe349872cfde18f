#include "persistent_launch.h"

namespace rnn_ext::cuda {

void persistent_gru_reset_before_forward(const CudaPlan& plan, const PersistentForward& args,
                                         const Stream& stream) {
  start_forward<PersistentGruResetBefore>("persistent_gru_reset_before_forward", plan, args,
                                          stream);
}

}  // namespace rnn_ext::cuda
