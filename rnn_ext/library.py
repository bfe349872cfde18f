"""The layer's kernels as operators of ``torch.library``, for torch.compile and torch.export.

``rnn_ext::layer`` and ``rnn_ext::layer_backward`` have fake kernels (shapes alone) and autograd.
An operator's results alias nothing: what is absent is an empty tensor, and so is ``states``
(``wide_cells``) where it would repeat ``output`` (``cells``).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _C

__all__ = ["layer"]

_TENSORS = (
    "Tensor input, Tensor h0, Tensor? c0, Tensor w_ih, Tensor w_hh, "
    "Tensor? b_ih, Tensor? b_hh, Tensor? w_hr"
)
_SAVED = "Tensor states, Tensor wide_cells, Tensor gates, Tensor middle"
_GRADIENTS = "Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, Tensor? d_cells"


def layer(
    cell: str, tensors: Sequence[Tensor | None], batch_sizes: Tensor | None, reverse: bool
) -> tuple[Tensor | None, ...]:
    """As ``ops.layer``, through the operator."""
    output, h_n, c_n, cells = torch.ops.rnn_ext.layer(cell, *tensors, batch_sizes, reverse)[:4]
    return (output, h_n, c_n, cells) if cell == "lstm" else (output, h_n, None, None)


def _on_cuda(tensor):
    return tensor.is_cuda


def _multiplies(tensor):
    """Whether the kernels multiply numbers of its dtype as they are, without widening them."""
    narrow = tensor.dtype == torch.bfloat16 and not _C.cpu_multiplies_bfloat16()
    return _on_cuda(tensor) or not narrow


@torch.library.custom_op(
    "rnn_ext::layer",
    mutates_args=(),
    schema=f"(str cell, {_TENSORS}, Tensor? batch_sizes, bool reverse) "
    f"-> (Tensor output, Tensor h_n, Tensor c_n, Tensor cells, {_SAVED})",
)
def _layer(cell, input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse):
    tensors = (input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
    output, h_n, c_n, states, cells, gates, middle, _ = _C.layer_forward(
        cell, *tensors, batch_sizes, reverse, True, "auto"
    )
    wide_cells = None
    if states is output:
        states = None
    if cells is not None and cells.dtype != input.dtype:
        wide_cells, cells = cells, cells.to(input.dtype)
    results = (output, h_n, c_n, cells, states, wide_cells, gates, middle)
    return tuple(input.new_empty(0) if t is None else t for t in results)


@_layer.register_fake
def _(cell, input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse):
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32
    wider = compute != input.dtype
    # What only the kernels read is as wide as what they compute with on the CPU, not on CUDA; what
    # they multiply, as wide as what they multiply with.
    stored = input.dtype if _on_cuda(input) else compute
    multiplied = input.dtype if _multiplies(input) else stored
    leading = input.shape[:-1]
    output_size = h0.shape[1]
    gates = {"lstm": 4, "gru": 3, "gru_reset_before": 3}.get(cell, 1)
    hidden = w_ih.shape[0] // gates
    if _on_cuda(input):
        width = gates * hidden if gates > 1 else 0
    else:
        width = _C.gates_width(cell, hidden, compute.itemsize)
    rows = input.numel() // input.shape[-1]

    def empty(*shape, dtype=input.dtype):
        return input.new_empty(shape, dtype=dtype)

    lstm, middle = cell == "lstm", cell.startswith("gru") or w_hr is not None
    return (
        empty(*leading, output_size),
        torch.empty_like(h0, memory_format=torch.contiguous_format),
        empty(*c0.shape) if lstm else empty(0),
        empty(*leading, hidden) if lstm else empty(0),
        empty(*leading, output_size, dtype=multiplied) if multiplied != input.dtype else empty(0),
        empty(*leading, hidden, dtype=compute) if wider and lstm else empty(0),
        empty(rows, width, dtype=stored) if width else empty(0),
        empty(rows, hidden, dtype=multiplied) if middle else empty(0),
    )


@torch.library.custom_op(
    "rnn_ext::layer_backward",
    mutates_args=(),
    schema=f"(str cell, {_TENSORS}, Tensor? batch_sizes, bool reverse, "
    f"Tensor output, Tensor cells, {_SAVED}, {_GRADIENTS}, bool[] wanted) -> Tensor[]",
)
def _layer_backward(
    cell, input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse, output, cells,
    states, wide_cells, gates, middle, d_output, d_h_n, d_c_n, d_cells, wanted,
):  # fmt: skip
    tensors = (input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
    saved = [output, cells, gates, middle]
    if input.dtype in (torch.bfloat16, torch.float16):
        saved[:2] = output if _multiplies(input) else states, wide_cells
    gradients = _C.layer_backward(
        cell, *tensors, batch_sizes, reverse,
        saved[0], *(t if c0 is not None or i else None for i, t in enumerate(saved[1:])),
        "cuda" if _on_cuda(input) else _C.cpu_isa(), d_output, d_h_n, d_c_n, d_cells, wanted,
        1, "auto",
    )  # fmt: skip
    return [input.new_empty(0) if g is None else g for g in gradients]


@_layer_backward.register_fake
def _(
    cell, input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse, output, cells,
    states, wide_cells, gates, middle, d_output, d_h_n, d_c_n, d_cells, wanted,
):  # fmt: skip
    tensors = (input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
    return [
        input.new_empty(t.shape) if w and t is not None else input.new_empty(0)
        for t, w in zip(tensors, wanted)
    ]


def _setup_context(ctx, inputs, output):
    cell, *tensors, batch_sizes, reverse = inputs
    shown, _, _, cells, *saved = output
    ctx.options = cell, reverse
    ctx.save_for_backward(*tensors, batch_sizes, shown, cells, *saved)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_output, d_h_n, d_c_n, d_cells, *_):
    cell, reverse = ctx.options
    *tensors, batch_sizes, output, cells, states, wide_cells, gates, middle = ctx.saved_tensors
    if cell != "lstm":
        d_c_n = d_cells = None
    wanted = list(ctx.needs_input_grad[1:9])
    gradients = torch.ops.rnn_ext.layer_backward(
        cell, *tensors, batch_sizes, reverse, output, cells, states, wide_cells, gates, middle,
        d_output, d_h_n, d_c_n, d_cells, wanted,
    )  # fmt: skip
    return None, *(g if w else None for g, w in zip(gradients, wanted)), None, None


_layer.register_autograd(_backward, setup_context=_setup_context)
