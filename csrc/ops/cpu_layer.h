// A layer on the CPU: allocation, choice of dtype, instruction set and plan.
#pragma once
#include <span>

#include "call.h"

namespace rnn_ext {

// How a pass over a part of a sequence, or one whose gradients are held within limits, differs from
// the plain one.
struct PassOptions {
  bool keep_gates = true;  // forward that saves: gates and middle, too, not the states alone
  long planned_steps = 0,
       planned_batch = 0;   // of the whole call, whose plan this pass is to follow
  Clip clip = Clip::kNone;  // of dL/dh_t, problem.h
  double limit = 0;
  at::Tensor dh_norms;  // [N] as wide as what is computed with: receives the norms of dL/dh_t
  // For w_ih, w_hh, b_ih, b_hh, w_hr: what their gradients are added to, in place, as wide as what
  // is computed with. All gradients are then returned unrounded.
  std::vector<OptionalTensor> sums;
};

// One direction, or both: side by side where one alone would leave threads idle.
std::vector<LayerOutputs> cpu_layer_forward(const Call& call,
                                            std::span<const LayerInputs> directions, bool save,
                                            const PassOptions& options = {});
std::vector<InputGradients> cpu_layer_backward(const Call& call,
                                               std::span<const LayerInputs> directions,
                                               std::span<const Saved> saved,
                                               std::span<const LayerGradients> d,
                                               std::span<const Wanted> wanted,
                                               const PassOptions& options = {});

}  // namespace rnn_ext
