"""Control over a layer's training: what is kept for the backward pass, and what limits dL/dh_t.

A `Control` runs one layer in one direction like ``ops.layer`` or ``normalized.layer``, with the
same results: to the last bit on the CPU, on CUDA as far as products over fewer steps round alike.
Where gradients are recorded

- ``checkpoint_every=k`` keeps the states before every k-th step and nothing else; the backward pass
  runs each stretch of k steps forward again, the last one first (Chen et al. 2016,
  arXiv:1604.06174). Memory grows with T / k + k instead of T, beside input and output;
- ``save="states"`` keeps h and c of every step; the backward pass computes all gates again in one
  product, which needs no time loop because every h_{t-1} is known;
- ``clip`` limits dL/dh_t as it has arrived from the output at t and from later steps, before it
  goes on to the cell;
- ``flow`` collects the norms of dL/dh_t (diagnostics.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import composite, normalized, ops, recompute, transforms
from .backend import current, warn_once
from .recompute import Flow
from .zoneout import Zoneout

__all__ = ["Control", "checked_control"]

# Sums over time are taken in blocks of this many rows (csrc/cpu/gradients.h: SumOrder); 256 but for
# numbers that are multiplied in pairs.
_SUMMED_ROWS = 512
# Calls of fewer rows are computed in another order than longer ones (csrc/cpu/plan.cpp).
_FEW_ROWS = 8
# Gates that a cache holds; on CUDA, that keep a GPU busy.
_CACHED_GATES, _CUDA_GATES = 1 << 19, 1 << 25


def checked_control(
    name: str, checkpoint_every: Any, save: Any, grad_clip: Any
) -> "Control | None":
    """The `Control` that a constructor's arguments ask for, None where they ask for nothing."""
    if checkpoint_every is not None and (
        isinstance(checkpoint_every, bool)
        or not isinstance(checkpoint_every, int)
        or checkpoint_every < 1
    ):
        raise ValueError(
            f"{name}: checkpoint_every must be a number of steps (an int of at least 1) or None, "
            f"got {checkpoint_every!r}"
        )
    if save not in ("all", "states"):
        raise ValueError(f"{name}: save must be 'all' or 'states', got {save!r}")
    if checkpoint_every is not None and save != "all":
        raise ValueError(
            f"{name}: checkpoint_every and save='states' exclude each other: the first keeps less; "
            "give one of them"
        )
    clip = _checked_clip(name, grad_clip)
    if checkpoint_every is None and save == "all" and clip is None:
        return None
    return Control(checkpoint_every, save, clip)


def _checked_clip(name, grad_clip):
    if grad_clip is None:
        return None
    kind, limit = grad_clip if _is_pair(grad_clip) else ("value", grad_clip)
    number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
    if kind not in ("value", "norm") or not number or not limit > 0:
        raise ValueError(
            f"{name}: grad_clip must be a positive number (the largest value of dL/dh_t), "
            f"('norm', number) (the largest norm of a sequence's dL/dh_t) or None, "
            f"got {grad_clip!r}"
        )
    return kind, float(limit)


def _is_pair(value):
    return isinstance(value, (tuple, list)) and len(value) == 2


