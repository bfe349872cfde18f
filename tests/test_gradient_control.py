"""``grad_clip`` and `gradient_flow`: dL/dh_t limited, and looked at, on its way back in time."""

import copy
import pickle
import sys

import numpy as np
import pytest
import torch
from cases import CELLS, make_case, run
from gradient_cases import CLIPS, control, reference_gradients
from kinds import KINDS, make, random
from torch.nn.utils.rnn import pack_padded_sequence
from twins import assert_same, forget_warnings, gradients, state, tensors

import rnn_ext
from rnn_ext import FallbackWarning, composite, gradient_flow, reference

COMPOSED = pytest.mark.filterwarnings("ignore::rnn_ext.FallbackWarning")


@pytest.fixture(autouse=True)
def _each_warning_again():
    forget_warnings()


def test_by_hand():
    """h_t = relu(h_{t-1} + x_t): dL/dh_t is 1 of the output at t and what t + 1 let pass."""
    one = np.ones((1, 1))
    x = np.ones((4, 1, 1))
    result = reference.forward("rnn_relu", x, one, None, (one, one))
    dh = reference.hidden_gradients(result, np.ones((4, 1, 1)))
    assert dh.ravel().tolist() == [4.0, 3.0, 2.0, 1.0]
    for limit in (2.5, ("norm", 2.5)):
        dh = reference.hidden_gradients(result, np.ones((4, 1, 1)), grad_clip=limit)
        assert dh.ravel().tolist() == [3.5, 3.0, 2.0, 1.0]
        gradients = reference.backward(result, np.ones((4, 1, 1)), grad_clip=limit)
        assert gradients.h0.item() == 2.5
        layer = rnn_ext.RNN(1, 1, nonlinearity="relu", bias=False, grad_clip=limit)
        for weight in layer.parameters():
            torch.nn.init.ones_(weight)
        h0 = torch.zeros(1, 1, 1, requires_grad=True)
        layer(torch.ones(4, 1, 1), h0)[0].sum().backward()
        assert h0.grad.item() == 2.5


