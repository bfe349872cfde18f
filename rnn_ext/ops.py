"""The fused layer as a differentiable operation: one layer in one direction over ``rnn_ext._C``.

`layer` takes the shortest way that is right for the call:

- nobody asks for gradients: the kernel alone;
- gradients: an autograd Function over the forward and backward kernels;
- torch.compile and torch.export: the same kernels as operators of ``torch.library`` (library.py);
- torch.func's transforms, and gradients that are to be differentiated again: the same kernels as
  Functions that torch can batch and differentiate (transforms.py);
- the backend "reference" and forward-mode derivatives: ``composite``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _C, composite, library, transforms
from .backend import current
from .zoneout import Zoneout, paired

__all__ = ["CELLS", "both_directions", "layer"]

_NO_HOLDS = (None, None)

CELLS = ("rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm", "gru", "gru_reset_before")


def layer(
    cell: str,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    resets: Tensor | None = None,
    return_cells: bool = False,
    zoneout: Zoneout | None = None,
) -> tuple[Any, ...]:
    """One layer in one direction, with T steps, batch B, I features, H hidden and P output units.

    Args:
        cell: one of ``CELLS``; G is its number of gates (RNN 1, GRU 3, LSTM 4), in torch's order.
        input: [T, B, I], or [N, I] with ``batch_sizes``.
        h0: [B, P] (P = H without a projection). With ``resets`` it may be [2 * B, P]: the second
            half is what they put in the place of the state instead of zeros.
        c0: [B, H] (or [2 * B, H], as h0) for "lstm", otherwise None.
        w_ih, w_hh: [G*H, I] and [G*H, P].
        b_ih, b_hh: [G*H], or both None.
        w_hr: [P, H], the LSTM's projection, or None.
        batch_sizes: int64 [T] on the CPU, as in PackedSequence.
        reverse: walk from the last step to the first.
        resets: bool [T, B] or [N]; where it is True at step t, no state passes between t - 1 and t,
            in whichever direction the layer walks.
        return_cells: make sure that the fourth result is there.
        zoneout: what a step holds on to of h_{t-1} and, of the LSTM, of c_{t-1} (else None)
            (Krueger et al. 2017, arXiv:1606.01305): bool, laid out like output and like cells, True
            where a unit keeps its state; or a share that each unit keeps, float64 without
            dimensions, on the CPU.

    Returns:
        ``(output, h_n, c_n, cells)``: [T, B, P] or [N, P]; [B, P]; [B, H] of the LSTM; every c_t of
        the LSTM, laid out like output, None where nobody asked for gradients or ``return_cells``.
        h_n and c_n are the states after a sequence's last step in walking order.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.
    """
    tensors = (input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
    if torch.compiler.is_compiling():
        return library.layer(
            cell, input, [tensors[1:]], batch_sizes, reverse, return_cells, resets, [zoneout]
        )[0]
    if transforms.watched():
        return transforms.layer(cell, tensors, batch_sizes, reverse, return_cells, resets, zoneout)
    if current() == "reference":
        return composite.layer(
            cell, *tensors, batch_sizes=batch_sizes, reverse=reverse, resets=resets, zoneout=zoneout
        )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        holds = zoneout or _NO_HOLDS
        output, h_n, *states = _Layer.apply(*tensors, resets, *holds, cell, batch_sizes, reverse)
        return output, h_n, *(states or (None, None))
    backend = current() if input.is_cuda else "auto"
    results = _C.layer_forward(
        cell, *tensors, batch_sizes, reverse, resets, zoneout, return_cells, backend
    )
    return *results[:3], results[4] if return_cells else None


def both_directions(
    cell: str,
    input: Tensor,
    first: tuple[Tensor | None, ...],
    second: tuple[Tensor | None, ...],
    *,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    resets: Tensor | None = None,
    return_cells: bool = False,
    zoneout: Sequence[Zoneout | None] = (None, None),
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """A layer's two directions over one input: what `layer` gives for each, as a pair.

    ``first`` (forward in time) and ``second`` (backward) are (h0, c0, w_ih, w_hh, b_ih, b_hh,
    w_hr); each has an entry in ``zoneout``. On the CPU they run side by side where one of them
    would leave threads idle, on CUDA in one launch where the kernel is persistent.
    """
    tensors = (input, *first, *second)
    if torch.compiler.is_compiling() and not reverse:
        return library.layer(
            cell, input, (first, second), batch_sizes, False, return_cells, resets, zoneout
        )
    if reverse or transforms.watched() or current() == "reference":
        options = {"batch_sizes": batch_sizes, "resets": resets, "return_cells": return_cells}
        return (
            layer(cell, input, *first, reverse=reverse, zoneout=zoneout[0], **options),
            layer(cell, input, *second, reverse=not reverse, zoneout=zoneout[1], **options),
        )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        holds = (hold for pair in zoneout for hold in pair or _NO_HOLDS)
        results = _BothDirections.apply(*tensors, resets, *holds, cell, batch_sizes)
        half = len(results) // 2
        empty = () if cell == "lstm" else (None, None)
        return (*results[:half], *empty), (*results[half:], *empty)
    backend = current() if input.is_cuda else "auto"
    pair = _C.both_forward(
        cell, input, (first, second), batch_sizes, resets, zoneout, return_cells, backend
    )
    return tuple((*r[:3], r[4] if return_cells else None) for r in pair)


class _Layer(torch.autograd.Function):
    """Tensors first, in the order of ``_C.layer_backward``'s results."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, resets, hold_h, hold_c, cell, batch_sizes, reverse = arguments
        input = tensors[0]
        backend = current() if input.is_cuda else "auto"
        output, h_n, c_n, states, cells, gates, middle, isa = _C.layer_forward(
            cell, *tensors, batch_sizes, reverse, resets, paired(hold_h, hold_c), True, backend
        )
        ctx.set_materialize_grads(False)
        ctx.options = cell, batch_sizes, reverse
        ctx.isa, ctx.backend = isa, backend  # backward has a thread, and context, of its own
        # What the user sees of the cell states; for bfloat16 narrower than what is saved.
        shown_cells = cells if cells is None else cells.to(input.dtype)
        ctx.save_for_backward(*tensors, resets, hold_h, hold_c, states, cells, gates, middle)
        return (output, h_n) if c_n is None else (output, h_n, c_n, shown_cells)

    @staticmethod
    def backward(ctx, d_output, d_h_n, d_c_n=None, d_cells=None):
        kept = ctx.saved_tensors  # once: torch.utils.checkpoint allows no more
        tensors, resets, zoneout, saved = kept[:8], kept[8], paired(*kept[9:11]), kept[11:]
        cell, batch_sizes, reverse = ctx.options
        wanted = ctx.needs_input_grad[:8]
        upstream = (d_output, d_h_n, d_c_n, d_cells)
        if transforms.watched_backward(upstream):
            gradients = _watched_backward(
                ctx, reverse, resets, zoneout, tensors, saved, upstream, wanted
            )
        else:
            gradients = _C.layer_backward(
                cell,
                *tensors,
                batch_sizes,
                reverse,
                resets,
                zoneout,
                *saved,
                ctx.isa,
                *upstream,
                wanted,
                1,
                ctx.backend,
            )
        return *gradients, *(None,) * 6


