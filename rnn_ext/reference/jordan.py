"""The output feedback network of Jordan (1986), step by step, and its BPTT.

a_t = W x_t + U z_t + b,  h_t = f(a_t),  o_t = g(V h_t + c), where z_t is what step t is fed:
o_{t-1}, or the target y_{t-1} where a teacher forces it, or o_0.
"""

from typing import NamedTuple

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike

from .cells import ACTIVATIONS, SLOPES, affine

__all__ = ["JordanGradients", "JordanResult", "JordanWeights", "jordan", "jordan_backward"]


class JordanWeights(NamedTuple):
    """H hidden units, O outputs."""

    w_ih: ndarray  # [H, I]  W
    w_oh: ndarray  # [H, O]  U
    w_ho: ndarray  # [O, H]  V
    b_h: ndarray | None = None  # [H]
    b_o: ndarray | None = None  # [O]


class JordanResult(NamedTuple):
    """output: o_t [T, B, O]; the rest is what the backward pass reads."""

    output: ndarray
    hidden: ndarray  # h_t [T, B, H]
    x: ndarray
    fed: ndarray  # z_t [T, B, O]
    forced: ndarray  # bool [T, B]
    weights: JordanWeights
    nonlinearity: str
    output_nonlinearity: str


class JordanGradients(NamedTuple):
    """dL/d(each argument of `jordan`), in that argument's shape."""

    x: ndarray
    targets: ndarray
    o_0: ndarray
    weights: JordanWeights


def jordan(
    x: ArrayLike,
    weights: JordanWeights,
    targets: ArrayLike | None = None,
    forced: ArrayLike | None = None,
    o_0: ArrayLike | None = None,
    *,
    nonlinearity: str = "tanh",
    output_nonlinearity: str = "identity",
) -> JordanResult:
    """Run over a batch of sequences, in float64.

    Args:
        x: [T, B, I].
        targets: y, [T, B, O]; None: free running.
        forced: bool [T, B], where step t is fed y_{t-1}; None: everywhere, if there are targets.
        o_0: [B, O], or None for zeros.
    """
    weights = JordanWeights(*(None if w is None else np.asarray(w, np.float64) for w in weights))
    x = np.asarray(x, np.float64)
    steps, batch, _ = x.shape
    outputs = len(weights.w_ho)
    o = np.zeros((batch, outputs)) if o_0 is None else np.asarray(o_0, np.float64)
    if forced is None:
        forced = np.full((steps, batch), targets is not None)
    forced = np.array(forced, dtype=bool)
    forced[0] = False  # o_0 comes before the first target
    output, fed = np.empty((steps, batch, outputs)), np.empty((steps, batch, outputs))
    hidden = np.empty((steps, batch, len(weights.w_ih)))
    for t in range(steps):
        fed[t] = o
        if forced[t].any():
            fed[t, forced[t]] = np.asarray(targets, np.float64)[t - 1, forced[t]]
        a = affine(x[t], weights.w_ih, weights.b_h) + fed[t] @ weights.w_oh.T
        hidden[t] = ACTIVATIONS[nonlinearity](a)
        o = output[t] = _output(output_nonlinearity, affine(hidden[t], weights.w_ho, weights.b_o))
    names = nonlinearity, output_nonlinearity
    return JordanResult(output, hidden, x, fed, forced, weights, *names)


def jordan_backward(result: JordanResult, d_output: ArrayLike) -> JordanGradients:
    """Backpropagate through time: from dL/do_t [T, B, O], by the output of step t alone.

    Where step t + 1 was fed o_t, its net input hands a gradient back to o_t; where the teacher
    spoke, to y_t, and none to the network before.
    """
    w = result.weights
    dx, dy = np.zeros_like(result.x), np.zeros_like(result.output)
    total = [None if part is None else np.zeros_like(part) for part in w]
    d_fed = np.zeros_like(result.output[0])
    for t in reversed(range(len(result.x))):
        d_o = np.asarray(d_output, np.float64)[t] + d_fed
        delta_o = _output_vjp(result.output_nonlinearity, result.output[t], d_o)
        delta = SLOPES[result.nonlinearity](result.hidden[t]) * (delta_o @ w.w_ho)
        terms = (
            delta.T @ result.x[t],
            delta.T @ result.fed[t],
            delta_o.T @ result.hidden[t],
            delta.sum(0),
            delta_o.sum(0),
        )
        for sum_, term in zip(total, terms, strict=True):
            if sum_ is not None:
                sum_ += term
        dx[t] = delta @ w.w_ih
        d_fed = delta @ w.w_oh
        if t:
            dy[t - 1] = np.where(result.forced[t, :, None], d_fed, 0)
            d_fed = np.where(result.forced[t, :, None], 0, d_fed)
    return JordanGradients(dx, dy, d_fed, JordanWeights(*total))


def _output(kind, a):
    if kind == "softmax":
        e = np.exp(a - a.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)
    return a if kind == "identity" else ACTIVATIONS[kind](a)


def _output_vjp(kind, o, d_o):
    if kind == "softmax":
        return o * (d_o - (o * d_o).sum(-1, keepdims=True))
    return d_o if kind == "identity" else d_o * SLOPES[kind](o)
