// What happens to a register of units between two matrix products: the cells of csrc/cells, bound
// to the memory of one time step. The time loops (forward.h, backward.h) are written once and take
// one of these classes.
//
// A step has one or two phases. Each is a product of an operand with recurrent weights, followed by
// a finish on the registers that hold the result (d: delta):
//                     forward 0              forward 1          backward 0            backward 1
//   Elman, LSTM, GRU  h' U -> gates, h                          d_next U -> delta
//   projected LSTM    h' U -> gates, m       m W_hr -> h        d_next U -> dh        dh W_hr -> d
//   reset-before GRU  h' U_rz -> r, z, r h'  (r h') U_n -> n,h  d_next U_rz -> z, n   d_n U_n -> r
#pragma once
#include "panels.h"
// The cells, in this target's namespace.
#include "../cells/elman.h"
#include "../cells/gru.h"
#include "../cells/lstm.h"

namespace rnn_ext::RNN_EXT_TARGET {

// Row 0 of one step. Rows of `gates` are [blocks][gates][kLanes]; those of h and d_out have
// `output` columns, all others `hidden` or what is said.
template <class value>
struct ForwardView {
  using real = Real<value>;
  long hidden, output, gates_width;
  real* gates;              // holds W x on entry; the activations when saving
  const real* bias;         // one row of gates
  const real* hidden_bias;  // reset-after GRU: b_rn, [blocks][kLanes]
  const value* h_prev;
  const real* c_prev;
  value *h, *middle;
  real* c;
  Hold hold_h, hold_c;  // zoneout
};

template <class value>
struct BackwardView {
  using real = Real<value>;
  long hidden, output, gates_width, delta_width;
  const value *h_prev, *h, *middle;
  const real *gates, *c_prev, *c;
  const value* d_out;  // or null
  const real* d_c;     // or null
  value* delta;        // [delta_width]: dL/d(net input), gate after gate, unit stride
  value* dh;           // projected LSTM: dL/dh, [output]
  real* carry;         // dL/dh' that does not go through the product; dL/dh_n where a sequence ends
  bool add_carry;
  real* dc;
  Hold hold_h, hold_c;  // zoneout
};

// What the recurrent weights were multiplied with.
enum class Operand { kNone, kPreviousState, kMiddle };

// Columns [delta_column, + count) of delta are the gradient at rows [weight_row, + count) of W x
// (`input`) and of U times an operand (`recurrent`).
constexpr int kMaxSegments = 3;
struct Segment {
  long delta_column, weight_row, count;
  bool input;
  Operand recurrent;
};

template <class value>
RNN_EXT_INLINE Vec<value> upstream(const BackwardView<value>& v, long row, long unit, int lanes,
                                   Vec<value> product) {
  const long at = row * v.output + unit;
  // In this order a sequence may be cut anywhere: what its later part hands on is the first sum.
  if (v.add_carry) product += load(v.carry + at, lanes);
  if (v.d_out) product += load(v.d_out + at, lanes);
  return product;
}

template <class value, class Activation>
struct ElmanSteps {
  using V = Vec<value>;
  using Cell = Elman<V, Activation>;
  using Gates = PanelShape<1, 2>;  // panels of W
  using First = Gates;             // panels of the first recurrent product
  static constexpr int phases = 1, gates = 1, deltas = 1, recurrent_gates = 1;
  static constexpr bool carries = false, keeps_gates = false, has_cell_state = false,
                        split_bias = false;
  static constexpr bool keeps_middle = false;
  static int segments(long hidden, Segment* s) {
    return s[0] = {0, 0, hidden, true, Operand::kPreviousState}, 1;
  }

  template <int phase, bool save>
  RNN_EXT_INLINE static void forward(const ForwardView<value>& v, long row, long block, int lanes,
                                     const V* product) {
    const long unit = block * kLanes<value>;
    const V a = product[0] + load(v.gates + row * v.gates_width + unit) + load(v.bias + unit);
    store(v.h + row * v.hidden + unit, Cell::forward(a), lanes);
  }

