// LSTM (Hochreiter & Schmidhuber 1997, forget gate of Gers et al. 2000)
//   a = W x + b_x + U h' + b_r                        order i, f, g, o = torch
//   i, f, o = sigmoid(a)      g = tanh(a)
//   c = f c' + i g            m = o tanh(c)           h = m, or W_hr m with a projection (Sak et al. 2014)
#pragma once
#include "target.h"

namespace rnn_ext::RNN_EXT_TARGET {

template <class R>
struct Lstm {
  struct Gates {
    R i, f, g, o;
  };

  // gates: net inputs in, activations out
  RNN_EXT_INLINE static void forward(Gates& gates, R c_prev, R& c, R& m) {
    gates.i = Math<R>::sigmoid(gates.i);
    gates.f = Math<R>::sigmoid(gates.f);
    gates.g = Math<R>::tanh(gates.g);
    gates.o = Math<R>::sigmoid(gates.o);
    c = cell(gates, c_prev);
    m = gates.o * Math<R>::tanh(c);
  }

  // of the activations
  RNN_EXT_INLINE static R cell(const Gates& gates, R c_prev) {
    return gates.f * c_prev + gates.i * gates.g;
  }

  // dm = dL/dm and dc = dL/dc from later steps in; delta = dL/da and dc_prev = dL/dc' out
  RNN_EXT_INLINE static void vjp(const Gates& gates, R c_prev, R c, R dm, R dc, Gates& delta,
                                 R& dc_prev) {
    const R tanh_c = Math<R>::tanh(c);
    const R dm_o = dm * gates.o;
    dc += dm_o * (1 - tanh_c * tanh_c);
    delta.i = dc * gates.g * gates.i * (1 - gates.i);
    delta.f = dc * c_prev * gates.f * (1 - gates.f);
    delta.g = dc * gates.i * (1 - gates.g * gates.g);
    delta.o = dm_o * tanh_c * (1 - gates.o);
    dc_prev = dc * gates.f;
  }
};

}  // namespace rnn_ext::RNN_EXT_TARGET
