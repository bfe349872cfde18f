"""The cells of cells.py with layer normalisation, and the LSTM with peepholes, one step each way.

Layer normalisation: Ba, Kiros and Hinton, arXiv:1607.06450, 2016. Peepholes: Gers and Schmidhuber,
"Recurrent nets that time and count", IJCNN 2000. W x and U h' are normalised apart, each with a
gain of its own; the biases are the layer's. Of the GRU, r and z are normalised together, n alone.

    a = LN(W x) gain_ih + b_ih + LN(U h') gain_hh + b_hh
    LN(v) = (v - mean(v)) / sqrt(variance(v) + 1e-5), over the units of v
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray

from .cells import ACTIVATIONS, SLOPES, StepGradients, sigmoid

__all__ = ["EPSILON", "STEPS", "NormalizedWeights", "check"]

EPSILON = 1e-5


class NormalizedWeights(NamedTuple):
    """Parameters of a layer with layer normalisation, peepholes or both, in one direction."""

    w_ih: ndarray  # as of Weights
    w_hh: ndarray
    b_ih: ndarray | None = None
    b_hh: ndarray | None = None
    w_hr: ndarray | None = None  # None: there is no projection
    gain_ih: ndarray | None = None  # [G*H]  of W x
    gain_hh: ndarray | None = None  # [G*H]  of U h'
    gain_cell: ndarray | None = None  # [H]  LSTM
    bias_cell: ndarray | None = None  # [H]  LSTM
    peephole: ndarray | None = None  # [3*H]  LSTM: of i, f, o


def check(cell: str, weights: NormalizedWeights) -> None:
    """ValueError unless the gains and peepholes that there are belong together."""
    normalized, lstm = weights.gain_ih is not None, cell == "lstm"
    given = weights.gain_hh is not None, weights.gain_cell is not None
    if given != (normalized, normalized and lstm) or (
        weights.bias_cell is not None and not given[1]
    ):
        raise ValueError(
            f"reference: {cell} needs gains of input and state, and of the LSTM's cell"
        )
    if weights.peephole is not None and not lstm:
        raise ValueError(f"reference: {cell} has no peepholes, peephole must be None")
    if (normalized or weights.peephole is not None) and weights.w_hr is not None:
        raise ValueError("reference: no projection beside layer normalisation or peepholes")


class Norm(NamedTuple):
    """A product that was normalised (or not: ``scale`` is None), and what comes of it."""

    hat: ndarray
    scale: ndarray | None
    value: ndarray  # hat * gain


def normalize(v: ndarray, gain: ndarray | None) -> Norm:
    if gain is None:
        return Norm(v, None, v)
    scale = 1.0 / np.sqrt(v.var(-1, keepdims=True) + EPSILON)
    hat = (v - v.mean(-1, keepdims=True)) * scale
    return Norm(hat, scale, hat * gain)


def normalize_backward(
    norm: Norm, d: ndarray, gain: ndarray | None
) -> tuple[ndarray, ndarray | None]:
    """dL/dv and dL/dgain from d = dL/dvalue.

    Every unit has a part in the mean and the variance: what d_hat has in common with 1 and with hat
    does not reach v.
    """
    if gain is None:
        return d, None
    d_hat = d * gain
    along = (d_hat * norm.hat).mean(-1, keepdims=True)
    dv = (d_hat - d_hat.mean(-1, keepdims=True) - norm.hat * along) * norm.scale
    return dv, (d * norm.hat).sum(0)


def plus(value: ndarray, bias: ndarray | None) -> ndarray:
    return value if bias is None else value + bias


def part(vector: ndarray | None, rows: slice) -> ndarray | None:
    return None if vector is None else vector[rows]


class Half(NamedTuple):
    """One half of a net input: v -> LN(weight v) gain + bias, for some rows of the weights."""

    v: ndarray
    norm: Norm
    a: ndarray


def half(
    v: ndarray, weight: ndarray, gain: ndarray | None, bias: ndarray | None, rows: slice
) -> Half:
    norm = normalize(v @ weight[rows].T, part(gain, rows))
    return Half(v, norm, plus(norm.value, part(bias, rows)))


def half_backward(
    record: Half, delta: ndarray, weight: ndarray, gain: ndarray | None, rows: slice
) -> tuple[ndarray, ndarray, ndarray | None, ndarray]:
    """dL/dv, and dL/d of weight, gain and bias in these rows, from delta = dL/da."""
    product, d_gain = normalize_backward(record.norm, delta, part(gain, rows))
    return product @ weight[rows], product.T @ record.v, d_gain, delta.sum(0)


ALL = slice(None)


class ElmanStep(NamedTuple):
    of_input: Half
    of_state: Half
    h: ndarray

    @property
    def state(self) -> tuple[ndarray]:
        return (self.h,)


def elman_step(x: ndarray, h: ndarray, weights: NormalizedWeights, nonlinearity: str) -> ElmanStep:
    w = weights
    of_input = half(x, w.w_ih, w.gain_ih, w.b_ih, ALL)
    of_state = half(h, w.w_hh, w.gain_hh, w.b_hh, ALL)
    return ElmanStep(of_input, of_state, ACTIVATIONS[nonlinearity](of_input.a + of_state.a))


def elman_step_backward(
    step: ElmanStep, dh: ndarray, weights: NormalizedWeights, nonlinearity: str
) -> StepGradients:
    w = weights
    delta = SLOPES[nonlinearity](step.h) * dh
    dx, dw_ih, d_gain_ih, db = half_backward(step.of_input, delta, w.w_ih, w.gain_ih, ALL)
    dh_prev, dw_hh, d_gain_hh, _ = half_backward(step.of_state, delta, w.w_hh, w.gain_hh, ALL)
    return StepGradients(
        dx,
        (dh_prev,),
        NormalizedWeights(dw_ih, dw_hh, db, db, gain_ih=d_gain_ih, gain_hh=d_gain_hh),
    )


class LSTMStep(NamedTuple):
    of_input: Half
    of_state: Half
    c_prev: ndarray
    i: ndarray
    f: ndarray
    g: ndarray
    o: ndarray
    c: ndarray
    shown: Norm  # of c
    h: ndarray

    @property
    def state(self) -> tuple[ndarray, ndarray]:
        return self.h, self.c


# i, f = s(a + p c')   g = tanh(a)   c = f c' + i g   o = s(a + p c)
# h = o tanh(LN(c) gain_cell + bias_cell), or o tanh(c)


def lstm_step(x: ndarray, h: ndarray, c: ndarray, weights: NormalizedWeights) -> LSTMStep:
    w = weights
    of_input = half(x, w.w_ih, w.gain_ih, w.b_ih, ALL)
    of_state = half(h, w.w_hh, w.gain_hh, w.b_hh, ALL)
    a_i, a_f, a_g, a_o = np.split(of_input.a + of_state.a, 4, -1)
    p_i, p_f, p_o = np.zeros((3, 1)) if w.peephole is None else np.split(w.peephole, 3)
    i, f, g = sigmoid(a_i + p_i * c), sigmoid(a_f + p_f * c), np.tanh(a_g)
    c_new = f * c + i * g
    o = sigmoid(a_o + p_o * c_new)
    shown = normalize(c_new, w.gain_cell)
    h_new = o * np.tanh(plus(shown.value, w.bias_cell))
    return LSTMStep(of_input, of_state, c, i, f, g, o, c_new, shown, h_new)


def lstm_step_backward(
    step: LSTMStep, dh: ndarray, dc: ndarray, weights: NormalizedWeights
) -> StepGradients:
    """dh is dL/dh_t; dc the part of dL/dc_t that passes neither through h_t nor through o_t."""
    w = weights
    of_input, of_state, c_prev, i, f, g, o, c, shown, _ = step
    p_i, p_f, p_o = np.zeros((3, 1)) if w.peephole is None else np.split(w.peephole, 3)
    tanh_s = np.tanh(plus(shown.value, w.bias_cell))
    delta_o = dh * tanh_s * o * (1.0 - o)
    ds = dh * o * (1.0 - tanh_s * tanh_s)
    of_shown, d_gain_cell = normalize_backward(shown, ds, w.gain_cell)
    dc = dc + of_shown + p_o * delta_o
    delta_i = dc * g * i * (1.0 - i)
    delta_f = dc * c_prev * f * (1.0 - f)
    delta_g = dc * i * (1.0 - g * g)
    delta = np.concatenate([delta_i, delta_f, delta_g, delta_o], -1)
    dx, dw_ih, d_gain_ih, db = half_backward(of_input, delta, w.w_ih, w.gain_ih, ALL)
    dh_prev, dw_hh, d_gain_hh, _ = half_backward(of_state, delta, w.w_hh, w.gain_hh, ALL)
    d_peephole = [(delta_i * c_prev).sum(0), (delta_f * c_prev).sum(0), (delta_o * c).sum(0)]
    return StepGradients(
        dx,
        (dh_prev, dc * f + p_i * delta_i + p_f * delta_f),
        NormalizedWeights(
            dw_ih, dw_hh, db, db, None, d_gain_ih, d_gain_hh, d_gain_cell, ds.sum(0),
            np.concatenate(d_peephole),
        ),
    )  # fmt: skip


class GRUStep(NamedTuple):
    inputs: tuple[Half, Half]  # of r and z, and of n
    states: tuple[Half, Half]
    h_prev: ndarray
    r: ndarray
    z: ndarray
    n: ndarray
    h: ndarray

    @property
    def state(self) -> tuple[ndarray]:
        return (self.h,)


# r, z = s(a)      h = (1 - z) n + z h'
# reset after:  n = tanh(LN(W_n x) gain + b_in + r (LN(U_n h') gain + b_hn))
# reset before: n = tanh(LN(W_n x) gain + b_in + LN(U_n (r h')) gain + b_hn)


def gru_step(x: ndarray, h: ndarray, weights: NormalizedWeights, reset_after: bool) -> GRUStep:
    w = weights
    rz, last = slice(2 * h.shape[-1]), slice(2 * h.shape[-1], None)
    x_rz, x_n = (half(x, w.w_ih, w.gain_ih, w.b_ih, rows) for rows in (rz, last))
    h_rz = half(h, w.w_hh, w.gain_hh, w.b_hh, rz)
    r, z = np.split(sigmoid(x_rz.a + h_rz.a), 2, -1)
    h_n = half(h if reset_after else r * h, w.w_hh, w.gain_hh, w.b_hh, last)
    n = np.tanh(x_n.a + (r * h_n.a if reset_after else h_n.a))
    return GRUStep((x_rz, x_n), (h_rz, h_n), h, r, z, n, (1.0 - z) * n + z * h)


def gru_step_backward(
    step: GRUStep, dh: ndarray, weights: NormalizedWeights, reset_after: bool
) -> StepGradients:
    w = weights
    (x_rz, x_n), (h_rz, h_n), h_prev, r, z, n, _ = step
    rz, last = slice(2 * h_prev.shape[-1]), slice(2 * h_prev.shape[-1], None)
    delta_n = dh * (1.0 - z) * (1.0 - n * n)
    delta_z = dh * (h_prev - n) * z * (1.0 - z)
    of_n = half_backward(h_n, delta_n * r if reset_after else delta_n, w.w_hh, w.gain_hh, last)
    d_r = delta_n * h_n.a if reset_after else of_n[0] * h_prev
    through_n = of_n[0] if reset_after else of_n[0] * r
    delta_rz = np.concatenate([d_r * r * (1.0 - r), delta_z], -1)
    of_rz = half_backward(h_rz, delta_rz, w.w_hh, w.gain_hh, rz)
    in_rz = half_backward(x_rz, delta_rz, w.w_ih, w.gain_ih, rz)
    in_n = half_backward(x_n, delta_n, w.w_ih, w.gain_ih, last)
    joined = [np.concatenate(pair) for pair in zip(in_rz[1:], in_n[1:], strict=True)]
    of_state = [np.concatenate(pair) for pair in zip(of_rz[1:], of_n[1:], strict=True)]
    return StepGradients(
        in_rz[0] + in_n[0],
        (dh * z + of_rz[0] + through_n,),
        NormalizedWeights(
            joined[0], of_state[0], joined[2], of_state[2], gain_ih=joined[1], gain_hh=of_state[1]
        ),
    )


STEPS: dict[str, tuple[Callable[..., Any], Callable[..., StepGradients]]] = {
    f"rnn_{name}": (
        partial(elman_step, nonlinearity=name),
        partial(elman_step_backward, nonlinearity=name),
    )
    for name in ("tanh", "relu", "sigmoid")
} | {
    "lstm": (lstm_step, lstm_step_backward),
    "gru": (partial(gru_step, reset_after=True), partial(gru_step_backward, reset_after=True)),
    "gru_reset_before": (
        partial(gru_step, reset_after=False),
        partial(gru_step_backward, reset_after=False),
    ),
}
