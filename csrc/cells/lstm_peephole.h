// LSTM whose gates look at the cell (Gers & Schmidhuber 2000), and whose cell may be normalised on its way out
// (Ba et al. 2016)
//   a = W x + b_x + U h' + b_r                        order i, f, g, o = torch
//   i, f = sigmoid(a + p c')  g = tanh(a)
//   c = f c' + i g            o = sigmoid(a + p c)
//   h = o tanh(s)             s = c, or gain (c - mean(c)) / sqrt(var(c) + eps) + bias
#pragma once
#include "lstm.h"

namespace rnn_ext::RNN_EXT_TARGET {

template <class R>
struct PeepholeLstm {
  using Gates = typename Lstm<R>::Gates;
  struct Peepholes {
    R i, f, o;
  };

  // gates: net inputs in, activations out; returns c
  RNN_EXT_INLINE static R forward(Gates& gates, const Peepholes& p, R c_prev) {
    gates.i = Math<R>::sigmoid(gates.i + p.i * c_prev);
    gates.f = Math<R>::sigmoid(gates.f + p.f * c_prev);
    gates.g = Math<R>::tanh(gates.g);
    const R c = gates.f * c_prev + gates.i * gates.g;
    gates.o = Math<R>::sigmoid(gates.o + p.o * c);
    return c;
  }

  RNN_EXT_INLINE static R output(R o, R s) { return o * Math<R>::tanh(s); }

  // Backward through h = o tanh(s): delta_o = dL/da_o; returns dL/ds.
  RNN_EXT_INLINE static R output_vjp(R o, R s, R dh, R& delta_o) {
    const R tanh_s = Math<R>::tanh(s), dh_o = dh * o;
    delta_o = dh_o * tanh_s * (1 - o);
    return dh_o * (1 - tanh_s * tanh_s);
  }

  // dc = dL/dc through s and from later steps in; delta = dL/da of i, f, g (o is there) and
  // dc_prev = dL/dc' out.
  RNN_EXT_INLINE static void vjp(const Gates& gates, const Peepholes& p, R c_prev, R dc,
                                 Gates& delta, R& dc_prev) {
    dc += p.o * delta.o;
    delta.i = dc * gates.g * gates.i * (1 - gates.i);
    delta.f = dc * c_prev * gates.f * (1 - gates.f);
    delta.g = dc * gates.i * (1 - gates.g * gates.g);
    dc_prev = dc * gates.f + p.i * delta.i + p.f * delta.f;
  }
};

}  // namespace rnn_ext::RNN_EXT_TARGET