  template <int phase>
  RNN_EXT_INLINE static void backward(const BackwardView<value>& v, long row, long block, int lanes,
                                      V product) {
    const long unit = block * kLanes<value>;
    const V h = load(v.h + row * v.hidden + unit, lanes);
    const V dh = upstream(v, row, unit, lanes, product);
    store(v.delta + row * v.delta_width + unit, Cell::vjp(h, dh), lanes);
  }
};

template <class value, bool projected>
struct LstmSteps {
  using real = Real<value>;
  using V = Vec<value>;
  using Cell = Lstm<V>;
  using Gates = PanelShape<4, 1>;
  using First = Gates;
  static constexpr int phases = projected ? 2 : 1, gates = 4, deltas = 4, recurrent_gates = 4;
  static constexpr bool carries = false, keeps_gates = true, has_cell_state = true,
                        split_bias = false;
  static constexpr bool keeps_middle = projected;
  static int segments(long hidden, Segment* s) {
    return s[0] = {0, 0, 4 * hidden, true, Operand::kPreviousState}, 1;
  }

  template <int phase, bool save>
  RNN_EXT_INLINE static void forward(const ForwardView<value>& v, long row, long block, int lanes,
                                     const V* product) {
    constexpr int w = kLanes<value>;
    const long unit = block * w;
    if constexpr (phase == 1) {
      store(v.h + row * v.output + unit, product[0], lanes);
      return;
    }
    real* g = v.gates + row * v.gates_width + unit * 4;
    const real* bias = v.bias + unit * 4;
    typename Cell::Gates gates{product[0] + load(g) + load(bias),
                               product[1] + load(g + w) + load(bias + w),
                               product[2] + load(g + 2 * w) + load(bias + 2 * w),
                               product[3] + load(g + 3 * w) + load(bias + 3 * w)};
    const long at = row * v.hidden + unit;
    V c, m;
    Cell::forward(gates, load(v.c_prev + at, lanes), c, m);
    store(v.c + at, c, lanes);
    store((projected ? v.middle : v.h) + at, m, lanes);
    if constexpr (save) {
      store(g, gates.i);
      store(g + w, gates.f);
      store(g + 2 * w, gates.g);
      store(g + 3 * w, gates.o);
    }
  }

  // `made`: the state that the gates made is not v.c, of which zoneout held some.
  template <int phase, bool made = false>
  RNN_EXT_INLINE static void backward(const BackwardView<value>& v, long row, long block, int lanes,
                                      V product) {
    constexpr int w = kLanes<value>;
    const long unit = block * w;
    if constexpr (projected && phase == 0) {
      store(v.dh + row * v.output + unit, upstream(v, row, unit, lanes, product), lanes);
      return;
    }
    const V dm = projected ? product : upstream(v, row, unit, lanes, product);
    const real* g = v.gates + row * v.gates_width + unit * 4;
    const typename Cell::Gates gates{load(g), load(g + w), load(g + 2 * w), load(g + 3 * w)};
    const long at = row * v.hidden + unit;
    V dc = load(v.dc + at, lanes), dc_prev;
    if (v.d_c) dc += load(v.d_c + at, lanes);
    typename Cell::Gates delta;
    const V c_prev = load(v.c_prev + at, lanes);
    const V c = made ? Cell::cell(gates, c_prev) : load(v.c + at, lanes);
    Cell::vjp(gates, c_prev, c, dm, dc, delta, dc_prev);
    store(v.dc + at, dc_prev, lanes);
    value* d = v.delta + row * v.delta_width + unit;
    store(d, delta.i, lanes);
    store(d + v.hidden, delta.f, lanes);
    store(d + 2 * v.hidden, delta.g, lanes);
    store(d + 3 * v.hidden, delta.o, lanes);
  }
};

// delta: r, z, n of the hidden side, n of the input's side
template <class value>
struct GruSteps {
  using real = Real<value>;
  using V = Vec<value>;
  using Cell = GruResetAfter<V>;
  using Gates = PanelShape<3, 1>;
  using First = Gates;
  static constexpr int phases = 1, gates = 3, deltas = 4, recurrent_gates = 3;
  static constexpr bool carries = true, keeps_gates = true, has_cell_state = false,
                        split_bias = true;
  static constexpr bool keeps_middle = true;
  static int segments(long hidden, Segment* s) {
    s[0] = {0, 0, 2 * hidden, true, Operand::kPreviousState};
    s[1] = {2 * hidden, 2 * hidden, hidden, false, Operand::kPreviousState};
    s[2] = {3 * hidden, 2 * hidden, hidden, true, Operand::kNone};
    return 3;
  }

