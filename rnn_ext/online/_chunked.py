"""The same gradients as exact RTRL, with backpropagation inside chunks of about H steps.

J. Schmidhuber, "A fixed size storage O(n^3) time complexity learning algorithm for fully recurrent
continually running networks", Neural Computation 4, 1992. Parameters act on the losses of a chunk
that starts at step k inside the chunk, which backpropagation gives, and by way of s_k, whose
influence R = ds_k/dtheta is known. At the end s_m of the chunk R becomes (ds_m/ds_k) R plus the
part from inside the chunk, whose rows are the backward passes of the units of s_m: a batch of them.
"""

import torch
from torch import Tensor

from .. import _C
from ._layer import Gradients, Layer, Status

__all__ = ["Chunked"]

# w_hr, batch_sizes, reverse, resets and zoneout of a layer, as _C takes them.
_PLAIN = None, None, False, None, None
# Rows of a batch of backward passes, about: enough to fill the products.
_ROWS = 256
_EVERYTHING = (False, True, True, True, True, True, True, False)


class Chunked:
    def __init__(self, layer: Layer, batch: int, size: int) -> None:
        self.layer, self.size, self.length = layer, size, 0
        self.states = 2 if layer.cell == "lstm" else 1
        h = layer.weights()[1].new_zeros(batch, layer.hidden_size)
        self.h, self.c = h.detach(), h.detach().clone() if self.states == 2 else None
        self.start = self.h, self.c
        width = sum(weight.numel() for weight in layer.weights() if weight is not None)
        self.influence = self.h.new_zeros(batch, self.states * layer.hidden_size, width)
        self.x = self.h.new_zeros(size, batch, layer.input_size)
        self.d_h = self.h.new_zeros(size, batch, layer.hidden_size)
        self.resets = torch.zeros(size, batch, dtype=torch.bool, device=self.h.device)
        self._keep_weights()

    def _keep_weights(self) -> None:
        """Every step of a chunk has the same weights: those of its start, kept for its end."""
        self.weights = [w if w is None else w.detach().clone() for w in self.layer.weights()]
        self.versions = self._current_versions()

    def _current_versions(self):
        return [(id(weight), weight._version) for weight in self.layer.parameters()]

    def reset(self, mask: Tensor) -> None:
        self.flush()
        for part in (self.h, self.c, self.influence):
            if part is not None:
                part[mask] = 0.0

    def is_due(self) -> bool:
        """Whether the chunk has to end before the next step."""
        full = self.length == self.size
        return full or (self.length > 0 and self._current_versions() != self.versions)

    @torch.no_grad()
    def step(self, x: Tensor, mask: Tensor | None) -> tuple[int, Tensor | None]:
        """A step's `Status`, and h where it is DONE."""
        if not _finite(x):
            return Status.INPUT_NOT_FINITE, None
        if self.length == 0:
            self.start = self.h, self.c
            if self._current_versions() != self.versions:
                self._keep_weights()
        h, c = (_masked(part, mask) for part in (self.h, self.c))
        _, h, c = _C.layer_forward(
            self.layer.cell, x[None], h, c, *self.weights, *_PLAIN, False, "auto"
        )
        if not _finite(h) or (c is not None and not _finite(c)):
            return Status.NOT_FINITE, None
        self.h, self.c = h, c
        self.x[self.length] = x
        self.d_h[self.length] = 0.0
        self.resets[self.length] = False if mask is None else mask
        self.length += 1
        return Status.DONE, h.clone()

    @torch.no_grad()
    def accumulate(self, d_h: Tensor) -> int:
        """Notes it for the end of the chunk, or adds to the gradients; returns a `Status`."""
        if not _finite(d_h):  # it would be used much later
            return Status.NOT_FINITE
        if self.length:
            self.d_h[self.length - 1] += d_h
            return Status.DONE
        found = torch.einsum("bi,bip->p", d_h, self.influence[:, : d_h.size(1)])
        gradients, finite = self._split(found)
        if finite:
            self.layer.add_gradients(gradients)
        return Status.DONE if finite else Status.NOT_FINITE

    def flush(self) -> Gradients | None:
        """The gradient of the chunk's losses; the influence moves on to the state as it is."""
        if not self.length:
            return None
        segments = self._segments()
        gradient = self._gradient(segments)
        rows = self.influence.size(1)
        block = max(1, _ROWS // rows)
        for first in range(0, len(self.h), block):
            self._advance(segments, slice(first, first + block))
        self.length = 0
        self.start = self.h, self.c
        return self._split(gradient)

    def _segments(self):
        """Parts of the chunk without a reset but at their starts: (x, reset or None, the state
        they start from, what the forward pass saved)."""
        resets = self.resets[: self.length]
        cuts = [t for t in range(1, self.length) if resets[t].any()]
        h, c = self.start
        segments = []
        for begin, end in zip([0, *cuts], [*cuts, self.length]):
            mask = resets[begin] if resets[begin].any() else None
            state, x = (_masked(h, mask), _masked(c, mask)), self.x[begin:end]
            _, h, c, *saved, isa = _C.layer_forward(
                self.layer.cell, x, *state, *self.weights, *_PLAIN, True, "auto"
            )
            segments.append((begin, x, mask, state, saved, isa))
        return segments

    def _gradient(self, segments):
        """Of the chunk's losses, those that act by way of its first state included."""
        total, d_h, d_c = None, None, None
        for begin, x, mask, state, saved, isa in reversed(segments):
            d_output = self.d_h[begin : begin + len(x)]
            d_h, d_c, *found = self._backward(x, state, saved, isa, (d_output, d_h, d_c, None), 1)
            d_h, d_c = _masked(d_h, mask), _masked(d_c, mask)
            flat = torch.cat([part.flatten() for part in found])
            total = flat if total is None else total.add_(flat)
        d_start = d_h if d_c is None else torch.cat([d_h, d_c], 1)
        return total.addmv_(self.influence.flatten(0, 1).t(), d_start.flatten())

    def _advance(self, segments, block):
        """The influence of a block of sequences, to the end of the chunk: a backward pass for
        each sequence and unit of the state."""
        influence = self.influence[block]
        batch, rows, width = influence.shape
        units = torch.eye(rows, dtype=influence.dtype, device=influence.device).repeat(batch, 1)
        d_state = list(units.split(self.layer.hidden_size, 1))
        inside = influence.new_zeros(batch * rows, width)
        for _, x, mask, state, saved, isa in reversed(segments):
            steps = len(x)

            def repeated(part, time=True, steps=steps):
                if part is None:
                    return None
                if not time:
                    return part[block].repeat_interleave(rows, 0)
                part = part.view(steps, len(self.h), -1)[:, block]
                return part.repeat_interleave(rows, 1)

            d_h, d_c, *found = self._backward(
                repeated(x),
                [repeated(part, False) for part in state],
                [repeated(part) for part in saved],
                isa,
                (None, *(part.contiguous() for part in d_state), *[None] * (3 - self.states)),
                batch * rows,
            )
            inside += torch.cat([part.reshape(batch * rows, -1) for part in found], 1)
            if mask is not None:
                mask = mask[block].repeat_interleave(rows)
            d_state = [_masked(part, mask) for part in (d_h, d_c) if part is not None]
        jacobian = torch.cat(d_state, 1).view(batch, rows, rows)
        inside = inside.view(batch, rows, width)
        self.influence[block] = inside.baddbmm_(jacobian, influence)

    def _backward(self, x, state, saved, isa, upstream, groups):
        """(dh_0, dc_0, then the gradients of the weights there are)."""
        wanted = [
            w and t is not None for w, t in zip(_EVERYTHING, (x, *state, *self.weights, None))
        ]
        found = _C.layer_backward(
            self.layer.cell, x, *state, *self.weights, *_PLAIN, *saved, isa, *upstream, wanted,
            groups, "auto",
        )  # fmt: skip
        return *found[1:3], *(part for part in found[3:7] if part is not None)

    def _split(self, gradient):
        found, at = [], 0
        for weight in self.weights:
            count = 0 if weight is None else weight.numel()
            found.append(None if weight is None else gradient[at : at + count].view_as(weight))
            at += count
        return found, _finite(gradient)

    def tensors(self) -> dict[str, Tensor]:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        found = {
            "h": self.h,
            "c": self.c,
            "influence": self.influence,
            "start_h": self.start[0],
            "start_c": self.start[1],
            "x": self.x[: self.length],
            "d_h": self.d_h[: self.length],
            "resets": self.resets[: self.length],
            **dict(zip(names, self.weights)),
        }
        return {name: t.clone() for name, t in found.items() if t is not None}

    def load(self, tensors: dict[str, Tensor]) -> None:
        own = self.tensors()
        if own.keys() != tensors.keys():
            raise ValueError(f"RTRL: expected the tensors {list(own)}, got {list(tensors)}")
        length = len(tensors["x"])
        for name, value in tensors.items():
            shape = list(own[name].shape)
            if name in ("x", "d_h", "resets"):
                shape[0] = length
            if list(value.shape) != shape or value.dtype != own[name].dtype or length > self.size:
                raise ValueError(
                    f"RTRL: {name} must be {own[name].dtype} {shape} with chunks of "
                    f"{self.size} steps, got {value.dtype} {list(value.shape)}"
                )
        device = self.h.device
        kept = {name: value.detach().to(device, copy=True) for name, value in tensors.items()}
        self.h, self.c, self.influence = kept["h"], kept.get("c"), kept["influence"]
        self.start = kept["start_h"], kept.get("start_c")
        for name in ("x", "d_h", "resets"):
            getattr(self, name)[:length] = kept[name]
        self.length = length
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        self.weights = [kept.get(name) for name in names]
        same = all(torch.equal(a, b) for a, b in zip(self.layer.parameters(), self.weights))
        self.versions = self._current_versions() if same else []

    def bytes(self) -> int:
        parts = (self.h, self.c, self.influence, self.x, self.d_h, self.resets, *self.weights)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)


def _masked(part, mask):
    if part is None or mask is None:
        return part
    return part.masked_fill(mask.to(part.device)[:, None], 0.0)


def _finite(t):
    return bool(torch.isfinite(t).all())
