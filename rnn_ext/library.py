"""The kernels as operators of torch's dispatcher, for torch.compile, torch.export and AOTInductor.

csrc/ops/operators.cpp defines them; here they get fake kernels (shapes alone) and gradients:

- ``rnn_ext::layer``: a layer in one direction or both; what compiled and exported models contain;
- ``rnn_ext::layer_forward``, ``rnn_ext::layer_backward``: what it becomes where gradients are asked
  for;
- ``rnn_ext::quantized_layer``: the same over weights of fewer bits, without gradients;
- ``rnn_ext::packing``: where the steps of padded sequences lie when they are packed;
- ``rnn_ext::random_mask``: the masks of dropouts.

``tensors`` are h0, c0, w_ih, w_hh, b_ih, b_hh and w_hr of one direction, or of the one forward in
time and then the one backward. ``hold_h`` and ``hold_c`` are of zoneout: masks of all directions,
stacked, or a share, as of ``ops.layer``. An operator's results alias nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _C, transforms
from .zoneout import Zoneout, paired, with_masks

__all__ = ["layer", "packing", "quantized_layer", "random_mask"]

_operators = torch.ops.rnn_ext
_DIRECTION, _SHOWN = 7, 4  # tensors that a direction takes, and gives


def layer(
    cell: str,
    input: Tensor,
    directions: Sequence[Sequence[Tensor | None]],
    batch_sizes: Tensor | None,
    reverse: bool,
    return_cells: bool,
    resets: Tensor | None = None,
    zoneout: Sequence[Zoneout | None] = (None,),
) -> list[tuple[Any, ...]]:
    """As ``ops.layer`` for each of ``directions``, through the operator."""
    tensors = [t for direction in directions for t in direction]
    results = _operators.layer(
        cell, input, tensors, batch_sizes, reverse, return_cells, resets, *_stacked(zoneout)
    )
    return [
        (*shown, *(None,) * (_SHOWN - len(shown))) for shown in _split(results, len(directions))
    ]


def quantized_layer(
    cell: str,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(output, h_n, c_n) of a layer with the weights of ``QuantizedLayers``."""
    results = _operators.quantized_layer(cell, input, h0, c0, weights, batch_sizes, reverse)
    return tuple(results) if len(results) == 3 else (*results, None)


