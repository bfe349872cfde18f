"""Options of layers beside control of their training, diagnosis and online learning."""

import numpy as np
import pytest
import torch
from kinds import make, random, squares
from options_by_numpy import keep, seed_of_next_call
from twins import assert_same, forget_warnings, tensors

import rnn_ext
from rnn_ext import gradient_flow, online, reference

T, B = 6, 3
SERVED = {
    "residual": {"num_layers": 2, "residual": True},
    "widths": {"hidden": [3, 4, 4], "residual": True},
    "masks": {"num_layers": 2, "weight_dropout": 0.4, "variational_dropout": 0.3},
    "parameters": {"num_layers": 2, "bias": "single", "learn_initial_state": True},
    "zoneout": {"num_layers": 2, "zoneout": 0.4},
}
CONTROLS = {
    "checkpoints": {"checkpoint_every": 2},
    "states": {"save": "states"},
    "value": {"grad_clip": 1e6},
    "norm": {"grad_clip": ("norm", 1e6), "checkpoint_every": 2},
}


@pytest.fixture(autouse=True)
def _each_warning_again():
    forget_warnings()


def pair(kind, options, control):
    """A layer and one that trains under ``control``, of the same weights."""
    options = {"hidden": 3, "bidirectional": True} | options
    plain = make(kind, 2, **options)
    controlled = make(kind, 2, **options, **control)
    controlled.load_state_dict(plain.state_dict())
    return plain, controlled


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("option", SERVED)
@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm", "gru", "gru_reset_before"])
def test_gradients_are_those_of_the_uncontrolled_layer(kind, option, control):
    """The same masks in the forward pass and in what is computed again."""
    layers = pair(kind, SERVED[option], CONTROLS[control])
    x = random(T, B, 2, requires_grad=True)
    for lengths in (None, [4, 6, 1]):
        found = []
        for layer in layers:
            seed_of_next_call()
            results = layer(x, lengths=lengths, return_gates=True)
            leaves = [x, *layer.parameters()]
            found.append((results, list(torch.autograd.grad(squares(results), leaves))))
        (plain, expected), (controlled, gradients) = found
        assert all(map(torch.equal, tensors(controlled), tensors(plain)))
        assert_same(gradients, expected)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("kind", ["rnn_relu", "lstm_projected", "gru"])
def test_a_share_that_is_held_has_the_same_gradients(kind, control):
    layers = [layer.eval() for layer in pair(kind, SERVED["zoneout"], CONTROLS[control])]
    x, resets = random(T, B, 2, requires_grad=True), torch.rand(T, B) < 0.3
    for lengths in (None, [4, 6, 1]):
        found = []
        for layer in layers:
            results = layer(x, lengths=lengths, resets=resets)
            found.append(torch.autograd.grad(squares(results), [x, *layer.parameters()]))
        assert_same(*found)


