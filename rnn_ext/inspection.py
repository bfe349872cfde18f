"""The gates of a layer that has run, from its input and its states: one product, no time loop."""

import torch
from torch import Tensor
from torch.nn.functional import linear

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
    output: Tensor,
    h0: Tensor,
    weights: tuple[Tensor | None, ...],
    batch: int,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
) -> Tensor:
    """What each gate let through at each step of one layer in one direction, [..., G * H].

    ``GATES`` has their order; ``a`` of the simple network is the net input, before f. ``x``,
    ``output``, ``h0`` and ``resets`` are as of ``ops.layer``, ``weights`` (w_ih, w_hh, b_ih, b_hh).
    """
    dtype = output.dtype
    if dtype in (torch.float16, torch.bfloat16):  # as the kernels compute
        x, output, h0, *weights = (
            None if t is None else t.float() for t in (x, output, h0, *weights)
        )
    w_ih, w_hh, b_ih, b_hh = weights
    before = _previous(output, h0, batch, batch_sizes, resets, reverse)
    wx = linear(x, w_ih, b_ih)
    if cell == "gru_reset_before":
        size = 2 * (w_hh.size(0) // 3)
        b_rz, b_n = (None, None) if b_hh is None else (b_hh[:size], b_hh[size:])
        rz = torch.sigmoid(wx[..., :size] + linear(before, w_hh[:size], b_rz))
        reset = rz[..., : size // 2] * before
        n = torch.tanh(wx[..., size:] + linear(reset, w_hh[size:], b_n))
        return torch.cat((rz, n), -1).to(dtype)
    uh = linear(before, w_hh, b_hh)
    if cell == "gru":
        (xr, xz, xn), (hr, hz, hn) = wx.chunk(3, -1), uh.chunk(3, -1)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        return torch.cat((r, z, torch.tanh(xn + r * hn)), -1).to(dtype)
    if cell == "lstm":
        i, f, g, o = (wx + uh).chunk(4, -1)
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
