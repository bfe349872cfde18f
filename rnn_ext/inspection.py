"""The gates of a layer that has run, from its input and its states: products, no time loop."""

import torch
from torch import Tensor

from .normalization import group, net

__all__ = ["GATES", "gates", "rows_of"]

_GRU = ("r", "z", "n")
GATES: dict[str, tuple[str, ...]] = {
    "lstm": ("i", "f", "g", "o"),
    "gru": _GRU,
    "gru_reset_before": _GRU,
    "rnn_tanh": ("a",),
    "rnn_relu": ("a",),
    "rnn_sigmoid": ("a",),
}


def rows_of(batch_sizes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Time and place in the batch of each of the ``count`` rows of a packed sequence, int64."""
    steps = torch.arange(batch_sizes.size(0)).repeat_interleave(batch_sizes, output_size=count)
    first = batch_sizes.cumsum(0) - batch_sizes
    return steps, torch.arange(count) - first[steps]


def gates(
    cell: str,
    x: Tensor,
    states: tuple[Tensor, Tensor | None],
    initial: tuple[Tensor, Tensor | None],
    weights: tuple[Tensor | None, ...],
    batch: int,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
) -> Tensor:
    """What each gate let through at each step of one layer in one direction, [..., G * H].

    ``GATES`` has their order; ``a`` of the simple network is the net input, before f. ``x`` and
    ``resets`` are as of ``ops.layer``, ``states`` output and cells, ``initial`` h0 and c0,
    ``weights`` (w_ih, w_hh, b_ih, b_hh) and, of a layer that has them, the five extras of
    ``normalization``. Cells are needed beside peepholes alone.
    """
    dtype = states[0].dtype
    if dtype in (torch.float16, torch.bfloat16):  # as the kernels compute
        x, *widened = (None if t is None else t.float() for t in (x, *states, *initial, *weights))
        states, initial, weights = widened[:2], widened[2:4], widened[4:]
    w_ih, w_hh, b_ih, b_hh, *extras = weights
    gain_ih, gain_hh, _, _, peephole = extras or (None,) * 5
    layout = batch, batch_sizes, resets, reverse
    before = _previous(states[0], initial[0], *layout)
    wx = net(cell, x, w_ih, b_ih, gain_ih)
    if cell == "gru_reset_before":
        size = 2 * (w_hh.size(0) // 3)
        of_rz, of_n = slice(size), slice(size, None)
        rz = torch.sigmoid(wx[..., of_rz] + group(before, w_hh, b_hh, gain_hh, of_rz))
        reset = rz[..., : size // 2] * before
        n = torch.tanh(wx[..., of_n] + group(reset, w_hh, b_hh, gain_hh, of_n))
        return torch.cat((rz, n), -1).to(dtype)
    uh = net(cell, before, w_hh, b_hh, gain_hh)
    if cell == "gru":
        (xr, xz, xn), (hr, hz, hn) = wx.chunk(3, -1), uh.chunk(3, -1)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        return torch.cat((r, z, torch.tanh(xn + r * hn)), -1).to(dtype)
    if cell == "lstm":
        i, f, g, o = (wx + uh).chunk(4, -1)
        if peephole is not None:
            p_i, p_f, p_o = peephole.chunk(3)
            c = _previous(states[1], initial[1], *layout)
            i, f = i + p_i * c, f + p_f * c
            o = o + p_o * (f.sigmoid() * c + i.sigmoid() * g.tanh())  # before zoneout
        return torch.cat((i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()), -1).to(dtype)
    return (wx + uh).to(dtype)


def _previous(output, h0, batch, batch_sizes, resets, reverse):
    """The h that was carried into each step, laid out like ``output``."""
    if batch_sizes is None:
        first, rows = h0[None, :batch], None
        before = torch.cat((output[1:], first) if reverse else (first, output[:-1]))
        cut = resets
        if resets is not None and reverse:
            cut = torch.cat((resets[1:], torch.zeros_like(resets[:1])))
    else:
        before, cut, rows = _previous_rows(output, h0[:batch], batch_sizes, resets, reverse)
    if resets is None:
        return before
    cut = cut.unsqueeze(-1)
    if h0.size(0) == batch:
        return before.masked_fill(cut, 0)
    restored = h0[batch:]
    return torch.where(cut, restored if rows is None else restored.index_select(0, rows), before)


def _previous_rows(output, h0, batch_sizes, resets, reverse):
    """The same of packed rows before resets cut it; where they do; the place of each in the
    batch."""
    steps, slots = rows_of(batch_sizes, output.size(0))
    sizes = torch.cat((batch_sizes, batch_sizes.new_zeros(1)))
    first = batch_sizes.cumsum(0) - batch_sizes
    if reverse:
        there = slots < sizes[steps + 1]
        carried = first.roll(-1)[steps] + slots
    else:
        there = steps > 0
        carried = first[(steps - 1).clamp(min=0)] + slots
    device = output.device
    rows = torch.where(there, h0.size(0) + carried, slots).to(device)  # h0 stands in front
    cut = resets
    if resets is not None and reverse:  # a reset of the step that was run before parts these two
        carried = torch.where(there, carried, 0).to(device)
        cut = resets.index_select(0, carried) & there.to(device)
    return torch.cat((h0, output)).index_select(0, rows), cut, slots.to(device)
