// A layer over weights of fewer bits: inference on the CPU in float32.
#pragma once
#include "../cpu/quantized_problem.h"
#include "stack.h"

namespace rnn_ext {

// The packed matrices of one layer and direction as csrc/cpu/quantized_problem.h describes them
// (uint8 with scales, or bfloat16 without), of 16 units to a strip.
struct QuantizedWeights {
  at::Tensor ih, hh;
  OptionalTensor second, ih_scales, hh_scales, second_scales, b_ih, b_hh;
};

// What a kernel reads of the weights of a layer of these sizes: matrices, biases and whether there is
// a projection, checked. Copies are kept alive in `held`.
QuantizedArgs quantized_args(CellKind kind, const Sizes& sizes, const QuantizedWeights& weights,
                             std::vector<at::Tensor>& held);
// Whether the CPU multiplies bytes.
bool cpu_has_vnni();

// input [T, B, I], or [N, I] with batch_sizes; h0 [B, P]; c0 [B, H]. Throws where something is not
// a plain float32 tensor on the CPU, or shapes do not fit.
StackOutputs quantized_layer(const std::string& cell, const at::Tensor& input, const at::Tensor& h0,
                             const OptionalTensor& c0, const QuantizedWeights& weights,
                             const OptionalTensor& batch_sizes, bool reverse);

// All layers and directions of a module, as run_stack: input [T, B, I] ([B, T, I] with
// batch_first), hx h_0 and for the LSTM c_0, or nothing for zeros. None where gradients are asked
// for, or where something is not a plain float32 tensor on the CPU or has another shape.
std::optional<StackOutputs> quantized_stack(const std::string& cell, const at::Tensor& input,
                                            const std::vector<at::Tensor>& hx,
                                            const std::vector<QuantizedWeights>& weights,
                                            int directions, long hidden, long output,
                                            bool batch_first);

}  // namespace rnn_ext
