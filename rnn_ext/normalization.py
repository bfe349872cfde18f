"""Cells with layer normalisation or peepholes out of torch operations, for ``composite.layer``.

Equations and sources: docs/math.md. ``extras`` of a layer and direction are gain_ih and gain_hh
[G*H], gain_cell [H] (LSTM) and bias_cell [H], and peephole [3*H] of i, f and o (LSTM); None for
what there is not.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.functional import layer_norm, linear

__all__ = ["EPSILON", "EXTRAS", "Extras", "group", "net", "step"]

EPSILON = 1e-5
EXTRAS: tuple[str, ...] = ("gain_ih", "gain_hh", "gain_cell", "bias_cell", "peephole")
Extras: TypeAlias = Sequence[Tensor | None]

_ACTIVATIONS = {"rnn_tanh": torch.tanh, "rnn_relu": torch.relu, "rnn_sigmoid": torch.sigmoid}


def _normalized(a: Tensor, gain: Tensor | None) -> Tensor:
    if gain is None:
        return a
    if not is_compiling() and (
        _are_functorch_transforms_active() or forward_ad._current_level >= 0
    ):
        # torch's forward-mode derivative of layer_norm is a script
        centred = a - a.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * gain
    return layer_norm(a, a.shape[-1:], gain, None, EPSILON)


def _by_group(cell: str, a: Tensor, gain: Tensor | None) -> Tensor:
    """What is normalised together: of the GRU r and z, and n alone; of the others all gates."""
    if gain is None or not cell.startswith("gru"):
        return _normalized(a, gain)
    size = 2 * gain.size(0) // 3
    return torch.cat(
        (_normalized(a[..., :size], gain[:size]), _normalized(a[..., size:], gain[size:])), -1
    )


def net(cell: str, v: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None) -> Tensor:
    """What an input or a state adds to the net inputs of all gates; ``gain`` None: as it is."""
    if gain is None:
        return linear(v, weight, bias)
    a = _by_group(cell, linear(v, weight), gain)
    return a if bias is None else a + bias


def group(
    v: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None, rows: slice
) -> Tensor:
    """The same of some rows of the weights, whose gates are normalised together."""
    bias, gain = (None if t is None else t[rows] for t in (bias, gain))
    return net("", v, weight[rows], bias, gain)


def step(cell: str, extras: Extras) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A step as those of ``composite.STEPS``, after `net` of its input."""
    _, gain, gain_cell, bias_cell, peephole = extras

    def elman(wx, h, c, w_hh, b_hh, w_hr):
        return _ACTIVATIONS[cell](wx + net(cell, h, w_hh, b_hh, gain)), None

    def lstm(wx, h, c, w_hh, b_hh, w_hr):
        i, f, g, o = (wx + net(cell, h, w_hh, b_hh, gain)).chunk(4, -1)
        if peephole is not None:
            p_i, p_f, p_o = peephole.chunk(3)
            i, f = i + p_i * c, f + p_f * c
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        if peephole is not None:
            o = o + p_o * c
        shown = _normalized(c, gain_cell)
        shown = shown if bias_cell is None else shown + bias_cell
        return torch.sigmoid(o) * torch.tanh(shown), c

    def gru(wx, h, c, w_hh, b_hh, w_hr):
        xr, xz, xn = wx.chunk(3, -1)
        hr, hz, hn = net(cell, h, w_hh, b_hh, gain).chunk(3, -1)
        z = torch.sigmoid(xz + hz)
        n = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
        return (1 - z) * n + z * h, None

    def gru_reset_before(wx, h, c, w_hh, b_hh, w_hr):
        of_rz, of_n = slice(2 * h.size(-1)), slice(2 * h.size(-1), None)
        r, z = torch.sigmoid(wx[..., of_rz] + group(h, w_hh, b_hh, gain, of_rz)).chunk(2, -1)
        n = torch.tanh(wx[..., of_n] + group(r * h, w_hh, b_hh, gain, of_n))
        return (1 - z) * n + z * h, None

    return {"lstm": lstm, "gru": gru, "gru_reset_before": gru_reset_before}.get(cell, elman)
