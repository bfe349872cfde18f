"""Recurrent layers as functions of plain tensors: one layer in one direction.

Shapes, with T steps, batch B, I input features, H hidden units, P projected units and G gates:

===========  =========================================================================
``input``    [T, B, I], or [B, T, I] with ``batch_first``; [N, I] with ``batch_sizes``
``hx``       [B, H]; of the LSTM a pair ([B, P or H], [B, H]); None means zeros
``w_ih``     [G*H, I], gates in torch's order: i, f, g, o of the LSTM, r, z, n of the GRU
``w_hh``     [G*H, H], or [G*H, P] with a projection
``b_ih``     [G*H], as is ``b_hh``; both or neither
``w_hr``     [P, H], the LSTM's projection
``output``   like ``input`` with the layer's output size last
===========  =========================================================================

``batch_sizes`` (int64 [T] on the CPU, as in `torch.nn.utils.rnn.PackedSequence`) says how many
sequences are alive at each step of a packed input. ``reverse`` walks from the last step to the
first; ``output`` keeps the order of ``input``.

``resets`` (bool [T, B], [B, T] with ``batch_first``, [N] with ``batch_sizes``) parts sequences:
where it is True at step t, no state passes between steps t - 1 and t, in whichever direction the
layer walks. The step that would have received it starts from zeros or, if given, from
``initial_state`` (the form of ``hx``, batch B or 1), and no gradient crosses. ``hx`` serves the
first step of the walk, unless that is step 0 and ``resets`` is True there.

All raise ``TypeError`` for what is no tensor, ``ValueError`` for wrong dtypes, choices and batch
sizes, and ``RuntimeError`` for wrong shapes and devices, in each case naming the argument.
"""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import composite, ops
from .backend import current, uncovered, warn_once
from .stack import stack, with_restored

__all__ = ["gru", "lstm", "rnn"]


def gates(cell: str) -> int:
    """How many gates ``cell`` (a name of ``ops.CELLS``) has."""
    return {"rnn": 1, "lstm": 4, "gru": 3}[cell.partition("_")[0]]


def rnn(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    batch_first: bool = False,
    resets: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Simple recurrent network (Elman 1990): h_t = f(W x_t + b_ih + U h_{t-1} + b_hh).

    ``nonlinearity`` is f: "tanh", "relu" or "sigmoid". Returns ``(output, h_n [B, H])``; the
    module's docstring has the other shapes and the errors.
    """
    if nonlinearity not in ("tanh", "relu", "sigmoid"):
        raise ValueError(
            f"rnn: nonlinearity must be 'tanh', 'relu' or 'sigmoid', got {nonlinearity!r}"
        )
    weights = (w_ih, w_hh, b_ih, b_hh, None)
    layout = batch_sizes, reverse, batch_first, resets, initial_state
    return _one_layer("rnn", f"rnn_{nonlinearity}", input, hx, weights, *layout)[:2]


def gru(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    reset_after: bool = True,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    batch_first: bool = False,
    resets: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated recurrent unit: r, z = s(W x_t + U h_{t-1} + b);  h_t = (1 - z) n + z h_{t-1}.

    ``reset_after=True`` is torch's and cuDNN's candidate, n = tanh(W_n x_t + b_in + r (U_n h_{t-1}
    + b_hn)); ``False`` the original one (Cho et al. 2014, arXiv:1406.1078), n = tanh(W_n x_t + b_in
    + U_n (r h_{t-1}) + b_hn). Textbooks that write h_t = (1 - z') h_{t-1} + z' n have z' = 1 - z:
    flip the sign of the z rows of weights and biases. Returns ``(output, h_n [B, H])``; the
    module's docstring has the other shapes and the errors.
    """
    weights = (w_ih, w_hh, b_ih, b_hh, None)
    cell = "gru" if reset_after else "gru_reset_before"
    layout = batch_sizes, reverse, batch_first, resets, initial_state
    return _one_layer("gru", cell, input, hx, weights, *layout)[:2]


@overload
def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    *,
    return_cells: Literal[False] = False,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    batch_first: bool = False,
    resets: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...
@overload
def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    *,
    return_cells: Literal[True],
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    batch_first: bool = False,
    resets: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]: ...
