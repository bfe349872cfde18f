"""layer_norm and peephole of layers: checks, parameters and their initialization."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import functional

__all__ = ["OPTIONS", "WithNormalization"]

OPTIONS: tuple[str, ...] = ("layer_norm", "peephole")
# In the order of normalization.EXTRAS
_NAMES = (
    "weight_layer_norm_ih", "weight_layer_norm_hh", "weight_layer_norm_cell",
    "bias_layer_norm_cell", "weight_peephole",
)  # fmt: skip


class WithNormalization:
    """Mixed into layers; `RecurrentLayers` says what the options do."""

    layer_norm: bool = False
    peephole: bool = False

    @property
    def _whole_rows(self):
        """Whether the cell is one of those that look at whole rows (normalized.py)."""
        return self.layer_norm or self.peephole

    def _check_normalization(self, proj_size):
        if self.peephole and self._cell != "lstm":
            raise ValueError(f"{self._get_name()}: peephole belongs to the LSTM alone")
        if proj_size and self._whole_rows:
            option = "layer_norm" if self.layer_norm else "peephole"
            raise ValueError(
                f"{self._get_name()}: {option}=True has no projection; leave proj_size out, or put "
                "a torch.nn.Linear after the layer"
            )

    def _make_normalization(self, factory):
        """Adds the parameters of the options that are on."""
        lstm, gates = self._cell == "lstm", functional.gates(self._cell)
        for suffix, width in zip(self._suffixes(), self._widths_of_groups()):
            sizes = (
                gates * width if self.layer_norm else 0,
                gates * width if self.layer_norm else 0,
                width if self.layer_norm and lstm else 0,
                width if self.layer_norm and lstm and self.bias else 0,
                3 * width if self.peephole else 0,
            )
            for name, size in zip(_NAMES, sizes):
                if size:
                    value = Parameter(torch.empty(size, **factory))
                    self.register_parameter(name + suffix, value)
        self._reset_normalization()

    def _reset_normalization(self):
        """Gains of 1, biases of 0, and peepholes as torch.nn's weights, U(-H^-1/2, H^-1/2)."""
        for suffix, width in zip(self._suffixes(), self._widths_of_groups()):
            bound = 1 / math.sqrt(width)
            for name in _NAMES:
                parameter = self._parameters.get(name + suffix)
                if parameter is None:
                    continue
                if name == "weight_peephole":
                    torch.nn.init.uniform_(parameter, -bound, bound)
                else:
                    torch.nn.init.constant_(parameter, float(name.startswith("weight")))

    def _suffixes(self):
        directions = ("", "_reverse")[: 2 if self.bidirectional else 1]
        return [f"_l{layer}{way}" for layer in range(self.num_layers) for way in directions]

    def _with_extras(self, groups: list[tuple[Any, ...]]) -> list[tuple[Tensor | None, ...]]:
        """``groups`` of weights, each with the five tensors of `normalized.layer` after it."""
        return [
            (*group, *(getattr(self, name + suffix, None) for name in _NAMES))
            for group, suffix in zip(groups, self._suffixes())
        ]
