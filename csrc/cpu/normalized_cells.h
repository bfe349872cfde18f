// The cells of normalized_forward.h and normalized_backward.h: what happens to one row of one step
// once its recurrent products are complete. A net input is a + gain u: a comes from the input, u
// from the state, and gain is 1 where nothing is normalised.
#pragma once
#include "../cells/elman.h"
#include "../cells/gru.h"
#include "../cells/lstm_peephole.h"
#include "layer_norm.h"

namespace rnn_ext::RNN_EXT_TARGET {

// Weights in the columns of the gates.
template <class value>
struct GateWeights {
  using real = Real<value>;
  GateColumns columns;
  long hidden;
  bool normalized;
  real *gain_ih, *gain_hh, *bias;  // [width]; bias: b_ih + b_hh, of the reset-after GRU's n b_ih
  real* hidden_bias;               // [H]: reset-after GRU's b_hn
  real *gain_cell, *bias_cell;     // [H]
  real* peephole;                  // [3 * H]

  RNN_EXT_INLINE long column(int gate) const {  // of a gate's first unit
    const long first = gate * hidden;
    return columns.groups == 2 && first >= columns.count[0]
               ? columns.at[1] + first - columns.count[0]
               : first;
  }
};

template <class value>
struct ForwardRow {
  using real = Real<value>;
  real* gates;    // a on entry, activations afterwards
  const real* u;  // as `gates`
  const value* h_prev;
  const real* c_prev;
  value *h, *middle;
  real* c;
  Moments<real>* cell;  // of c; {0, 1} where it is not normalised
};

template <class value>
struct BackwardRow {
  using real = Real<value>;
  const real *gates, *u;
  const value* h_prev;
  const real *c_prev, *c;
  Moments<real> cell;
  const value* d_out;   // or null
  const real* d_c;      // or null
  real* carry;          // dL/dh from later steps in; what does not pass through U out
  real* dc;             // the same of c
  real* delta;          // as `gates`: dL/da
  real* extra;          // [H]: GRU, dL/d(u gain) of n; LSTM, dL/ds (lstm_peephole.h)
  const real* d_reset;  // reset-before GRU: dL/d(r h')
};

template <class value>
RNN_EXT_INLINE Vec<value> upstream(const BackwardRow<value>& row, long u, int n) {
  const Vec<value> dh = load(row.carry + u, n);
  return row.d_out ? dh + load(row.d_out + u, n) : dh;
}

template <class value, class Activation>
struct NormalizedElman {
  using V = Vec<value>;
  using real = Real<value>;
  using Cell = Elman<V, Activation>;
  static constexpr int gates = 1, phases = 1;
  static constexpr bool has_cell_state = false, split_bias = false, has_extra = false;

  template <int phase>
  static void forward(const GateWeights<value>& w, const ForwardRow<value>& row) {
    for_registers<real>(w.hidden, [&](long u, int n) {
      const V a = load(row.gates + u, n) + load(w.gain_hh + u, n) * load(row.u + u, n);
      const V h = Cell::forward(a);
      store(row.gates + u, h, n);
      store(row.h + u, h, n);
    });
  }
  template <int phase>
  static void backward(const GateWeights<value>& w, const BackwardRow<value>& row) {
    for_registers<real>(w.hidden, [&](long u, int n) {
      store(row.delta + u, Cell::vjp(load(row.gates + u, n), upstream(row, u, n)), n);
      store(row.carry + u, V{}, n);
    });
  }
};

template <class value>
struct NormalizedLstm {
  using V = Vec<value>;
  using real = Real<value>;
  using Cell = PeepholeLstm<V>;
  using Gates = typename Cell::Gates;
  static constexpr int gates = 4, phases = 1;
  static constexpr bool has_cell_state = true, split_bias = false, has_extra = true;

