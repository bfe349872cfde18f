"""Cells with layer normalisation or peepholes out of torch operations, for ``composite.layer``.

Equations and sources: docs/math.md. ``extras`` of a layer and direction are gain_ih and gain_hh
[G*H], gain_cell [H] (LSTM) and bias_cell [H], and peephole [3*H] of i, f and o (LSTM); None for
what there is not.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import layer_norm, linear

__all__ = ["EPSILON", "EXTRAS", "Extras", "project", "step"]

EPSILON = 1e-5
EXTRAS: tuple[str, ...] = ("gain_ih", "gain_hh", "gain_cell", "bias_cell", "peephole")
Extras: TypeAlias = Sequence[Tensor | None]

_ACTIVATIONS = {"rnn_tanh": torch.tanh, "rnn_relu": torch.relu, "rnn_sigmoid": torch.sigmoid}


def _normalized(a: Tensor, gain: Tensor | None) -> Tensor:
    if gain is None:
        return a
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
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


def project(cell: str, input: Tensor, w_ih: Tensor, b_ih: Tensor | None, extras: Extras) -> Tensor:
    """The input's part of the net inputs, of all steps at once."""
    a = _by_group(cell, linear(input, w_ih), extras[0])
    return a if b_ih is None else a + b_ih


def step(cell: str, extras: Extras) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A step as those of ``composite.STEPS``, over what `project` gave."""
    _, gain, gain_cell, bias_cell, peephole = extras

    def plus(a, b):
        return a if b is None else a + b

    def elman(wx, h, c, w_hh, b_hh, w_hr):
        a = wx + plus(_normalized(linear(h, w_hh), gain), b_hh)
        return _ACTIVATIONS[cell](a), None

    def lstm(wx, h, c, w_hh, b_hh, w_hr):
        i, f, g, o = (wx + plus(_normalized(linear(h, w_hh), gain), b_hh)).chunk(4, -1)
        if peephole is not None:
            p_i, p_f, p_o = peephole.chunk(3)
            i, f = i + p_i * c, f + p_f * c
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        if peephole is not None:
            o = o + p_o * c
        return torch.sigmoid(o) * torch.tanh(plus(_normalized(c, gain_cell), bias_cell)), c

    def gru(wx, h, c, w_hh, b_hh, w_hr):
        xr, xz, xn = wx.chunk(3, -1)
        hr, hz, hn = plus(_by_group(cell, linear(h, w_hh), gain), b_hh).chunk(3, -1)
        z = torch.sigmoid(xz + hz)
        n = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
        return (1 - z) * n + z * h, None

    def gru_reset_before(wx, h, c, w_hh, b_hh, w_hr):
        size = 2 * h.size(-1)
        b_rz, b_n = (None, None) if b_hh is None else (b_hh[:size], b_hh[size:])
        rz = plus(_normalized(linear(h, w_hh[:size]), gain[:size]), b_rz)
        r, z = torch.sigmoid(wx[..., :size] + rz).chunk(2, -1)
        hn = plus(_normalized(linear(r * h, w_hh[size:]), gain[size:]), b_n)
        n = torch.tanh(wx[..., size:] + hn)
        return (1 - z) * n + z * h, None

    return {"lstm": lstm, "gru": gru, "gru_reset_before": gru_reset_before}.get(cell, elman)
