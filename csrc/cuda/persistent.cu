// From a cell to its persistent kernels.
#include "persistent_launch.h"

namespace rnn_ext::cuda {
namespace {

template <class Elman, class Lstm, class Gru, class ResetBefore>
void with_cell(CellKind cell, const Elman& elman, const Lstm& lstm, const Gru& gru,
               const ResetBefore& reset_before) {
  switch (cell) {
    case CellKind::kLstm:
      return lstm();
    case CellKind::kGru:
      return gru();
    case CellKind::kGruResetBefore:
      return reset_before();
    default:
      return elman();
  }
}

}  // namespace

void persistent_forward(CellKind cell, const CudaPlan& plan, const PersistentForward& args,
                        const Stream& stream) {
  with_cell(
      cell, [&] { persistent_elman_forward(cell, plan, args, stream); },
      [&] { persistent_lstm_forward(plan, args, stream); },
      [&] { persistent_gru_forward(plan, args, stream); },
      [&] { persistent_gru_reset_before_forward(plan, args, stream); });
}

void persistent_backward(CellKind cell, const CudaPlan& plan, const PersistentBackward& args,
                         const Stream& stream) {
  with_cell(
      cell, [&] { persistent_elman_backward(cell, plan, args, stream); },
      [&] { persistent_lstm_backward(plan, args, stream); },
      [&] { persistent_gru_backward(plan, args, stream); },
      [&] { persistent_gru_reset_before_backward(plan, args, stream); });
}

}  // namespace rnn_ext::cuda