@pytest.mark.parametrize("grad_clip", CLIPS, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_clipped_gradients_follow_the_reference(cell, ragged, reverse, grad_clip):
    case = make_case(cell, (6, 4, 3, 5), ragged=ragged, reverse=reverse)
    truth = reference_gradients(case, grad_clip)
    plain = reference_gradients(case, None)
    assert not torch.allclose(truth["w_hh"], plain["w_hh"], rtol=1e-3)  # the limit is felt
    how = control(grad_clip)
    for layer in (how.layer, how.composed, control(grad_clip, checkpoint_every=2).layer):
        _, found = run(layer, case)
        for name, value in truth.items():
            assert_same(found[name], value)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("grad_clip", CLIPS, ids=str)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm_projected", "gru_reset_before"])
@pytest.mark.parametrize("shape", [(3, 40, 4, 70), (3, 4, 5, 300)], ids=["rows", "columns"])
def test_however_the_threads_share_the_work(shape, cell, grad_clip, threads):
    case = make_case(cell, shape)
    truth = reference_gradients(case, grad_clip)
    _, found = run(control(grad_clip).layer, case)
    for name, value in truth.items():
        assert_same(found[name], value)


@pytest.mark.parametrize(
    ("cell", "grad_clip"),
    [("rnn_tanh", 0.3), ("lstm_projected", ("norm", 0.4)), ("gru_reset_before", 0.3)],
)
def test_every_instruction_set_and_narrow_numbers(isa, cell, grad_clip):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        case = make_case(cell, (5, 3, 4, 19)).to(dtype)
        _, expected = run(control(grad_clip).composed, case)
        _, found = run(control(grad_clip).layer, case)
        for name, value in expected.items():
            error = (found[name] - value).abs().max() / value.abs().max()
            assert error <= tolerance, (name, dtype)


@pytest.mark.parametrize("cell", CELLS)
def test_a_limit_that_is_never_reached_changes_no_bit(cell):
    case = make_case(cell, (6, 4, 3, 5)).to(torch.float32)
    _, expected = run(rnn_ext.ops.layer, case)
    for grad_clip in (1e6, ("norm", 1e6)):
        _, found = run(control(grad_clip).layer, case)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_is_not_a_number_stays_so():
    for grad_clip in CLIPS:
        layer = rnn_ext.GRU(2, 3, grad_clip=grad_clip)
        output, _ = layer(torch.randn(3, 2, 2))
        output.backward(torch.full_like(output, torch.nan))
        assert layer.weight_hh_l0.grad.isnan().any()


@pytest.mark.parametrize("grad_clip", CLIPS, ids=str)
def test_modules_in_every_layer_and_direction(grad_clip):
    """Packed and padded, against the same module composed of torch operations."""
    for kind in ("rnn_relu", "lstm_projected", "gru"):
        options = {"inputs": 4, "hidden": 5, "num_layers": 2, "bidirectional": True}
        layer = make(kind, grad_clip=grad_clip, **options)
        plain = make(kind, **options)
        plain.load_state_dict(layer.state_dict())
        x = random(6, 3, 4, requires_grad=True)
        hx = state(layer, 3, requires_grad=True)
        packed = pack_padded_sequence(x, [2, 6, 3], enforce_sorted=False)
        for given in (x, packed):
            results = layer(given, hx)
            assert_same(results, plain(given, hx))
            found = gradients(layer, results, x, *tensors(hx))
            with rnn_ext.use_backend("reference"):
                results = layer(given, hx)
                assert_same(gradients(layer, results, x, *tensors(hx)), found)
            unclipped = gradients(plain, plain(given, hx), x, *tensors(hx))
            assert not torch.allclose(found[0], unclipped[0])


@pytest.mark.parametrize("grad_clip", CLIPS, ids=str)
@pytest.mark.parametrize("mode", [{"checkpoint_every": 32}, {"save": "states"}], ids=str)
def test_clipping_where_less_is_kept(grad_clip, mode):
    plain = rnn_ext.GRU(4, 16, grad_clip=grad_clip)
    ours = rnn_ext.GRU(4, 16, grad_clip=grad_clip, **mode)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(100, 8, 4, requires_grad=True)
    expected, found = gradients(plain, plain(x), x), gradients(ours, ours(x), x)
    if "save" in mode:
        assert_same(found, expected)
    else:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@COMPOSED
@pytest.mark.parametrize("grad_clip", CLIPS, ids=str)
def test_gradients_of_clipped_gradients(grad_clip):
    """As of the same module composed of torch operations, whose order torch differentiates."""
    layer = make("lstm", grad_clip=grad_clip)
    x = random(4, 2, 2, requires_grad=True)

    def second():
        output, _ = layer(x)
        (first,) = torch.autograd.grad((output * 0.7).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, *layer.parameters()))

    found = second()
    assert all(part.isfinite().all() and part.any() for part in found[:3])
    with rnn_ext.use_backend("reference"):
        assert_same(found, second())


@pytest.mark.parametrize("grad_clip", CLIPS, ids=str)
def test_transforms_of_torch_func_are_composed(grad_clip):
    layer = make("gru", grad_clip=grad_clip)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    x = random(5, 3, 2)

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x.unsqueeze(1),))[0].sum()

    with pytest.warns(FallbackWarning, match="grad_clip=.* has no kernel under the transforms"):
        found = torch.func.vmap(torch.func.grad(loss), (None, 1))(parameters, x)
    for k in range(3):
        layer.zero_grad()
        layer(x[:, k : k + 1])[0].sum().backward()
        assert_same([found[n][k] for n in parameters], [p.grad for p in layer.parameters()])


