// The functions of csrc/cells for CUDA: R is one number, and what CUDA's mathematical library
// rounds well is not approximated further, since a step waits for memory. Compiled by nvcc and, for
// the emulator, by a host compiler.
#pragma once
#include <cmath>

#ifndef RNN_EXT_TARGET
#define RNN_EXT_TARGET cuda
#endif
#include "../cells/target.h"

namespace rnn_ext::RNN_EXT_TARGET {

template <>
struct Math<float> {
  RNN_EXT_INLINE static float sigmoid(float a) { return 1.0f / (1.0f + ::expf(-a)); }
  RNN_EXT_INLINE static float tanh(float a) { return ::tanhf(a); }
};

template <>
struct Math<double> {
  RNN_EXT_INLINE static double sigmoid(double a) { return 1.0 / (1.0 + ::exp(-a)); }
  RNN_EXT_INLINE static double tanh(double a) { return ::tanh(a); }
};

}  // namespace rnn_ext::RNN_EXT_TARGET
