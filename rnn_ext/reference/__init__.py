"""The truth: recurrent layers and their BPTT in plain NumPy float64, written to be read.

One layer and one direction, because a stack only composes those. ``docs/math.md`` derives every
line; the tests hold it against finite differences and against ``torch.nn``, and hold everything
else against it. NumPy is all it needs, and nothing in it is fast.

>>> import numpy as np
>>> from rnn_ext import reference
>>> weights = reference.Weights(w_ih=[[0.5]], w_hh=[[0.5]])
>>> x = np.array([1.0, -1.0, 2.0]).reshape(3, 1, 1)  # T = 3 steps, batch of 1, 1 feature
>>> result = reference.forward("rnn_relu", x, None, None, weights)
>>> result.output.ravel().tolist()
[0.5, 0.0, 1.0]
>>> gradients = reference.backward(result, d_h_n=[[1.0]])  # of the loss L = h_3
>>> gradients.w_ih.item(), gradients.w_hh.item()
(2.0, 0.0)
"""

from . import random
from .cells import (
    ElmanStep,
    GRUStep,
    LSTMStep,
    StepGradients,
    Weights,
    elman_step,
    elman_step_backward,
    gru_reset_before_step,
    gru_reset_before_step_backward,
    gru_step,
    gru_step_backward,
    lstm_step,
    lstm_step_backward,
    sigmoid,
)
from .generation import beam_search, sample
from .jordan import JordanGradients, JordanResult, JordanWeights, jordan, jordan_backward
from .normalized import NormalizedWeights
from .rtrl import OnlineResult, rtrl, touched
from .sequence import CELLS, Cell, Gradients, Result, backward, forward, hidden_gradients

__all__ = [
    "CELLS",
    "Cell",
    "ElmanStep",
    "GRUStep",
    "Gradients",
    "JordanGradients",
    "JordanResult",
    "JordanWeights",
    "LSTMStep",
    "NormalizedWeights",
    "OnlineResult",
    "Result",
    "StepGradients",
    "Weights",
    "backward",
    "beam_search",
    "elman_step",
    "elman_step_backward",
    "forward",
    "gru_reset_before_step",
    "gru_reset_before_step_backward",
    "gru_step",
    "gru_step_backward",
    "hidden_gradients",
    "jordan",
    "jordan_backward",
    "lstm_step",
    "lstm_step_backward",
    "random",
    "rtrl",
    "sample",
    "sigmoid",
    "touched",
]