def test_grad_clip_shows_and_torch_nn_cannot_have_it():
    layer = rnn_ext.GRU(2, 3, grad_clip=("norm", 1))
    assert str(layer) == "GRU(2, 3, grad_clip=('norm', 1.0))"
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.grad_clip == ("norm", 1.0) and str(twin) == str(layer)
    with pytest.raises(ValueError, match=r"GRU with grad_clip=\('norm', 1.0\), which torch.nn has"):
        rnn_ext.restore(layer)
    with pytest.raises(RuntimeError, match=r"with grad_clip=.* cannot be scripted"):
        layer.__prepare_scriptable__()
    assert rnn_ext.explain(layer, torch.randn(3, 2, 2)).steps[0].kernel == "cpu"
    with pytest.warns(FallbackWarning, match="grad_clip=.*float16 .* composed of torch operations"):
        layer.half()(torch.randn(3, 2, 2).half())
    assert rnn_ext.RNN(2, 3, grad_clip=1).grad_clip == 1.0
    assert rnn_ext.RNN(2, 3, nonlinearity="sigmoid", grad_clip=1).grad_clip == 1.0


@pytest.mark.parametrize(
    "grad_clip", [0, -1.0, float("nan"), True, "norm", ("max", 1.0), ("norm", 0), ("norm", 1, 2)]
)
def test_wrong_limits(grad_clip):
    with pytest.raises(ValueError, match="LSTM: grad_clip must be a positive number"):
        rnn_ext.LSTM(2, 3, grad_clip=grad_clip)


def norms_of_a_loop(layer, x, loss_fn):
    """||dL/dh_t||, [layers, directions, T, B], by autograd through steps that retain_grad."""
    rows, count = [], 2 if layer.bidirectional else 1
    for first in range(0, len(layer._all_weights), count):
        outputs = []
        for reverse, names in enumerate(layer._all_weights[first : first + count]):
            weights = [getattr(layer, name) for name in names]
            step = composite.STEPS[layer._cell]
            h = c = x.new_zeros(x.size(1), layer.hidden_size)
            c = c if layer._cell == "lstm" else None
            states = []
            for xt in reversed(x) if reverse else x:
                h, c = step(xt @ weights[0].T + weights[2], h, c, weights[1], weights[3], None)
                h.retain_grad()
                states.append(h)
            rows.append(states[::-1] if reverse else states)
            outputs.append(torch.stack(rows[-1]))
        x = torch.cat(outputs, -1)
    loss_fn(x).backward()
    norms = torch.stack([torch.stack([h.grad.norm(dim=-1) for h in states]) for states in rows])
    return norms.unflatten(0, (-1, count)).detach()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lstm_projected"])
def test_gradient_flow_is_that_of_a_loop(kind):
    layer = make(kind, inputs=3, hidden=4, num_layers=2, bidirectional=True)
    x = random(6, 3, 3)

    def loss_fn(output):
        return output[-1].square().sum() + output[2].sum()

    flow = gradient_flow(layer, x, loss_fn=lambda output, _: loss_fn(output))
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert layer._control is None
    expected = norms_of_a_loop(layer, x, loss_fn)
    assert flow.norms.shape == (2, 2, 6) and flow.per_sample.shape == (2, 2, 6, 3)
    assert_same(flow.per_sample, expected)
    assert_same(flow.norms, expected.norm(dim=-1))
    with rnn_ext.use_backend("reference"):
        again = gradient_flow(layer, x, loss_fn=lambda output, _: loss_fn(output))
    assert_same(again.per_sample, expected)


