// A layer's forward pass over weights of fewer bits, as plain pointers.
//
// A matrix of `gates` times `units` rows is cut into strips of 16 units of one gate, and strips
// into panels as in panels.h: [panels][groups][blocks][gates][16][per], where a group is the `per`
// products of the sum that share 32 bits. The layout is the same for every instruction set, so
// stored weights can move between machines.
#pragma once
#include "problem.h"

namespace rnn_ext {

constexpr int kStrip = 16;

struct QuantizedMatrix {
  // With scales: two's complement less its sign bit, that is value + 128 in a byte, per = 4.
  // Without: bfloat16, per = 2.
  const void* data;
  const float* scales;  // [panels][blocks][gates][16], one for each row of the matrix
};

struct QuantizedArgs {
  Steps steps;
  Sizes sizes;
  QuantizedMatrix ih, hh, second;  // second: the projection, or reset-before GRU's U_n
  const float *b_ih, *b_hh;        // [G*H] or null
  bool projected;
  const float* x;   // [N, I]
  const float* h0;  // [B, P]
  float* out;       // [N, P]
  float* c;         // LSTM: [B, H], c_0 on entry, c_n afterwards
  int threads;      // they share the hidden units
  bool vnni;        // the CPU multiplies bytes (AVX512_VNNI)
};

}  // namespace rnn_ext
