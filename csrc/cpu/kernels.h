// Everything above, instantiated for every cell and dtype: the table that isa_*.cpp exports.
#pragma once
#include "backward.h"
#include "quantized.h"

namespace rnn_ext::RNN_EXT_TARGET {

// Calls body with a value of the type that implements the cell.
template <class real, class Body>
void with_cell(CellKind kind, bool projected, const Body& body) {
  switch (kind) {
    case CellKind::kRnnTanh:
      return body(ElmanSteps<real, Tanh>{});
    case CellKind::kRnnRelu:
      return body(ElmanSteps<real, Relu>{});
    case CellKind::kRnnSigmoid:
      return body(ElmanSteps<real, Sigmoid>{});
    case CellKind::kLstm:
      return projected ? body(LstmSteps<real, true>{}) : body(LstmSteps<real, false>{});
    case CellKind::kGru:
      return body(GruSteps<real>{});
    case CellKind::kGruResetBefore:
      return body(GruResetBeforeSteps<real>{});
  }
}

template <class real>
void run_forward(CellKind kind, const ForwardArgs<real>& args) {
  with_cell<real>(kind, args.weights.hr, [&](auto cell) {
    if (args.save)
      Forward<real, decltype(cell), true>(args).run();
    else
      Forward<real, decltype(cell), false>(args).run();
  });
}

template <class real>
void run_backward(CellKind kind, const BackwardArgs<real>& args) {
  with_cell<real>(kind, args.weights.hr,
                  [&](auto cell) { Backward<real, decltype(cell)>(args).run(); });
}

inline void run_quantized(CellKind kind, const QuantizedArgs& args) {
  with_cell<float>(kind, args.projected,
                   [&](auto cell) { QuantizedForward<decltype(cell)>(args).run(); });
}

template <class real>
long gates_width(CellKind kind, long hidden) {
  long width = 0;
  with_cell<real>(kind, false, [&](auto cell) {
    using Cell = decltype(cell);
    if (Cell::keeps_gates)
      width = panels_of<real, typename Cell::Gates>(hidden) * Cell::Gates::vectors * kLanes<real>;
  });
  return width;
}

inline long gates_width_of(CellKind kind, long hidden, size_t real_bytes) {
  return real_bytes == sizeof(float) ? gates_width<float>(kind, hidden)
                                     : gates_width<double>(kind, hidden);
}

}  // namespace rnn_ext::RNN_EXT_TARGET
