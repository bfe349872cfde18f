// Gated recurrent unit, h' the previous hidden state, order r, z, n = torch.
//   r, z = sigmoid(W x + b_x + U h' + b_r)
//   h = (1 - z) n + z h'
// reset after the product (torch, cuDNN):       n = tanh(W_n x + b_xn + r (U_n h' + b_rn))
// reset before the product (Cho et al. 2014):   n = tanh(W_n x + b_xn + U_n (r h') + b_rn)
// Cho et al. write h = z' h' + (1 - z') n as here; texts that write (1 - z') h' + z' n have z' = 1 - z.
#pragma once
#include "target.h"

namespace rnn_ext::RNN_EXT_TARGET {

template <class R>
struct Gru {
  struct Gates {
    R r, z, n;
  };

  // What both forms share: the interpolation, and its part of the backward pass.
  RNN_EXT_INLINE static R interpolate(R z, R n, R h_prev) { return n + z * (h_prev - n); }

  // delta_z, delta_n = dL/da of the gates z and n; carry = the part of dL/dh' that flows through z h'
  RNN_EXT_INLINE static void interpolate_vjp(R z, R n, R h_prev, R dh, R& delta_z, R& delta_n,
                                             R& carry) {
    carry = dh * z;
    delta_n = (dh - carry) * (1 - n * n);
    delta_z = carry * (h_prev - n) * (1 - z);
  }
};

template <class R>
struct GruResetAfter : Gru<R> {
  using typename Gru<R>::Gates;

  // gates: net inputs in (n: the input's part alone), activations out; hidden_n = U_n h' + b_rn
  RNN_EXT_INLINE static R forward(Gates& gates, R hidden_n, R h_prev) {
    gates.r = Math<R>::sigmoid(gates.r);
    gates.z = Math<R>::sigmoid(gates.z);
    gates.n = Math<R>::tanh(gates.n + gates.r * hidden_n);
    return Gru<R>::interpolate(gates.z, gates.n, h_prev);
  }

  // delta.n belongs to the input's side, delta_hidden_n = r delta.n to the hidden side
  RNN_EXT_INLINE static void vjp(const Gates& gates, R hidden_n, R h_prev, R dh, Gates& delta,
                                 R& delta_hidden_n, R& carry) {
    Gru<R>::interpolate_vjp(gates.z, gates.n, h_prev, dh, delta.z, delta.n, carry);
    delta_hidden_n = delta.n * gates.r;
    delta.r = delta_hidden_n * hidden_n * (1 - gates.r);
  }
};

template <class R>
struct GruResetBefore : Gru<R> {
  // First phase: the gates r and z, and r h', which the second product needs whole.
  RNN_EXT_INLINE static R reset(R& r, R& z, R h_prev) {
    r = Math<R>::sigmoid(r);
    z = Math<R>::sigmoid(z);
    return r * h_prev;
  }
  // Second phase: n from its net input.
  RNN_EXT_INLINE static R forward(R& n, R z, R h_prev) {
    n = Math<R>::tanh(n);
    return Gru<R>::interpolate(z, n, h_prev);
  }
  // Backward through r h': d_reset = dL/d(r h'); adds to carry, returns delta_r.
  RNN_EXT_INLINE static R reset_vjp(R r, R h_prev, R d_reset, R& carry) {
    carry += d_reset * r;
    return d_reset * h_prev * r * (1 - r);
  }
};

}  // namespace rnn_ext::RNN_EXT_TARGET
