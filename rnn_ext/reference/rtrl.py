"""Real-time recurrent learning in NumPy: the gradient carried forward beside the state.

R. J. Williams and D. Zipser, "A learning algorithm for continually running fully recurrent neural
networks", Neural Computation 1, 1989; SnAp-1: J. Menick et al., "Practical real time recurrent
learning with a sparse approximation to the Jacobian", ICLR 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike

from .cells import Weights
from .sequence import CELLS

__all__ = ["OnlineResult", "rtrl", "touched"]


@dataclass(frozen=True)
class OnlineResult:
    """output: h_t of every step, [T, B, H]. gradients: dL/dtheta of each weight, for the loss L =
    sum_t <d_output_t, h_t>. influence: after the last step, [S, B, S's H units, P] for the states
    S (h, or h and c) and the parameters in the order of `Weights`, flattened."""

    output: ndarray
    gradients: Weights
    influence: ndarray


def rtrl(
    cell: str,
    x: ArrayLike,
    weights: Weights | Sequence[ArrayLike | None],
    d_output: ArrayLike,
    *,
    resets: ArrayLike | None = None,
    mode: str = "exact",
) -> OnlineResult:
    """M_t = D_t M_{t-1} + I_t with D_t = ds_t/ds_{t-1}, I_t the immediate part; s is all the state.

    Row i of D_t and I_t is the backward pass of one step for the loss s_{t,i}.

    Args:
        cell: a name in CELLS; x: [T, B, I]; weights: without a projection.
        d_output: [T, B, H], dL_t/dh_t.
        resets: bool [T, B]; True makes state and influence zero before the step.
        mode: "exact", or "snap1": entries of M that `touched` does not have are zero.

    Raises:
        ValueError: an unknown mode or cell.
    """
    if mode not in ("exact", "snap1") or cell not in CELLS:
        raise ValueError(f"reference: no RTRL of mode {mode!r} for cell {cell!r}")
    weights = Weights(*(None if w is None else np.asarray(w, dtype=np.float64) for w in weights))
    x, d_output = np.asarray(x, dtype=np.float64), np.asarray(d_output, dtype=np.float64)
    (steps, batch, _), hidden = x.shape, weights.w_hh.shape[1]
    states = 2 if cell == "lstm" else 1
    count = sum(w.size for w in weights if w is not None)
    kept = touched(cell, weights) if mode == "snap1" else 1.0
    state = np.zeros((states, batch, hidden))
    m = np.zeros((batch, states * hidden, count))
    gradient, output = np.zeros(count), np.empty((steps, batch, hidden))
    for t in range(steps):
        if resets is not None:
            fresh = np.asarray(resets, dtype=bool)[t]
            state[:, fresh], m[fresh] = 0.0, 0.0
        for b in range(batch):
            new, d, immediate = _linearized(cell, x[t, b], state[:, b], weights)
            m[b] = kept * (d @ m[b] + immediate)
            state[:, b] = new
            gradient += d_output[t, b] @ m[b, :hidden]
        output[t] = state[0]
    influence = m.reshape(batch, states, hidden, count).swapaxes(0, 1)
    return OnlineResult(output, _unflattened(gradient, weights), influence)


def touched(cell: str, weights: Weights) -> ndarray:
    """bool [S * H, P]: the entries of I_t that are not zero whatever the numbers.

    Found where no slope and no factor is zero: all numbers positive, and units not in the same
    state.
    """
    random = np.random.default_rng(0)
    positive = Weights(*(None if w is None else random.uniform(0.1, 0.2, w.shape) for w in weights))
    features, hidden = positive.w_ih.shape[1], positive.w_hh.shape[1]
    state = random.uniform(0.1, 0.9, (2 if cell == "lstm" else 1, hidden))
    _, _, immediate = _linearized(cell, random.uniform(0.1, 0.9, features), state, positive)
    return immediate != 0.0


def _linearized(cell, x, state, weights):
    """(s_t [S, H], D_t, I_t) of one sample."""
    spec = CELLS[cell]
    record = spec.step(x[None], *(part[None] for part in state), weights)
    rows, immediate = [], []
    for unit in np.eye(state.size):
        parts = unit.reshape(len(state), 1, -1)
        found = spec.step_backward(record, *parts, weights)
        rows.append(np.concatenate([part[0] for part in found.state]))
        given = [g.ravel() for g, w in zip(found.weights, weights, strict=True) if w is not None]
        immediate.append(np.concatenate(given))
    new = np.stack([part[0] for part in record.state])
    return new, np.stack(rows), np.stack(immediate)


def _unflattened(flat, weights):
    parts, at = [], 0
    for w in weights:
        parts.append(None if w is None else flat[at : at + w.size].reshape(w.shape))
        at += 0 if w is None else w.size
    return Weights(*parts)
