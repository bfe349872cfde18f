"""Keras' own layers (on its torch backend) and ours with their weights: results and gradients.

What torch.nn has no peer for is held to Keras here: the GRU of the first papers
(``reset_after=False``) and one dropout mask for all steps of a sequence.
"""

import os
import time

import numpy as np
import pytest
import torch

import rnn_ext
from rnn_ext import random
from rnn_ext.converters import from_keras, to_keras

B, T, I, H = 3, 7, 4, 5
LAYERS = [
    ("SimpleRNN", "RNN", {}),
    ("LSTM", "LSTM", {}),
    ("GRU", "GRU", {"reset_after": True}),
    ("GRU", "GRU", {"reset_after": False}),
]
each_layer = pytest.mark.parametrize(
    "theirs, kind, options", LAYERS, ids=["RNN", "LSTM", "GRU", "GRU-reset_before"]
)


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    os.environ["KERAS_BACKEND"] = "torch"
    os.environ["KERAS_HOME"] = str(tmp_path_factory.mktemp("keras"))  # where it writes a file
    return pytest.importorskip("keras")


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def built(keras, name, **options):
    """A layer of Keras with weights and biases that are not zero."""
    layer = getattr(keras.layers, name)(H, return_sequences=True, **options)
    layer.build((B, T, I))
    rng = np.random.default_rng(0)
    layer.set_weights([rng.uniform(-0.5, 0.5, w.shape) for w in layer.get_weights()])
    return layer


def ours(kind, options, weights, **more):
    layer = getattr(rnn_ext, kind)(I, H, batch_first=True, **options, **more)
    layer.load_state_dict(from_keras(kind, weights))
    return layer


def inputs():
    return torch.randn(B, T, I, generator=torch.Generator().manual_seed(0))


@each_layer
@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "go_backwards"])
def test_results_and_gradients(keras, theirs, kind, options, backwards):
    peer = built(keras, theirs, go_backwards=backwards, **options)
    layer = ours(kind, options, peer.get_weights())
    x, given = inputs().requires_grad_(), inputs().requires_grad_()
    expected = peer(x)
    output, _ = layer(given.flip(1) if backwards else given)
    assert_close(output, expected)

    upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    expected.backward(upstream)
    output.backward(upstream)
    assert_close(given.grad, x.grad)
    found = {name: p.grad for name, p in layer.named_parameters()}
    two_biases = bool(options.get("reset_after"))
    for name, value in from_keras(kind, [w.value.grad for w in peer.weights]).items():
        if name.startswith("weight") or two_biases or name == "bias_ih_l0":
            assert_close(found[name], value)


@each_layer
def test_both_directions(keras, theirs, kind, options):
    peer = keras.layers.Bidirectional(built(keras, theirs, **options))
    peer.build((B, T, I))
    weights = [w * 0.5 for w in peer.get_weights()]
    peer.set_weights(weights)
    layer = getattr(rnn_ext, kind)(I, H, batch_first=True, bidirectional=True, **options)
    half = len(weights) // 2
    parameters = from_keras(kind, weights[:half]) | from_keras(kind, weights[half:], reverse=True)
    layer.load_state_dict(parameters)
    assert_close(layer(inputs())[0], peer(inputs()))


@each_layer
def test_weights_back_to_keras(keras, theirs, kind, options):
    layer = getattr(rnn_ext, kind)(I, H, batch_first=True, **options)
    peer = built(keras, theirs, **options)
    peer.set_weights(to_keras(kind, layer.state_dict(), **options))
    assert_close(layer(inputs())[0], peer(inputs()))


@each_layer
def test_one_dropout_mask_for_all_steps(keras, theirs, kind, options):
    """Keras' ``dropout`` and ``variational_dropout``, with the mask that ours draws."""
    p, seed = 0.4, 7
    peer = built(keras, theirs, dropout=p, **options)
    layer = ours(kind, options, peer.get_weights(), variational_dropout=p)
    torch.manual_seed(seed)
    output, _ = layer(inputs())
    torch.manual_seed(seed)
    stream = random.stream("variational_dropout", 0)
    steps, rows = torch.zeros(B, dtype=torch.int64), torch.arange(B)
    mask = random.mask(random.draw_seed(), stream, steps, rows, I, p, 1 / (1 - p), inputs())
    of_keras = peer.cell.get_dropout_mask(inputs()[:, 0])  # one for each gate, or for all
    of_keras = of_keras if isinstance(of_keras, torch.Tensor) else of_keras[0]
    assert of_keras.shape == mask.shape
    assert_close(of_keras[of_keras > 0], torch.full_like(of_keras[of_keras > 0], 1 / (1 - p)))

    plain = built(keras, theirs, **options)
    plain.set_weights(peer.get_weights())
    assert_close(output, plain(inputs() * mask[:, None]))


def test_the_original_gru_beside_keras(keras, capsys):
    """Says how fast; other machines have other numbers."""
    peer = keras.layers.GRU(128, return_sequences=True, reset_after=False)
    x = torch.randn(16, 50, 64)
    peer.build(x.shape)
    layer = rnn_ext.GRU(64, 128, batch_first=True, reset_after=False)
    layer.load_state_dict(from_keras("GRU", peer.get_weights()))
    seconds = {}
    for name, run in {"Keras": peer, "rnn_ext": lambda x: layer(x)[0]}.items():
        results = run(x)
        start = time.perf_counter()
        run(x).square().sum().backward()
        seconds[name] = time.perf_counter() - start
        if name == "Keras":
            expected = results
    assert_close(results, expected)
    with capsys.disabled():
        print(
            f"\noriginal GRU, a training step of [16, 50, 64] with 128 units: "
            f"{seconds['Keras'] / seconds['rnn_ext']:.1f} times as fast as Keras on torch"
        )
