"""The influence of every parameter on the state, carried forward by the kernels of csrc/cpu/rtrl.h.

Exact, it is dh_t/dtheta, H P numbers for each sequence (LSTM: 2 H P, with dc_t/dtheta); diagonal
(SnAp-1), P or 2 P of them.
"""

from torch import Tensor

from .. import _C
from ._layer import Gradients, Layer

__all__ = ["Influence"]


class Influence:
    keeps = ("h", "c", "influence")

    def __init__(self, layer: Layer, batch: int, diagonal: bool) -> None:
        self.layer, self.diagonal = layer, diagonal
        weights = layer.weights()
        self.h = weights[1].new_zeros(batch, layer.hidden_size)
        self.c = self.h.clone() if layer.cell == "lstm" else None
        self.influence = _C.rtrl_influence(layer.cell, weights, batch, diagonal)

    def reset(self, mask: Tensor) -> None:
        for part in (self.h, self.c, self.influence):
            if part is not None:
                part[mask] = 0.0

    def is_due(self) -> bool:
        return False

    def step(self, x: Tensor, mask: Tensor | None) -> tuple[int, Tensor | None]:
        """A step's `Status`, and h where it is DONE; all in one call of C++."""
        layer, c = self.layer, self.c
        return _C.rtrl_step(
            layer.cell, layer.weights(), x, mask, self.h, c, self.influence, self.diagonal
        )

    def accumulate(self, d_h: Tensor) -> int:
        """Adds to the gradients of the parameters; returns a `Status`."""
        layer = self.layer
        return _C.rtrl_accumulate(layer.cell, layer.weights(), d_h, self.influence, self.diagonal)

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
            setattr(self, name, value.detach().clone())

    def bytes(self) -> int:
        parts = (self.h, self.c, self.influence)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)
