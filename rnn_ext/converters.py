"""Weights of other libraries' layers in the layout of ours and torch.nn's, and back to Keras.

Functions of arrays: anything that numpy.asarray takes, tensors included. ``from_...`` return a dict
of tensors that a layer's ``load_state_dict`` takes, of one layer (``layer``) in one direction
(``reverse``); merge the dicts for more:

>>> import rnn_ext
>>> from rnn_ext.converters import from_keras, to_keras
>>> layer = rnn_ext.LSTM(3, 5)
>>> weights = to_keras("LSTM", layer.state_dict())  # what keras_layer.set_weights takes
>>> [array.shape for array in weights]
[(3, 20), (5, 20), (20,)]
>>> layer.load_state_dict(from_keras("LSTM", weights))
<All keys matched successfully>

==========  ====================  ==========  ======================================================
library     LSTM                  GRU         layout
==========  ====================  ==========  ======================================================
torch, us   i, f, g, o            r, z, n     [G*H, I], [G*H, H], two biases
Keras       i, f, c (our g), o    z, r, h     [I, G*H], [H, G*H], one bias; two of the GRU with
                                              ``reset_after=True``
ONNX        i, o, f, c            z, r, h     [directions, G*H, I], both biases one after the other;
                                              peepholes [directions, 3*H] of i, o, f
haste       i, g, f, o            z, r, h     [I, G*H], [H, G*H], one bias of the LSTM, two of the
                                              GRU
==========  ====================  ==========  ======================================================

All of them compute h_t = (1 - z) n + z h_{t-1}, as we do. Keras' GRU with ``reset_after=False`` is
ours with ``reset_after=False``, and so is ONNX's with ``linear_before_reset=0``.

Sources: keras.layers.LSTM, GRU and SimpleRNN (clients/test_keras.py runs them beside ours);
https://onnx.ai/onnx/operators; lmnt-com/haste, frameworks/pytorch/lstm.py and gru.py
(``to_native_weights``).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

__all__ = ["from_haste", "from_keras", "from_onnx", "to_keras"]

# Where each gate of ours stands in the other library's order.
_KERAS = {"RNN": (0,), "LSTM": (0, 1, 2, 3), "GRU": (1, 0, 2)}
_ONNX = {"RNN": (0,), "LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2)}
_HASTE = {"LSTM": (0, 2, 1, 3), "GRU": (1, 0, 2)}


def from_keras(
    kind: str,
    weights: Sequence[Any],
    *,
    layer: int = 0,
    reverse: bool = False,
    single_bias: bool = False,
) -> dict[str, Tensor]:
    """The parameters of a layer from ``keras_layer.get_weights()``.

    Args:
        kind: "RNN" (Keras' SimpleRNN), "LSTM" or "GRU".
        weights: kernel [I, G*H], recurrent kernel [H, G*H] and, if there is one, the bias: [G*H],
            or [2, 3*H] of a GRU with ``reset_after=True``. Of a Bidirectional the first half is the
            one forward in time, the second half the ``reverse`` one.
        layer, reverse: which layer and direction the names say.
        single_bias: for a layer with ``bias="single"``: no bias_hh. ValueError where Keras has two.

    Raises:
        ValueError: an unknown kind, or arrays that do not fit together (named).
    """
    order = _order("from_keras", _KERAS, kind)
    if len(weights) not in (2, 3):
        raise ValueError(
            f"from_keras: weights must be kernel, recurrent kernel and at most one bias, got "
            f"{len(weights)} arrays"
        )
    kernel, recurrent, *biases = map(_array, weights)
    b_ih = b_hh = None
    if biases:
        (bias,) = biases
        two = bias.ndim == 2 and kind == "GRU"
        b_ih = bias[0] if two else bias
        b_hh = bias[1] if two else np.zeros_like(bias)
        if single_bias:
            if two:
                raise ValueError(
                    "from_keras: single_bias=True cannot hold the two biases of a GRU with "
                    "reset_after=True"
                )
            b_hh = None
    return _parameters("from_keras", order, kernel.T, recurrent.T, b_ih, b_hh, layer, reverse)


def to_keras(
    kind: str,
    state: Mapping[str, Any],
    *,
    layer: int = 0,
    reverse: bool = False,
    reset_after: bool = True,
) -> list[ndarray]:
    """What ``keras_layer.set_weights`` takes, from a layer's ``state_dict()``.

    Args:
        kind, layer, reverse: as of `from_keras`.
        state: with weight_ih_l0, weight_hh_l0 and, if there are biases, bias_ih_l0 and perhaps
            bias_hh_l0 (for layer 0).
        reset_after: of the GRU: whether it keeps its two biases, [2, 3*H]. Elsewhere they are added
            up.

    Raises:
        ValueError: an unknown kind, a projection, or a missing array (named).
    """
    order = _order("to_keras", _KERAS, kind)
    suffix = _suffix(layer, reverse)
    if f"weight_hr{suffix}" in state:
        raise ValueError(f"to_keras: weight_hr{suffix}: Keras' LSTM has no projection")
    for name in ("weight_ih", "weight_hh"):
        if f"{name}{suffix}" not in state:
            raise ValueError(f"to_keras: state has no {name}{suffix}")
    inverse = np.argsort(order)
    w_ih, w_hh, b_ih, b_hh = (
        _reordered(_array(state[name]), inverse) if name in state else None
        for name in (f"{name}{suffix}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    )
    weights = [np.ascontiguousarray(w_ih.T), np.ascontiguousarray(w_hh.T)]
    if b_ih is not None:
        b_hh = np.zeros_like(b_ih) if b_hh is None else b_hh
        weights.append(np.stack((b_ih, b_hh)) if kind == "GRU" and reset_after else b_ih + b_hh)
    return weights


def from_onnx(
    kind: str, weights: Sequence[Any], *, layer: int = 0, peepholes: Any = None
) -> dict[str, Tensor]:
    """The parameters of a layer, in both directions if there are two, from the inputs W, R and B of
    ONNX's node, and of an LSTM with ``peephole=True`` P.

    Args:
        kind: "RNN", "LSTM" or "GRU", as the node is called.
        weights: W [directions, G*H, I], R [directions, G*H, H] and, if there is one, B [directions,
            2*G*H]. A node with direction "reverse" counts as forward: give it its input reversed in
            time.
        layer: which layer the names say.
        peepholes: P [directions, 3*H] of i, o and f, or None; of the LSTM.

    Raises:
        ValueError: an unknown kind, or arrays that do not fit together (named).
    """
    order = _order("from_onnx", _ONNX, kind)
    arrays = [_array(w) for w in weights if w is not None]
    if len(arrays) not in (2, 3) or any(a.ndim != n for a, n in zip(arrays, (3, 3, 2))):
        shapes = [a.shape for a in arrays]
        raise ValueError(
            f"from_onnx: weights must be W [D, G*H, I], R [D, G*H, H] and perhaps B [D, 2*G*H], "
            f"got {shapes}"
        )
    if {len(a) for a in arrays} not in ({1}, {2}):
        raise ValueError("from_onnx: W, R and B must all have one direction, or all have two")
    parameters = {}
    for direction, (w, r, *b) in enumerate(zip(*arrays)):
        biases = np.split(b[0], 2) if b else (None, None)
        parameters |= _parameters("from_onnx", order, w, r, *biases, layer, bool(direction))
    if peepholes is None:
        return parameters
    looks, shape = _array(peepholes), (len(arrays[1]), 3 * arrays[1].shape[-1])
    if kind != "LSTM" or looks.shape != shape:
        raise ValueError(
            f"from_onnx: peepholes must be P [D, 3*H] of an LSTM, got {looks.shape} of {kind} with "
            f"R {arrays[1].shape}"
        )
    for direction, p in enumerate(looks):
        name = f"weight_peephole{_suffix(layer, bool(direction))}"
        parameters[name] = torch.from_numpy(_reordered(p, (0, 2, 1)))
    return parameters


def from_haste(
    kind: str, state: Mapping[str, Any], *, layer: int = 0, reverse: bool = False
) -> dict[str, Tensor]:
    """The parameters of a layer from the ``state_dict()`` of haste's LSTM or GRU for PyTorch.

    Args:
        kind: "LSTM" or "GRU" (reset after, haste has no other).
        state: kernel [I, G*H], recurrent_kernel [H, G*H], bias [G*H] and, of the GRU,
            recurrent_bias [G*H].
        layer, reverse: which layer and direction the names say.

    Raises:
        ValueError: an unknown kind, or arrays that are missing or do not fit together (named).
    """
    order = _order("from_haste", _HASTE, kind)
    names = ("kernel", "recurrent_kernel", "bias", "recurrent_bias")
    arrays = {name: _array(state[name]) for name in names if name in state}
    for name in names[: 3 + (kind == "GRU")]:
        if name not in arrays:
            raise ValueError(f"from_haste: state has no {name}")
    kernel, recurrent, b_ih = (arrays[name] for name in names[:3])
    b_hh = arrays.get("recurrent_bias", np.zeros_like(b_ih))
    return _parameters("from_haste", order, kernel.T, recurrent.T, b_ih, b_hh, layer, reverse)


def _order(caller, orders, kind):
    if kind not in orders:
        raise ValueError(f"{caller}: kind must be one of {', '.join(orders)}, got {kind!r}")
    return orders[kind]


def _suffix(layer, reverse):
    return f"_l{layer}{'_reverse' if reverse else ''}"


def _array(value):
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _reordered(array, order):
    """``array`` [G*H, ...] with its blocks of H rows in ``order``."""
    return np.concatenate([np.split(array, len(order))[k] for k in order])


def _parameters(caller, order, w_ih, w_hh, b_ih, b_hh, layer, reverse):
    """Arrays in torch's layout and the other library's order, as named tensors in ours."""
    count = len(order)
    if w_hh.ndim != 2 or w_hh.shape[0] != count * w_hh.shape[1]:
        raise ValueError(
            f"{caller}: the recurrent weights of {w_hh.shape[-1]} units must be {count} gates of "
            f"as many rows each, got {w_hh.shape} as torch lays them out"
        )
    rows = w_hh.shape[0]
    if w_ih.ndim != 2 or w_ih.shape[0] != rows:
        raise ValueError(
            f"{caller}: the input weights must be [{rows}, input_size] as torch lays them out, got "
            f"{w_ih.shape}"
        )
    for bias in (b_ih, b_hh):
        if bias is not None and bias.shape != (rows,):
            raise ValueError(f"{caller}: a bias must have {rows} entries, got {bias.shape}")
    named = {"weight_ih": w_ih, "weight_hh": w_hh, "bias_ih": b_ih, "bias_hh": b_hh}
    return {
        f"{name}{_suffix(layer, reverse)}": torch.from_numpy(_reordered(array, order))
        for name, array in named.items()
        if array is not None
    }
