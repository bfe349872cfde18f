"""What calling a layer or cell takes and gives, for type checkers; torch.nn.Module says ``Any``."""

from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = [
    "CellCall",
    "Device",
    "LSTMCall",
    "LSTMCellCall",
    "LayerCall",
    "Lengths",
    "Pair",
    "PairOfStates",
    "States",
]

Device: TypeAlias = torch.device | str | int | None
Lengths: TypeAlias = Tensor | Sequence[int] | None
Pair: TypeAlias = tuple[Tensor, Tensor]
# One tensor, or one for each layer where layers have widths of their own. Not any sequence, though
# any is taken: a pair (h, c) given to a GRU is an error worth finding.
States: TypeAlias = Tensor | list[Tensor] | None
PairOfStates: TypeAlias = Pair | tuple[Sequence[Tensor], Sequence[Tensor]] | None


class LayerCall(Protocol):
    """Of RNN and GRU. With a list for ``hidden_size``, states are tuples of tensors, of which types
    do not tell."""

    @overload
    def __call__(
        self,
        input: Tensor,
        hx: States = None,
        *,
        lengths: Lengths = None,
        resets: Tensor | None = None,
        initial_state: States = None,
        return_gates: Literal[False] = False,
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(
        self,
        input: Tensor,
        hx: States = None,
        *,
        lengths: Lengths = None,
        resets: Tensor | None = None,
        initial_state: States = None,
        return_gates: Literal[True],
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]: ...
    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: States = None,
        *,
        lengths: None = None,
        resets: Tensor | None = None,
        initial_state: States = None,
        return_gates: Literal[False] = False,
    ) -> tuple[PackedSequence, Tensor]: ...
    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: States = None,
        *,
        lengths: None = None,
        resets: Tensor | None = None,
        initial_state: States = None,
        return_gates: Literal[True],
    ) -> tuple[PackedSequence, Tensor, dict[str, PackedSequence]]: ...


class LSTMCall(Protocol):
    """Of LSTM, as `LayerCall`."""

    @overload
    def __call__(
        self,
        input: Tensor,
        hx: PairOfStates = None,
        *,
        lengths: Lengths = None,
        resets: Tensor | None = None,
        initial_state: PairOfStates = None,
        return_cells: Literal[False] = False,
        return_gates: Literal[False] = False,
    ) -> tuple[Tensor, Pair]: ...
    @overload
    def __call__(
        self,
        input: Tensor,
        hx: PairOfStates = None,
        *,
        lengths: Lengths = None,
        resets: Tensor | None = None,
        initial_state: PairOfStates = None,
        return_cells: Literal[False] = False,
        return_gates: Literal[True],
    ) -> tuple[Tensor, Pair, dict[str, Tensor]]: ...
    @overload
    def __call__(
        self,
        input: Tensor,
        hx: PairOfStates = None,
        *,
        lengths: Lengths = None,
        resets: Tensor | None = None,
        initial_state: PairOfStates = None,
        return_cells: Literal[True],
        return_gates: Literal[False] = False,
    ) -> tuple[Tensor, Pair, Tensor]: ...
    @overload
    def __call__(
        self,
        input: Tensor,
        hx: PairOfStates = None,
        *,
        lengths: Lengths = None,
        resets: Tensor | None = None,
        initial_state: PairOfStates = None,
        return_cells: Literal[True],
        return_gates: Literal[True],
    ) -> tuple[Tensor, Pair, Tensor, dict[str, Tensor]]: ...
    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: PairOfStates = None,
        *,
        lengths: None = None,
        resets: Tensor | None = None,
        initial_state: PairOfStates = None,
        return_cells: Literal[False] = False,
        return_gates: Literal[False] = False,
    ) -> tuple[PackedSequence, Pair]: ...
    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: PairOfStates = None,
        *,
        lengths: None = None,
        resets: Tensor | None = None,
        initial_state: PairOfStates = None,
        return_cells: Literal[False] = False,
        return_gates: Literal[True],
    ) -> tuple[PackedSequence, Pair, dict[str, PackedSequence]]: ...
    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: PairOfStates = None,
        *,
        lengths: None = None,
        resets: Tensor | None = None,
        initial_state: PairOfStates = None,
        return_cells: Literal[True],
        return_gates: Literal[False] = False,
    ) -> tuple[PackedSequence, Pair, PackedSequence]: ...
    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: PairOfStates = None,
        *,
        lengths: None = None,
        resets: Tensor | None = None,
        initial_state: PairOfStates = None,
        return_cells: Literal[True],
        return_gates: Literal[True],
    ) -> tuple[PackedSequence, Pair, PackedSequence, dict[str, PackedSequence]]: ...


class CellCall(Protocol):
    """Of RNNCell and GRUCell."""

    def __call__(self, input: Tensor, hx: Tensor | None = None) -> Tensor: ...


class LSTMCellCall(Protocol):
    """Of LSTMCell."""

    def __call__(self, input: Tensor, hx: Pair | None = None) -> Pair: ...
