"""The fused layer with layer normalisation or peepholes: `layer`, as ``ops.layer`` for plain ones.

The kernels are of the CPU and, step by step, of CUDA: under torch.func, forward-mode derivatives
and the backend "reference", and for gradients of gradients, ``composite`` serves, with a
`FallbackWarning` where nobody asked for it.
"""

from typing import Any

import torch
from torch import Tensor

from . import _C, composite, library, transforms
from .backend import current, warn_once
from .zoneout import Zoneout, paired

__all__ = ["layer", "uncovered"]

_operators = torch.ops.rnn_ext
_INPUTS, _SHOWN = 13, 4  # tensors that a layer takes, and gives
_NO_HOLDS = (None, None)


def uncovered(x: Tensor) -> str | None:
    """Why no kernel takes this input (a phrase), or None."""
    if not (x.is_cpu or x.is_cuda):
        return f"layer_norm and peephole have no kernel for {x.device}"
    if current() == "cuda-persistent":
        return "layer_norm and peephole have step-wise kernels alone"
    return None


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
    gain_ih: Tensor | None = None,
    gain_hh: Tensor | None = None,
    gain_cell: Tensor | None = None,
    bias_cell: Tensor | None = None,
    peephole: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    resets: Tensor | None = None,
    return_cells: bool = False,
    zoneout: Zoneout | None = None,
) -> tuple[Any, ...]:
    """One layer in one direction; arguments and results as of ``ops.layer``, and

    Args:
        w_hr: None; there is no projection.
        gain_ih, gain_hh: [G*H], of the normalised W x and U h; both, or neither for a layer that is
            not normalised.
        gain_cell, bias_cell: [H], of the normalised cell that an LSTM shows; the bias may be None.
        peephole: [3*H], of i, f and o of the LSTM, or None.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.
    """
    tensors = (input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
    extras = (gain_ih, gain_hh, gain_cell, bias_cell, peephole)
    options = {
        "batch_sizes": batch_sizes,
        "reverse": reverse,
        "resets": resets,
        "zoneout": zoneout,
    }
    holds = zoneout or _NO_HOLDS
    given = (*tensors[1:], *extras)
    reason = uncovered(input)
    if reason is None and torch.compiler.is_compiling():
        results = _operators.normalized_layer(
            cell, input, given, batch_sizes, reverse, return_cells, resets, *holds
        )
        return (*results, *(None,) * (_SHOWN - len(results)))
    if reason is None and transforms.watched():
        reason = "torch.func and forward-mode derivatives of layer_norm and peephole have no kernel"
    if reason is not None or current() == "reference":
        if reason is not None and current() == "auto":
            warn_once(f"rnn_ext: {reason}; composed of torch operations instead")
        return composite.layer(cell, *tensors, *extras, **options)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, *given)):
        output, h_n, *states = _Layer.apply(
            input, *given, resets, *holds, cell, batch_sizes, reverse
        )
        return output, h_n, *(states or (None, None))
    results = _C.normalized_forward(
        *(cell, tensors, extras, batch_sizes, reverse, resets, zoneout),
        return_cells and c0 is not None,
    )
    return *results[:3], results[4].to(input.dtype) if return_cells and c0 is not None else None


