// What csrc/ops asks the kernels of every target for: the cells by name, and what is done to
// gradients.
#pragma once

namespace rnn_ext {

enum class CellKind { kRnnTanh, kRnnRelu, kRnnSigmoid, kLstm, kGru, kGruResetBefore };

// What happens to dL/dh_t, as it has arrived from the output at t and from later steps, before it
// goes on to the cell: each of its values, or the norm of each sequence's row, is held within a
// limit.
enum class Clip { kNone, kValue, kNorm };

}  // namespace rnn_ext
