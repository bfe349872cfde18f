"""Initializations that torch.nn's layers do not offer; applied after theirs, gate by gate."""

import numbers

import torch
from torch import Tensor

__all__ = ["checked_forget_bias", "checked_recurrent_init", "forget_bias_", "recurrent_"]

_RECURRENT = {"orthogonal": torch.nn.init.orthogonal_, "identity": torch.nn.init.eye_}


def checked_recurrent_init(name: str, kind: str | None) -> str | None:
    """``kind`` if it is one we know, else ValueError; ``name`` starts the message."""
    if kind is not None and kind not in _RECURRENT:
        raise ValueError(
            f"{name}: recurrent_init must be None, 'orthogonal' or 'identity', got {kind!r}"
        )
    return kind


def checked_forget_bias(name: str, value: float | None) -> float | None:
    """``value`` as a float, or None; TypeError if it is no number."""
    if value is None:
        return None
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: forget_bias must be a number or None, got {value!r}")
    return float(value)


def recurrent_(weight_hh: Tensor, hidden_size: int, kind: str) -> None:
    """Sets each gate's [hidden_size, hidden_size or proj_size] block of ``weight_hh``, in place."""
    for gate in weight_hh.detach().split(hidden_size):
        wide = gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, torch.float32))
        gate.copy_(_RECURRENT[kind](wide))


def forget_bias_(
    name: str, bias_ih: Tensor | None, bias_hh: Tensor | None, hidden_size: int, value: float
) -> None:
    """Makes ``bias_ih + bias_hh`` of an LSTM's forget gate ``value``, in place."""
    if bias_ih is None:
        raise ValueError(f"{name}: forget_bias needs bias=True")
    forget_gate = slice(hidden_size, 2 * hidden_size)
    bias_ih.detach()[forget_gate] = value
    bias_hh.detach()[forget_gate] = 0.0
