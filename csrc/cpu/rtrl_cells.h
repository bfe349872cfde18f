// The cells linearized at one step, for RTRL: the slopes of h and c in the net inputs, and from
// them the rows of D = dh/dh' (LSTM: of the two matrices that multiply dh'/dtheta).
#pragma once
#include "cell_steps.h"

namespace rnn_ext::RNN_EXT_TARGET {

// Of one sample, each [H] in room for `padded`.
template <class real>
struct Slopes {
  real* h[kMaxNets];  // dh_j/da_j, by way of c too
  real* c[kMaxNets];  // LSTM: dc_j/da_j
  real* keep;         // LSTM: dc_j/dc'_j; GRU: z, the part of dh_j/dh'_j past the net inputs
  real* pass;         // LSTM: dh_j/dc_j

  Slopes(real* base, long padded) {
    for (int k = 0; k < kMaxNets; k++) {
      h[k] = base + k * padded;
      c[k] = base + (kMaxNets + k) * padded;
    }
    keep = base + 2 * kMaxNets * padded;
    pass = keep + padded;
  }
};

// Units [unit, unit + lanes) of sample b.
template <class real>
struct UnitsView {
  const RtrlArgs<real>& args;
  long b, unit, gates;
  int lanes;
  RNN_EXT_INLINE Vec<real> input(int gate) const { return of(args.input_gates, gate); }
  RNN_EXT_INLINE Vec<real> recurrent(int gate) const { return of(args.hidden_gates, gate); }
  RNN_EXT_INLINE Vec<real> sum(int gate) const { return input(gate) + recurrent(gate); }
  RNN_EXT_INLINE Vec<real> previous(const real* state) const {
    return load(state + b * args.hidden + unit, lanes);
  }
  RNN_EXT_INLINE void put(real* state, Vec<real> v) const {
    store(state + b * args.hidden + unit, v, lanes);
  }
  RNN_EXT_INLINE void put_slope(real* slope, Vec<real> v) const { store(slope + unit, v, lanes); }

 private:
  RNN_EXT_INLINE Vec<real> of(const real* all, int gate) const {
    return load(all + (b * gates + gate) * args.hidden + unit, lanes);
  }
};

// out (+)= factor times a row of weights
template <class real>
RNN_EXT_INLINE void scaled_row(real* __restrict out, real factor, const real* __restrict row,
                               long n, bool add) {
  if (add)
    for (long k = 0; k < n; k++) out[k] += factor * row[k];
  else
    for (long k = 0; k < n; k++) out[k] = factor * row[k];
}

// Each cell: gates of w_hh, states, the gates whose rows make up D (`through`) and, of the LSTM,
// the matrix of c (`through_c`): {net, gate} pairs.
struct Through {
  int net, gate;
};

template <class real, class Activation>
struct LinearElman {
  using V = Vec<real>;
  static constexpr int gates = 1, states = 1;
  static constexpr bool keeps = false, spreads = false;
  static constexpr Through through[] = {{0, 0}};

  RNN_EXT_INLINE static void linearize(const UnitsView<real>& u, const Slopes<real>& s) {
    const V h = Elman<V, Activation>::forward(u.sum(0));
    u.put(u.args.h, h);
    u.put_slope(s.h[0], Elman<V, Activation>::vjp(h, 1 - V{}));
  }
};

template <class real>
struct LinearLstm {
  using V = Vec<real>;
  static constexpr int gates = 4, states = 2;
  static constexpr bool keeps = false, spreads = false;
  static constexpr Through through[] = {{3, 3}};
  static constexpr Through through_c[] = {{0, 0}, {1, 1}, {2, 2}};

  RNN_EXT_INLINE static void linearize(const UnitsView<real>& u, const Slopes<real>& s) {
    using Cell = Lstm<V>;
    const V c_prev = u.previous(u.args.c_prev), zero{}, one = 1 - zero;
    typename Cell::Gates gates{u.sum(0), u.sum(1), u.sum(2), u.sum(3)}, d_h, d_c;
    V c, h, d_c_prev;
    Cell::forward(gates, c_prev, c, h);
    u.put(u.args.h, h);
    u.put(u.args.c, c);
    Cell::vjp(gates, c_prev, c, one, zero, d_h, d_c_prev);
    Cell::vjp(gates, c_prev, c, zero, one, d_c, d_c_prev);
    const V of_h[] = {d_h.i, d_h.f, d_h.g, d_h.o}, of_c[] = {d_c.i, d_c.f, d_c.g, d_c.o};
    for (int k = 0; k < 4; k++) {
      u.put_slope(s.h[k], of_h[k]);
      u.put_slope(s.c[k], of_c[k]);
    }
    u.put_slope(s.keep, d_c_prev);
    const V tanh_c = Math<V>::tanh(c);
    u.put_slope(s.pass, gates.o * (1 - tanh_c * tanh_c));
  }
};

template <class real>
struct LinearGru {
  using V = Vec<real>;
  static constexpr int gates = 3, states = 1;
  static constexpr bool keeps = true, spreads = false;
  static constexpr Through through[] = {{0, 0}, {1, 1}, {3, 2}};

  RNN_EXT_INLINE static void linearize(const UnitsView<real>& u, const Slopes<real>& s) {
    using Cell = GruResetAfter<V>;
    const V h_prev = u.previous(u.args.h_prev), hidden_n = u.recurrent(2);
    typename Cell::Gates gates{u.sum(0), u.sum(1), u.input(2)}, d;
    u.put(u.args.h, Cell::forward(gates, hidden_n, h_prev));
    V d_hidden_n, carry;
    Cell::vjp(gates, hidden_n, h_prev, 1 - V{}, d, d_hidden_n, carry);
    u.put_slope(s.h[0], d.r);
    u.put_slope(s.h[1], d.z);
    u.put_slope(s.h[2], d.n);
    u.put_slope(s.h[3], d_hidden_n);
    u.put_slope(s.keep, carry);
  }
};

// The gate r of a unit acts on every h_i, by way of U_n (r h'): dh_i/da^r_j = s^n_i U_n,ij s^r_j,
// where slope r is d(r h')_j/da^r_j.
template <class real>
struct LinearGruResetBefore {
  using V = Vec<real>;
  static constexpr int gates = 3, states = 1;
  static constexpr bool keeps = true, spreads = true;
  static constexpr Through through[] = {{1, 1}};

  RNN_EXT_INLINE static void linearize(const UnitsView<real>& u, const Slopes<real>& s) {
    using Cell = GruResetBefore<V>;
    const V h_prev = u.previous(u.args.h_prev);
    V r = u.sum(0), z = u.sum(1), n = u.sum(2), d_z, d_n, carry, unused{};
    Cell::reset(r, z, h_prev);
    u.put(u.args.h, Cell::forward(n, z, h_prev));
    Cell::interpolate_vjp(z, n, h_prev, 1 - V{}, d_z, d_n, carry);
    u.put_slope(s.h[0], Cell::reset_vjp(r, h_prev, 1 - V{}, unused));
    u.put_slope(s.h[1], d_z);
    u.put_slope(s.h[2], d_n);
    u.put_slope(s.keep, carry);
  }
};

}  // namespace rnn_ext::RNN_EXT_TARGET
