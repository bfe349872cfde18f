// A layer of the recurrent stack: checks, and the choice of the device's kernels.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "../cpu/problem.h"
#include "../cuda/plan.h"

namespace rnn_ext {

using OptionalTensor = std::optional<at::Tensor>;

// What a layer is given; shapes as in rnn_ext/ops.py. With resets, h0 and c0 may have 2 B rows: the
// second half is what a reset puts in the place of the state, instead of zeros.
struct LayerInputs {
  std::string cell;
  at::Tensor input, h0;
  OptionalTensor c0;
  at::Tensor w_ih, w_hh;
  OptionalTensor b_ih, b_hh, w_hr;
  OptionalTensor batch_sizes;
  bool reverse;
  OptionalTensor resets = {};  // bool, laid out like input's rows
  bool parted = false;         // resets are parted_rows (call.h) already
  // Zoneout: what a step holds on to of h and of the LSTM's c, bool and laid out like the states
  // (these units), or on the CPU double without dimensions (so much of each). Both, or of other cells
  // h alone.
  OptionalTensor hold_h = {}, hold_c = {};
};

// What the backward pass reads beside the inputs. For bfloat16 `cells` and `gates` are float, wider
// than what the caller sees, and so are `states` and `middle` where the CPU computes in float alone:
// what is multiplied is not rounded between the passes.
struct Saved {
  at::Tensor
      states;  // every h_t, laid out like output; the output itself where its dtype is the same
  OptionalTensor cells;          // every c_t (LSTM)
  OptionalTensor gates, middle;  // private to the kernels of the instruction set `isa`
  std::string isa;
};

struct LayerOutputs {
  at::Tensor output, h_n;
  OptionalTensor c_n;
  Saved saved;  // filled when asked for
};

struct LayerGradients {
  OptionalTensor d_output, d_h_n, d_c_n, d_cells;
};

// How a pass over a part of a sequence, or one whose gradients are held within limits, differs from
// the plain one.
struct PassOptions {
  bool keep_gates = true;  // forward that saves: gates and middle, too, not the states alone
  long planned_steps = 0,
       planned_batch = 0;   // of the whole call, whose plan this pass is to follow on the CPU
  Clip clip = Clip::kNone;  // of dL/dh_t
  double limit = 0;
  at::Tensor dh_norms;  // [N] as wide as what is computed with: receives the norms of dL/dh_t
  // For w_ih, w_hh, b_ih, b_hh, w_hr: what their gradients are added to, in place, as wide as what
  // is computed with. All gradients are then returned unrounded.
  std::vector<OptionalTensor> sums;

  bool needs_norms() const { return clip == Clip::kNorm || dh_norms.defined(); }
};

constexpr int kLayerInputs = 8;  // input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr
constexpr int kFirstWeight = 3;

using InputGradients = std::array<OptionalTensor, kLayerInputs>;
using Wanted = std::array<bool, kLayerInputs>;

// One direction of a layer, or both over the same input, which may then run side by side. The path
// is for CUDA tensors. With several groups of sequences, of which sequence b belongs to group
// b % groups, the gradients of weights and biases have a leading dimension: one for each group.
std::vector<LayerOutputs> layer_forward(std::span<const LayerInputs> directions, bool save,
                                        cuda::Path path, const PassOptions& options = {});
std::vector<InputGradients> layer_backward(std::span<const LayerInputs> directions,
                                           std::span<const Saved> saved,
                                           std::span<const LayerGradients> d,
                                           std::span<const Wanted> wanted, cuda::Path path,
                                           long groups = 1, const PassOptions& options = {});

CellKind cell_kind(const std::string& name);
int cell_gates(CellKind kind);

}  // namespace rnn_ext
