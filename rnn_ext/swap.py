"""`accelerate` and `restore`: exchange the recurrent layers of a model that exists with torch.nn's.

A module's class is exchanged and nothing else, so whatever refers to the module, its parameters,
hooks or buffers (an optimizer, a container, a second owner) goes on referring to the same objects.
"""

from typing import TypeVar

import torch
from torch.nn.utils import parametrize

from .cells import GRUCell, LSTMCell, RNNCell
from .modules import GRU, LSTM, RNN
from .options import DEFAULTS

__all__ = ["accelerate", "restore"]

Model = TypeVar("Model", bound=torch.nn.Module)

_OURS = {ours._twin: ours for ours in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)}
_TORCH = {ours: twin for twin, ours in _OURS.items()}
# Attributes of ours that torch.nn's classes have not: choices of initialization, already made, of
# what training keeps, and options that are off.
_ONLY_OURS = ("forget_bias", "recurrent_init", "_control")
_ONLY_OURS += ("_extended", "_option_words", "_ratios", *DEFAULTS)


def accelerate(model: Model) -> Model:
    """Makes every torch.nn.RNN, LSTM, GRU and cell in ``model`` rnn_ext's, in place; returns
    ``model``.

    Parameters, buffers, hooks, parametrizations, training flags and the modules themselves stay the
    same objects, so an optimizer made before goes on working. Instances of classes derived from
    torch.nn's are left alone, because what they override may not be ours to replace. Safe to call
    twice.

    Args:
        model: any `torch.nn.Module`, also a bare layer.

    Raises:
        TypeError: ``model`` is no module.
    """
    _exchange(model, "accelerate", _OURS)
    return model


def restore(model: Model) -> Model:
    """Makes every layer and cell of rnn_ext in ``model`` torch.nn's again, in place; returns
    ``model``.

    The opposite of `accelerate`, also for models built from rnn_ext's layers.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a layer does what torch.nn's cannot (named, with the module); nothing was
            changed.
    """
    for name, module in _exchangeable(model, "restore", _TORCH):
        if module._extra is not None:
            raise ValueError(
                f"restore: {name or 'the model'} is a {module._get_name()} with {module._extra}, "
                "which torch.nn has not"
            )
    for module in _exchange(model, "restore", _TORCH):
        for attribute in _ONLY_OURS:
            module.__dict__.pop(attribute, None)
    return model


def _exchange(model, caller, classes):
    """Gives each module of ``model`` the class that replaces its own; returns those changed."""
    changed = [module for _, module in _exchangeable(model, caller, classes)]
    for module in changed:
        own = own_class(module)
        if own is type(module):
            module.__class__ = classes[own]
        else:
            # Parametrized: a class made for this module, with a property for each such tensor.
            namespace = {
                key: value
                for key, value in type(module).__dict__.items()
                if key not in ("__dict__", "__weakref__", "__doc__")
            }
            module.__class__ = type(type(module).__name__, (classes[own],), namespace)
    return changed


def _exchangeable(model, caller, classes):
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")
    return [item for item in model.named_modules() if own_class(item[1]) in classes]


def own_class(module: torch.nn.Module) -> type:
    """The module's class, without what `torch.nn.utils.parametrize` put in front of it."""
    if parametrize.is_parametrized(module):
        return type(module).__bases__[0]
    return type(module)