  RNN_EXT_INLINE static typename Cell::Peepholes peepholes(const GateWeights<value>& w, long u,
                                                           int n) {
    const real* p = w.peephole + u;
    return {load(p, n), load(p + w.hidden, n), load(p + 2 * w.hidden, n)};
  }

  template <int phase>
  static void forward(const GateWeights<value>& w, const ForwardRow<value>& row) {
    const long hidden = w.hidden;
    for_registers<real>(hidden, [&](long u, int n) {
      real* g = row.gates + u;
      const auto net = [&](int gate) {
        const long at = gate * hidden;
        return load(g + at, n) + load(w.gain_hh + at + u, n) * load(row.u + at + u, n);
      };
      Gates gates{net(0), net(1), net(2), net(3)};
      store(row.c + u, Cell::forward(gates, peepholes(w, u, n), load(row.c_prev + u, n)), n);
      store(g, gates.i, n);
      store(g + hidden, gates.f, n);
      store(g + 2 * hidden, gates.g, n);
      store(g + 3 * hidden, gates.o, n);
    });
    *row.cell = w.normalized ? moments(row.c, hidden) : Moments<real>{0, 1};
    for_registers<real>(hidden, [&](long u, int n) {
      const V s = shown_cell(w, row.c, *row.cell, u, n);
      store(row.h + u, Cell::output(load(row.gates + 3 * hidden + u, n), s), n);
    });
  }

  template <int phase>
  static void backward(const GateWeights<value>& w, const BackwardRow<value>& row) {
    const long hidden = w.hidden;
    const real* o = row.gates + 3 * hidden;
    real* delta_o = row.delta + 3 * hidden;
    for_registers<real>(hidden, [&](long u, int n) {
      const V s = shown_cell(w, row.c, row.cell, u, n);
      V d;
      store(row.extra + u, Cell::output_vjp(load(o + u, n), s, upstream(row, u, n), d), n);
      store(delta_o + u, d, n);
      store(row.carry + u, V{}, n);
    });
    const auto d_hat = [&](long u, int n) {
      return load(row.extra + u, n) * load(w.gain_cell + u, n);
    };
    const auto hat = [&](long u, int n) {
      return (load(row.c + u, n) - row.cell.mean) * row.cell.scale;
    };
    real mean = 0, along = 0;
    if (w.normalized) {
      mean = sum_of<real>(hidden, d_hat) / hidden;
      along = sum_of<real>(hidden, [&](long u, int n) { return d_hat(u, n) * hat(u, n); }) / hidden;
    }
    for_registers<real>(hidden, [&](long u, int n) {
      V dc = load(row.dc + u, n) + (d_hat(u, n) - mean - hat(u, n) * along) * row.cell.scale;
      if (row.d_c) dc += load(row.d_c + u, n);
      const real* g = row.gates + u;
      const Gates gates{load(g, n), load(g + hidden, n), load(g + 2 * hidden, n), V{}};
      real* d = row.delta + u;
      Gates delta;
      delta.o = load(delta_o + u, n);
      V dc_prev;
      Cell::vjp(gates, peepholes(w, u, n), load(row.c_prev + u, n), dc, delta, dc_prev);
      store(d, delta.i, n);
      store(d + hidden, delta.f, n);
      store(d + 2 * hidden, delta.g, n);
      store(row.dc + u, dc_prev, n);
    });
  }

 private:
  RNN_EXT_INLINE static V shown_cell(const GateWeights<value>& w, const real* c,
                                     const Moments<real>& m, long u, int n) {
    return (load(c + u, n) - m.mean) * m.scale * load(w.gain_cell + u, n) +
           load(w.bias_cell + u, n);
  }
};

template <class value>
struct NormalizedGru {
  using V = Vec<value>;
  using real = Real<value>;
  using Cell = GruResetAfter<V>;
  using Gates = typename Cell::Gates;
  static constexpr int gates = 3, phases = 1;
  static constexpr bool has_cell_state = false, split_bias = true, has_extra = true;

