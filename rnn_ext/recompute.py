"""A layer whose backward pass computes again what the forward pass did not keep (control.py)."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import _C, transforms
from .backend import current, warn_once
from .zoneout import Zoneout, paired, with_masks

__all__ = ["PLAIN", "Flow", "layer"]

PLAIN, _FIRST_WEIGHT = 8, 3  # tensors of a layer without extras, and before the weights


class Flow:
    """The norms of dL/dh_t of one layer in one direction, [T, B] or [N]; None until the backward
    pass has run."""

    def __init__(self) -> None:
        self.norms: Tensor | None = None


class _Time:
    """The rows of a sequence step by step, and its cuts; T steps, batch B."""

    def __init__(self, input, batch_sizes, reverse, stretch=None):
        self.packed, self.reverse, self.batch_sizes = batch_sizes is not None, reverse, batch_sizes
        self.sizes = batch_sizes.tolist() if self.packed else [input.size(1)] * input.size(0)
        self.steps, self.batch = len(self.sizes), self.sizes[0]
        self.offsets = [0, *accumulate(self.sizes)]
        stretch = stretch or self.steps
        self.parts = [(t, min(t + stretch, self.steps)) for t in range(0, self.steps, stretch)]
        if reverse:
            self.parts.reverse()

    def of(self, tensor, part):
        """The steps ``part`` of what is laid out like input or output."""
        if tensor is None:
            return None
        start, end = part if not self.packed else (self.offsets[t] for t in part)
        return tensor[start:end]

    def rows(self, part):
        return slice(self.offsets[part[0]], self.offsets[part[1]])

    def carried(self, part):
        """Rows of all states from which ``part``'s first step, in running order, goes on."""
        if self.reverse:
            before, count = part[1], self.sizes[part[1]]
        else:
            before, count = part[0] - 1, self.sizes[part[0]]
        return slice(self.offsets[before], self.offsets[before] + count)

    def previous(self, states, initial, part, parted):
        """The state that each step of ``part`` starts from, of all those after a step, as rows."""
        if initial is None:
            return None
        steps = range(*part)
        if not self.packed and part != self.parts[0]:
            step = 1 if self.reverse else -1
            rows = states[self.offsets[part[0] + step] : self.offsets[part[1] + step]]
        else:
            first, pieces = self.steps - 1 if self.reverse else 0, []
            for t in steps:
                carried = states[:0] if t == first else states[self.carried((t, t + 1))]
                pieces.append(_joined(carried, initial[: self.sizes[t]]))
            rows = torch.cat(pieces)
        if parted is None:
            return rows
        restored = rows.new_zeros(())
        if len(initial) > self.batch:
            restored = torch.cat([initial[self.batch :][: self.sizes[t]] for t in steps])
        return torch.where(parted.reshape(-1, 1), restored.to(rows.dtype), rows)


def _joined(carried, initial):
    """The states that go on, and the initial ones of sequences that only now begin."""
    if initial is None:
        return None
    if len(carried) == len(initial):
        return carried
    return torch.cat((carried, initial[len(carried) :].to(carried.dtype)))


def _flat(tensor):
    """[T, B, ...] or [N, ...] as [N, ...]."""
    return None if tensor is None else tensor.reshape(-1, tensor.size(-1))


def layer(
    how: Any,
    cell: str,
    tensors: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    reverse: bool,
    resets: Tensor | None,
    zoneout: Zoneout | None,
) -> tuple[Any, ...]:
    """As ``ops.layer`` where gradients are recorded, under the `Control` ``how``; with five tensors
    more as ``normalized.layer``."""
    given = *tensors, resets, *(zoneout or (None, None))
    output, h_n, *states = _Layer.apply(*given, cell, batch_sizes, reverse, how)
    return output, h_n, *(states or (None, None))