@pytest.mark.parametrize("option", SERVED)
def test_clipping_reaches_every_layer(option):
    options = SERVED[option]
    plain, clipped = pair("lstm", options, {"grad_clip": 0.05})
    x = random(T, B, 2)
    found = []
    for layer, backend in ((plain, "auto"), (clipped, "auto"), (clipped, "reference")):
        seed_of_next_call()
        with rnn_ext.use_backend(backend):
            loss = squares(layer(x))
            found.append(list(torch.autograd.grad(loss, list(layer.parameters()))))
    assert_same(found[1], found[2])
    for before, after in zip(*found[:2]):
        assert not torch.allclose(before, after, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("grad_clip", [None, 0.2, ("norm", 0.3)], ids=str)
@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm", "gru", "gru_reset_before"])
def test_zoneout_clipped_and_watched_follows_the_reference(kind, grad_clip):
    module = make(kind, 2, 3, zoneout=0.4, grad_clip=grad_clip)
    x, upstream = random(T, B, 2, requires_grad=True), random(T, B, 3)
    seed = seed_of_next_call()
    gradients = torch.autograd.grad(module(x)[0], [x, *module.parameters()], upstream)
    at = np.repeat(np.arange(T), B), np.tile(np.arange(B), T)
    hold = [
        1.0 - keep(seed, purpose, 0, *at, 3, 0.4).reshape(T, B, 3)
        for purpose in ("zoneout_h", "zoneout_c")
    ]
    weights = [None if w is None else w.detach().numpy() for w in module._weights()[0]]
    result = reference.forward(module._cell, x.detach().numpy(), None, None, weights, zoneout=hold)
    truth = reference.backward(result, upstream.numpy(), grad_clip=grad_clip)
    names = ("x", "w_ih", "w_hh", "b_ih", "b_hh")
    assert_same(list(gradients), [torch.from_numpy(getattr(truth, name)) for name in names])
    dh = reference.hidden_gradients(result, upstream.numpy(), grad_clip=grad_clip)
    seed_of_next_call()
    flow = gradient_flow(module, x, upstream=upstream)
    assert_same(flow.per_sample[0, 0], torch.from_numpy(np.linalg.norm(dh, axis=-1)))


def test_gradient_flow_through_residual_links_and_widths():
    """Two layers, of which the second is linked, against each of them alone."""
    both = make("lstm", 2, [3, 3], residual=True)
    first, second = make("lstm", 2, 3), make("lstm", 3, 3)
    for layer, name in ((first, "l0"), (second, "l1")):
        own = {k.replace(name, "l0"): v for k, v in both.state_dict().items() if k.endswith(name)}
        layer.load_state_dict(own)
    x, upstream = random(T, B, 2), random(T, B, 3)
    flow = gradient_flow(both, x, upstream=upstream)
    inner = first(x)[0].detach().requires_grad_()
    output = second(inner)[0] + inner
    assert_same(both(x)[0], output)
    (reaching,) = torch.autograd.grad(output, inner, upstream)
    assert_same(flow.norms[1], gradient_flow(second, inner, upstream=upstream).norms[0])
    assert_same(flow.norms[0], gradient_flow(first, x, upstream=reaching).norms[0])
    hx = [(torch.ones(1, B, 3, dtype=torch.float64),) * 2] * 2
    assert gradient_flow(both, x, tuple(hx), upstream=upstream, lengths=[2, 6, 1]).norms.all()


@pytest.mark.parametrize("mode", ["exact", "chunked"])
@pytest.mark.parametrize("options", [{"bias": "single"}, {"hidden": [3]}], ids=str)
@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm", "gru", "gru_reset_before"])
def test_rtrl_of_what_needs_no_other_kernel(kind, options, mode):
    module = make(kind, 2, **{"hidden": 3} | options)
    x, upstream = random(T, B, 2), random(T, B, 3)
    expected = torch.autograd.grad(module(x)[0], list(module.parameters()), upstream)
    learner = online.RTRL(module, mode)
    for step, d in zip(x, upstream):
        learner.step(step)
        learner.accumulate(d)
    learner.flush()
    assert_same([p.grad for p in module.parameters()], list(expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zoneout": 0.1}, "has zoneout=0.1; the influence on a state that is held back"),
        ({"weight_dropout": 0.1}, "has weight_dropout=0.1; a mask holds for one call"),
        ({"variational_dropout": 0.1}, "has variational_dropout=0.1; a mask holds for one seq"),
        ({"learn_initial_state": True}, "has learn_initial_state=True; a stream begins at zeros"),
        ({"hidden": [3, 3]}, "has 2 layers"),
        ({"num_layers": 2, "residual": True}, "has 2 layers"),
    ],
)
def test_rtrl_refuses_with_the_reason(options, message):
    with pytest.raises(ValueError, match=message):
        online.RTRL(make("lstm", 2, **{"hidden": 3} | options))


def test_quantized_layers_refuse_gates():
    layer = rnn_ext.quantize_weights(rnn_ext.LSTM(4, 5, weight_dropout=0.5), "int8")
    with pytest.raises(ValueError, match="QuantizedLSTM: return_gates needs the float32 layer"):
        layer(torch.ones(2, 1, 4), return_gates=True)
