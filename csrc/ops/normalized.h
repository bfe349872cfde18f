// A layer with layer normalisation (RNN, LSTM, GRU) or peepholes (LSTM).
#pragma once
#include "layer.h"

namespace rnn_ext {

constexpr int kExtras = 5, kNormalizedInputs = kLayerInputs + kExtras;
// gain_ih, gain_hh [G*H]; gain_cell, bias_cell [H]; peephole [3*H], as in cpu/normalized_problem.h
using ExtraTensors = std::array<OptionalTensor, kExtras>;
using NormalizedGradients = std::array<OptionalTensor, kNormalizedInputs>;
using NormalizedWanted = std::array<bool, kNormalizedInputs>;

// What is saved for the backward pass beside states and cells are records, in the place of gates. The
// options' sums are of the extras, too, after those of the weights.
LayerOutputs normalized_forward(const LayerInputs& in, const ExtraTensors& extras, bool save,
                                const PassOptions& options = {});
NormalizedGradients normalized_backward(const LayerInputs& in, const ExtraTensors& extras,
                                        const Saved& saved, const LayerGradients& d,
                                        const NormalizedWanted& wanted,
                                        const PassOptions& options = {});

}  // namespace rnn_ext
