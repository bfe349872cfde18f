"""What calling a layer or cell takes and gives, for type checkers; torch.nn.Module says ``Any``."""

from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = ["CellCall", "Device", "LSTMCall", "LSTMCellCall", "LayerCall", "Lengths", "Pair"]

Device: TypeAlias = torch.device | str | int | None
Lengths: TypeAlias = Tensor | Sequence[int] | None
Pair: TypeAlias = tuple[Tensor, Tensor]


class LayerCall(Protocol):
    """Of RNN and GRU."""

    @overload
    def __call__(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        lengths: Lengths = None,
        resets: Tensor | None = None,
        initial_state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: None = None,
        resets: Tensor | None = None,
        initial_state: Tensor | None = None,
    ) -> tuple[PackedSequence, Tensor]: ...


class LSTMCall(Protocol):
    """Of LSTM."""

    @overload
    def __call__(
        self,
        input: Tensor,
        hx: Pair | None = None,
        *,
        lengths: Lengths = None,
        resets: Tensor | None = None,
        initial_state: Pair | None = None,
        return_cells: Literal[False] = False,
    ) -> tuple[Tensor, Pair]: ...
    @overload
    def __call__(
        self,
        input: Tensor,
        hx: Pair | None = None,
        *,
        lengths: Lengths = None,
        resets: Tensor | None = None,
        initial_state: Pair | None = None,
        return_cells: Literal[True],
    ) -> tuple[Tensor, Pair, Tensor]: ...
    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: Pair | None = None,
        *,
        lengths: None = None,
        resets: Tensor | None = None,
        initial_state: Pair | None = None,
        return_cells: Literal[False] = False,
    ) -> tuple[PackedSequence, Pair]: ...
    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: Pair | None = None,
        *,
        lengths: None = None,
        resets: Tensor | None = None,
        initial_state: Pair | None = None,
        return_cells: Literal[True],
    ) -> tuple[PackedSequence, Pair, PackedSequence]: ...


class CellCall(Protocol):
    """Of RNNCell and GRUCell."""

    def __call__(self, input: Tensor, hx: Tensor | None = None) -> Tensor: ...


class LSTMCellCall(Protocol):
    """Of LSTMCell."""

    def __call__(self, input: Tensor, hx: Pair | None = None) -> Pair: ...