class _Layer(torch.autograd.Function):
    """Tensors first, in the order of ``_C.normalized_backward``'s results."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, resets, hold_h, hold_c, cell, batch_sizes, reverse = arguments
        output, h_n, c_n, states, cells, records, isa = _C.normalized_forward(
            *(cell, tensors[:8], tensors[8:], batch_sizes, reverse, resets),
            *(paired(hold_h, hold_c), True),
        )
        ctx.set_materialize_grads(False)
        ctx.options = cell, batch_sizes, reverse, isa
        ctx.save_for_backward(*tensors, resets, hold_h, hold_c, states, cells, records)
        return (output, h_n) if c_n is None else (output, h_n, c_n, cells.to(output.dtype))

    @staticmethod
    def backward(ctx, *upstream):
        kept = ctx.saved_tensors  # once: torch.utils.checkpoint allows no more
        tensors, (resets, *holds), saved = kept[:_INPUTS], kept[_INPUTS:-3], kept[-3:]
        cell, batch_sizes, reverse, isa = ctx.options
        zoneout = paired(*holds)
        upstream = (*upstream, *(None,) * (_SHOWN - len(upstream)))
        wanted = ctx.needs_input_grad[:_INPUTS]
        if transforms.watched_backward(upstream):
            gradients = _composed_gradients(
                cell, tensors, batch_sizes, reverse, resets, zoneout, upstream, wanted
            )
        else:
            gradients = _C.normalized_backward(
                *(cell, tensors[:8], tensors[8:], batch_sizes, reverse, resets, zoneout),
                *(saved, isa, upstream, wanted),
            )
        return *gradients, *(None,) * 6


def _composed_gradients(cell, tensors, batch_sizes, reverse, resets, zoneout, upstream, wanted):
    """The gradients of ``tensors``, None for what is not wanted; differentiable again."""
    warn_once(
        "rnn_ext: gradients of gradients of layer_norm and peephole have no kernel; composed of "
        "torch operations instead"
    )
    wanted = [w and t is not None for w, t in zip(wanted, tensors)]
    present = [d is not None for d in upstream]
    if not any(wanted) or not any(present):
        return [None] * _INPUTS

    def results(*tensors):
        shown = composite.layer(
            cell, *tensors, batch_sizes=batch_sizes, reverse=reverse, resets=resets,
            zoneout=zoneout,
        )  # fmt: skip
        return tuple(r for r, p in zip(shown, present) if p)

    return transforms.vjp(results, tensors, wanted, [d for d in upstream if d is not None])


def _layer_fake(
    cell, input, tensors, batch_sizes, reverse, return_cells, resets=None, hold_h=None, hold_c=None
):
    return _shown_fake(cell, input, tensors, batch_sizes, resets, return_cells)


def _shown_fake(cell, input, tensors, batch_sizes, resets, return_cells):
    leading, (h0, c0) = input.shape[:-1], tensors[:2]
    batch = input.shape[1]
    if batch_sizes is not None:  # with resets, h0 has two rows for each
        batch = h0.shape[0] if resets is None else h0.shape[0] // 2
    results = [input.new_empty(*leading, h0.shape[1]), input.new_empty(batch, h0.shape[1])]
    if cell == "lstm":
        results.append(input.new_empty(batch, c0.shape[1]))
        if return_cells:
            results.append(input.new_empty(*leading, c0.shape[1]))
    return results


def _record_width(cell, hidden, normalized, compute, on_cuda):
    """Numbers that the kernels save of a row of the steps beside its states."""
    if not on_cuda:
        return _C.record_width(cell, hidden, normalized, compute.itemsize)
    # Activations and, where gates are normalised, what W x and U h became, and the scales of each
    # group; of the LSTM's cell, mean and scale (csrc/ops/cuda_normalized.cpp).
    gates = {"lstm": 4, "gru": 3, "gru_reset_before": 3}.get(cell, 1)
    width = gates * hidden if gates > 1 else 0
    if normalized:
        width += 2 * gates * hidden + 2 * (2 if gates == 3 else 1) + 2 * (cell == "lstm")
    return width


def _forward_fake(
    cell, input, tensors, batch_sizes, reverse, resets=None, hold_h=None, hold_c=None
):
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32
    narrow, lstm = compute != input.dtype, cell == "lstm"
    on_cuda = library._on_cuda(input)
    shown = _shown_fake(cell, input, tensors, batch_sizes, resets, True)
    shown += [input.new_empty(0) for _ in range(_SHOWN - len(shown))]
    widened = narrow and not on_cuda and not _C.cpu_multiplies_bfloat16()
    rows = input.shape[0] if batch_sizes is not None else input.shape[0] * input.shape[1]
    width = _record_width(cell, tensors[0].shape[1], tensors[7] is not None, compute, on_cuda)
    return [
        *shown,
        shown[0].new_empty(shown[0].shape, dtype=compute) if widened else input.new_empty(0),
        shown[3].new_empty(shown[3].shape, dtype=compute)
        if narrow and lstm
        else input.new_empty(0),
        input.new_empty(rows, width, dtype=compute),
    ]


def _backward_fake(
    cell, input, tensors, batch_sizes, reverse, kept, upstream, wanted, resets=None, hold_h=None,
    hold_c=None,
):  # fmt: skip
    given = (input, *tensors)
    return [input.new_empty(t.shape) for t, w in zip(given, wanted) if w and t is not None]


class _LayerOperator(torch.autograd.Function):
    """Tensors first, in the order of ``_C.normalized_backward``'s results."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, batch_sizes, resets, hold_h, hold_c, cell, reverse, return_cells = arguments
        with torch._C._AutoDispatchBelowAutograd():
            results = _operators.normalized_forward(
                cell, tensors[0], tensors[1:], batch_sizes, reverse, resets, hold_h, hold_c
            )
        output, h_n, c_n, cells, states, wide_cells, records = results
        ctx.set_materialize_grads(False)
        ctx.options = cell, reverse
        kept = output, cells, states, wide_cells, records
        ctx.save_for_backward(*tensors, batch_sizes, resets, hold_h, hold_c, *kept)
        if cell != "lstm":
            return output, h_n
        return (output, h_n, c_n, cells) if return_cells else (output, h_n, c_n)

    @staticmethod
    def backward(ctx, *upstream):
        cell, reverse = ctx.options
        tensors = ctx.saved_tensors[:_INPUTS]
        batch_sizes, resets, *holds = ctx.saved_tensors[_INPUTS : _INPUTS + 4]
        kept = ctx.saved_tensors[_INPUTS + 4 :]
        upstream = (*upstream, *(None,) * (_SHOWN - len(upstream)))
        wanted = [w and t is not None for w, t in zip(ctx.needs_input_grad[:_INPUTS], tensors)]
        if transforms.watched_backward(upstream):
            gradients = _composed_gradients(
                cell, tensors, batch_sizes, reverse, resets, paired(*holds), upstream, wanted
            )
        else:
            found = iter(
                _operators.normalized_backward(
                    cell, tensors[0], tensors[1:], batch_sizes, reverse, kept, upstream, wanted,
                    resets, *holds,
                )
            )  # fmt: skip
            gradients = [next(found) if w else None for w in wanted]
        return (*gradients, *(None,) * 7)


def _register():
    """Shapes and gradients for the operators; the registration is to be kept."""
    library = torch.library.Library("rnn_ext", "IMPL")
    for name, fake in {
        "normalized_layer": _layer_fake,
        "normalized_forward": _forward_fake,
        "normalized_backward": _backward_fake,
    }.items():
        torch.library.register_fake(f"rnn_ext::{name}", fake, lib=library)

    def layer(
        keyset, cell, input, tensors, batch_sizes, reverse, return_cells, resets=None, hold_h=None,
        hold_c=None,
    ):  # fmt: skip
        given, more = (input, *tensors), (resets, hold_h, hold_c)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
            options = cell, reverse, return_cells
            return list(_LayerOperator.apply(*given, batch_sizes, *more, *options))
        with torch._C._AutoDispatchBelowAutograd():
            return _operators.normalized_layer(
                cell, input, tensors, batch_sizes, reverse, return_cells, *more
            )

    library.impl("normalized_layer", layer, "Autograd", with_keyset=True)
    return library


_registration = _register()