@dataclass(frozen=True)
class Control:
    """``clip`` is None or a pair ("value" or "norm", limit); ``flow`` gets a `Flow` for each layer
    and direction that runs with gradients, in that order."""

    checkpoint_every: int | None = None
    save: str = "all"
    clip: tuple[str, float] | None = None
    flow: list[Flow] | None = None

    @property
    def grad_clip(self) -> float | tuple[str, float] | None:
        """``clip`` as the constructors take it."""
        return self.clip[1] if self.clip and self.clip[0] == "value" else self.clip

    @property
    def keeps_less(self) -> bool:
        return self.checkpoint_every is not None or self.save != "all"

    @property
    def looks_at_gradients(self) -> bool:
        return self.clip is not None or self.flow is not None

    def __str__(self) -> str:
        given = {
            "checkpoint_every": self.checkpoint_every,
            "save": None if self.save == "all" else self.save,
            "grad_clip": self.grad_clip,
        }
        return ", ".join(f"{key}={value!r}" for key, value in given.items() if value is not None)

    def watching(self, flow: list[Flow]) -> "Control":
        return replace(self, flow=flow)

    def layer(
        self,
        cell: str,
        input: Tensor,
        *tensors: Tensor | None,
        batch_sizes: Tensor | None = None,
        reverse: bool = False,
        resets: Tensor | None = None,
        return_cells: bool = False,
        zoneout: Zoneout | None = None,
    ) -> tuple[Any, ...]:
        """As ``ops.layer`` or, with five tensors more, ``normalized.layer``."""
        given = (input, *tensors)
        options = {
            "batch_sizes": batch_sizes,
            "reverse": reverse,
            "resets": resets,
            "return_cells": return_cells,
            "zoneout": zoneout,
        }
        recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
        if recorded or transforms.watched():
            return self._recorded(cell, given, options)
        return _uncontrolled(given)(cell, *given, **options)

    @torch.compiler.disable(
        reason="rnn_ext: torch.compile cannot take a layer that trains with checkpoint_every, save "
        "or grad_clip; compile without fullgraph, or build the layer without them"
    )
    def _recorded(self, cell, given, options):
        obstacle = None
        if transforms.watched():
            obstacle = "under the transforms of torch.func and in forward mode"
        if obstacle is None and current() != "reference":
            names = "batch_sizes", "reverse", "resets", "zoneout"
            return recompute.layer(self, cell, given, *(options[name] for name in names))
        if not self.looks_at_gradients:
            if obstacle is not None:
                warn_once(f"rnn_ext: {self} has no effect {obstacle}: everything is kept")
            return _uncontrolled(given)(cell, *given, **options)
        if obstacle is not None:
            warn_once(
                f"rnn_ext: {str(self) or 'gradient_flow'} has no kernel {obstacle}; "
                "composed of torch operations instead"
            )
        return self.composed(cell, *given, **options)

    def composed(
        self,
        cell: str,
        *tensors: Tensor | None,
        batch_sizes: Tensor | None = None,
        reverse: bool = False,
        resets: Tensor | None = None,
        return_cells: bool = True,
        zoneout: Zoneout | None = None,
    ) -> tuple[Tensor | None, ...]:
        """As ``composite.layer``, with gradients clipped and watched."""
        watch = self._watch(reverse) if self.looks_at_gradients else None
        return composite.layer(
            cell,
            *tensors,
            batch_sizes=batch_sizes,
            reverse=reverse,
            resets=resets,
            return_cells=return_cells,
            watch=watch,
            zoneout=zoneout,
        )

    def _watch(self, reverse) -> Callable[[Tensor], Tensor]:
        flow, norms = None, []
        if self.flow is not None:
            flow = Flow()
            self.flow.append(flow)

        def note(step, gradient):
            norms[step] = torch.linalg.vector_norm(gradient.detach(), dim=-1)
            if step == 0:  # the gradient gets there last
                flow.norms = torch.cat(norms[::-1] if reverse else norms)

        def watch(h):
            if self.clip is not None:
                h = _Clipped.apply(h, *self.clip)
            if flow is not None and h.requires_grad:
                step = len(norms)
                norms.append(h.new_zeros(h.size(0)))
                h.register_hook(lambda gradient: note(step, gradient))
            return h

        return watch

    def stretch(
        self, cell_rows: int, steps: int, batch: int, packed: bool, input: Tensor
    ) -> int | None:
        """How many steps the backward pass computes again at a time, None if it does not have to.

        As many as between checkpoints or, of states that were all kept, whose gates (``cell_rows``
        of them a row) a cache holds. On the CPU sums over time are cut where their blocks end,
        which keeps every bit, where that at most doubles the steps between checkpoints.
        """
        if not self.keeps_less:
            return None
        if input.is_cuda:
            within = max(1, _CUDA_GATES // (cell_rows * max(batch, 1)))
            return min(max(steps, 1), self.checkpoint_every or within)
        rows = _SUMMED_ROWS if input.dtype == torch.bfloat16 else _SUMMED_ROWS // 2
        whole = 1 if packed else rows // math.gcd(rows, batch)
        if self.checkpoint_every is None:
            cached = max(rows, _CACHED_GATES // cell_rows)
            return max(1, cached // (whole * max(batch, 1))) * whole
        k = self.checkpoint_every
        if k >= steps or steps * batch <= _FEW_ROWS:
            return max(steps, 1)
        aligned = -(-k // whole) * whole
        return aligned if aligned <= 2 * k else k


def _uncontrolled(tensors):
    return ops.layer if len(tensors) <= recompute.PLAIN else normalized.layer


def _clip(gradient: Tensor, kind: str, limit: float) -> Tensor:
    """dL/dh_t [B, P] held within ``limit``, value by value or row by row."""
    if kind == "value":
        return gradient.clamp(-limit, limit)
    norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
    return gradient * (limit / norm.clamp_min(limit))


class _Clipped(torch.autograd.Function):
    """The identity, whose gradient is clipped."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h, kind, limit):
        return h.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.kind, ctx.limit = inputs

    @staticmethod
    def backward(ctx, gradient):
        return _clip(gradient, ctx.kind, ctx.limit), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return tangent.clone()