def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    *,
    return_cells: bool = False,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    batch_first: bool = False,
    resets: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
) -> Any:
    """LSTM with forget gate (Gers et al. 2000), and projection if ``w_hr`` is given (Sak et al.
    2014).

    i, f, o = s(a);  g = tanh(a);  a = W x_t + b_ih + U h_{t-1} + b_hh;
    c_t = f c_{t-1} + i g;  h_t = o tanh(c_t), or W_hr (o tanh(c_t)).

    Returns ``(output, (h_n [B, P or H], c_n [B, H]))`` and, with ``return_cells``, every c_t laid
    out like ``output`` as a third result; the module's docstring has the other shapes and the
    errors.
    """
    weights = (w_ih, w_hh, b_ih, b_hh, w_hr)
    layout = batch_sizes, reverse, batch_first, resets, initial_state
    output, h_n, c_n, cells = _one_layer(
        "lstm", "lstm", input, hx, weights, *layout, return_cells=return_cells
    )
    return (output, (h_n, c_n), cells) if return_cells else (output, (h_n, c_n))


def _one_layer(
    name,
    cell,
    input,
    hx,
    weights,
    batch_sizes,
    reverse,
    batch_first,
    resets,
    initial_state,
    *,
    return_cells=False,
):
    states = _check(name, input, hx, weights, batch_sizes, batch_first)
    x = input.transpose(0, 1) if batch_first else input
    w_hh, w_hr = weights[1], weights[4]
    if states is None:
        batch = x.size(1) if batch_sizes is None else int(batch_sizes[0])
        h0 = c0 = x.new_zeros(batch, w_hh.size(1))
        if w_hr is not None:
            c0 = x.new_zeros(batch, w_hr.size(1))
    else:
        h0, c0 = states[0], states[-1]
    if name != "lstm":
        c0 = None
    restored = _check_resets(name, input, h0.size(0), resets, initial_state, weights)
    if resets is not None:
        resets = resets.transpose(0, 1) if batch_first else resets
        h0, c0 = with_restored(h0, c0, restored, batch_sizes is not None)

    run = ops.layer
    reason = uncovered(x, (h0, c0), [weights])
    if reason is not None:
        run = composite.layer
        backend = current()
        if backend not in ("auto", "reference"):
            raise RuntimeError(f"{name}: the backend {backend!r} cannot run this: {reason}")
        if backend == "auto":
            warn_once(f"{name}: {reason}; composed of torch operations instead")
    output, (h_n,), (c_n,), cells = stack(
        cell,
        x,
        [h0],
        [c0],
        [weights],
        batch_sizes=batch_sizes,
        reverse=reverse,
        resets=resets,
        return_cells=return_cells,
        run=run,
    )
    if batch_first:
        output, cells = output.transpose(0, 1), None if cells is None else cells.transpose(0, 1)
    return output, h_n, c_n, cells


def _check(name, input, hx, weights, batch_sizes, batch_first):
    """Raises unless the arguments fit together; returns ``hx`` as a tuple of states, or None."""
    states = _states(name, hx)
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    named = {"input": input, "w_ih": w_ih, "w_hh": w_hh}
    optional = {"b_ih": b_ih, "b_hh": b_hh, "w_hr": w_hr}
    if states is not None:
        optional.update({"hx": hx} if name != "lstm" else {"hx[0]": hx[0], "hx[1]": hx[1]})
    named.update((key, tensor) for key, tensor in optional.items() if tensor is not None)
    for key, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {key} must be a tensor, got {type(tensor).__name__}")
        check_like(name, key, tensor, input)
    if not input.is_floating_point():
        raise ValueError(f"{name}: input must have a floating-point dtype, got {input.dtype}")
    if ("b_ih" in named) != ("b_hh" in named):
        raise RuntimeError(f"{name}: give both b_ih and b_hh, or neither")

    batch = _check_input(name, input, batch_sizes, batch_first)
    count = gates(name)
    if w_hh.dim() != 2 or w_hh.size(0) % count:
        raise RuntimeError(
            f"{name}: w_hh must be [{count} * hidden, hidden], got {list(w_hh.shape)}"
        )
    hidden = w_hh.size(0) // count
    width = hidden if w_hr is None else w_hr.size(0)
    expected = {
        "w_ih": (count * hidden, input.size(-1)),
        "w_hh": (count * hidden, width),
        "b_ih": (count * hidden,),
        "b_hh": (count * hidden,),
        "w_hr": (width, hidden),
        "hx": (batch, width),
        "hx[0]": (batch, width),
        "hx[1]": (batch, hidden),
    }
    for key, tensor in named.items():
        if key in expected and tensor.shape != expected[key]:
            raise RuntimeError(
                f"{name}: {key} must have shape {list(expected[key])}, got {list(tensor.shape)}"
            )
    return states


