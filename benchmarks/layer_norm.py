"""An LSTM with layer normalisation as users of torch write it: a loop, scripted."""

import warnings

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear


def _steps(
    input: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    gain_ih: Tensor,
    gain_hh: Tensor,
    gain_cell: Tensor,
    bias_cell: Tensor,
):
    hidden = h.size(1)
    outputs = []
    for t in range(input.size(0)):
        of_input = layer_norm(linear(input[t], weight_ih), [4 * hidden], gain_ih)
        of_state = layer_norm(linear(h, weight_hh), [4 * hidden], gain_hh)
        i, f, g, o = (of_input + of_state + bias).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(layer_norm(c, [hidden], gain_cell, bias_cell))
        outputs.append(h)
    return torch.stack(outputs), h, c


class LayerNormLoop(torch.nn.Module):
    """One layer in one direction, with the names of the parameters of rnn_ext's."""

    def __init__(self, weights):
        super().__init__()
        for name, weight in weights.items():
            self.register_parameter(name, torch.nn.Parameter(weight.clone()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit
            self.steps = torch.jit.script(_steps)

    def forward(self, input, state=None):
        if state is None:
            h = c = input.new_zeros(input.size(1), self.weight_hh_l0.size(1))
        else:
            h, c = (s[0] for s in state)
        output, h, c = self.steps(
            input,
            h,
            c,
            self.weight_ih_l0,
            self.weight_hh_l0,
            self.bias_ih_l0 + self.bias_hh_l0,
            self.weight_layer_norm_ih_l0,
            self.weight_layer_norm_hh_l0,
            self.weight_layer_norm_cell_l0,
            self.bias_layer_norm_cell_l0,
        )
        return output, (h.unsqueeze(0), c.unsqueeze(0))


def gains(hidden):
    """The further parameters of an LSTM of so many units, as a state_dict.

    Gains below 1: rounding errors then do not grow from step to step.
    """
    sizes = {"weight_layer_norm_ih": 4, "weight_layer_norm_hh": 4, "weight_layer_norm_cell": 1}
    found = {f"{name}_l0": torch.rand(n * hidden) / 4 + 0.25 for name, n in sizes.items()}
    return found | {"bias_layer_norm_cell_l0": torch.rand(hidden) - 0.5}
