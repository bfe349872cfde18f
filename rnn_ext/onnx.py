"""torch.onnx.export of our layers and cells, by either of its exporters: ONNX's nodes RNN, LSTM and
GRU, one for each layer.

ONNX's gates stand in another order, i, o, f, g and z, r, n, and its equations are torch.nn's; its
GRU has both forms (``linear_before_reset``) and its LSTM has peepholes.
https://onnx.ai/onnx/operators lists what each node computes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .hooks import Hooks

__all__ = ["is_exporting", "layers"]

_GATE_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "gru_reset_before": (1, 0, 2)}
_ACTIVATIONS = {"rnn_tanh": "Tanh", "rnn_relu": "Relu", "rnn_sigmoid": "Sigmoid"}
_OPERATORS = {"lstm": "LSTM", "gru": "GRU", "gru_reset_before": "GRU"}
_OPERATORS |= dict.fromkeys(_ACTIVATIONS, "RNN")


def is_exporting() -> bool:
    """Whether torch.onnx.export runs the model."""
    recording = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return recording and _in_onnx_export()


@torch.compiler.assume_constant_result  # Dynamo takes the function it calls to be always False
def _in_onnx_export():
    return torch.onnx.is_in_onnx_export()


def layers(
    name: str,
    cell: str,
    x: Tensor,
    states: Sequence[Sequence[Tensor]],
    weights: Sequence[tuple[Tensor | None, ...]],
    directions: int,
    widths: Sequence[int],
    *,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
    hooks: Hooks | None = None,
) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """Layers over directions, a node for each layer.

    Args:
        name: of the module, for messages.
        cell: one of ``ops.CELLS``.
        x: [T, B, I].
        states: h_0 and of the LSTM c_0, each a list with [directions, B, H] of each layer, or none
            of them.
        weights: (w_ih, w_hh, b_ih, b_hh, w_hr) of each layer and direction, and with peepholes five
            more, the last of them [3*H] of i, f and o.
        widths: hidden units of each layer.
        lengths: [B] integers, or None.
        hooks: what adds residual links.

    Returns:
        output [T, B, directions * H] and h_n and, of the LSTM, c_n, laid out like ``states``.

    Raises:
        RuntimeError: for what ONNX has not: the cell, a projection.
    """
    if cell not in _OPERATORS:
        raise RuntimeError(f"{name}: ONNX has no node for the cell {cell!r}")
    if weights[0][4] is not None:
        raise RuntimeError(f"{name}: ONNX's LSTM has no projection; export with proj_size=0")
    if lengths is not None:
        lengths = lengths.to(torch.int32)
    last = []
    for first in range(0, len(weights), directions):
        before = x
        if first and dropout:
            x = torch.dropout(x, dropout, True)
        layer = first // directions
        given = [state[layer] for state in states]
        group = weights[first : first + directions]
        output, *after = _layer(cell, x, given, group, widths[layer], lengths)
        # [T, directions, B, H]
        x = output.squeeze(1) if directions == 1 else output.transpose(1, 2).flatten(2)
        if hooks is not None:
            x = hooks.after(first, before, x)
        last.append(after)
    return x, list(zip(*last))


def _layer(cell, x, states, weights, hidden, lengths):
    directions = len(weights)
    w_ih, w_hh, b_ih, b_hh = (
        None if tensors[0] is None else _in_order(cell, torch.stack(tensors), hidden)
        for tensors in list(zip(*weights))[:4]
    )
    biases = None if b_ih is None else torch.cat((b_ih, b_hh), 1)
    peepholes = None
    if len(weights[0]) > 5:
        i, f, o = torch.stack([tensors[-1] for tensors in weights]).chunk(3, 1)
        peepholes = torch.cat((i, o, f), 1)
    inputs = [x, w_ih, w_hh, biases, lengths, *(states or (None, None)), peepholes]
    while inputs[-1] is None:
        inputs.pop()
    attributes = {
        "hidden_size": hidden,
        "direction": "bidirectional" if directions == 2 else "forward",
    }
    if cell in _ACTIVATIONS:
        attributes["activations"] = [_ACTIVATIONS[cell]] * directions
    if cell.startswith("gru"):
        attributes["linear_before_reset"] = int(cell == "gru")
    operator = _OPERATORS[cell]
    if torch.jit.is_tracing():
        return _TracedNode.apply(operator, attributes, *inputs)
    shapes = _shapes(operator, x, w_hh)
    return torch.onnx.ops.symbolic_multi_out(
        operator, inputs, attributes, dtypes=[x.dtype] * len(shapes), shapes=shapes
    )


def _in_order(cell, stacked, hidden):
    """[directions, G*H, ...] with the gates in ONNX's order."""
    order = _GATE_ORDER.get(cell)
    if order is None:
        return stacked
    # Slices and one concatenation of constants: both exporters fold those.
    return torch.cat([stacked[:, k * hidden : (k + 1) * hidden] for k in order], 1)


def _shapes(operator, x, w_hh):
    state = (w_hh.size(0), x.size(1), w_hh.size(2))
    return [(x.size(0), *state), *[state] * (2 if operator == "LSTM" else 1)]


class _TracedNode(torch.autograd.Function):
    """A node for the exporter that traces (``dynamo=False``), which wants a value too."""

    @staticmethod
    def forward(ctx, operator, attributes, x, w_ih, w_hh, *inputs):
        return tuple(x.new_zeros(shape) for shape in _shapes(operator, x, w_hh))

    @staticmethod
    def symbolic(g, operator, attributes, *inputs):
        def absent():
            value = g.op("prim::Constant")
            value.setType(torch._C.OptionalType.ofTensor())
            return value

        suffix = {int: "i", str: "s", list: "s"}
        named = {f"{key}_{suffix[type(value)]}": value for key, value in attributes.items()}
        given = [absent() if value is None else value for value in inputs]
        return g.op(operator, *given, **named, outputs=3 if operator == "LSTM" else 2)