  template <int phase, bool save>
  RNN_EXT_INLINE static void forward(const ForwardView<value>& v, long row, long block, int lanes,
                                     const V* product) {
    constexpr int w = kLanes<value>;
    const long unit = block * w;
    real* g = v.gates + row * v.gates_width + unit * 3;
    const real* bias = v.bias + unit * 3;
    typename Cell::Gates gates{product[0] + load(g) + load(bias),
                               product[1] + load(g + w) + load(bias + w),
                               load(g + 2 * w) + load(bias + 2 * w)};
    const V hidden_n = product[2] + load(v.hidden_bias + unit);
    const long at = row * v.hidden + unit;
    store(v.h + at, Cell::forward(gates, hidden_n, load(v.h_prev + at, lanes)), lanes);
    if constexpr (save) {
      store(g, gates.r);
      store(g + w, gates.z);
      store(g + 2 * w, gates.n);
      store(v.middle + at, hidden_n, lanes);
    }
  }

  template <int phase>
  RNN_EXT_INLINE static void backward(const BackwardView<value>& v, long row, long block, int lanes,
                                      V product) {
    constexpr int w = kLanes<value>;
    const long unit = block * w, at = row * v.hidden + unit;
    const V dh = upstream(v, row, unit, lanes, product);
    const real* g = v.gates + row * v.gates_width + unit * 3;
    const typename Cell::Gates gates{load(g), load(g + w), load(g + 2 * w)};
    typename Cell::Gates delta;
    V delta_hidden_n, carry;
    Cell::vjp(gates, load(v.middle + at, lanes), load(v.h_prev + at, lanes), dh, delta,
              delta_hidden_n, carry);
    store(v.carry + at, carry, lanes);
    value* d = v.delta + row * v.delta_width + unit;
    store(d, delta.r, lanes);
    store(d + v.hidden, delta.z, lanes);
    store(d + 2 * v.hidden, delta_hidden_n, lanes);
    store(d + 3 * v.hidden, delta.n, lanes);
  }
};

template <class value>
struct GruResetBeforeSteps {
  using real = Real<value>;
  using V = Vec<value>;
  using Cell = GruResetBefore<V>;
  using Gates = PanelShape<3, 1>;
  using First = PanelShape<2, 1>;
  static constexpr int phases = 2, gates = 3, deltas = 3, recurrent_gates = 2;
  static constexpr bool carries = true, keeps_gates = true, has_cell_state = false,
                        split_bias = false;
  static constexpr bool keeps_middle = true;
  static int segments(long hidden, Segment* s) {
    s[0] = {0, 0, 2 * hidden, true, Operand::kPreviousState};
    s[1] = {2 * hidden, 2 * hidden, hidden, true, Operand::kMiddle};
    return 2;
  }

  template <int phase, bool save>
  RNN_EXT_INLINE static void forward(const ForwardView<value>& v, long row, long block, int lanes,
                                     const V* product) {
    constexpr int w = kLanes<value>;
    const long unit = block * w, at = row * v.hidden + unit;
    real* g = v.gates + row * v.gates_width + unit * 3;
    const real* bias = v.bias + unit * 3;
    const V h_prev = load(v.h_prev + at, lanes);
    if constexpr (phase == 0) {
      V r = product[0] + load(g) + load(bias), z = product[1] + load(g + w) + load(bias + w);
      store(v.middle + at, Cell::reset(r, z, h_prev), lanes);
      store(g, r);
      store(g + w, z);
    } else {
      V n = product[0] + load(g + 2 * w) + load(bias + 2 * w);
      store(v.h + at, Cell::forward(n, load(g + w), h_prev), lanes);
      store(g + 2 * w, n);
    }
  }

  template <int phase>
  RNN_EXT_INLINE static void backward(const BackwardView<value>& v, long row, long block, int lanes,
                                      V product) {
    constexpr int w = kLanes<value>;
    const long unit = block * w, at = row * v.hidden + unit;
    const real* g = v.gates + row * v.gates_width + unit * 3;
    const V h_prev = load(v.h_prev + at, lanes);
    value* d = v.delta + row * v.delta_width + unit;
    if constexpr (phase == 0) {
      V delta_z, delta_n, carry;
      Cell::interpolate_vjp(load(g + w), load(g + 2 * w), h_prev,
                            upstream(v, row, unit, lanes, product), delta_z, delta_n, carry);
      store(v.carry + at, carry, lanes);
      store(d + v.hidden, delta_z, lanes);
      store(d + 2 * v.hidden, delta_n, lanes);
    } else {
      V carry = load(v.carry + at, lanes);
      store(d, Cell::reset_vjp(load(g), h_prev, product, carry), lanes);
      store(v.carry + at, carry, lanes);
    }
  }
};

}  // namespace rnn_ext::RNN_EXT_TARGET
