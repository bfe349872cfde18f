"""Streams for online learning, and what backpropagation through time makes of them."""

import copy

import torch

import rnn_ext


def stream(steps, batch, inputs, hidden, resets=True, dtype=torch.float64):
    """x, dL/dh of every step, and resets (about one in twelve) or None."""
    x = torch.randn(steps, batch, inputs, dtype=dtype)
    d_h = torch.randn(steps, batch, hidden, dtype=dtype)
    return x, d_h, (torch.rand(steps, batch) < 0.08) if resets else None


def learn(rtrl, x, d_h, resets=None, flush=True):
    """Outputs of all steps; gradients go to the module."""
    outputs = []
    for t in range(len(x)):
        outputs.append(rtrl.step(x[t], None if resets is None else resets[t]))
        rtrl.accumulate(d_h[t])
    if flush:
        rtrl.flush()
    return torch.stack(outputs)


def bptt(module, x, d_h, resets=None):
    """Outputs and gradients by autograd through steps of the composed cell."""
    module = copy.deepcopy(module)
    module.zero_grad()
    batch = x.shape[1]
    state = x.new_zeros(1, batch, module.hidden_size)
    state = (state, state) if module._cell == "lstm" else state
    outputs = []
    with rnn_ext.use_backend("reference"):
        for t in range(len(x)):
            if resets is not None:
                keep = ~resets[t][:, None]
                state = (
                    tuple(part * keep for part in state)
                    if isinstance(state, tuple)
                    else state * keep
                )
            output, state = module(x[t][None], state)
            outputs.append(output[0])
    output = torch.stack(outputs)
    output.backward(d_h)
    return output.detach(), gradients_of(module)


def gradients_of(module):
    return {name: weight.grad for name, weight in module.named_parameters()}


def assert_close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name] - value).abs().max() / value.abs().max()
        assert error <= tolerance, f"{name}: relative error {error:.3g}"