  RNN_EXT_INLINE static V hidden_n(const GateWeights<value>& w, const real* u_n, long u, int n) {
    return load(w.gain_hh + w.column(2) + u, n) * load(u_n + u, n) + load(w.hidden_bias + u, n);
  }

  template <int phase>
  static void forward(const GateWeights<value>& w, const ForwardRow<value>& row) {
    const long z = w.hidden, c = w.column(2);
    for_registers<real>(w.hidden, [&](long u, int n) {
      real* g = row.gates + u;
      Gates gates{load(g, n) + load(w.gain_hh + u, n) * load(row.u + u, n),
                  load(g + z, n) + load(w.gain_hh + z + u, n) * load(row.u + z + u, n),
                  load(g + c, n)};
      const V q = hidden_n(w, row.u + c, u, n);
      store(row.h + u, Cell::forward(gates, q, load(row.h_prev + u, n)), n);
      store(g, gates.r, n);
      store(g + z, gates.z, n);
      store(g + c, gates.n, n);
    });
  }

  template <int phase>
  static void backward(const GateWeights<value>& w, const BackwardRow<value>& row) {
    const long z = w.hidden, c = w.column(2);
    for_registers<real>(w.hidden, [&](long u, int n) {
      const real* g = row.gates + u;
      const Gates gates{load(g, n), load(g + z, n), load(g + c, n)};
      Gates delta;
      V of_hidden, carry;
      Cell::vjp(gates, hidden_n(w, row.u + c, u, n), load(row.h_prev + u, n), upstream(row, u, n),
                delta, of_hidden, carry);
      real* d = row.delta + u;
      store(d, delta.r, n);
      store(d + z, delta.z, n);
      store(d + c, delta.n, n);
      store(row.extra + u, of_hidden, n);
      store(row.carry + u, carry, n);
    });
  }
};

template <class value>
struct NormalizedGruResetBefore {
  using V = Vec<value>;
  using real = Real<value>;
  using Cell = GruResetBefore<V>;
  static constexpr int gates = 3, phases = 2;
  static constexpr bool has_cell_state = false, split_bias = false, has_extra = false;

  template <int phase>
  static void forward(const GateWeights<value>& w, const ForwardRow<value>& row) {
    const long z = w.hidden, c = w.column(2);
    for_registers<real>(w.hidden, [&](long u, int n) {
      real* g = row.gates + u;
      const V h_prev = load(row.h_prev + u, n);
      const auto net = [&](long at) {
        return load(g + at, n) + load(w.gain_hh + at + u, n) * load(row.u + at + u, n);
      };
      if constexpr (phase == 0) {
        V r = net(0), update = net(z);
        store(row.middle + u, Cell::reset(r, update, h_prev), n);
        store(g, r, n);
        store(g + z, update, n);
      } else {
        V candidate = net(c);
        store(row.h + u, Cell::forward(candidate, load(g + z, n), h_prev), n);
        store(g + c, candidate, n);
      }
    });
  }

  template <int phase>
  static void backward(const GateWeights<value>& w, const BackwardRow<value>& row) {
    const long z = w.hidden, c = w.column(2);
    for_registers<real>(w.hidden, [&](long u, int n) {
      const real* g = row.gates + u;
      real* d = row.delta + u;
      const V h_prev = load(row.h_prev + u, n);
      if constexpr (phase == 0) {
        V delta_z, delta_n, carry;
        Cell::interpolate_vjp(load(g + z, n), load(g + c, n), h_prev, upstream(row, u, n), delta_z,
                              delta_n, carry);
        store(d + z, delta_z, n);
        store(d + c, delta_n, n);
        store(row.carry + u, carry, n);
      } else {
        V carry = load(row.carry + u, n);
        store(d, Cell::reset_vjp(load(g, n), h_prev, load(row.d_reset + u, n), carry), n);
        store(row.carry + u, carry, n);
      }
    });
  }
};

}  // namespace rnn_ext::RNN_EXT_TARGET
