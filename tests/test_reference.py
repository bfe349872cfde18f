"""The NumPy reference against finite differences, torch.nn and autograd through plain loops."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from reference_cases import (
    BATCH,
    BATCH_SIZES,
    CASES,
    HIDDEN,
    INPUT,
    LENGTHS,
    STEPS,
    TOLERANCE,
    check_gradients,
    each_cell,
    each_direction,
    each_layout,
    largest_difference,
    random_arguments,
    random_cotangents,
    results,
)
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from rnn_ext import reference

# Finite differences


@each_direction
@each_layout
@each_cell
def test_every_gradient_is_the_slope_of_the_loss(cell, projection, layout, reverse):
    arguments, batch = random_arguments(cell, projection, layout)
    result = reference.forward(cell, **arguments, **batch, reverse=reverse)
    cotangents = random_cotangents(result)
    weights = arguments.pop("weights")._asdict()
    leaves = {name: leaf for name, leaf in (arguments | weights).items() if leaf is not None}

    def loss():
        values = reference.forward(
            cell, **arguments, weights=weights.values(), **batch, reverse=reverse
        )
        return sum((cotangents[f"d_{name}"] * r).sum() for name, r in results(values).items())

    def slopes(leaf, epsilon=1e-5):
        slope = np.empty_like(leaf)
        for index in np.ndindex(leaf.shape):
            value = leaf[index]
            leaf[index] = value + epsilon
            above = loss()
            leaf[index] = value - epsilon
            slope[index] = (above - loss()) / (2 * epsilon)
            leaf[index] = value
        return slope

    expected = {name: slopes(leaf) for name, leaf in leaves.items()}
    # Rounding: eps * |loss| / epsilon ~ 1e-10; truncation: epsilon^2 / 6 * third derivative ~ 1e-9.
    check_gradients(reference.backward(result, **cotangents), expected, tolerance=2e-8)


# torch.nn


def torch_module(cell, projection, bias):
    options = {"bias": bias, "bidirectional": True, "dtype": torch.float64}
    if cell == "lstm":
        return torch.nn.LSTM(INPUT, HIDDEN, proj_size=projection, **options)
    if cell == "gru":
        return torch.nn.GRU(INPUT, HIDDEN, **options)
    return torch.nn.RNN(INPUT, HIDDEN, nonlinearity=cell.removeprefix("rnn_"), **options)


def torch_weights(module, reverse):
    suffix = "_l0_reverse" if reverse else "_l0"
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    return [getattr(module, name + suffix, None) for name in names]


def run_torch(module, x, states, layout):
    """x and states are leaves; returns output, h_n and perhaps c_n as plain tensors."""
    hx = tuple(states) if len(states) > 1 else states[0]
    if layout == "padded":
        output, final = module(x, hx)
    elif layout == "packed":
        output, final = module(PackedSequence(x, torch.tensor(BATCH_SIZES)), hx)
        output = output.data
    else:
        packed, final = module(pack_padded_sequence(x, LENGTHS, enforce_sorted=False), hx)
        output, _ = pad_packed_sequence(packed)
    return output, *(final if isinstance(final, tuple) else (final,))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@each_layout
@pytest.mark.parametrize(
    "cell, projection",
    [case for case in CASES if case[0] not in ("rnn_sigmoid", "gru_reset_before")],
)
def test_agrees_with_both_directions_of_torch(cell, projection, layout, bias):
    forwards, batch = random_arguments(cell, projection, layout, bias=bias)
    backwards, _ = random_arguments(cell, projection, layout, seed=5, bias=bias)
    backwards["x"] = forwards["x"]
    module = torch_module(cell, projection, bias)
    for reverse, arguments in enumerate((forwards, backwards)):
        for parameter, weight in zip(
            torch_weights(module, reverse), arguments["weights"], strict=True
        ):
            if weight is not None:
                parameter.data = torch.from_numpy(weight)
    x = torch.from_numpy(forwards["x"]).requires_grad_()
    states = [
        torch.from_numpy(np.stack([forwards[s], backwards[s]])).requires_grad_()
        for s in ("h0", "c0")
        if forwards[s] is not None
    ]
    outputs = run_torch(module, x, states, layout)
    random = np.random.default_rng(1)
    cotangents = [random.normal(size=o.shape) for o in outputs]
    weights = [w for r in (False, True) for w in torch_weights(module, r) if w is not None]
    leaves = [x, *states, *weights]
    grads = torch.autograd.grad(outputs, leaves, [torch.from_numpy(c) for c in cotangents])
    grad_x, *grads = [g.numpy() for g in grads]
    grad_states, grad_weights = grads[: len(states)], grads[len(states) :]
    each = len(grad_weights) // 2

    d_x = 0.0
    for reverse, arguments in enumerate((forwards, backwards)):
        mine = reference.forward(cell, **arguments, **batch, reverse=bool(reverse))
        half = np.s_[..., reverse * mine.output.shape[-1] : (reverse + 1) * mine.output.shape[-1]]
        finals = [f for f in (mine.h_n, mine.c_n) if f is not None]
        assert largest_difference(mine.output, outputs[0].detach()[half]) <= TOLERANCE
        for final, expected in zip(finals, outputs[1:], strict=True):
            assert largest_difference(final, expected.detach()[reverse]) <= TOLERANCE

        d_output, *d_final = cotangents
        gradients = asdict(reference.backward(mine, d_output[half], *(d[reverse] for d in d_final)))
        d_x = d_x + gradients.pop("x")
        gradients = [g for g in gradients.values() if g is not None]
        expected = [g[reverse] for g in grad_states]
        expected += grad_weights[reverse * each : (reverse + 1) * each]
        for gradient, value in zip(gradients, expected, strict=True):
            assert largest_difference(gradient, value) <= TOLERANCE
    assert largest_difference(d_x, grad_x) <= TOLERANCE


# What torch.nn does not have, against autograd through a plain loop


def sigmoid_rnn(x, h, w_ih, w_hh, b_ih, b_hh):
    return torch.sigmoid(w_ih @ x + w_hh @ h + b_ih + b_hh)


def reset_before_gru(x, h, w_ih, w_hh, b_ih, b_hh):
    (w_r, w_z, w_n), (u_r, u_z, u_n) = w_ih.chunk(3), w_hh.chunk(3)
    b_r, b_z, b_n = (b_ih + b_hh).chunk(3)
    r = torch.sigmoid(w_r @ x + u_r @ h + b_r)
    z = torch.sigmoid(w_z @ x + u_z @ h + b_z)
    n = torch.tanh(w_n @ x + u_n @ (r * h) + b_n)
    return n - z * n + z * h


@each_direction
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["equal", "ragged"])
@pytest.mark.parametrize(
    "cell, step", [("rnn_sigmoid", sigmoid_rnn), ("gru_reset_before", reset_before_gru)]
)
def test_agrees_with_an_autograd_loop(cell, step, lengths, reverse):
    arguments, _ = random_arguments(cell, 0, "padded")
    result = reference.forward(cell, **arguments, lengths=lengths, reverse=reverse)
    cotangents = random_cotangents(result)

    weights = arguments["weights"]._asdict()
    leaves = {"x": arguments["x"], "h0": arguments["h0"]} | weights
    leaves = {k: torch.from_numpy(v).requires_grad_() for k, v in leaves.items() if v is not None}
    x, h0, *parameters = leaves.values()
    output, h_n = torch.zeros(result.output.shape, dtype=torch.float64), []
    for row, length in enumerate(lengths or [STEPS] * BATCH):
        h = h0[row]
        for t in reversed(range(length)) if reverse else range(length):
            h = step(x[t, row], h, *parameters)
            output[t, row] = h
        h_n.append(h)
    outputs = output, torch.stack(h_n)
    for actual, expected in zip((result.output, result.h_n), outputs, strict=True):
        assert largest_difference(actual, expected.detach()) <= TOLERANCE
    d_outputs = [torch.from_numpy(d) for d in cotangents.values()]
    grads = torch.autograd.grad(outputs, list(leaves.values()), d_outputs)
    expected = {name: grad.numpy() for name, grad in zip(leaves, grads, strict=True)}
    check_gradients(reference.backward(result, **cotangents), expected)


@pytest.mark.parametrize("cell", ["gru", "gru_reset_before"])
def test_textbook_z_is_a_sign_flip_of_the_z_rows(cell):
    """h = (1-z) h' + z n, written out here, is our GRU with the z rows negated."""
    arguments, _ = random_arguments(cell, 0, "padded")
    weights, h = arguments["weights"], arguments["h0"]
    (w_r, w_z, w_n), (u_r, u_z, u_n), (b_r, b_z, b_n), (c_r, c_z, c_n) = (
        np.split(w, 3) for w in weights[:4]
    )
    textbook = []
    for x in arguments["x"]:
        r = 1 / (1 + np.exp(-(x @ w_r.T + h @ u_r.T + b_r + c_r)))
        z = 1 / (1 + np.exp(-(x @ w_z.T + h @ u_z.T + b_z + c_z)))
        recurrent = (r * h) @ u_n.T + c_n if cell == "gru_reset_before" else r * (h @ u_n.T + c_n)
        h = (1 - z) * h + z * np.tanh(x @ w_n.T + b_n + recurrent)
        textbook.append(h)

    z_rows = slice(HIDDEN, 2 * HIDDEN)
    flipped = [w.copy() for w in weights[:4]]
    for weight in flipped:
        weight[z_rows] *= -1
    converted = reference.forward(cell, **(arguments | {"weights": flipped}))
    assert largest_difference(converted.output, textbook) <= 1e-14
    unconverted = reference.forward(cell, **arguments)
    assert largest_difference(unconverted.output, textbook) > 0.1