def packing(lengths: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rows, batch_sizes, order, restore) that pack [T, B, ...] of these lengths, in any order.

    ``rows`` [N] are indices into the T * B rows, the rest is as in PackedSequence. ValueError for
    lengths that are not in 1..steps.
    """
    return _operators.packing(lengths, steps)


def random_mask(
    seed: Tensor,
    stream: int,
    steps: Tensor,
    rows: Tensor,
    columns: int,
    threshold: int,
    dropped: float,
    kept: float,
    dtype: torch.dtype,
) -> Tensor:
    """As ``_C.random_mask``, on the device of ``steps`` and ``rows``."""
    return _operators.random_mask(
        seed, stream, steps, rows, columns, threshold, dropped, kept, dtype
    )


def _stacked(zoneout):
    """hold_h and hold_c of what each direction has of zoneout."""
    if zoneout[0] is None:
        return None, None
    return [
        holds[0] if holds[0] is None or holds[0].dim() == 0 else torch.stack(holds)
        for holds in zip(*zoneout)
    ]


def _split(items, parts):
    size = len(items) // parts
    return [items[k * size : (k + 1) * size] for k in range(parts)]


def _by_direction(tensors):
    return _split(tensors, len(tensors) // _DIRECTION)


def _on_cuda(tensor):
    return tensor.is_cuda


def _multiplies(tensor):
    """Whether the kernels multiply numbers of its dtype as they are, without widening them."""
    narrow = tensor.dtype == torch.bfloat16 and not _C.cpu_multiplies_bfloat16()
    return _on_cuda(tensor) or not narrow


def _batch(input, h0, batch_sizes, resets):
    """Sequences in a call; with resets, h0 has two rows for each where it must say so."""
    if batch_sizes is None:
        return input.shape[1]
    return h0.shape[0] if resets is None else h0.shape[0] // 2


def _layer_fake(
    cell,
    input,
    tensors,
    batch_sizes,
    reverse,
    return_cells,
    resets=None,
    hold_h=None,
    hold_c=None,
):
    results, lstm = [], cell == "lstm"
    for h0, c0, _, w_hh, *_ in _by_direction(tensors):
        shape, batch = input.shape[:-1], _batch(input, h0, batch_sizes, resets)
        results += [input.new_empty(*shape, h0.shape[1]), input.new_empty(batch, h0.shape[1])]
        if lstm:
            results.append(input.new_empty(batch, c0.shape[1]))
        if lstm and return_cells:
            results.append(input.new_empty(*shape, w_hh.shape[0] // 4))
    return results


def _layer_forward_fake(
    cell, input, tensors, batch_sizes, reverse, resets=None, hold_h=None, hold_c=None
):
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32
    wider = compute != input.dtype
    # What only the kernels read is as wide as what they compute with on the CPU, not on CUDA; what
    # they multiply, as wide as what they multiply with.
    stored = input.dtype if _on_cuda(input) else compute
    multiplied = input.dtype if _multiplies(input) else stored
    gates = {"lstm": 4, "gru": 3, "gru_reset_before": 3}.get(cell, 1)
    leading = input.shape[:-1]
    rows = leading[0] if batch_sizes is not None else leading[0] * leading[1]
    lstm = cell == "lstm"

    def empty(*shape, dtype=input.dtype, there=True):
        return input.new_empty(shape, dtype=dtype) if there else input.new_empty(0)

    results = []
    for h0, _, w_ih, _, _, _, w_hr in _by_direction(tensors):
        output_size, hidden = h0.shape[1], w_ih.shape[0] // gates
        batch = _batch(input, h0, batch_sizes, resets)
        if _on_cuda(input):
            width = gates * hidden if gates > 1 else 0
        else:
            width = _C.gates_width(cell, hidden, compute.itemsize)
        made = gates == 1 and hold_h is not None and hold_h.dim() == 0
        middle = cell.startswith("gru") or w_hr is not None or made
        results += [
            empty(*leading, output_size),
            empty(batch, output_size),
            empty(batch, hidden) if lstm else empty(0),
            empty(*leading, hidden, there=lstm),
            empty(*leading, output_size, dtype=multiplied, there=multiplied != input.dtype),
            empty(*leading, hidden, dtype=compute, there=wider and lstm),
            empty(rows, width, dtype=stored, there=width > 0),
            empty(rows, hidden, dtype=multiplied, there=middle),
        ]
    return results


def _layer_backward_fake(
    cell,
    input,
    tensors,
    batch_sizes,
    reverse,
    kept,
    upstream,
    wanted,
    resets=None,
    hold_h=None,
    hold_c=None,
):
    inputs = [t for direction in _by_direction(tensors) for t in (input, *direction)]
    return [input.new_empty(t.shape) for t, w in zip(inputs, wanted) if w and t is not None]


def _saved(output, cells, states, wide_cells, gates, middle):
    """What ``_C.layer_backward`` reads, of what `_Layer` keeps."""
    first = (states, output), (wide_cells, cells), (gates,), (middle,)
    return [next((t for t in ts if t.dim() != 1 or t.numel()), None) for ts in first]


def _quantized_layer_fake(cell, input, h0, c0, weights, batch_sizes, reverse):
    results = [input.new_empty(*input.shape[:-1], h0.shape[1]), input.new_empty(h0.shape)]
    return results if c0 is None else [*results, input.new_empty(c0.shape)]


def _packing_fake(lengths, steps):
    context = torch.library.get_ctx()
    rows, taken = context.new_dynamic_size(min=1), context.new_dynamic_size(min=1)
    return tuple(lengths.new_empty(n) for n in (rows, taken, *lengths.shape * 2))


def _random_mask_fake(seed, stream, steps, rows, columns, threshold, dropped, kept, dtype):
    return steps.new_empty((steps.shape[0], columns), dtype=dtype)


class _Layer(torch.autograd.Function):
    """Tensors first: input, then the seven of each direction."""

    @staticmethod
    def forward(ctx, input, *arguments):
        *tensors, batch_sizes, resets, hold_h, hold_c = arguments[:-4]
        operators, cell, reverse, return_cells = arguments[-4:]
        more = resets, hold_h, hold_c
        with torch._C._AutoDispatchBelowAutograd():
            results = operators.layer_forward(cell, input, tensors, batch_sizes, reverse, *more)
        ctx.set_materialize_grads(False)
        ctx.options = operators, cell, reverse
        shown, kept = [], []
        for output, h_n, c_n, cells, *saved in _split(results, len(tensors) // _DIRECTION):
            shown += [output, h_n]
            if cell == "lstm":
                shown += [c_n, cells] if return_cells else [c_n]
            kept += [output, cells, *saved]
        ctx.save_for_backward(input, *tensors, batch_sizes, *more, *kept)
        return tuple(shown)

    @staticmethod
    def backward(ctx, *upstream):
        operators, cell, reverse = ctx.options
        count = len(ctx.needs_input_grad) - 9  # without input and the eight options
        input, *saved = ctx.saved_tensors
        tensors, (batch_sizes, resets, *holds) = saved[:count], saved[count : count + 4]
        kept = saved[count + 4 :]
        groups = _by_direction(tensors)
        needed = _by_direction(ctx.needs_input_grad[1 : 1 + count])
        wanted = [(ctx.needs_input_grad[0], *n) for n in needed]
        upstream = [(*d, *(None,) * (_SHOWN - len(d))) for d in _split(upstream, len(groups))]
        if transforms.watched_backward([d for group in upstream for d in group]):
            isa = "cuda" if _on_cuda(input) else _C.cpu_isa()
            parts = zip((reverse, True), groups, _split(kept, len(groups)), upstream, wanted)
            gradients = [
                transforms.layer_backward(
                    transforms.Call(
                        *(cell, batch_sizes, way, "auto", resets),
                        with_masks(paired(*holds), lambda hold, k=k: hold[k]),
                        isa=isa,
                    ),
                    (input, *group),
                    _saved(*rest[0]),
                    *rest[1:],
                )
                for k, (way, group, *rest) in enumerate(parts)
            ]
        else:
            joined = (
                [d for group in upstream for d in group],
                [w for group in wanted for w in group],
            )
            found = iter(
                operators.layer_backward(
                    cell, input, tensors, batch_sizes, reverse, kept, *joined, resets, *holds
                )
            )
            gradients = [[next(found) if w else None for w in group] for group in wanted]
        d_input = [d[0] for d in gradients if d[0] is not None]
        return (
            sum(d_input[1:], d_input[0]) if d_input else None,
            *(g for group in gradients for g in group[1:]),
            *(None,) * 8,
        )


def _register(namespace):
    """Shapes and gradients for the operators of ``namespace``; the registration is to be kept."""
    operators = getattr(torch.ops, namespace)
    library = torch.library.Library(namespace, "IMPL")
    for name, fake in {
        "layer": _layer_fake,
        "layer_forward": _layer_forward_fake,
        "layer_backward": _layer_backward_fake,
        "quantized_layer": _quantized_layer_fake,
        "packing": _packing_fake,
        "random_mask": _random_mask_fake,
    }.items():
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)

    def layer(
        keyset,
        cell,
        input,
        tensors,
        batch_sizes,
        reverse,
        return_cells,
        resets=None,
        hold_h=None,
        hold_c=None,
    ):
        given, more = (input, *tensors), (resets, hold_h, hold_c)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
            options = operators, cell, reverse, return_cells
            return list(_Layer.apply(input, *tensors, batch_sizes, *more, *options))
        with torch._C._AutoDispatchBelowAutograd():
            return operators.layer(cell, input, tensors, batch_sizes, reverse, return_cells, *more)

    library.impl("layer", layer, "Autograd", with_keyset=True)
    return library


_registration = _register("rnn_ext")
