// All layers and directions of a module in one call on the CPU: a step of a stream, or of training a
// small model, costs its kernels and little else.
#pragma once
#include "layer.h"

namespace rnn_ext {

// What torch.nn's layers have not: as RecurrentLayers (rnn_ext/layers.py) has it, 0 where it is
// off. Masks are drawn in training alone; in evaluation zoneout is a share of every unit.
struct StackOptions {
  bool training = false, residual = false;
  double weight_dropout = 0, variational_dropout = 0, zoneout = 0;
};

struct StackOutputs {
  at::Tensor output, h_n;
  OptionalTensor c_n;
};

// input [T, B, I] ([B, T, I] with batch_first); hx h_0 and, for the LSTM, c_0, [layers and
// directions, B, size], or none for zeros; weights of each layer and direction: w_ih, w_hh, b_ih
// and b_hh with `bias`, w_hr with `projected`; `dropout` between layers, 0 for none; resets bool
// [T, B] ([B, T] with batch_first), `restored` what they restore, as hx or with a batch of 1, none
// for zeros. None where something is not a plain CPU tensor of the right shape and dtype: the
// general path takes those.
std::optional<StackOutputs> run_stack(const std::string& cell, const at::Tensor& input,
                                      const std::vector<at::Tensor>& hx,
                                      const std::vector<at::Tensor>& weights, int directions,
                                      bool bias, bool projected, bool batch_first, double dropout,
                                      const OptionalTensor& resets,
                                      const std::vector<at::Tensor>& restored,
                                      const StackOptions& options);

// One step of a cell: input [B, I], states and results [B, size].
std::optional<StackOutputs> run_cell(const std::string& cell, const at::Tensor& input,
                                     const std::vector<at::Tensor>& hx,
                                     const std::vector<at::Tensor>& weights, bool bias);

}  // namespace rnn_ext