@pytest.mark.parametrize("mode", [{}, {"checkpoint_every": 2}, {"save": "states"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_flow_follows_the_reference(kind, mode):
    layer = make(kind, hidden=3, grad_clip=0.2, **mode)
    x, hx = random(7, 2, 2), state(layer, 2)
    upstream = random(7, 2, layer.proj_size or 3)
    flow = gradient_flow(layer, x, hx, upstream=upstream)
    h0, c0 = (*(part[0].numpy() for part in tensors(hx)), None)[:2]
    weights = [value.detach().numpy() for value in layer.parameters()]
    result = reference.forward(layer._cell, x.numpy(), h0, c0, weights)
    dh = reference.hidden_gradients(result, upstream.numpy(), grad_clip=0.2)
    assert_same(flow.per_sample[0, 0], torch.from_numpy(np.linalg.norm(dh, axis=-1)))


def test_gradient_flow_of_every_kind_of_input():
    layer = rnn_ext.LSTM(2, 3, batch_first=True, bidirectional=True, dtype=torch.float64)
    x, lengths = random(3, 6, 2), [4, 6, 1]

    def last(output, state):
        return state[0].sum()

    flow = gradient_flow(layer, x, loss_fn=last, lengths=lengths)
    for b, length in enumerate(lengths):
        alone = gradient_flow(layer, x[b, :length], loss_fn=last)
        assert alone.per_sample.shape == (1, 2, length, 1)
        assert_same(flow.per_sample[:, :, :length, b], alone.norms)
        assert not flow.per_sample[:, :, length:, b].any()
    packed = pack_padded_sequence(x, lengths, True, enforce_sorted=False)
    assert_same(gradient_flow(layer, packed, loss_fn=last).per_sample, flow.per_sample)
    whole = gradient_flow(layer, x, loss_fn=last, lengths=[6, 6, 6])
    assert_same(whole.per_sample, gradient_flow(layer, x, loss_fn=last).per_sample)


def test_gradient_flow_where_no_gradient_comes_is_zero():
    layer = rnn_ext.GRU(2, 3, 2)
    x = torch.randn(5, 2, 2)
    flow = gradient_flow(layer, x, loss_fn=lambda output, h_n: h_n[0].sum())
    assert not flow.norms[1].any() and flow.norms[0].all()
    flow = gradient_flow(layer, x, loss_fn=lambda output, h_n: output[2].sum())
    assert not flow.norms[1, 0, 3:].any() and flow.norms[:, 0, :3].all()


def test_gradient_flow_refuses_what_it_cannot_do():
    layer, x = rnn_ext.GRU(2, 3), torch.randn(5, 2, 2)
    with pytest.raises(TypeError, match="module must be an RNN, LSTM or GRU of rnn_ext, got GRU;"):
        gradient_flow(torch.nn.GRU(2, 3), x, upstream=torch.ones(5, 2, 3))
    with pytest.raises(ValueError, match="give either loss_fn or upstream"):
        gradient_flow(layer, x)
    with pytest.raises(ValueError, match="give either loss_fn or upstream"):
        gradient_flow(layer, x, loss_fn=torch.sum, upstream=torch.ones(5, 2, 3))
    with pytest.raises(ValueError, match=r"upstream must have shape \[5, 2, 3\]"):
        gradient_flow(layer, x, upstream=torch.ones(5, 2))
    with pytest.raises(ValueError, match="loss_fn must return a scalar tensor"):
        gradient_flow(layer, x, loss_fn=lambda output, _: output)
    assert layer._control is None
    with pytest.warns(FallbackWarning), pytest.raises(RuntimeError, match=r"explain says why: GRU"):
        gradient_flow(layer.half(), x.half(), loss_fn=lambda output, _: output.sum())


def test_plot(monkeypatch):
    layer = rnn_ext.GRU(2, 3, 2, bidirectional=True)
    flow = gradient_flow(layer, torch.randn(5, 2, 2), loss_fn=lambda output, _: output.sum())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.pyplot", None)
        with pytest.raises(ImportError, match="matplotlib is not installed; run `pip install"):
            flow.plot()

    class Axes:
        def __init__(self):
            self.lines, self.calls = {}, []

        def plot(self, values, label):
            self.lines[label] = values

        def __getattr__(self, name):
            return lambda *args: self.calls.append((name, *args))

    axes = Axes()
    assert flow.plot(axes) is axes
    assert list(axes.lines) == ["layer 0", "layer 0 reverse", "layer 1", "layer 1 reverse"]
    assert axes.lines["layer 1"] == flow.norms[1, 0].tolist()
    assert ("set_yscale", "log") in axes.calls
