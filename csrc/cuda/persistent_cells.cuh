// The cells of csrc/cells as the persistent kernels drive them: one unit of one row of the batch,
// in one step.
//
//   kGates                rows of U of a unit, and numbers of its delta multiplied with U^T
//   kDeltaBlocks          numbers of its delta in all; the first kGates are the recurrent ones, of
//                         recurrent_gate(b)
//   forward(net, product, hidden_bias, state, middle)
//                         net: W x and the biases in, the net inputs out; product: U h'
//   backward(kept, dh, carry, dc, delta)
//                         dh = dL/dh in; carry out: dL/dh' that does not flow through U; dc: dL/dc
//                         in, dL/dc' out
#pragma once
#include "../cells/elman.h"
#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "math.h"
#include "persistent_layout.h"
#include "platform.h"

namespace rnn_ext::cuda {

struct State {
  float h, c;
};

// What the backward pass of a step reads of the forward pass.
template <int gates>
struct Kept {
  float net[gates];
  float middle, h, h_prev, c, c_prev;
};

template <class Activation>
struct PersistentElman {
  static constexpr int kGates = 1, kDeltaBlocks = 1;
  static constexpr bool kHasCells = false, kKeepsNet = false, kHasMiddle = false,
                        kReadsPrevious = false;
  RNN_EXT_DEVICE static constexpr int recurrent_gate(int d) { return d; }

  RNN_EXT_DEVICE static void forward(float (&net)[1], const float (&product)[1],
                                     float /*hidden_bias*/, State& state, float& /*middle*/) {
    state.h = Elman<float, Activation>::forward(net[0] + product[0]);
  }
  RNN_EXT_DEVICE static void backward(const Kept<1>& kept, float dh, float& carry, float& /*dc*/,
                                      float (&delta)[1]) {
    delta[0] = Elman<float, Activation>::vjp(kept.h, dh);
    carry = 0;
  }
};

struct PersistentLstm {
  static constexpr int kGates = 4, kDeltaBlocks = 4;
  static constexpr bool kHasCells = true, kKeepsNet = true, kHasMiddle = false,
                        kReadsPrevious = false;
  RNN_EXT_DEVICE static constexpr int recurrent_gate(int d) { return d; }
  using Cell = Lstm<float>;

  RNN_EXT_DEVICE static void forward(float (&net)[4], const float (&product)[4],
                                     float /*hidden_bias*/, State& state, float& /*middle*/) {
    RNN_EXT_UNROLL
    for (int g = 0; g < 4; g++) net[g] += product[g];
    Cell::Gates gates{net[0], net[1], net[2], net[3]};
    float c, h;
    Cell::forward(gates, state.c, c, h);
    state = {h, c};
  }
  RNN_EXT_DEVICE static void backward(const Kept<4>& kept, float dh, float& carry, float& dc,
                                      float (&delta)[4]) {
    using M = Math<float>;
    const Cell::Gates gates{M::sigmoid(kept.net[0]), M::sigmoid(kept.net[1]), M::tanh(kept.net[2]),
                            M::sigmoid(kept.net[3])};
    Cell::Gates d;
    float dc_prev;
    Cell::vjp(gates, kept.c_prev, kept.c, dh, dc, d, dc_prev);
    delta[0] = d.i, delta[1] = d.f, delta[2] = d.g, delta[3] = d.o;
    dc = dc_prev;
    carry = 0;
  }
};

// Reset after the product. middle = U_n h' + b_rn. delta: n of the hidden side, then r, z, n of the
// input's side.
struct PersistentGru {
  static constexpr int kGates = 3, kDeltaBlocks = 4;
  static constexpr bool kHasCells = false, kKeepsNet = true, kHasMiddle = true,
                        kReadsPrevious = true;
  RNN_EXT_DEVICE static constexpr int recurrent_gate(int d) { return (d + 2) % 3; }
  using Cell = GruResetAfter<float>;

  RNN_EXT_DEVICE static void forward(float (&net)[3], const float (&product)[3], float hidden_bias,
                                     State& state, float& middle) {
    net[0] += product[0];
    net[1] += product[1];
    middle = product[2] + hidden_bias;
    Cell::Gates gates{net[0], net[1], net[2]};
    state.h = Cell::forward(gates, middle, state.h);
  }
  RNN_EXT_DEVICE static void backward(const Kept<3>& kept, float dh, float& carry, float& /*dc*/,
                                      float (&delta)[4]) {
    using M = Math<float>;
    const float r = M::sigmoid(kept.net[0]);
    const Cell::Gates gates{r, M::sigmoid(kept.net[1]), M::tanh(kept.net[2] + r * kept.middle)};
    Cell::Gates d;
    Cell::vjp(gates, kept.middle, kept.h_prev, dh, d, delta[0], carry);
    delta[1] = d.r, delta[2] = d.z, delta[3] = d.n;
  }
};

// Reset before the product: its steps have kernels of their own (persistent_reset_before_*.cuh).
struct PersistentGruResetBefore {
  static constexpr int kGates = 3;
};

}  // namespace rnn_ext::cuda
