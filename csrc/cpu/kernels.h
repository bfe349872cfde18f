// Everything above, instantiated for every cell and dtype: the table that isa_*.cpp exports.
#pragma once
#include "backward.h"
#include "generate.h"
#include "normalized_backward.h"
#ifndef RNN_EXT_BFLOAT16
#include "rtrl.h"
#endif

namespace rnn_ext::RNN_EXT_TARGET {

// Calls body with a value of the type that implements the cell.
template <class value, class Body>
void with_cell(CellKind kind, bool projected, const Body& body) {
  switch (kind) {
    case CellKind::kRnnTanh:
      return body(ElmanSteps<value, Tanh>{});
    case CellKind::kRnnRelu:
      return body(ElmanSteps<value, Relu>{});
    case CellKind::kRnnSigmoid:
      return body(ElmanSteps<value, Sigmoid>{});
    case CellKind::kLstm:
      return projected ? body(LstmSteps<value, true>{}) : body(LstmSteps<value, false>{});
    case CellKind::kGru:
      return body(GruSteps<value>{});
    case CellKind::kGruResetBefore:
      return body(GruResetBeforeSteps<value>{});
  }
}

template <class value>
void run_forward(CellKind kind, const ForwardArgs<value>& args) {
  with_cell<value>(kind, args.weights.hr, [&](auto cell) {
    if (args.save)
      Forward<value, decltype(cell), true>(args).run();
    else
      Forward<value, decltype(cell), false>(args).run();
  });
}

template <class value>
void run_backward(CellKind kind, const BackwardArgs<value>& args) {
  with_cell<value>(kind, args.weights.hr,
                   [&](auto cell) { Backward<value, decltype(cell)>(args).run(); });
}

// The same for cells with layer normalisation or peepholes.
template <class value, class Body>
void with_normalized_cell(CellKind kind, const Body& body) {
  switch (kind) {
    case CellKind::kRnnTanh:
      return body(NormalizedElman<value, Tanh>{});
    case CellKind::kRnnRelu:
      return body(NormalizedElman<value, Relu>{});
    case CellKind::kRnnSigmoid:
      return body(NormalizedElman<value, Sigmoid>{});
    case CellKind::kLstm:
      return body(NormalizedLstm<value>{});
    case CellKind::kGru:
      return body(NormalizedGru<value>{});
    case CellKind::kGruResetBefore:
      return body(NormalizedGruResetBefore<value>{});
  }
}

template <class value>
void run_normalized_forward(CellKind kind, const NormalizedForwardArgs<value>& args) {
  with_normalized_cell<value>(
      kind, [&](auto cell) { NormalizedForward<value, decltype(cell)>(args).run(); });
}

template <class value>
void run_normalized_backward(CellKind kind, const NormalizedBackwardArgs<value>& args) {
  with_normalized_cell<value>(
      kind, [&](auto cell) { NormalizedBackward<value, decltype(cell)>(args).run(); });
}

template <class value>
constexpr NormalizedKernels<value> normalized_kernels{run_normalized_forward<value>,
                                                      run_normalized_backward<value>};

template <class value>
long record_width(CellKind kind, long hidden, bool normalized) {
  long size = 0;
  with_normalized_cell<value>(kind, [&](auto cell) {
    const long width = gate_columns<value>(decltype(cell)::gates, hidden).width;
    size = Record<value>{width, normalized}.size();
  });
  return size;
}

inline long record_width_of(CellKind kind, long hidden, bool normalized, size_t real_bytes) {
  return real_bytes == sizeof(float) ? record_width<float>(kind, hidden, normalized)
                                     : record_width<double>(kind, hidden, normalized);
}

#ifndef RNN_EXT_BFLOAT16
inline void run_quantized(CellKind kind, const QuantizedArgs& args) {
  with_cell<float>(kind, args.projected,
                   [&](auto cell) { QuantizedForward<decltype(cell)>(args).run(); });
}
#endif

template <class value>
void run_generate(CellKind kind, const GenerateArgs<value>& args) {
#ifndef RNN_EXT_BFLOAT16
  if constexpr (sizeof(value) == sizeof(float))
    if (args.quantized)
      return with_cell<float>(kind, args.quantized->projected, [&](auto cell) {
        Generation<QuantizedLayer<decltype(cell)>>(args).run();
      });
#endif
  with_cell<value>(kind, args.weights->hr,
                   [&](auto cell) { Generation<DenseLayer<value, decltype(cell)>>(args).run(); });
}

template <class value>
long gates_width(CellKind kind, long hidden) {
  long width = 0;
  with_cell<value>(kind, false, [&](auto cell) {
    using Cell = decltype(cell);
    if (Cell::keeps_gates)
      width = panels_of<value, typename Cell::Gates>(hidden) * Cell::Gates::vectors * kLanes<value>;
  });
  return width;
}

inline long gates_width_of(CellKind kind, long hidden, size_t real_bytes) {
  return real_bytes == sizeof(float) ? gates_width<float>(kind, hidden)
                                     : gates_width<double>(kind, hidden);
}

}  // namespace rnn_ext::RNN_EXT_TARGET
