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

// Steps that the exact influence has not taken: what csrc/cpu/rtrl_problem.h keeps of them, the first
// that counts of each sequence (int64 [B]), and how many there are.
struct RtrlPending {
  at::Tensor steps, start;
  long count;
};

// The influence of the layer's parameters on its state for `batch` sequences, zero, and room for
// pending steps. Diagonal (SnAp-1) it has none, and below `pending` is then none.
std::tuple<at::Tensor, OptionalTensor> rtrl_influence(const RtrlLayer& layer, long batch,
                                                      bool diagonal);

enum class RtrlStatus { kDone, kUnsuitable, kInputNotFinite, kNotFinite };

// A step of every stream: h and c [B, H] and what is carried go on, in place, from zero where `reset`
// (bool [B]) is true. x [B, I]. Returns kDone and a copy of h; there is then one more pending step.
// Nothing has changed where x is kUnsuitable, as `reset` may be, or kInputNotFinite, and nothing but
// what was reset where the new state is kNotFinite.
std::tuple<RtrlStatus, OptionalTensor> rtrl_step(const RtrlLayer& layer, const at::Tensor& x,
                                                 const OptionalTensor& reset, const at::Tensor& h,
                                                 const OptionalTensor& c,
                                                 const at::Tensor& influence,
                                                 const std::optional<RtrlPending>& pending);

// The influence takes the pending steps; there are then none. To be called when there are
// kPendingSteps of them.
void rtrl_advance(const RtrlLayer& layer, const at::Tensor& influence, const RtrlPending& pending);

// Adds d_h [B, H] times the influence, summed over the batch, to the gradients of those weights that
// want one; not where d_h is kUnsuitable or the product is kNotFinite.
RtrlStatus rtrl_accumulate(const RtrlLayer& layer, const at::Tensor& d_h,
                           const at::Tensor& influence, const std::optional<RtrlPending>& pending);

}  // namespace rnn_ext
