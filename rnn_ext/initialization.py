"""Initializations that torch.nn's layers do not offer; applied after theirs, gate by gate."""

import numbers

import torch

_RECURRENT = {"orthogonal": torch.nn.init.orthogonal_, "identity": torch.nn.init.eye_}


def checked_recurrent_init(name, kind):
    """``kind`` if it is one we know, else ValueError; ``name`` starts the message."""
    if kind is not None and kind not in _RECURRENT:
        raise ValueError(
            f"{name}: recurrent_init must be None, 'orthogonal' or 'identity', got {kind!r}"
        )
    return kind


def checked_forget_bias(name, value):
    """``value`` as a float, or None; TypeError if it is no number."""
    if value is None:
        return None
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: forget_bias must be a number or None, got {value!r}")
    return float(value)


def recurrent_(weight_hh, hidden_size, kind):
    """Sets each gate's [hidden_size, hidden_size or proj_size] block of ``weight_hh``, in place."""
    for gate in weight_hh.detach().split(hidden_size):
        wide = gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, torch.float32))
        gate.copy_(_RECURRENT[kind](wide))


def forget_bias_(name, bias_ih, bias_hh, hidden_size, value):
    """Makes ``bias_ih + bias_hh`` of an LSTM's forget gate ``value``, in place."""
    if bias_ih is None:
        raise ValueError(f"{name}: forget_bias needs bias=True")
    forget_gate = slice(hidden_size, 2 * hidden_size)
    bias_ih.detach()[forget_gate] = value
    bias_hh.detach()[forget_gate] = 0.0
