"""One time step of every cell, forward and backward, as in docs/math.md.

Shapes: x_t [B, I], h_t and c_t [B, H] (h_t [B, P] for an LSTM with projection), gate blocks stacked
along the last axis in torch's order: LSTM i, f, g, o and GRU r, z, n.

A step returns a record of all that its backward needs, new state included. The backward takes that
record and the gradient that reaches the new state, and returns the gradients of the step's inputs.
`delta` is always dL/da, the gradient at a net input a, never dL/dh. In the formulas a prime marks
what comes from step t-1, and a product of two vectors is element by element.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray

__all__ = [
    "ACTIVATIONS",
    "SLOPES",
    "ElmanStep",
    "GRUStep",
    "LSTMStep",
    "StepGradients",
    "Weights",
    "affine",
    "elman_step",
    "elman_step_backward",
    "gru_reset_before_step",
    "gru_reset_before_step_backward",
    "gru_step",
    "gru_step_backward",
    "lstm_step",
    "lstm_step_backward",
    "sigmoid",
]


class Weights(NamedTuple):
    """Parameters of one layer in one direction, laid out as torch stores them (G gates)."""

    w_ih: ndarray  # [G*H, I]            W
    w_hh: ndarray  # [G*H, H], [G*H, P]  U
    b_ih: ndarray | None = None  # [G*H]
    b_hh: ndarray | None = None  # [G*H]
    w_hr: ndarray | None = None  # [P, H]  LSTM projection


class StepGradients(NamedTuple):
    """What one step passes on: to its input, to the state before it, to its parameters."""

    x: ndarray  # [B, I]
    state: tuple[ndarray, ...]  # (dL/dh_{t-1},) or (dL/dh_{t-1}, dL/dc_{t-1})
    weights: Any  # in the form of the layer's: this step's terms of dW, dU, ..., over the batch


def sigmoid(a: ndarray) -> ndarray:
    """1 / (1 + exp(-a)) without overflow, accurate to the last digits in both tails."""
    small = np.exp(-np.abs(a))
    return np.where(a >= 0, 1.0, small) / (1.0 + small)


def affine(x: ndarray, weight: ndarray, bias: ndarray | None) -> ndarray:
    return x @ weight.T if bias is None else x @ weight.T + bias


# Simple recurrent network: Elman, "Finding structure in time", Cognitive Science 14, 1990.
# a = W x + b_ih + U h' + b_hh      h = f(a)

ACTIVATIONS: dict[str, Callable[[ndarray], ndarray]] = {
    "tanh": np.tanh,
    "relu": lambda a: np.maximum(a, 0.0),
    "sigmoid": sigmoid,
}

# f'(a) written with h = f(a), so that h is all a step has to keep.
SLOPES: dict[str, Callable[[ndarray], ndarray]] = {
    "tanh": lambda h: 1.0 - h * h,
    "relu": lambda h: (h > 0).astype(h.dtype),
    "sigmoid": lambda h: h * (1.0 - h),
}


class ElmanStep(NamedTuple):
    x: ndarray
    h_prev: ndarray
    h: ndarray

    @property
    def state(self) -> tuple[ndarray]:
        return (self.h,)


def elman_step(x: ndarray, h: ndarray, weights: Weights, nonlinearity: str = "tanh") -> ElmanStep:
    """h_t from x_t and h_{t-1}; nonlinearity is "tanh", "relu" or "sigmoid"."""
    w = weights
    a = affine(x, w.w_ih, w.b_ih) + affine(h, w.w_hh, w.b_hh)
    return ElmanStep(x, h, ACTIVATIONS[nonlinearity](a))


def elman_step_backward(
    step: ElmanStep, dh: ndarray, weights: Weights, nonlinearity: str = "tanh"
) -> StepGradients:
    """dh [B, H] is dL/dh_t: from the output at t and from step t+1 together."""
    delta = SLOPES[nonlinearity](step.h) * dh
    db = delta.sum(0)
    return StepGradients(
        x=delta @ weights.w_ih,
        state=(delta @ weights.w_hh,),
        weights=Weights(delta.T @ step.x, delta.T @ step.h_prev, db, db),
    )


# LSTM: Hochreiter & Schmidhuber, Neural Computation 9, 1997; forget gate: Gers, Schmidhuber and
# Cummins, Neural Computation 12, 2000; projection: Sak et al., Interspeech 2014. No peepholes.
# i,f,o = s(a)   g = tanh(a)   a = W x + b_ih + U h' + b_hh
# c = f c' + i g      m = o tanh(c)      h = m, or W_hr m


class LSTMStep(NamedTuple):
    x: ndarray
    h_prev: ndarray
    c_prev: ndarray
    i: ndarray
    f: ndarray
    g: ndarray
    o: ndarray
    c: ndarray
    h: ndarray

    @property
    def state(self) -> tuple[ndarray, ndarray]:
        return self.h, self.c


def lstm_step(x: ndarray, h: ndarray, c: ndarray, weights: Weights) -> LSTMStep:
    """h_t and c_t from x_t, h_{t-1} and c_{t-1}; with weights.w_hr, h_t is projected to P units."""
    w = weights
    a_i, a_f, a_g, a_o = np.split(affine(x, w.w_ih, w.b_ih) + affine(h, w.w_hh, w.b_hh), 4, -1)
    i, f, g, o = sigmoid(a_i), sigmoid(a_f), np.tanh(a_g), sigmoid(a_o)
    c_new = f * c + i * g
    m = o * np.tanh(c_new)
    h_new = m if w.w_hr is None else m @ w.w_hr.T
    return LSTMStep(x, h, c, i, f, g, o, c_new, h_new)


def lstm_step_backward(step: LSTMStep, dh: ndarray, dc: ndarray, weights: Weights) -> StepGradients:
    """dh [B, H or P] is dL/dh_t; dc [B, H] the part of dL/dc_t that does not pass through h_t."""
    _, _, c_prev, i, f, g, o, c, _ = step
    tanh_c = np.tanh(c)
    dm = dh if weights.w_hr is None else dh @ weights.w_hr
    dc = dc + dm * o * (1.0 - tanh_c * tanh_c)
    delta_i = dc * g * i * (1.0 - i)
    delta_f = dc * c_prev * f * (1.0 - f)
    delta_g = dc * i * (1.0 - g * g)
    delta_o = dm * tanh_c * o * (1.0 - o)
    delta = np.concatenate([delta_i, delta_f, delta_g, delta_o], -1)
    db = delta.sum(0)
    dw_hr = None if weights.w_hr is None else dh.T @ (o * tanh_c)
    return StepGradients(
        x=delta @ weights.w_ih,
        state=(delta @ weights.w_hh, dc * f),
        weights=Weights(delta.T @ step.x, delta.T @ step.h_prev, db, db, dw_hr),
    )


# GRU: Cho et al., "Learning phrase representations using RNN encoder-decoder", EMNLP 2014.
# r,z = s(W x + b_ih + U h' + b_hh)      h = (1-z) n + z h'
# reset after (cuDNN, torch):  n = tanh(W_n x + b_in + r (U_n h' + b_hn))
# reset before (the paper):    n = tanh(W_n x + b_in + U_n (r h') + b_hn)
# Texts that write h = (1-z) h' + z n, such as Chung et al. 2014, call z what is 1 - z here. Since
# 1 - s(a) = s(-a), a sign flip of the z rows of W, U, b_ih and b_hh converts one into the other.


class GRUStep(NamedTuple):
    x: ndarray
    h_prev: ndarray
    r: ndarray
    z: ndarray
    n: ndarray
    q: ndarray  # what the reset gate multiplies: U_n h' + b_hn (reset after) or h' (reset before)
    h: ndarray

    @property
    def state(self) -> tuple[ndarray]:
        return (self.h,)


def gru_step(x: ndarray, h: ndarray, weights: Weights) -> GRUStep:
    """h_t from x_t and h_{t-1}, the reset gate applied after the recurrent product."""
    x_r, x_z, x_n = np.split(affine(x, weights.w_ih, weights.b_ih), 3, -1)
    h_r, h_z, q = np.split(affine(h, weights.w_hh, weights.b_hh), 3, -1)
    r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
    n = np.tanh(x_n + r * q)
    return GRUStep(x, h, r, z, n, q, h=(1.0 - z) * n + z * h)


def gru_step_backward(step: GRUStep, dh: ndarray, weights: Weights) -> StepGradients:
    """dh [B, H] is dL/dh_t. The n rows get delta_n on the input side, r * delta_n on the other."""
    x, h_prev, r, z, n, q, _ = step
    delta_n = dh * (1.0 - z) * (1.0 - n * n)
    delta_z = dh * (h_prev - n) * z * (1.0 - z)
    delta_r = delta_n * q * r * (1.0 - r)
    delta_x = np.concatenate([delta_r, delta_z, delta_n], -1)
    delta_h = np.concatenate([delta_r, delta_z, delta_n * r], -1)
    return StepGradients(
        x=delta_x @ weights.w_ih,
        state=(dh * z + delta_h @ weights.w_hh,),
        weights=Weights(delta_x.T @ x, delta_h.T @ h_prev, delta_x.sum(0), delta_h.sum(0)),
    )


def gru_reset_before_step(x: ndarray, h: ndarray, weights: Weights) -> GRUStep:
    """h_t from x_t and h_{t-1}, the reset gate applied to h_{t-1} before the recurrent product."""
    w_rz, w_n = np.split(weights.w_hh, [2 * h.shape[-1]])
    b_rz, b_n = (None, None) if weights.b_hh is None else np.split(weights.b_hh, [2 * h.shape[-1]])
    x_r, x_z, x_n = np.split(affine(x, weights.w_ih, weights.b_ih), 3, -1)
    h_r, h_z = np.split(affine(h, w_rz, b_rz), 2, -1)
    r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
    n = np.tanh(x_n + affine(r * h, w_n, b_n))
    return GRUStep(x, h, r, z, n, q=h, h=(1.0 - z) * n + z * h)


def gru_reset_before_step_backward(step: GRUStep, dh: ndarray, weights: Weights) -> StepGradients:
    """dh [B, H] is dL/dh_t. The n rows of U have r * h_{t-1} as their input, not h_{t-1}."""
    x, h_prev, r, z, n, _, _ = step
    w_rz, w_n = np.split(weights.w_hh, [2 * h_prev.shape[-1]])
    delta_n = dh * (1.0 - z) * (1.0 - n * n)
    d_reset = delta_n @ w_n  # dL/d(r * h_{t-1})
    delta_z = dh * (h_prev - n) * z * (1.0 - z)
    delta_r = d_reset * h_prev * r * (1.0 - r)
    delta_rz = np.concatenate([delta_r, delta_z], -1)
    delta = np.concatenate([delta_rz, delta_n], -1)
    dw_hh = np.concatenate([delta_rz.T @ h_prev, delta_n.T @ (r * h_prev)])
    db = delta.sum(0)
    return StepGradients(
        x=delta @ weights.w_ih,
        state=(dh * z + d_reset * r + delta_rz @ w_rz,),
        weights=Weights(delta.T @ x, dw_hh, db, db),
    )
