"""What online learning needs of a layer: its cell, and its parameters as they are now."""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..layers import RecurrentLayers

__all__ = ["Gradients", "Layer", "Status"]

NAMES = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")

_REFUSED = {
    "weight_dropout": "a mask holds for one call, and a stream has no end; use weight_dropout=0",
    "variational_dropout": "a mask holds for one sequence, and a stream has no end; use "
    "variational_dropout=0, or mask what goes in",
    "zoneout": "the influence on a state that is held back is not computed; use zoneout=0",
    "learn_initial_state": "a stream begins at zeros, and the influence of another beginning is "
    "not computed; use learn_initial_state=False",
    "layer_norm": "the influence through means and variances is not computed; use layer_norm=False",
    "peephole": "the influence through peepholes is not computed; use peephole=False",
}

# Of w_ih, w_hh, b_ih and b_hh, and whether they are finite.
Gradients: TypeAlias = tuple[Sequence[Tensor | None], bool]


class Status(IntEnum):
    """How a step or an accumulation ended: `RtrlStatus` of csrc/ops/rtrl.h."""

    DONE = 0
    UNSUITABLE = 1
    INPUT_NOT_FINITE = 2
    NOT_FINITE = 3


class Layer(NamedTuple):
    module: Any
    cell: str
    input_size: int
    hidden_size: int
    names: tuple[str, ...]

    @classmethod
    def of(cls, module: Any) -> "Layer":
        """Raises TypeError or ValueError, with the reason, for what RTRL does not do."""
        kind = type(module).__name__
        if isinstance(module, torch.nn.RNNBase) and not isinstance(module, RecurrentLayers):
            raise TypeError(
                f"RTRL: {kind} is not a layer of rnn_ext; call rnn_ext.accelerate(module) first"
            )
        if not isinstance(module, RecurrentLayers):
            raise TypeError(f"RTRL: takes an rnn_ext.RNN, LSTM or GRU, got {kind}")
        if module.num_layers > 1:
            raise ValueError(
                f"RTRL: {kind} has {module.num_layers} layers; the gradient of a stack is exact "
                "only with the states of all layers as one, whose influence matrix grows with the "
                "square of their number, and that is not done; use one layer"
            )
        if module.bidirectional:
            raise ValueError(
                f"RTRL: {kind} is bidirectional; the backward direction starts at the end of the "
                "sequence, which a stream has not"
            )
        if module.proj_size:
            raise ValueError(
                f"RTRL: {kind} has proj_size={module.proj_size}; the influence of parameters on a "
                "projected state is not computed; use proj_size=0"
            )
        if module.grad_clip is not None:
            raise ValueError(
                f"RTRL: {kind} has grad_clip={module.grad_clip!r}, which clips dL/dh_t; gradients "
                "carried forward in time have none: clip those of the parameters instead"
            )
        for option, reason in _REFUSED.items():
            if getattr(module, option):
                value = getattr(module, option)
                raise ValueError(f"RTRL: {kind} has {option}={value!r}; {reason}")
        names = {True: NAMES, "single": NAMES[:3], False: NAMES[:2]}[module.bias]
        missing = [name for name in names if name not in module._parameters]
        if missing:
            raise ValueError(
                f"RTRL: {missing[0]} of {kind} is computed from other parameters; remove its "
                "parametrization"
            )
        more = sorted(set(module._parameters) - set(names))
        if more:
            raise ValueError(f"RTRL: {kind} has parameters that RTRL does not know: {more}")
        layer = cls(module, module._cell, module.input_size, module._widths()[0], names)
        for name, weight in zip(names, layer.parameters()):
            if weight.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"RTRL: {name} is {weight.dtype}; use float32 or float64")
            if weight.device.type not in ("cpu", "cuda"):
                raise TypeError(f"RTRL: {name} is on {weight.device}; use the CPU or CUDA")
        return layer

    def parameters(self) -> list[Tensor]:
        return [self.module._parameters[name] for name in self.names]

    def weights(self) -> list[Tensor | None]:
        """w_ih, w_hh, b_ih, b_hh."""
        found = self.parameters()
        if len(found) == 3:  # bias="single"
            return [*found, torch.zeros_like(found[2])]
        return [*found, *[None] * (4 - len(found))]

    def add_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters(), gradients):
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = gradient.clone()
            else:
                parameter.grad.add_(gradient)
