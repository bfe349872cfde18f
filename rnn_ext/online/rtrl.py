"""`RTRL`: gradients of a stream, forward in time."""

import math
from typing import Any

import torch
from torch import Tensor

from ._chunked import Chunked
from ._composed import Composed
from ._influence import Influence
from ._layer import Layer, Status

__all__ = ["RTRL"]

MODES = ("exact", "snap1", "chunked")


class RTRL:
    """Real-time recurrent learning: the gradient of every loss along a stream without end.

    Carries dh_t/dtheta forward instead of going back in time, so that memory does not depend on how
    long the stream is, and no influence is cut off as by truncated BPTT. The loss stays the
    caller's: one needs its gradient in h_t alone.

    >>> import torch, rnn_ext
    >>> rnn, head = rnn_ext.GRU(3, 8), torch.nn.Linear(8, 1)
    >>> optimizer = torch.optim.SGD([*rnn.parameters(), *head.parameters()], 0.1)
    >>> rtrl = rnn_ext.online.RTRL(rnn)
    >>> for x, y in zip(torch.randn(20, 4, 3), torch.randn(20, 4, 1)):  # 4 streams side by side
    ...     h = rtrl.step(x).requires_grad_()
    ...     loss = (head(h) - y).square().mean()
    ...     optimizer.zero_grad()
    ...     loss.backward()  # gradients of the head, and dL/dh
    ...     rtrl.accumulate(h.grad)  # gradients of the layer
    ...     optimizer.step()

    With H hidden units, P parameters (about G H (I + H) for G gates) and B streams:

    - "exact": all of dh_t/dtheta. Memory B H P (LSTM: twice that) and time B H P for a gradient. On
      the CPU dh_t/dtheta follows the state once in 32 steps, with a product of B H^2 P operations
      that makes this one step longer than the others; what 32 steps need is kept beside it, and
      `accumulate` goes back through them first, so gradients are exact at every step. On CUDA every
      step has its product.
    - "snap1": of each parameter only the influence on its own unit (SnAp-1). An approximation, and
      for units that do not act on each other exact. Memory and time B P.
    - "chunked": exact, with backpropagation inside chunks of H steps. Memory as "exact", and less
      time, as gradients arrive once a chunk, at its end: with the step after its last, or `flush`.

    The weights may change between steps. dh_t/dtheta is then a sum in which every past step has
    the derivative at the weights that it had: that of the state that was in fact reached, if all
    steps' weights were moved together. For small steps of the optimizer that is close to the
    gradient for the present weights (Williams and Zipser 1989). In "chunked" a change of the
    weights, made in place as optimizers do, ends the chunk; change them after `flush`, or it works
    as "exact" does and costs more.

    Args:
        module: an `rnn_ext.RNN`, `LSTM` or `GRU` with one layer and one direction, without
            projection, in float32 or float64, on the CPU or on CUDA, where "exact" and "snap1" are
            torch operations, "chunked" the layers' kernels, and the device is waited for once a
            step. `batch_first` plays no role.
        mode: "exact", "snap1" or "chunked". "snap1" is not for ``GRU(reset_after=False)``, where
            the reset gate of a unit touches all units in one step.
        chunk: keyword only; steps in a chunk, default ``module.hidden_size``.

    Raises:
        TypeError, ValueError: a module or mode that is not served, with the reason.

    Sources: Williams and Zipser, Neural Computation 1, 1989; Menick et al., ICLR 2021,
    arXiv:2006.07232 (SnAp-1); Schmidhuber, Neural Computation 4, 1992 (chunked).
    """

    def __init__(self, module: Any, mode: str = "exact", *, chunk: int | None = None) -> None:
        if mode not in MODES:
            raise ValueError(f"RTRL: mode must be 'exact', 'snap1' or 'chunked', got {mode!r}")
        self._layer = Layer.of(module)
        if mode == "snap1" and self._layer.cell == "gru_reset_before":
            raise ValueError(
                "RTRL: with reset_after=False a reset gate touches every unit in one step, so that "
                "SnAp-1 would keep all of its influence; use mode='exact' or 'chunked', or a GRU "
                "with reset_after=True"
            )
        if chunk is not None and mode != "chunked":
            raise ValueError(f"RTRL: chunk belongs to mode='chunked', not {mode!r}")
        if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int)):
            raise TypeError(f"RTRL: chunk must be an int, got {chunk!r}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"RTRL: chunk must be at least 1, got {chunk}")
        self.mode = mode
        self._chunk = chunk or self._layer.hidden_size
        self._steps = 0
        self._carried: Influence | Composed | Chunked | None = None

    @property
    def module(self) -> Any:
        return self._layer.module

    @property
    def steps(self) -> int:
        """Steps since construction or ``reset()``."""
        return self._steps

    def step(self, x: Tensor, reset: Tensor | None = None) -> Tensor:
        """One step of every stream.

        Args:
            x: [B, input_size], in the dtype of the weights.
            reset: bool [B]; True starts a stream anew, with a zero state, before this step.

        Returns:
            h_t [B, hidden_size], cut off from any graph.

        Raises:
            ValueError, TypeError: x or reset that do not fit.
            FloatingPointError: NaN or infinity in x or in the new state, with the step; step and
                influence are then as before it.
        """
        carried = self._carried
        if type(carried) is not Influence:  # which looks at x itself
            carried = self._prepared(x, reset)
        try:
            status, h = carried.step(x, reset)
        except TypeError:
            self._prepared(x, reset)
            raise
        if h is None:
            self._prepared(x, reset)
            if status == Status.INPUT_NOT_FINITE:
                raise FloatingPointError(f"RTRL: x is not finite at step {self._steps}")
            raise FloatingPointError(
                f"RTRL: the state is not finite at step {self._steps}; look at the weights"
            )
        self._steps += 1
        return h

    def _prepared(self, x, reset):
        """What is carried, ready for a step with these, which are checked."""
        self._check("x", x, self._layer.input_size)
        if reset is not None:
            self._checked_mask(reset, len(x))
        if self._carried is None:
            self._carried = self._make(len(x))
        elif len(x) != len(self._carried.h):
            raise ValueError(
                f"RTRL: there are {len(self._carried.h)} streams, but x has {len(x)} rows; call "
                "reset() to begin with another number"
            )
        if self._carried.is_due() and _finite(x):
            self.flush()
        return self._carried

    def accumulate(self, dL_dh: Tensor) -> None:
        """Adds the gradient of a loss at the last step to ``.grad`` of the module's parameters.

        "chunked" adds it when the chunk ends. May be called several times for a step; a step whose
        loss is zero needs no call.

        Args:
            dL_dh: [B, hidden_size], the derivative in h_t of the loss at this step alone.

        Raises:
            RuntimeError: before the first step.
            FloatingPointError: dL_dh, or in effect dh_t/dtheta, is not finite.
        """
        carried = self._carried
        if carried is None:
            raise RuntimeError("RTRL: there has been no step yet")
        if type(carried) is not Influence:
            self._check_gradient(dL_dh)
        try:
            status = carried.accumulate(dL_dh)
        except TypeError:
            self._check_gradient(dL_dh)
            raise
        if status != Status.DONE:
            self._check_gradient(dL_dh)
            self._refuse(dL_dh)

    def _check_gradient(self, dL_dh):
        self._check("dL_dh", dL_dh, self._layer.hidden_size, len(self._carried.h))

    @torch.no_grad()
    def flush(self) -> None:
        """Ends the chunk of "chunked", so that all gradients are in ``.grad``; else a no-op."""
        if self._carried is not None:
            found = self._carried.flush()
            if found is not None:
                gradients, finite = found
                if not finite:
                    self._refuse()
                self._layer.add_gradients(gradients)

    @torch.no_grad()
    def reset(self, mask: Tensor | None = None) -> None:
        """Starts the streams of ``mask`` (bool [B]) anew; None: all, then of any number.

        "chunked" ends its chunk first, as `flush` does.
        """
        self.flush()
        if mask is None:
            self._carried, self._steps = None, 0
        elif self._carried is None:
            raise RuntimeError("RTRL: there has been no step yet")
        else:
            self._carried.reset(self._checked_mask(mask, len(self._carried.h)))

    def state_dict(self) -> dict[str, Any]:
        """What goes on with the stream: states, influence and, "chunked", the chunk so far.

        Not the parameters or their gradients; save the module beside it.
        """
        tensors = {} if self._carried is None else self._carried.tensors()
        return {"mode": self.mode, "cell": self._layer.cell, "steps": self._steps, **tensors}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken; unless "chunked", on the same kind of device.

        Raises:
            ValueError: the state is of another mode, cell, size or dtype.
        """
        tensors = dict(state)
        try:
            mode, cell, steps = (tensors.pop(name) for name in ("mode", "cell", "steps"))
        except KeyError as error:
            raise ValueError(f"RTRL: the state has no {error}") from None
        if (mode, cell) != (self.mode, self._layer.cell):
            raise ValueError(
                f"RTRL: the state is of mode {mode!r} and cell {cell!r}, not {self.mode!r} and "
                f"{self._layer.cell!r}"
            )
        carried = None
        if tensors:
            if "h" not in tensors:
                raise ValueError("RTRL: the state has no 'h'")
            carried = self._make(len(tensors["h"]))
            carried.load(tensors)
        self._carried, self._steps = carried, steps

    def memory(self) -> int:
        """Bytes carried from step to step."""
        return 0 if self._carried is None else self._carried.bytes()

    def __repr__(self) -> str:
        return f"RTRL({self.module!r}, mode={self.mode!r}, steps={self._steps})"

    def _make(self, batch):
        if self.mode == "chunked":
            return Chunked(self._layer, batch, self._chunk)
        on_cpu = self._layer.parameters()[0].is_cpu
        kind = Influence if on_cpu else Composed
        return kind(self._layer, batch, diagonal=self.mode == "snap1")

    def _refuse(self, dL_dh=None):
        if dL_dh is not None and not _finite(dL_dh):
            raise FloatingPointError(f"RTRL: dL_dh is not finite at step {self._steps - 1}")
        raise FloatingPointError(
            f"RTRL: dh/dtheta is not finite at step {self._steps - 1}; it grows without bound "
            "where the recurrent weights are too large"
        )

    def _check(self, name, value, width, rows=None):
        if not isinstance(value, Tensor):
            raise TypeError(f"RTRL: {name} must be a tensor, got {type(value).__name__}")
        if value.dim() != 2 or value.size(1) != width or rows not in (None, value.size(0)):
            raise ValueError(
                f"RTRL: {name} must be [{'B' if rows is None else rows}, {width}], got "
                f"{list(value.shape)}"
            )
        weight = self._layer.parameters()[0]
        if value.device != weight.device:
            raise ValueError(
                f"RTRL: {name} is on {value.device} and the weights on {weight.device}; move one "
                "of them"
            )
        if self._carried is not None and self._carried.h.device != weight.device:
            raise ValueError(
                f"RTRL: the weights moved to {weight.device}, but the stream is on "
                f"{self._carried.h.device}; call reset() to begin anew"
            )
        if value.dtype != weight.dtype:
            raise TypeError(
                f"RTRL: {name} is {value.dtype}, but the weights are {weight.dtype}; convert it"
            )

    def _checked_mask(self, mask, rows):
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (rows,):
            found = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
            raise ValueError(f"RTRL: reset must be a bool tensor [{rows}], got {found}")
        return mask


def _finite(t):
    # A sum is finite only if every term is; a sum that overflows is looked at again.
    return math.isfinite(t.sum().item()) or bool(torch.isfinite(t).all())
