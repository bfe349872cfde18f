// A layer with layer normalisation or peepholes on the tensors of a CUDA device, step by step.
#pragma once
#include "cuda_layer.h"
#include "normalized.h"

namespace rnn_ext {

LayerOutputs cuda_normalized_forward(const Call& call, const LayerInputs& in,
                                     const ExtraTensors& extras, bool save,
                                     const PassOptions& options);
NormalizedGradients cuda_normalized_backward(const Call& call, const LayerInputs& in,
                                             const ExtraTensors& extras, const Saved& saved,
                                             const LayerGradients& d,
                                             const NormalizedWanted& wanted,
                                             const PassOptions& options);

}  // namespace rnn_ext
