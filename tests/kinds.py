"""A layer of every kind of cell, tiny and in float64, and losses of them."""

import torch
from torch.func import functional_call
from twins import tensors

import rnn_ext

KINDS = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "rnn_sigmoid": ("RNN", {"nonlinearity": "sigmoid"}),
    "lstm": ("LSTM", {}),
    "lstm_projected": ("LSTM", {"proj_size": 1}),
    "gru": ("GRU", {}),
    "gru_reset_before": ("GRU", {"reset_after": False}),
}


def make(kind, inputs=2, hidden=2, **options):
    name, more = KINDS[kind]
    return getattr(rnn_ext, name)(inputs, hidden, dtype=torch.float64, **more, **options)


def random(*shape, **options):
    return torch.randn(*shape, dtype=torch.float64, **options)


def squares(results):
    return sum(part.square().sum() for part in tensors(results))


def parameters_of(module):
    return {name: value.detach() for name, value in module.named_parameters()}


def loss_of(module):
    return lambda parameters, *inputs: squares(functional_call(module, parameters, inputs))


def gradients_alone(module, *inputs):
    """{name: gradient} of the same loss, by torch.autograd."""
    found = torch.autograd.grad(squares(module(*inputs)), list(module.parameters()))
    return dict(zip((name for name, _ in module.named_parameters()), found))