def check_like(name: str, key: str, tensor: Tensor, input: Tensor) -> None:
    """Raises unless ``tensor``, the argument ``key``, has the device and dtype of ``input``."""
    if tensor.device != input.device:
        raise RuntimeError(
            f"{name}: {key} is on {tensor.device} but input on {input.device}; move one of them"
        )
    if tensor.dtype != input.dtype and not torch._C._is_any_autocast_enabled():
        raise ValueError(
            f"{name}: {key} has dtype {tensor.dtype} but input {input.dtype}; convert one of them"
        )


def check_resets(name: str, resets: object, shape: Sequence[int], device: torch.device) -> None:
    """Raises unless ``resets`` is a bool tensor of this shape on this device."""
    if not isinstance(resets, Tensor):
        raise TypeError(f"{name}: resets must be a bool tensor, got {type(resets).__name__}")
    if resets.dtype != torch.bool:
        raise ValueError(
            f"{name}: resets must have dtype torch.bool, got {resets.dtype}; give resets.bool()"
        )
    if resets.shape != torch.Size(shape):
        raise ValueError(
            f"{name}: resets must have shape {list(shape)}, as the steps of input, "
            f"got {list(resets.shape)}"
        )
    if resets.device != device:
        raise RuntimeError(
            f"{name}: resets is on {resets.device} but input on {device}; move one of them"
        )


def _check_resets(name, input, batch, resets, initial_state, weights):
    """Raises unless these fit ``input``; returns ``initial_state`` as a tuple, or None."""
    if resets is not None:
        check_resets(name, resets, input.shape[:-1], input.device)
    elif initial_state is not None:
        raise ValueError(f"{name}: initial_state is what resets restore; give resets, or hx")
    restored = _states(name, initial_state, "initial_state")
    hidden = weights[0].size(0) // gates(name)
    sizes = weights[1].size(1), hidden
    for i, state in enumerate(restored or ()):
        key = "initial_state" if name != "lstm" else f"initial_state[{i}]"
        if not isinstance(state, Tensor):
            raise TypeError(f"{name}: {key} must be a tensor, got {type(state).__name__}")
        if state.shape not in ((1, sizes[i]), (batch, sizes[i])):
            raise RuntimeError(
                f"{name}: {key} must have shape [{batch} or 1, {sizes[i]}], got {list(state.shape)}"
            )
        check_like(name, key, state, input)
    return restored


def _states(name, hx, argument="hx"):
    if hx is None:
        return None
    if name != "lstm":
        return (hx,)
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        raise TypeError(
            f"lstm: {argument} must be a pair (h_0, c_0) of tensors, got {type(hx).__name__}"
        )
    return tuple(hx)


def _check_input(name, input, batch_sizes, batch_first):
    """Raises unless ``input`` and ``batch_sizes`` fit; returns the batch size."""
    rank = 3 if batch_sizes is None else 2
    if input.dim() != rank:
        layout = "[T, B, I]" if rank == 3 else "[N, I] with batch_sizes"
        raise RuntimeError(
            f"{name}: input must have {rank} dimensions {layout}, got {list(input.shape)}"
        )
    if batch_sizes is None:
        if input.size(1 if batch_first else 0) == 0:
            raise RuntimeError(f"{name}: input must have at least one time step")
        return input.size(0 if batch_first else 1)
    if batch_first:
        raise ValueError(
            f"{name}: batch_first has no meaning for packed input (batch_sizes is given)"
        )
    if (
        not isinstance(batch_sizes, Tensor)
        or batch_sizes.dtype != torch.int64
        or batch_sizes.dim() != 1
        or not batch_sizes.is_cpu
    ):
        raise ValueError(f"{name}: batch_sizes must be a 1-D int64 tensor on the CPU")
    sizes = batch_sizes.tolist()
    ordered = sizes == sorted(sizes, reverse=True)
    if not sizes or sizes[-1] < 1 or not ordered or sum(sizes) != input.size(0):
        raise ValueError(
            f"{name}: batch_sizes must be positive, never increase and sum to {input.size(0)}, "
            f"the rows of input; got {sizes}"
        )
    return sizes[0]