class _BothDirections(torch.autograd.Function):
    """`_Layer` for the two directions at once: input, then the seven tensors of each."""

    @staticmethod
    def forward(ctx, input, *arguments):
        *tensors, resets, h1, c1, h2, c2, cell, batch_sizes = arguments
        groups, zoneout = (tensors[:7], tensors[7:]), (paired(h1, c1), paired(h2, c2))
        backend = current() if input.is_cuda else "auto"
        pair = _C.both_forward(cell, input, groups, batch_sizes, resets, zoneout, True, backend)
        ctx.set_materialize_grads(False)
        ctx.options = cell, batch_sizes
        ctx.isa, ctx.backend = pair[0][7], backend
        saved = *pair[0][3:7], *pair[1][3:7]
        ctx.save_for_backward(input, *tensors, resets, h1, c1, h2, c2, *saved)
        shown = []
        for output, h_n, c_n, _, cells, *_ in pair:
            shown += (output, h_n)
            if c_n is not None:
                shown += (c_n, cells.to(input.dtype))
        return tuple(shown)

    @staticmethod
    def backward(ctx, *upstream):
        kept = ctx.saved_tensors
        input, *tensors = kept[:15]
        resets, zoneout = kept[15], (paired(*kept[16:18]), paired(*kept[18:20]))
        saved = kept[20:24], kept[24:]
        groups = tensors[:7], tensors[7:]
        cell, batch_sizes = ctx.options
        needed = ctx.needs_input_grad
        wanted = needed[:8], (needed[0], *needed[8:15])
        half = len(upstream) // 2
        empty = (None,) * (4 - half)
        upstream = (*upstream[:half], *empty), (*upstream[half:], *empty)
        if transforms.watched_backward((*upstream[0], *upstream[1])):
            first, second = (
                _watched_backward(ctx, reverse, resets, holds, (input, *group), *rest)
                for reverse, holds, group, *rest in zip(
                    (False, True), zoneout, groups, saved, upstream, wanted
                )
            )
        else:
            first, second = _C.both_backward(
                cell,
                input,
                groups,
                batch_sizes,
                resets,
                zoneout,
                saved,
                ctx.isa,
                upstream,
                wanted,
                ctx.backend,
            )
        d_input = [d[0] for d in (first, second) if d[0] is not None]
        return (
            sum(d_input[1:], d_input[0]) if d_input else None,
            *first[1:],
            *second[1:],
            *(None,) * 7,
        )


def _watched_backward(ctx, reverse, resets, zoneout, tensors, saved, upstream, wanted):
    """The gradients with ``create_graph=True`` or batched upstream ones, as transforms does it."""
    call = transforms.Call(*ctx.options[:2], reverse, ctx.backend, resets, zoneout, isa=ctx.isa)
    return transforms.layer_backward(call, tensors, saved, upstream, wanted)


def _general_backward(cell, tensors, reverse, resets, holds, saved, isa, upstream, wanted):
    """The same for a layer that C++ ran (csrc/ops/training.cpp)."""
    call = transforms.Call(cell, None, reverse, "auto", resets, paired(*holds), isa=isa)
    return transforms.layer_backward(call, tensors, saved, upstream, wanted)


_C.set_general_backward(_general_backward)
