// A layer on the CPU: allocation, choice of dtype, instruction set and plan.
#pragma once
#include <span>

#include "call.h"

namespace rnn_ext {

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
