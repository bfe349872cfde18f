// Real-time recurrent learning on the CPU: one step, and the gradient of a loss at that step.
#pragma once
#include <tuple>

#include "layer.h"

namespace rnn_ext {

// One layer, float or double, contiguous: weights as in LayerInputs.
struct RtrlLayer {
  std::string cell;
  at::Tensor w_ih, w_hh;
  OptionalTensor b_ih, b_hh;
};

// Zeros of the shape that the influence of the layer's parameters on its state has for `batch`
// sequences; csrc/cpu/rtrl_problem.h says what is where.
at::Tensor rtrl_influence(const RtrlLayer& layer, long batch, bool diagonal);

// (h, c, whether they are finite); where they are, the influence has gone a step too.
// x [B, I], h and c [B, H].
std::tuple<at::Tensor, OptionalTensor, bool> rtrl_step(const RtrlLayer& layer, const at::Tensor& x,
                                                       const at::Tensor& h, const OptionalTensor& c,
                                                       const at::Tensor& influence, bool diagonal);

struct RtrlGradients {
  at::Tensor w_ih, w_hh;
  OptionalTensor b_ih, b_hh;
  bool finite = true;
};

// d_h [B, H] times the influence, summed over the batch.
RtrlGradients rtrl_gradient(const RtrlLayer& layer, const at::Tensor& d_h,
                            const at::Tensor& influence, bool diagonal);

}  // namespace rnn_ext
