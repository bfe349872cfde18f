"""One time loop for every cell: forward over a sequence, and backpropagation through time.

Ragged batches and the reverse direction are a mask and an order: at step t only the rows that are
long enough take part, and t runs over 0..T-1 or T-1..0. The backward pass walks the same steps back
(Werbos, "Backpropagation through time: what it does and how to do it", Proc. IEEE 78, 1990).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike

from . import cells, normalized
from .cells import StepGradients, Weights
from .normalized import NormalizedWeights

__all__ = [
    "CELLS",
    "Cell",
    "Gradients",
    "Result",
    "Tape",
    "backward",
    "clip",
    "forward",
    "hidden_gradients",
]


class Cell(NamedTuple):
    gates: int
    step: Callable[..., Any]  # (x, *state, weights) -> record
    step_backward: Callable[
        ..., StepGradients
    ]  # (record, *gradient of state, weights) -> StepGradients


CELLS: dict[str, Cell] = {
    f"rnn_{name}": Cell(
        1,
        partial(cells.elman_step, nonlinearity=name),
        partial(cells.elman_step_backward, nonlinearity=name),
    )
    for name in ("tanh", "relu", "sigmoid")
} | {
    "lstm": Cell(4, cells.lstm_step, cells.lstm_step_backward),
    "gru": Cell(3, cells.gru_step, cells.gru_step_backward),
    "gru_reset_before": Cell(3, cells.gru_reset_before_step, cells.gru_reset_before_step_backward),
}


@dataclass(frozen=True)
class Tape:
    """What backward needs of a forward pass."""

    cell: Cell
    weights: Weights | NormalizedWeights
    active: ndarray  # bool [T, B]: row b takes part in step t
    packed: bool
    steps: list[
        tuple[int, ndarray, Any]
    ]  # (t, rows that took part, record of the step), in the order they were made
    input_size: int
    cuts: ndarray  # bool [T, B]: no state is carried into row b's step t
    restored: list[bool]  # of h and of c: what resets restore was given
    holds: list[ndarray]  # zoneout: [T, B, size] of h and c, the share of the state that stays


@dataclass(frozen=True)
class Result:
    """Of a layer with S = P units of output with a projection, S = H without.

    output: h_t of every step, [T, B, S] (zero past a row's length) or [N, S] if packed.
    h_n: [B, S], and c_n: [B, H] (LSTM, else None): the state after each row's last step in the
    direction taken; the reverse direction ends at step 0.
    cells: c_t of every step (LSTM, else None), laid out like output.
    """

    output: ndarray
    h_n: ndarray
    c_n: ndarray | None
    cells: ndarray | None
    tape: Tape


@dataclass(frozen=True)
class Gradients:
    """dL/d(each argument of forward), in that argument's shape; None where it has none."""

    x: ndarray
    h0: ndarray
    c0: ndarray | None
    w_ih: ndarray
    w_hh: ndarray
    b_ih: ndarray | None
    b_hh: ndarray | None
    w_hr: ndarray | None
    reset_h: ndarray | None = None
    reset_c: ndarray | None = None
    gain_ih: ndarray | None = None
    gain_hh: ndarray | None = None
    gain_cell: ndarray | None = None
    bias_cell: ndarray | None = None
    peephole: ndarray | None = None


def forward(
    cell: str,
    x: ArrayLike,
    h0: ArrayLike | None,
    c0: ArrayLike | None,
    weights: Weights | NormalizedWeights | Sequence[ArrayLike | None],
    *,
    batch_sizes: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    reverse: bool = False,
    resets: ArrayLike | None = None,
    reset_h: ArrayLike | None = None,
    reset_c: ArrayLike | None = None,
    zoneout: tuple[ArrayLike, ArrayLike] = (0.0, 0.0),
) -> Result:
    """Run one layer in one direction over a batch of sequences.

    Arrays are anything that numpy.asarray takes, and are computed with in float64.

    Args:
        cell: a name in CELLS.
        x: [T, B, I], or [N, I] with batch_sizes.
        h0: [B, S], or None for zeros.
        c0: [B, H], or None for zeros; None for all but "lstm".
        weights: Weights, NormalizedWeights (with layer normalisation or peepholes), or a sequence
            in the order of their fields (None for what is absent).
        batch_sizes: [T], non-increasing: rows in each step of a PackedSequence of torch.
        lengths: [B], 0..T, in any order: steps in each row of the padded x, whose rest is never
            read.
        reverse: from each row's last step to its first.
        resets: bool [T, B], or [N] with batch_sizes; where it is True at step t, no state passes
            between steps t - 1 and t.
        reset_h, reset_c: [B, S] and [B, H], what the step that lacks it starts from, or None for
            zeros.
        zoneout: the share of h_{t-1} and of c_{t-1} that stays in place of the step's own (Krueger
            et al. 2017): numbers, or laid out like output and cells; 0 and 1 are masks.

    Raises:
        ValueError: an unknown cell, a wrong shape, or lengths or batch_sizes out of range.
    """
    if cell not in CELLS:
        raise ValueError(f"reference: unknown cell {cell!r}; known are {', '.join(CELLS)}")
    spec = CELLS[cell]
    x, packed = _float64(x), batch_sizes is not None
    if x.ndim != (2 if packed else 3):
        raise ValueError(f"reference: x must be [T, B, I], or [N, I] if packed, got {x.shape}")
    weights = _check_weights(cell, weights, x.shape[-1])
    if isinstance(weights, NormalizedWeights):
        spec = Cell(spec.gates, *normalized.STEPS[cell])
    active = _active(x, batch_sizes, lengths)
    if packed:
        x = _unpack(x, active)

    steps, batch = active.shape
    hidden = weights.w_hh.shape[0] // spec.gates
    sizes = [weights.w_hh.shape[1]] + [hidden] * (cell == "lstm")
    if c0 is not None and cell != "lstm":
        raise ValueError(f"reference: {cell} has no cell state, c0 must be None")
    given = zip((h0, c0), sizes, ("h0", "c0"), strict=False)  # the LSTM alone has two
    state = [_filled(value, (batch, size), name) for value, size, name in given]
    given = (reset_h, reset_c)[: len(sizes)]
    restored = [
        _filled(value, (batch, size), name)
        for value, size, name in zip(given, sizes, ("reset_h", "reset_c"), strict=False)
    ]
    cuts = _cuts(resets, active, packed, reverse)
    holds = [_held(hold, active, size, packed) for hold, size in zip(zoneout, sizes, strict=False)]
    trajectory = [np.zeros((steps, batch, size)) for size in sizes]

    tape = []
    for t in reversed(range(steps)) if reverse else range(steps):
        rows = np.flatnonzero(active[t])
        cut = cuts[t, rows, None]
        before = [np.where(cut, r[rows], s[rows]) for r, s in zip(restored, state, strict=True)]
        record = spec.step(x[t, rows], *before, weights)
        # h' = z_h h + (1 - z_h) h~   c' = z_c c + (1 - z_c) c~   h~ has c~ in it, not c'
        each = zip(state, trajectory, before, record.state, holds, strict=True)
        for s, states, old, new, hold in each:
            s[rows] = states[t, rows] = hold[t, rows] * old + (1 - hold[t, rows]) * new
        tape.append((t, rows, record))

    if packed:
        trajectory = [states[active] for states in trajectory]
    output, all_c = (*trajectory, None)[:2]
    h_n, c_n = (*state, None)[:2]
    was_given = [value is not None for value in given]
    all_steps = Tape(spec, weights, active, packed, tape, x.shape[-1], cuts, was_given, holds)
    return Result(output, h_n, c_n, all_c, all_steps)


def backward(
    result: Result,
    d_output: ArrayLike | None = None,
    d_h_n: ArrayLike | None = None,
    d_c_n: ArrayLike | None = None,
    d_cells: ArrayLike | None = None,
    *,
    grad_clip: float | tuple[str, float] | None = None,
) -> Gradients:
    """Backpropagate through time: Gradients of a loss from its gradients at what forward returned.

    Args:
        result: what `forward` returned.
        d_output, d_h_n, d_c_n, d_cells: shaped like the results they belong to; None is zero.
        grad_clip: what dL/dh_t, from the output at t and from later steps together, is held to
            before it goes on: v > 0 holds each value in [-v, v], ("norm", v) each row's norm.

    Raises:
        ValueError: another shape.
    """
    return _backward(result, (d_output, d_h_n, d_c_n, d_cells), grad_clip)[0]


def hidden_gradients(
    result: Result,
    d_output: ArrayLike | None = None,
    d_h_n: ArrayLike | None = None,
    d_c_n: ArrayLike | None = None,
    d_cells: ArrayLike | None = None,
    *,
    grad_clip: float | tuple[str, float] | None = None,
) -> ndarray:
    """dL/dh_t of every step, through the output at t and all later steps, before it is clipped.

    Arguments as of `backward`; the result is laid out like ``result.output``.
    """
    return _backward(result, (d_output, d_h_n, d_c_n, d_cells), grad_clip)[1]


def _backward(result, cotangents, grad_clip):
    d_output, d_h_n, d_c_n, d_cells = cotangents
    tape = result.tape
    d_trajectory = _like(
        (result.output, result.cells), (d_output, d_cells), ("d_output", "d_cells")
    )
    d_state = _like((result.h_n, result.c_n), (d_h_n, d_c_n), ("d_h_n", "d_c_n"))
    if tape.packed:
        d_trajectory = [_unpack(d, tape.active) for d in d_trajectory]

    dx = np.zeros((*tape.active.shape, tape.input_size))
    dh = np.zeros((*tape.active.shape, result.output.shape[-1]))
    totals = [None if w is None else np.zeros_like(w) for w in tape.weights]
    d_restored = [np.zeros_like(d) for d in d_state]
    for t, rows, record in reversed(tape.steps):
        reaching = [d[rows] + at[t, rows] for d, at in zip(d_state, d_trajectory, strict=True)]
        dh[t, rows] = reaching[0]
        reaching[0] = clip(reaching[0], grad_clip)
        kept = [hold[t, rows] for hold in tape.holds]
        own = ((1 - k) * d for k, d in zip(kept, reaching, strict=True))
        step = tape.cell.step_backward(record, *own, tape.weights)
        dx[t, rows] = step.x
        cut = tape.cuts[t, rows, None]
        each = zip(d_state, d_restored, step.state, kept, reaching, strict=True)
        for d, d_reset, before, k, r in each:
            before = before + k * r
            d[rows] = np.where(cut, 0, before)
            d_reset[rows] += np.where(cut, before, 0)
        for total, term in zip(totals, step.weights, strict=True):
            if total is not None:
                total += term

    if tape.packed:
        dx, dh = dx[tape.active], dh[tape.active]
    dh0, dc0 = (*d_state, None)[:2]
    d_restored = [d if given else None for d, given in zip(d_restored, tape.restored, strict=True)]
    reset_h, reset_c = (*d_restored, None)[:2]
    return Gradients(dx, dh0, dc0, *totals[:5], reset_h, reset_c, *totals[5:]), dh


def clip(dh: ndarray, limit: float | tuple[str, float] | None) -> ndarray:
    """dL/dh_t [B, S] held to ``limit`` as `backward` says."""
    if limit is None:
        return dh
    if not isinstance(limit, tuple):
        return np.clip(dh, -limit, limit)
    norm = np.linalg.norm(dh, axis=-1, keepdims=True)
    return dh * (limit[1] / np.maximum(norm, limit[1]))


def _active(x, batch_sizes, lengths):
    """bool [T, B]: does row b take part in step t?"""
    if batch_sizes is not None:
        batch_sizes = np.asarray(batch_sizes)
        if lengths is not None:
            raise ValueError("reference: give batch_sizes (packed) or lengths (padded), not both")
        if (
            batch_sizes.size == 0
            or (batch_sizes < 1).any()
            or (np.diff(batch_sizes) > 0).any()
            or batch_sizes.sum() != len(x)
        ):
            raise ValueError("reference: batch_sizes must be positive, non-increasing, sum to N")
        return np.arange(batch_sizes[0]) < batch_sizes[:, None]
    steps, batch = x.shape[:2]
    lengths = np.full(batch, steps) if lengths is None else np.asarray(lengths)
    if lengths.shape != (batch,) or (lengths < 0).any() or (lengths > steps).any():
        raise ValueError(f"reference: lengths must be [B] = [{batch}], each from 0 to T = {steps}")
    return np.arange(steps)[:, None] < lengths


def _cuts(resets, active, packed, reverse):
    """bool [T, B]: is no state carried into row b's step t?"""
    if resets is None:
        return np.zeros_like(active)
    resets = np.asarray(resets)
    shape = (active.sum(),) if packed else active.shape
    if resets.dtype != bool or resets.shape != shape:
        raise ValueError(f"reference: resets must be bool {shape}, got {resets.shape}")
    if packed:
        given, resets = resets, np.zeros_like(active)
        resets[active] = given
    if not reverse:
        return resets
    # Walking back, what a reset at step t parts is met on entering step t - 1.
    cuts = np.zeros_like(active)
    cuts[:-1] = resets[1:] & active[1:]
    return cuts


def _held(hold, active, size, packed):
    """[T, B, size] of the share of a state that stays."""
    hold = _float64(hold)
    if hold.ndim == 0:
        return np.full((*active.shape, size), hold)
    hold = _unpack(hold, active) if packed else hold
    if hold.shape != (*active.shape, size):
        raise ValueError(f"reference: zoneout must be laid out like output, got {hold.shape}")
    return hold


def _unpack(packed, active):
    """[N, F] -> [T, B, F]: a mask picks entries in the order in which torch packs them."""
    padded = np.zeros((*active.shape, packed.shape[-1]))
    padded[active] = packed
    return padded


def _check_weights(cell, weights, input_size):
    kind = Weights if len(weights) <= len(Weights._fields) else NormalizedWeights
    weights = kind(*(None if w is None else _float64(w).copy() for w in weights))
    if weights.w_hr is not None and cell != "lstm":
        raise ValueError(f"reference: {cell} takes no projection, w_hr must be None")
    hidden = weights.w_hh.shape[0] // CELLS[cell].gates
    rows = hidden * CELLS[cell].gates
    output = hidden if weights.w_hr is None else weights.w_hr.shape[0]
    shapes = (
        (rows, input_size), (rows, output), (rows,), (rows,), (output, hidden),
        (rows,), (rows,), (hidden,), (hidden,), (3 * hidden,),
    )  # fmt: skip
    if kind is NormalizedWeights:
        normalized.check(cell, weights)
    for name, weight, shape in zip(kind._fields, weights, shapes, strict=False):
        if weight is not None and weight.shape != shape:
            raise ValueError(f"reference: {cell} needs {name} of {shape}, got {weight.shape}")
    return weights


def _float64(value):
    return np.asarray(value, dtype=np.float64)


def _filled(value, shape, name):
    """A float64 copy of value, or zeros; never broadcast, a truth must not guess."""
    filled = np.zeros(shape) if value is None else _float64(value).copy()
    if filled.shape != shape:
        raise ValueError(f"reference: {name} must be {shape}, got {filled.shape}")
    return filled


def _like(results, gradients, names):
    """Gradients as fresh arrays shaped like results; a result that is None takes none."""
    filled = []
    for result, gradient, name in zip(results, gradients, names, strict=True):
        if result is not None:
            filled.append(_filled(gradient, result.shape, name))
        elif gradient is not None:
            raise ValueError(f"reference: this cell has no cell state, {name} must be None")
    return filled
