// A layer as a differentiable function of its tensors, without Python between torch's autograd and
// the CPU kernels.
#pragma once
#include <functional>

#include "layer.h"

namespace rnn_ext {

// One direction of a layer or both, as layer_forward takes them; batch_sizes absent.
std::vector<LayerOutputs> differentiable_layer(const std::vector<LayerInputs>& directions);

// Whether what computes with `t` is batched, differentiated or otherwise looked at by torch.
bool is_watched(const at::Tensor& t);

// What computes a direction's gradients where they are to be differentiated again or carry a batch
// dimension of torch.func: torch operations, in Python (rnn_ext/ops.py).
using GeneralBackward = std::function<InputGradients(const LayerInputs&, const Saved&,
                                                     const LayerGradients&, const Wanted&)>;
void set_general_backward(GeneralBackward backward);

}  // namespace rnn_ext
