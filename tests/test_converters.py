"""Weights of Keras, ONNX and haste in our layers: those libraries' equations, then ours."""

import doctest

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import rnn_ext
from rnn_ext import converters
from rnn_ext.converters import from_haste, from_keras, from_onnx, to_keras
from rnn_ext.reference import sigmoid

T, B, I, H = 4, 2, 3, 5
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}


def random(*shape):
    return np.random.default_rng(sum(shape) + len(shape)).normal(size=shape) * 0.5


def arrays(kind, two_biases):
    rows = GATES[kind] * H
    return random(I, rows), random(H, rows), random(2, rows) if two_biases else random(rows)


def ours(kind, parameters, x, **options):
    layer = getattr(rnn_ext, kind)(I, H, dtype=torch.float64, **options)
    layer.load_state_dict(parameters)
    return layer(torch.from_numpy(x))[0].detach().numpy()


def keras(kind, weights, x, reset_after=True):
    """Keras' layers, as the documentation of keras.layers has their equations."""
    kernel, recurrent, bias = weights
    h, c, outputs = np.zeros((B, H)), np.zeros((B, H)), []
    for x_t in x:
        if kind == "RNN":
            h = np.tanh(x_t @ kernel + bias + h @ recurrent)
        elif kind == "LSTM":
            i, f, g, o = np.split(x_t @ kernel + h @ recurrent + bias, 4, -1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        elif reset_after:
            (xz, xr, xh), (hz, hr, hh) = (
                np.split(a, 3, -1) for a in (x_t @ kernel + bias[0], h @ recurrent + bias[1])
            )
            z, r = sigmoid(xz + hz), sigmoid(xr + hr)
            h = z * h + (1 - z) * np.tanh(xh + r * hh)
        else:
            xz, xr, xh = np.split(x_t @ kernel + bias, 3, -1)
            uz, ur, uh = np.split(recurrent, 3, -1)
            z, r = sigmoid(xz + h @ uz), sigmoid(xr + h @ ur)
            h = z * h + (1 - z) * np.tanh(xh + (r * h) @ uh)
        outputs.append(h)
    return np.stack(outputs)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("RNN", {}), ("LSTM", {}), ("GRU", {}), ("GRU", {"reset_after": False})],
)
def test_keras_and_back(kind, options):
    reset_after = options.get("reset_after", True)
    weights, x = arrays(kind, kind == "GRU" and reset_after), random(T, B, I)
    parameters = from_keras(kind, weights)
    expected = keras(kind, weights, x, reset_after)
    np.testing.assert_allclose(ours(kind, parameters, x, **options), expected, atol=1e-12)
    returned = to_keras(kind, parameters, reset_after=reset_after)
    for there, back in zip(weights, returned, strict=True):
        assert there.shape == back.shape
        np.testing.assert_array_equal(there, back)
    if kind != "GRU" or not reset_after:
        single = from_keras(kind, weights, single_bias=True)
        assert "bias_hh_l0" not in single
        found = ours(kind, single, x, bias="single", **options)
        np.testing.assert_allclose(found, expected, atol=1e-12)
        np.testing.assert_array_equal(to_keras(kind, single, reset_after=False)[2], weights[2])


def test_layers_and_directions_of_keras():
    layer = rnn_ext.GRU(I, H, 2, bidirectional=True, bias=False)
    collected = {}
    for k in range(2):
        for reverse in (False, True):
            weights = to_keras("GRU", layer.state_dict(), layer=k, reverse=reverse)
            assert [w.shape for w in weights] == [(2 * H if k else I, 3 * H), (H, 3 * H)]
            collected |= from_keras("GRU", weights, layer=k, reverse=reverse)
    assert collected.keys() == layer.state_dict().keys()
    assert all(torch.equal(collected[name], value) for name, value in layer.state_dict().items())


def arrays_of_onnx(kind="LSTM", directions=1):
    """W, R and B."""
    rows = GATES[kind] * H
    shapes = (directions, rows, I), (directions, rows, H), (directions, 2 * rows)
    return [random(*shape).astype(np.float32) for shape in shapes]


