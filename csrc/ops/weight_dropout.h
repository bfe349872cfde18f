// DropConnect on a matrix of weights: a differentiable product with a mask of booleans, of a quarter
// of the weights' memory.
#pragma once
#include <ATen/core/Tensor.h>

namespace rnn_ext {

// weight / (1 - p) where `keep` (bool, of the shape of weight), elsewhere 0. On the CPU; float32,
// float64 or bfloat16.
at::Tensor dropped_weight(const at::Tensor& weight, const at::Tensor& keep, double p);

}  // namespace rnn_ext
