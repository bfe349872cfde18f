// What a layer with layer normalisation, peepholes or both reads and writes beside what problem.h
// says of every layer.
#pragma once
#include "problem.h"

namespace rnn_ext {

constexpr double kNormEpsilon = 1e-5;

// Columns of the gates of a row. A group of gates is normalised together: all four of the LSTM, r
// and z of the GRU, and its n. A group starts at a multiple of a panel's width.
struct GateColumns {
  int groups;
  long count[2], at[2];  // of each group: gates times hidden units; first column
  long row[2];           // its first row of W and U
  long width;            // of all columns
};

template <class value>
struct Extras {
  using real = Real<value>;
  const real *gain_ih, *gain_hh;  // [G*H] or both null: nothing is normalised
  const real* gain_cell;          // [H], LSTM with the other gains
  const real* bias_cell;          // [H] or null
  const real* peephole;           // [3*H], of i, f and o; LSTM; or null
};

// `layer.gates`, when saving, are records of one row each, [N, record_width], or null: not kept. The
// activations (of the LSTM's cell and of what a step makes: before zoneout) and, where gates are
// normalised, what W x and U h' became before their gains, and the scales. `layer.middle` is not used.
template <class value>
struct NormalizedForwardArgs {
  ForwardArgs<value> layer;
  Extras<value> extras;
};

template <class value>
struct NormalizedBackwardArgs {
  using real = Real<value>;
  BackwardArgs<value> layer;
  Extras<value> extras;
  // As Extras; null where the gradient was not asked for
  real *d_gain_ih, *d_gain_hh, *d_gain_cell, *d_bias_cell, *d_peephole;
};

template <class value>
struct NormalizedKernels {
  void (*forward)(CellKind, const NormalizedForwardArgs<value>&);
  void (*backward)(CellKind, const NormalizedBackwardArgs<value>&);
};

}  // namespace rnn_ext