def run_node(kind, x, arrays, **attributes):
    """What onnxruntime makes of [T, B, I] with a node's arrays by name, [T, B, directions * H]."""
    inputs = ["x", "W", "R", "B", *("", "", "", "P")[: 4 * ("P" in arrays)]]
    node = onnx.helper.make_node(kind, inputs, ["y"], hidden_size=H, **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "layer",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(None, {"x": x})  # [T, directions, B, H]
    return y.transpose(0, 2, 1, 3).reshape(T, B, -1)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("kind", [*GATES, "peephole LSTM"])
def test_onnx_runs_the_same(kind, directions):
    peephole, kind = kind == "peephole LSTM", kind.split()[-1]
    w, r, b = arrays_of_onnx(kind, directions)
    p = random(directions, 3 * H).astype(np.float32) if peephole else None
    x = random(T, B, I).astype(np.float32)
    attributes = {"direction": "bidirectional"} if directions == 2 else {}
    for before in (0, 1) if kind == "GRU" else (None,):
        if before is not None:
            attributes["linear_before_reset"] = before
        arrays = {"W": w, "R": r, "B": b} | ({"P": p} if peephole else {})
        expected = run_node(kind, x, arrays, **attributes)
        options = {"reset_after": bool(before)} if kind == "GRU" else {}
        options |= {"peephole": True} if peephole else {}
        layer = getattr(rnn_ext, kind)(I, H, bidirectional=directions == 2, **options)
        layer.load_state_dict(from_onnx(kind, [w, r, b], peepholes=p))
        found = layer(torch.from_numpy(x))[0].detach().numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)
    without = from_onnx(kind, [w, r, None], layer=3)
    assert set(without) == {
        f"weight_{part}_l3{way}" for part in ("ih", "hh") for way in ("", "_reverse")[:directions]
    }


def haste(kind, state, x):
    h, c, outputs = np.zeros((B, H)), np.zeros((B, H)), []
    for x_t in x:
        wx = x_t @ state["kernel"] + state["bias"]
        rh = h @ state["recurrent_kernel"]
        if kind == "LSTM":
            i, g, f, o = np.split(wx + rh, 4, -1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:
            (xz, xr, xg), (hz, hr, hg) = (
                np.split(a, 3, -1) for a in (wx, rh + state["recurrent_bias"])
            )
            z, r = sigmoid(xz + hz), sigmoid(xr + hr)
            h = z * h + (1 - z) * np.tanh(xg + r * hg)
        outputs.append(h)
    return np.stack(outputs)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_haste(kind):
    kernel, recurrent, biases = arrays(kind, True)
    state = {"kernel": kernel, "recurrent_kernel": recurrent, "bias": biases[0]}
    if kind == "GRU":
        state["recurrent_bias"] = biases[1]
    x = random(T, B, I)
    found = ours(kind, from_haste(kind, state), x)
    np.testing.assert_allclose(found, haste(kind, state, x), atol=1e-12)
    tensors = {name: torch.from_numpy(a).requires_grad_() for name, a in state.items()}
    again = from_haste(kind, tensors, layer=1, reverse=True)
    assert torch.equal(again["weight_ih_l1_reverse"], from_haste(kind, state)["weight_ih_l0"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: from_keras("lstm", []), "kind must be one of RNN, LSTM, GRU, got 'lstm'"),
        (lambda: from_keras("LSTM", [np.zeros((3, 20))]), "at most one bias, got 1 arrays"),
        (
            lambda: from_keras("LSTM", [np.zeros((3, 20)), np.zeros((4, 20))]),
            "recurrent weights of 4 units must be 4 gates",
        ),
        (
            lambda: from_keras("LSTM", [np.zeros((3, 16)), np.zeros((5, 20))]),
            r"input weights must be \[20, input_size\]",
        ),
        (
            lambda: from_keras("RNN", [np.zeros((3, 5)), np.zeros((5, 5)), np.zeros(4)]),
            "a bias must have 5 entries",
        ),
        (
            lambda: from_keras("GRU", arrays("GRU", True), single_bias=True),
            "cannot hold the two biases",
        ),
        (lambda: to_keras("RNN", {}), "state has no weight_ih_l0"),
        (
            lambda: to_keras("LSTM", rnn_ext.LSTM(3, 5, proj_size=2).state_dict()),
            "Keras' LSTM has no projection",
        ),
        (lambda: from_onnx("GRU", [np.zeros((1, 15, 3))]), "weights must be W"),
        (
            lambda: from_onnx("RNN", [np.zeros((1, 5, 3)), np.zeros((2, 5, 5))]),
            "all have one direction",
        ),
        (
            lambda: from_onnx("LSTM", arrays_of_onnx(), peepholes=np.zeros((1, 20))),
            r"peepholes must be P \[D, 3\*H\] of an LSTM, got \(1, 20\) of LSTM",
        ),
        (
            lambda: from_onnx("RNN", [np.zeros((1, 5, 3)), np.zeros((1, 5, 5))], peepholes=[[0]]),
            "of an LSTM, got .* of RNN",
        ),
        (lambda: from_haste("GRU", {"kernel": np.zeros((3, 15))}), "state has no recurrent_kernel"),
        (lambda: from_haste("RNN", {}), "kind must be one of LSTM, GRU"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_examples_of_the_docstrings_run():
    for module in (converters, rnn_ext.reference.random):
        found = doctest.testmod(module)
        assert found.attempted and not found.failed
