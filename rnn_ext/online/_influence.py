"""The influence of every parameter on the state, carried forward by the kernels of csrc/cpu/rtrl.h.

Exact, it is dh_t/dtheta, H P numbers for each sequence (LSTM: 2 H P, with dc_t/dtheta), and lags up
to `_C.rtrl_pending_steps` steps behind the state: what those steps need is kept beside it. Diagonal
(SnAp-1), it is P or 2 P numbers.
"""

import torch
from torch import Tensor

from .. import _C
from ._layer import Gradients, Layer, Status

__all__ = ["Carried", "Influence"]


class Carried:
    """Tensors by name, None where there are none, that go on from step to step."""

    keeps: tuple[str, ...]

    def reset(self, mask: Tensor) -> None:
        for name in self.keeps:
            part = getattr(self, name)
            if part is not None:
                part[mask] = 0.0

    def is_due(self) -> bool:
        return False

    def flush(self) -> Gradients | None:
        return None

    def tensors(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in self.keeps}
        return {name: t.clone() for name, t in found.items() if t is not None}

    def load(self, tensors: dict[str, Tensor]) -> None:
        own = self.tensors()
        if own.keys() != tensors.keys():
            raise ValueError(f"RTRL: expected the tensors {list(own)}, got {list(tensors)}")
        for name, value in tensors.items():
            if value.shape != own[name].shape or value.dtype != own[name].dtype:
                raise ValueError(
                    f"RTRL: {name} must be {own[name].dtype} {list(own[name].shape)}, got "
                    f"{value.dtype} {list(value.shape)}"
                )
        for name, value in tensors.items():
            setattr(self, name, value.detach().to(own[name].device, copy=True))


class Influence(Carried):
    keeps = ("h", "c", "influence")

    def __init__(self, layer: Layer, batch: int, diagonal: bool) -> None:
        self.layer = layer
        weights = layer.weights()
        self.h = weights[1].new_zeros(batch, layer.hidden_size)
        self.c = self.h.clone() if layer.cell == "lstm" else None
        self.influence, self.steps = _C.rtrl_influence(layer.cell, weights, batch, diagonal)
        self.start, self.count = torch.zeros(batch, dtype=torch.int64), 0

    @property
    def pending(self) -> tuple[Tensor, Tensor, int] | None:
        return None if self.steps is None else (self.steps, self.start, self.count)

    def reset(self, mask: Tensor) -> None:
        self.start[mask] = self.count
        super().reset(mask)

    def step(self, x: Tensor, mask: Tensor | None) -> tuple[int, Tensor | None]:
        """A step's `Status`, and h where it is DONE."""
        if self.count == _C.rtrl_pending_steps:
            self.advance()
        layer, pending = self.layer, self.pending
        status, h = _C.rtrl_step(
            layer.cell, layer.weights(), x, mask, self.h, self.c, self.influence, pending
        )
        if status == Status.DONE and pending is not None:
            self.count += 1
        return status, h

    def advance(self) -> None:
        """Lets the influence catch up with the state."""
        if self.count:
            _C.rtrl_advance(self.layer.cell, self.layer.weights(), self.influence, self.pending)
            self.count = 0

    def accumulate(self, d_h: Tensor) -> int:
        """Adds to the gradients of the parameters; returns a `Status`."""
        layer = self.layer
        return _C.rtrl_accumulate(layer.cell, layer.weights(), d_h, self.influence, self.pending)

    def tensors(self) -> dict[str, Tensor]:
        self.advance()
        return super().tensors()

    def bytes(self) -> int:
        parts = (self.h, self.c, self.influence, self.steps, self.start)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)
