// What a layer's forward and backward pass read and write, as plain pointers: the border between
// torch's side (csrc/ops) and the kernels. All matrices are row-major and contiguous.
//
// value is what is stored and multiplied: float, double or BFloat16; real is what is computed with:
// the same, but float for BFloat16.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../cells/kind.h"
#include "plan.h"

namespace rnn_ext {

// The upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

template <class value>
struct RealOf {
  using type = value;
};
template <>
struct RealOf<BFloat16> {
  using type = float;
};
template <class value>
using Real = typename RealOf<value>::type;

// The time axis. Rows of step t are offsets[t] .. offsets[t + 1]; row r of a step belongs to
// sequence r, and the number of rows never grows with t (the layout of a PackedSequence; a padded
// batch has B rows at every step).
struct Steps {
  long count, batch;       // T, B
  const int64_t* offsets;  // [T + 1]
  bool reverse;            // time runs from T - 1 to 0

  long at(long i) const { return reverse ? count - 1 - i : i; }  // the i-th step in running order
  long begin(long t) const { return offsets[t]; }
  long rows(long t) const { return offsets[t + 1] - offsets[t]; }
  long total() const { return offsets[count]; }
  long previous(long t) const { return reverse ? t + 1 : t - 1; }
  long next(long t) const { return reverse ? t - 1 : t + 1; }
  bool exists(long t) const { return t >= 0 && t < count; }
  // How many rows of step t have a previous (next) step; the rest start from h0 (end at h_n).
  long carried(long t) const { return shared(t, previous(t)); }
  long continuing(long t) const { return shared(t, next(t)); }

 private:
  long shared(long t, long other) const {
    if (!exists(other)) return 0;
    return rows(other) < rows(t) ? rows(other) : rows(t);
  }
};

struct Sizes {
  long input, hidden, output;  // I, H, P (P = H without a projection)
};

template <class value>
struct Weights {
  using real = Real<value>;
  const value* ih;   // [G*H, I]
  const value* hh;   // [G*H, P]
  const real* b_ih;  // [G*H] or null
  const real* b_hh;  // [G*H] or null
  const value* hr;   // [P, H] or null: the projection
};

// Where sequences start afresh: the state that the walk carries into such a row's step is replaced.
template <class value>
struct Resets {
  const bool* rows;      // [N] or null: nowhere
  const value* h;        // [B, P], not null where rows is not
  const Real<value>* c;  // [B, H], LSTM
  bool zero;             // h and c are zero

  // Those of the `count` rows from `first` on, or null if none of them starts afresh.
  const bool* among(long first, long count) const {
    return rows && std::memchr(rows + first, true, count) ? rows + first : nullptr;
  }
};

// What a step holds on to of a state (zoneout).
struct Hold {
  const bool* units;  // [N, size], a row for each row of the steps: of these units all; or null:
  double share;       // of each unit so much

  Hold from(long at) const { return {units ? units + at : nullptr, share}; }
};
struct Zoneout {
  bool on;
  Hold h, c;

  Zoneout from(long at) const { return {on, h.from(at), c.from(at)}; }  // of equal widths
};

template <class value>
struct ForwardArgs {
  using real = Real<value>;
  Steps steps;
  Sizes sizes;
  Weights<value> weights;
  const value* x;   // [N, I], N = steps.total()
  const value* h0;  // [B, P]
  const real* c0;   // [B, H], LSTM
  value* out;       // [N, P]
  real* c;  // LSTM: [N, H] when saving; otherwise [B, H], holding c0 on entry and c_n afterwards
  // Saving, cells with gates: [N, gates_width] activations in panel order, or null: not kept.
  real* gates;
  // Saving, [N, H]: GRU's U_n h' + b_rn, reset-before GRU's r h', projected LSTM's o tanh(c), and
  // of the Elman network the f(a) that zoneout keeps a share of; or null: not kept.
  value* middle;
  Resets<value> resets;
  Zoneout zoneout;
  bool save;  // keep what the backward pass needs
  Plan plan;
};

template <class value>
struct BackwardArgs {
  using real = Real<value>;
  Steps steps;
  Sizes sizes;
  Weights<value> weights;
  const value *x, *h0, *out, *middle;  // as in ForwardArgs, saved
  const real *c0, *c, *gates;
  const value* d_out;  // [N, P] or null (zero)
  const real* d_hn;    // [B, P] or null
  const real* d_c;     // [N, H] or null: gradient of every c_t
  real* dc;            // LSTM: [B, H], dL/dc_n on entry, dL/dc0 afterwards
  Resets<value> resets;
  Zoneout zoneout;
  real *d_reset_h, *d_reset_c;  // [B, P] and [B, H], zero on entry: gradients of resets.h and .c
  // null where the gradient was not asked for
  value* dx;
  real *dh0, *dw_ih, *dw_hh, *db_ih, *db_hh, *dw_hr;
  // Weights and biases get a gradient for each group of sequences, one after the other; sequence b
  // belongs to group b % groups. Divides the rows of every step.
  long groups;
  bool add;  // gradients of weights and biases are added to what is there
  Clip clip;
  double limit;
  real* dh_norms;  // [N] or null: the norm of each row of dL/dh_t, before it is clipped
  Plan plan;
};

struct QuantizedArgs;  // quantized_problem.h
template <class real>
struct RtrlKernels;  // rtrl_problem.h
template <class value>
struct GenerateArgs;  // generate_problem.h
template <class value>
struct NormalizedKernels;  // normalized_problem.h

// The kernels that multiply bfloat16, where the CPU does.
struct Bfloat16Kernels {
  bool (*supported)();
  void (*forward)(CellKind, const ForwardArgs<BFloat16>&);
  void (*backward)(CellKind, const BackwardArgs<BFloat16>&);
  void (*generate)(CellKind, const GenerateArgs<BFloat16>&);
  const NormalizedKernels<BFloat16>* normalized;
};

// Kernels of one instruction set.
struct Kernels {
  const char* name;
  bool (*supported)();
  long (*gates_width)(CellKind, long hidden, size_t real_bytes);  // 0: the cell keeps no gates
  void (*forward_float)(CellKind, const ForwardArgs<float>&);
  void (*forward_double)(CellKind, const ForwardArgs<double>&);
  void (*backward_float)(CellKind, const BackwardArgs<float>&);
  void (*backward_double)(CellKind, const BackwardArgs<double>&);
  void (*quantized)(CellKind, const QuantizedArgs&);
  const RtrlKernels<float>* rtrl_float;
  const RtrlKernels<double>* rtrl_double;
  void (*generate_float)(CellKind, const GenerateArgs<float>&);
  void (*generate_double)(CellKind, const GenerateArgs<double>&);
  // Of layer normalisation and peepholes; how wide a row of what they keep is.
  const NormalizedKernels<float>* normalized_float;
  const NormalizedKernels<double>* normalized_double;
  long (*record_width)(CellKind, long hidden, bool normalized, size_t real_bytes);
  const Bfloat16Kernels* bfloat16 = nullptr;  // null: bfloat16 is converted to float
};

}  // namespace rnn_ext
