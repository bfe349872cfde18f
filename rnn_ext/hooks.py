"""What a stack does around its layers: masks, residual links, zoneout, and a look at the gates."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import inspection, random

__all__ = ["Hooks", "StackOptions"]

Group: TypeAlias = tuple[Tensor | None, ...]


class StackOptions(NamedTuple):
    """What a stack has that torch.nn's have not, as `RecurrentLayers` has it; masks are drawn where
    ``training``. ``_C.run_stack`` takes it too."""

    training: bool = False
    residual: bool = False
    weight_dropout: float = 0.0
    variational_dropout: float = 0.0
    zoneout: float = 0.0


class Hooks:
    """Of one call of a layer stack. ``stack.stack`` calls the methods, layer by layer.

    Layers are counted together with directions, as the lists of states and weights are.

    Args:
        directions: 1 or 2.
        options: of the stack.
        batch: B. To be set before the layers run, as is ``sequences``.
        sequences: [B] int64, which sequence stands where in the batch; None: in order. So that the
            masks of a sequence do not depend on how a batch was sorted.
        gates: whether to record the gates of the last layer.
    """

    def __init__(
        self,
        directions: int,
        options: StackOptions,
        *,
        gates: bool = False,
    ) -> None:
        self.directions: int = directions
        training = options.training
        self.training: bool = training
        self.residual: bool = options.residual
        self.zoneout: float = options.zoneout
        self.weight_dropout: float = options.weight_dropout if training else 0.0
        self.variational_dropout: float = options.variational_dropout if training else 0.0
        self.gates: bool = gates
        self.batch: int = 0
        self.sequences: Tensor | None = None
        self._seed: Tensor | None = None
        self._weights: list[Group] | None = None
        self._recorded: list[Tensor] = []

    @property
    def around_layers(self) -> bool:
        """Whether there is anything to do between layers, or inside of them."""
        return bool(self.residual or self.zoneout or self.variational_dropout or self.gates)

    def weights(self, groups: list[Group]) -> list[Group]:
        """``groups`` (w_ih, w_hh, ...) with the masks of this call on w_hh."""
        if not self.weight_dropout:
            return groups
        if self._weights is None:
            self._weights = [
                (group[0], self._dropped(group[1], k), *group[2:]) for k, group in enumerate(groups)
            ]
        return self._weights

    def before(self, first: int, x: Tensor, batch_sizes: Tensor | None) -> Tensor:
        """The input of layer ``first``, masked: one mask for all steps of a sequence."""
        p = self.variational_dropout
        if not p:
            return x
        steps = torch.zeros(self.batch, dtype=torch.int64, device=x.device)
        mask = self._mask("variational_dropout", first, steps, self._rows(steps), x.size(-1), p, x)
        if batch_sizes is not None:
            mask = mask.index_select(0, inspection.rows_of(batch_sizes, x.size(0))[1].to(x.device))
        return x * mask

    def options(
        self, first: int, x: Tensor, group: Sequence[Any], batch_sizes: Tensor | None
    ) -> list[dict[str, Any]]:
        """Further arguments of layer ``first``, for each of its directions."""
        if not self.zoneout:
            return [{}] * self.directions
        if not self.training:
            share = torch.full((), self.zoneout, dtype=torch.float64, device="cpu")
            pair = share, None if group[0][1] is None else share
            return [{"zoneout": pair}] * self.directions
        rows = self._rows_of(x, self.batch, batch_sizes)
        return [
            {
                "zoneout": tuple(
                    None if state is None else self._hold(purpose, first + k, *rows, x, state)
                    for purpose, state in zip(("zoneout_h", "zoneout_c"), states)
                )
            }
            for k, states in enumerate(group)
        ]

    def _rows_of(self, x, batch, batch_sizes):
        """Time and sequence of each row of a layer's input."""
        if batch_sizes is None:
            steps = torch.arange(x.size(0), device=x.device).repeat_interleave(batch)
            return steps, torch.arange(batch, device=x.device).repeat(x.size(0))
        steps, slots = inspection.rows_of(batch_sizes, x.size(0))
        return steps, slots if self.sequences is None else self.sequences[
            slots.to(self.sequences.device)
        ]

    def _hold(self, purpose, layer, steps, rows, x, state):
        units, like = state.size(-1), torch.empty(0, dtype=torch.bool, device=x.device)
        values = 0.0, 1.0  # of a unit that moves on, and of one that holds
        held = self._mask(purpose, layer, steps, rows, units, self.zoneout, like, values)
        return held.reshape(*x.shape[:-1], units)

    def after(self, first: int, before: Tensor, x: Tensor) -> Tensor:
        """What layer ``first`` hands on, given what reached it and what it computed."""
        linked = self.residual and first > 0 and before.size(-1) == x.size(-1)
        return x + before if linked else x

    def looks_at_cells(self, group: Sequence[Any]) -> bool:
        """Whether `record` needs every cell state of a layer: its gates look at them."""
        return self.gates and len(group[0]) > 7 and group[0][-1] is not None

    def record(
        self,
        cell: str,
        x: Tensor,
        group: Sequence[Any],
        results: Sequence[Any],
        batch_sizes: Tensor | None,
        resets: Tensor | None,
    ) -> None:
        """Keeps the gates of a layer that has run; the last one's stay."""
        if self.gates:
            layout = self.batch, batch_sizes, resets
            self._recorded = [
                inspection.gates(
                    cell, x, (result[0], result[3]), tensors[:2], (*tensors[2:6], *tensors[7:]),
                    *layout, bool(direction),
                )
                for direction, (tensors, result) in enumerate(zip(group, results))
            ]  # fmt: skip

    def recorded(self, cell: str) -> Tensor:
        """The last layer's gates, each with its directions side by side: [..., G * D * H]."""
        count = len(inspection.GATES[cell])
        parts = [gates.chunk(count, -1) for gates in self._recorded]
        return torch.cat([part[k] for k in range(count) for part in parts], -1)

    def _dropped(self, weight, layer):
        rows = torch.arange(weight.size(0), device=weight.device)
        p, steps = self.weight_dropout, torch.zeros_like(rows)
        return weight * self._mask("weight_dropout", layer, steps, rows, weight.size(1), p, weight)

    def _rows(self, steps):
        if self.sequences is not None:
            return self.sequences
        return torch.arange(steps.size(0), device=steps.device)

    def _mask(self, purpose, layer, steps, rows, columns, p, like, values=None):
        if self._seed is None:
            self._seed = random.draw_seed()
        kept, dropped = values or (1 / (1 - p), 0.0)
        stream = random.stream(purpose, layer)
        return random.mask(self._seed, stream, steps, rows, columns, p, kept, like, dropped)
