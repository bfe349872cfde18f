"""The fused layer as a differentiable operation: one layer in one direction over ``rnn_ext._C``.

`layer` takes the shortest way that is right for the call:

- nobody asks for gradients: the kernel alone;
- gradients: an autograd Function over the forward and backward kernels;
- torch.compile and torch.export: the same kernels as operators of ``torch.library`` (library.py);
- torch.func's transforms, and gradients that are to be differentiated again: the same kernels as
  Functions that torch can batch and differentiate (transforms.py);
- the backend "reference" and forward-mode derivatives: ``composite``.
"""

from typing import Any

import torch
from torch import Tensor

from . import _C, composite, library, transforms
from .backend import current

__all__ = ["CELLS", "both_directions", "layer"]

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
            cell, input, [tensors[1:]], batch_sizes, reverse, return_cells, resets
        )[0]
    if transforms.watched():
        return transforms.layer(cell, tensors, batch_sizes, reverse, return_cells, resets)
    if current() == "reference":
        return composite.layer(
            cell, *tensors, batch_sizes=batch_sizes, reverse=reverse, resets=resets
        )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        output, h_n, *states = _Layer.apply(*tensors, resets, cell, batch_sizes, reverse)
        return output, h_n, *(states or (None, None))
    backend = current() if input.is_cuda else "auto"
    results = _C.layer_forward(cell, *tensors, batch_sizes, reverse, resets, return_cells, backend)
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
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """A layer's two directions over one input: what `layer` gives for each, as a pair.

    ``first`` (forward in time) and ``second`` (backward) are (h0, c0, w_ih, w_hh, b_ih, b_hh,
    w_hr). On the CPU they run side by side where one of them would leave threads idle, on CUDA in
    one launch where the kernel is persistent.
    """
    tensors = (input, *first, *second)
    if torch.compiler.is_compiling() and not reverse:
        return library.layer(cell, input, (first, second), batch_sizes, False, return_cells, resets)
    if reverse or transforms.watched() or current() == "reference":
        options = {"batch_sizes": batch_sizes, "resets": resets, "return_cells": return_cells}
        return (
            layer(cell, input, *first, reverse=reverse, **options),
            layer(cell, input, *second, reverse=not reverse, **options),
        )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        results = _BothDirections.apply(*tensors, resets, cell, batch_sizes)
        half = len(results) // 2
        empty = () if cell == "lstm" else (None, None)
        return (*results[:half], *empty), (*results[half:], *empty)
    backend = current() if input.is_cuda else "auto"
    pair = _C.both_forward(cell, input, (first, second), batch_sizes, resets, return_cells, backend)
    return tuple((*r[:3], r[4] if return_cells else None) for r in pair)


class _Layer(torch.autograd.Function):
    """Tensors first, in the order of ``_C.layer_backward``'s results."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, resets, cell, batch_sizes, reverse = arguments
        input = tensors[0]
        backend = current() if input.is_cuda else "auto"
        output, h_n, c_n, states, cells, gates, middle, isa = _C.layer_forward(
            cell, *tensors, batch_sizes, reverse, resets, True, backend
        )
        ctx.set_materialize_grads(False)
        ctx.options = cell, batch_sizes, reverse
        ctx.isa, ctx.backend = isa, backend  # backward has a thread, and context, of its own
        # What the user sees of the cell states; for bfloat16 narrower than what is saved.
        shown_cells = cells if cells is None else cells.to(input.dtype)
        ctx.save_for_backward(*tensors, resets, states, cells, gates, middle)
        return (output, h_n) if c_n is None else (output, h_n, c_n, shown_cells)

    @staticmethod
    def backward(ctx, d_output, d_h_n, d_c_n=None, d_cells=None):
        kept = ctx.saved_tensors  # once: torch.utils.checkpoint allows no more
        tensors, resets, saved = kept[:8], kept[8], kept[9:]
        cell, batch_sizes, reverse = ctx.options
        wanted = ctx.needs_input_grad[:8]
        upstream = (d_output, d_h_n, d_c_n, d_cells)
        if transforms.watched_backward(upstream):
            gradients = _watched_backward(ctx, reverse, resets, tensors, saved, upstream, wanted)
        else:
            gradients = _C.layer_backward(
                cell,
                *tensors,
                batch_sizes,
                reverse,
                resets,
                *saved,
                ctx.isa,
                *upstream,
                wanted,
                1,
                ctx.backend,
            )
        return *gradients, None, None, None, None


class _BothDirections(torch.autograd.Function):
    """`_Layer` for the two directions at once: input, then the seven tensors of each."""

    @staticmethod
    def forward(ctx, input, *arguments):
        *tensors, resets, cell, batch_sizes = arguments
        groups = tensors[:7], tensors[7:]
        backend = current() if input.is_cuda else "auto"
        pair = _C.both_forward(cell, input, groups, batch_sizes, resets, True, backend)
        ctx.set_materialize_grads(False)
        ctx.options = cell, batch_sizes
        ctx.isa, ctx.backend = pair[0][7], backend
        ctx.save_for_backward(input, *tensors, resets, *pair[0][3:7], *pair[1][3:7])
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
        resets, saved = kept[15], (kept[16:20], kept[20:])
        groups = tensors[:7], tensors[7:]
        cell, batch_sizes = ctx.options
        needed = ctx.needs_input_grad
        wanted = needed[:8], (needed[0], *needed[8:15])
        half = len(upstream) // 2
        empty = (None,) * (4 - half)
        upstream = (*upstream[:half], *empty), (*upstream[half:], *empty)
        if transforms.watched_backward((*upstream[0], *upstream[1])):
            first, second = (
                _watched_backward(ctx, reverse, resets, (input, *group), *rest)
                for reverse, group, *rest in zip((False, True), groups, saved, upstream, wanted)
            )
        else:
            first, second = _C.both_backward(
                cell,
                input,
                groups,
                batch_sizes,
                resets,
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
            None,
            None,
            None,
        )


def _watched_backward(ctx, reverse, resets, tensors, saved, upstream, wanted):
    """The gradients with ``create_graph=True`` or batched upstream ones, as transforms does it."""
    call = transforms.Call(*ctx.options[:2], reverse, ctx.backend, resets, isa=ctx.isa)
    return transforms.layer_backward(call, tensors, saved, upstream, wanted)


def _general_backward(cell, tensors, reverse, resets, saved, isa, upstream, wanted):
    """The same for a layer that C++ ran (csrc/ops/training.cpp)."""
    call = transforms.Call(cell, None, reverse, "auto", resets, isa=isa)
    return transforms.layer_backward(call, tensors, saved, upstream, wanted)


_C.set_general_backward(_general_backward)
