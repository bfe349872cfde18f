// The cells by name: what csrc/ops asks the kernels of every target for.
#pragma once

namespace rnn_ext {

enum class CellKind { kRnnTanh, kRnnRelu, kRnnSigmoid, kLstm, kGru, kGruResetBefore };

}  // namespace rnn_ext