class _Layer(torch.autograd.Function):
    """As ``ops._Layer``, under a `Control`."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, resets, hold_h, hold_c, cell, batch_sizes, reverse, how = arguments
        input, w_ih, packed = tensors[0], tensors[_FIRST_WEIGHT], batch_sizes is not None
        steps = batch_sizes.numel() if packed else input.size(0)
        batch = int(batch_sizes[0]) if packed else input.size(1)
        stretch = how.stretch(w_ih.size(0), steps, batch, packed, input)
        backend = current() if input.is_cuda else "auto"
        parted = None
        if resets is not None:
            parted = _C.parted_rows(cell, tensors, batch_sizes, reverse, resets)
        output, h_n, c_n, states, cells, gates, middle, isa = _C.partial_forward(
            *(cell, tensors, batch_sizes, reverse, parted, paired(hold_h, hold_c)),
            *(stretch is None, (0, 0), backend),
        )
        ctx.set_materialize_grads(False)
        ctx.options, ctx.how, ctx.isa = (cell, batch_sizes, reverse), how, isa
        ctx.backend = backend  # backward has a thread, and context, of its own
        ctx.stretch, ctx.flow = stretch, None
        if how.flow is not None:
            ctx.flow = Flow()
            how.flow.append(ctx.flow)
        shown_cells = cells if cells is None else cells.to(input.dtype)
        if how.checkpoint_every is not None:
            time = _Time(input, batch_sizes, reverse, stretch)
            rows = [time.carried(part) for part in time.parts[1:]]
            states, cells = (
                None if t is None or not rows else torch.cat([_flat(t)[r] for r in rows])
                for t in (states, cells)
            )
        saved = states, cells, gates, middle
        ctx.save_for_backward(*tensors, resets, parted, hold_h, hold_c, *saved)
        return (output, h_n) if c_n is None else (output, h_n, c_n, shown_cells)

    @staticmethod
    def backward(ctx, d_output, d_h_n, d_c_n=None, d_cells=None):
        kept = ctx.saved_tensors
        tensors, (resets, parted, *holds), saved = kept[:-8], kept[-8:-4], kept[-4:]
        zoneout, wanted = paired(*holds), ctx.needs_input_grad[: len(tensors)]
        upstream = (d_output, d_h_n, d_c_n, d_cells)
        if all(d is None for d in upstream):
            return (None,) * (len(tensors) + 7)
        if transforms.watched_backward(upstream):
            gradients = _composed_gradients(ctx, tensors, resets, zoneout, upstream, wanted)
        else:
            backward = _Backward(ctx, tensors, parted, zoneout, wanted)
            if ctx.stretch is not None:
                gradients = backward.by_part(saved, upstream)
            else:
                whole = tensors, ctx.options[1], parted, zoneout
                gradients = backward.run(*whole, saved, ctx.isa, upstream)
            if ctx.flow is not None:
                ctx.flow.norms = backward.norms
        return *gradients, *(None,) * 7


class _Backward:
    """The backward kernel over a sequence, whole or in parts."""

    def __init__(self, ctx, tensors, parted, zoneout, wanted):
        self.cell, self.batch_sizes, self.reverse = ctx.options
        self.stretch, self.tensors, self.wanted = ctx.stretch, tensors, wanted
        self.zoneout = zoneout
        self.parted = parted  # the rows into whose step no state is carried
        self.isa, self.has_states = ctx.isa, ctx.how.save == "states"
        self.backend = ctx.backend
        self.clip = ctx.how.clip or ("", 0.0)
        self.compute = torch.promote_types(tensors[0].dtype, torch.float32)
        self.norms = None
        if ctx.flow is not None:
            rows = tensors[0].shape[:-1].numel()
            self.norms = tensors[0].new_empty(rows, dtype=self.compute)

    def run(
        self,
        tensors,
        batch_sizes,
        parted,
        zoneout,
        saved,
        isa,
        upstream,
        *,
        part=None,
        planned=(0, 0),
        sums=(),
    ):
        norms = self.norms if self.norms is None or part is None else self.norms[part]
        wanted = self.wanted if part is None else (self.wanted[0], True, True, *self.wanted[3:])
        return _C.partial_backward(
            self.cell,
            tensors,
            batch_sizes,
            self.reverse,
            parted,
            zoneout,
            saved,
            isa,
            upstream,
            wanted,
            planned,
            sums,
            *self.clip,
            norms,
            self.backend,
        )

    def by_part(self, saved, upstream):
        """Part by part, the last first; dL/dh and dL/dc are handed from part to part."""
        input, h0, c0, *weights = self.tensors
        d_output, d_h_n, d_c_n, d_cells = upstream
        time = _Time(input, self.batch_sizes, self.reverse, self.stretch)
        planned, batch = (time.steps, time.batch), time.batch
        dh, dc = self._sum(h0, d_h_n), None if c0 is None else self._sum(c0, d_c_n)
        sums = [
            None if t is None or not w else self._sum(t)
            for t, w in zip(weights, self.wanted[_FIRST_WEIGHT:])
        ]
        dx = input.new_empty(input.shape) if self.wanted[0] else None
        kept = [_flat(t) for t in saved[:2]]
        end = None if kept[0] is None else len(kept[0])
        for part in reversed(time.parts):
            count = time.sizes[part[0]]
            start = [None if t is None else t[:count] for t in (h0, c0)]
            if part != time.parts[0]:
                rows = time.carried(part)
                if not self.has_states:
                    rows = slice(end - (rows.stop - rows.start), end)
                    end = rows.start
                start = [None if k is None else _joined(k[rows], t) for k, t in zip(kept, start)]
            if len(h0) > batch:  # what resets restore follows, see ops.layer
                start = [
                    None if t is None else torch.cat((s.to(t.dtype), t[batch:][:count]))
                    for s, t in zip(start, (h0, c0))
                ]
            tensors = (time.of(input, part), *start, *weights)
            parted = time.of(self.parted, part)
            zoneout = with_masks(self.zoneout, lambda hold, part=part: time.of(hold, part))
            sizes = None if self.batch_sizes is None else self.batch_sizes[slice(*part)]
            if self.has_states:
                again, isa = self._from_states(time, part, parted, saved, kept)
            else:
                _, _, _, *again, isa = _C.partial_forward(
                    *(self.cell, tensors, sizes, self.reverse, parted, zoneout),
                    *(True, planned, self.backend),
                )
            reaching = (
                time.of(d_output, part),
                dh[:count],
                None if dc is None else dc[:count],
                time.of(d_cells, part),
            )
            d = self.run(
                tensors,
                sizes,
                parted,
                zoneout,
                again,
                isa,
                reaching,
                part=time.rows(part),
                planned=planned,
                sums=sums,
            )
            for sum, gradient in ((dh, d[1]), (dc, d[2])):
                if sum is not None:
                    sum[:count] = gradient[:count]
                    sum[batch:][:count] += gradient[count:]
            if dx is not None:
                time.of(dx, part).copy_(d[0])
        gradients = [dx, dh, dc, *sums]
        return [
            g.to(input.dtype) if w and g is not None else None
            for g, w in zip(gradients, self.wanted)
        ]

    def _from_states(self, time, part, parted, saved, kept):
        """What the forward kernel saved of ``part``: every step is a row of a single one, as what
        precedes it is known."""
        input, h0, c0, *weights = self.tensors
        known = tuple(time.of(t, part) for t in saved[:2])
        shared = self.zoneout is not None and self.zoneout[0].dim() == 0
        elman = self.cell.startswith("rnn") and len(self.tensors) == PLAIN
        if elman and not shared:  # of which h is all there is
            return (*known, None, None), self.isa
        at_once = (
            _flat(time.of(input, part)).unsqueeze(0),
            *(time.previous(k, t, part, parted) for k, t in zip(kept, (h0, c0))),
            *weights,
        )
        *_, states, _, gates, middle, isa = _C.partial_forward(
            self.cell, at_once, None, False, None, None, True, (0, 0), self.backend
        )
        if elman:
            middle = states[0]
        return (*known, gates, middle), isa

    def _sum(self, like, start=None):
        """A contiguous sum of the shape of ``like``, its first rows from ``start`` on, or zero."""
        sum = like.new_zeros(like.shape, dtype=self.compute)
        if start is not None:
            sum[: len(start)] = start
        return sum


def _composed_gradients(ctx, tensors, resets, zoneout, upstream, wanted):
    """The gradients of ``tensors`` in torch operations, differentiable again."""
    warn_once(
        "rnn_ext: gradients of gradients have no kernel; composed of torch operations instead"
    )
    cell, batch_sizes, reverse = ctx.options
    how = replace(ctx.how, flow=None)
    wanted = tuple(w and t is not None for t, w in zip(tensors, wanted))
    present = [d is not None for d in upstream]

    def results(*tensors):
        options = {"batch_sizes": batch_sizes, "reverse": reverse, "resets": resets}
        options["zoneout"] = zoneout
        found = how.composed(cell, *tensors, **options)
        return tuple(r for r, p in zip(found, present) if p)

    upstream = [d for d in upstream if d is not None]
    return transforms.vjp(results, tensors, wanted, upstream, again=True)
