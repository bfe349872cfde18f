"""RNN, LSTM and GRU with layer_norm, LSTM with peephole: what their users do with them."""

import copy
import io
import pickle

import pytest
import torch
from normalized_cases import OPTIONS, _loop, make
from tolerance import error
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from twins import forget_warnings, tensors

import rnn_ext
from rnn_ext import reference

each = pytest.mark.parametrize("name", OPTIONS)
a_few = pytest.mark.parametrize("name", ["RNN", "LSTM-both", "GRU-before"])
NAMES = {
    "layer_norm": ("weight_layer_norm_ih", "weight_layer_norm_hh"),
    "cell": ("weight_layer_norm_cell", "bias_layer_norm_cell"),
    "peephole": ("weight_peephole",),
}


@pytest.fixture(autouse=True)
def _fresh():
    forget_warnings()


def of_reference(layers, x, **options):
    """The output of the last layer and the gradient of its sum's square at x, in NumPy."""
    directions = 2 if layers.bidirectional else 1
    groups = [[None if w is None else w.detach().double().numpy() for w in g]
              for g in layers._weights()]  # fmt: skip
    x, results = x.double().numpy(), []
    for first in range(0, len(groups), directions):
        found = [
            reference.forward(layers._cell, x, None, None, groups[first + d], reverse=d == 1,
                              **options)
            for d in range(directions)
        ]  # fmt: skip
        results.append(found)
        x = torch.cat([torch.as_tensor(f.output) for f in found], -1).numpy()
    upstream = 2 * x
    for found in reversed(results):
        parts = [
            torch.as_tensor(upstream).chunk(directions, -1)[d].numpy() for d in range(directions)
        ]
        upstream = sum(
            reference.backward(f, d_output=part).x for f, part in zip(found, parts, strict=True)
        )
    return torch.as_tensor(x), torch.as_tensor(upstream)


@pytest.mark.parametrize("lengths", [None, [2, 6, 4]], ids=["padded", "lengths"])
@each
def test_stacks_of_both_directions_follow_the_reference(name, lengths):
    layers = make(name, 5, 12, num_layers=2, bidirectional=True).double()
    x = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
    output, _ = layers(x, lengths=lengths)
    expected, gradient = of_reference(layers, x.detach(), lengths=lengths)
    output.square().sum().backward()
    assert error(output.detach(), expected) <= 1e-12
    assert error(x.grad, gradient) <= 1e-11


@each
def test_a_loop_of_torch_operations_does_the_same(name):
    layers = make(name)
    x, h0 = torch.randn(7, 4, 5), torch.rand(4, 12)
    (_, _, b_ih, b_hh, _, *extras), lstm = layers._weights()[0], layers._cell == "lstm"
    weights = (layers.weight_ih_l0, layers.weight_hh_l0, b_ih, b_hh, *extras)
    expected = _loop(layers._cell, x, h0, h0 if lstm else None, weights, False, None)
    hx = (h0[None], h0[None]) if lstm else h0[None]
    options = {"return_cells": True} if lstm else {}
    output, state, *cells = layers(x, hx, **options)
    found = (output, *(s[0] for s in (state if lstm else (state,))), *cells)
    expected = [value for value in expected if value is not None]
    parameters = list(layers.parameters())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad(output.square().sum(), parameters)
    theirs = torch.autograd.grad(expected[0].square().sum(), parameters)
    for key, (one, other) in zip(dict(layers.named_parameters()), zip(ours, theirs)):
        assert error(one, other.double()) <= 1e-4, key


@a_few
def test_every_way_to_give_a_batch_is_the_same(name):
    layers = make(name, bidirectional=True)
    first = make(name, bidirectional=True, batch_first=True)
    first.load_state_dict(layers.state_dict())
    x, lengths = torch.randn(6, 3, 5), [2, 6, 4]
    output, state = layers(x, lengths=lengths)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    also, packed_state = layers(packed)
    torch.testing.assert_close(pad_packed_sequence(also, total_length=6)[0], output)
    torch.testing.assert_close(packed_state, state)
    torch.testing.assert_close(first(x.transpose(0, 1), lengths=lengths)[0].transpose(0, 1), output)
    torch.testing.assert_close(layers(x[:, 0])[0], layers(x[:, :1])[0].squeeze(1))
    assert layers(x[:, :0])[0].shape == (6, 0, 24)


@a_few
def test_resets_part_episodes(name):
    layers = make(name, num_layers=2, bidirectional=True)
    x, resets = torch.randn(7, 2, 5), torch.zeros(7, 2, dtype=torch.bool)
    resets[3] = True
    apart = torch.cat([layers(x[:3])[0], layers(x[3:])[0]])
    torch.testing.assert_close(layers(x, resets=resets)[0], apart)


@each
def test_gates(name):
    """Of both directions, beside lengths, resets to a state and shares that zoneout holds."""
    module = make(name, bidirectional=True, zoneout=0.3).double().eval()
    x, start = (torch.randn(*size, dtype=torch.float64) for size in ((6, 3, 5), (2, 3, 12)))
    resets, lstm = torch.rand(6, 3) < 0.3, module._cell == "lstm"
    options = {
        "lengths": [2, 6, 4],
        "resets": resets,
        "initial_state": (start,) * 2 if lstm else start,
    }
    *results, gates = module(x, **options, return_gates=True)
    for ours, plain in zip(tensors(results), tensors(module(x, **options)), strict=True):
        assert torch.equal(ours, plain)
    for k in range(2):
        weights = [None if w is None else w.detach().numpy() for w in module._weights()[k]]
        restored = {f"reset_{name}": start[k].numpy() for name in ("hc" if lstm else "h")}
        found = reference.forward(
            module._cell, x.numpy(), None, None, weights, lengths=options["lengths"],
            reverse=k == 1, resets=resets.numpy(), zoneout=(0.3, 0.3), **restored,
        )  # fmt: skip
        for t, rows, step in found.tape.steps:
            for letter, gate in gates.items():
                truth = getattr(step, letter, None)
                truth = step.of_input.a + step.of_state.a if truth is None else truth
                ours = gate[t, rows, 12 * k : 12 * k + 12]
                assert error(ours.detach(), torch.as_tensor(truth)) <= 1e-11, letter
    assert not any(gate[2:, 0].any() for gate in gates.values())


@a_few
def test_gates_have_gradients_and_compile(name):
    module = make(name, 3, 4, num_layers=2).double()
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)

    def gates(x, *_):
        return tuple(module(x, return_gates=True)[2].values())

    assert torch.autograd.gradcheck(gates, (x, *module.parameters()), fast_mode=True)
    torch.compiler.reset()
    compiled = torch.compile(gates, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), gates(x))
    assert (
        module.bfloat16()(x.bfloat16(), return_gates=True)[2].popitem()[1].dtype == torch.bfloat16
    )


@each
def test_parameters_have_names_like_those_of_torch(name):
    kind, options = OPTIONS[name]
    layers = make(name, 5, 12, 2, bidirectional=True)
    torch.manual_seed(3)
    ours = kind(5, 12, 2, bidirectional=True, **options)
    torch.manual_seed(3)
    plain = kind(
        5, 12, 2, bidirectional=True, **{k: v for k, v in options.items() if v is not True}
    )
    names = [n for option, ns in NAMES.items() if options.get(option) for n in ns]
    names += NAMES["cell"] if layers._cell == "lstm" and layers.layer_norm else ()
    more = {n + s for n in names for s in ("_l0", "_l0_reverse", "_l1", "_l1_reverse")}
    assert set(layers.state_dict()) == set(plain.state_dict()) | more
    for key, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    for key in more:
        if "peephole" in key:
            assert 0 < getattr(ours, key).abs().max() <= 12**-0.5
        else:
            assert (getattr(ours, key) == float(key.startswith("weight"))).all(), key
    assert all(text in repr(layers) for text in options if options[text] is True)
    layers.reset_parameters()
    assert (layers.weight_ih_l0 != plain.weight_ih_l0).any()
    if layers.layer_norm:
        assert (layers.weight_layer_norm_hh_l1 == 1).all()


@a_few
def test_copies_are_equal(name):
    layers, x = make(name, num_layers=2), torch.randn(4, 2, 5)
    expected = layers(x)[0]
    buffer = io.BytesIO()
    torch.save(layers, buffer)
    buffer.seek(0)
    again = make(name, num_layers=2)
    again.load_state_dict(layers.state_dict())
    copies = copy.deepcopy(layers), pickle.loads(pickle.dumps(layers)), again
    for other in (*copies, torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x)[0], expected)
        assert repr(other) == repr(layers)
    with pytest.raises(RuntimeError, match="Missing key"):
        layers.load_state_dict(type(layers)(5, 12, 2).state_dict())


@each
@pytest.mark.parametrize("bias", [False, "single"])
def test_fewer_biases(name, bias):
    layers = make(name, bias=bias).double()
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    assert error(layers(x)[0].detach(), of_reference(layers, x)[0]) <= 1e-12
    assert ("bias_layer_norm_cell_l0" in layers.state_dict()) == bool(
        bias and layers.layer_norm and layers._cell == "lstm"
    )


@a_few
def test_other_options_combine(name):
    more = {"residual": True, "weight_dropout": 0.5, "learn_initial_state": True, "dropout": 0.5}
    layers = make(name, 6, [6, 6, 4], **more)
    x = torch.randn(5, 3, 6)
    layers.train()
    layers(x)[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layers.parameters())
    layers.eval()
    assert torch.equal(layers(x)[0], layers(x)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@a_few
def test_dtypes_and_autocast(name, dtype):
    layers, x = make(name), torch.randn(4, 2, 5)
    expected = layers(x)[0]
    output = copy.deepcopy(layers).to(dtype)(x.to(dtype))[0]
    assert output.dtype == dtype and error(output, expected.double()) <= 0.1
    if dtype == torch.bfloat16:
        plain = type(layers)(5, 12)
        with torch.autocast("cpu"):
            output = layers(x)[0]
            assert output.dtype == plain(x)[0].dtype
        assert error(output, expected.double()) <= 0.1
        output.float().sum().backward()


@pytest.mark.filterwarnings("ignore:.*composed of torch operations")
@a_few
def test_transforms_and_double_backward(name):
    layers, x = make(name).double(), torch.randn(4, 2, 5, dtype=torch.float64)
    parameters = {k: v.detach() for k, v in layers.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(layers, parameters, (x,))[0].square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x.unsqueeze(0))
    leaves = list(layers.parameters())
    again = torch.autograd.grad(layers(x)[0].square().sum(), leaves, create_graph=True)
    for key, gradient in zip(parameters, again):
        assert error(gradients[key][0], gradient.detach()) <= 1e-10, key
    sum(g.square().sum() for g in again).backward()
    assert all(p.grad.isfinite().all() for p in leaves)


@a_few
def test_compile_without_a_graph_break(name):
    torch.compiler.reset()
    layers, x = make(name, num_layers=2, bidirectional=True), torch.randn(4, 2, 5)
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    parameters = list(layers.parameters())
    expected, output = layers(x)[0], compiled(x)[0]
    assert torch.equal(output, expected)
    pairs = zip(*(torch.autograd.grad(o.sum(), parameters) for o in (output, expected)))
    for key, (ours, theirs) in zip(dict(layers.named_parameters()), pairs):
        torch.testing.assert_close(ours, theirs, msg=key)


def test_export_runs_the_operator():
    layers, x = make("LSTM-both").eval(), torch.randn(4, 2, 5)
    program = torch.export.export(layers, (x,))
    assert "normalized_layer" in str(program.graph)
    torch.testing.assert_close(program.module()(x)[0], layers(x)[0])


@pytest.mark.parametrize("kind", [rnn_ext.RNN, rnn_ext.LSTM, rnn_ext.GRU])
def test_wrong_arguments_are_named(kind):
    with pytest.raises(TypeError, match="layer_norm must be True or False"):
        kind(4, 5, layer_norm=1)
    layers = kind(4, 5, layer_norm=True)
    with pytest.raises(ValueError, match="layer_norm is chosen at construction"):
        layers.layer_norm = False
    if kind is not rnn_ext.LSTM:
        with pytest.raises(ValueError, match="peephole belongs to the LSTM"):
            kind(4, 5, peephole=True)
        return
    for option in ("layer_norm", "peephole"):
        with pytest.raises(ValueError, match=f"{option}=True has no projection"):
            kind(4, 5, proj_size=2, **{option: True})
    with pytest.raises(TypeError, match="peephole must be True or False"):
        kind(4, 5, peephole="yes")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit and torch.onnx
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@each
def test_what_has_no_such_layer_refuses(name):
    layers, x = make(name), torch.randn(3, 2, 5)
    option = "layer_norm=True" if layers.layer_norm else "peephole=True"
    with pytest.raises(ValueError, match=r"which torch\.nn has not"):
        rnn_ext.restore(torch.nn.Sequential(layers))
    with pytest.raises(RuntimeError, match="cannot be scripted"):
        torch.jit.script(layers)
    with pytest.raises(ValueError, match=option):
        rnn_ext.quantize_weights(copy.deepcopy(layers), "int8")
    with pytest.raises(ValueError, match=r"layer_norm|peephole"):
        rnn_ext.online.RTRL(layers)
    if layers.layer_norm:  # tests/test_onnx.py exports peepholes
        with pytest.raises(RuntimeError, match="ONNX's layers have no layer_norm"):
            torch.onnx.export(torch.nn.Sequential(layers), (x,), io.BytesIO(), dynamo=False)
    assert rnn_ext.accelerate(layers) is layers


def test_explain_says_what_runs():
    layers, x = make("LSTM").double(), torch.randn(7, 3, 5, dtype=torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (step,) = rnn_ext.explain(make("LSTM", 64, 64), torch.randn(64, 32, 64)).steps
        assert (step.kernel, step.threads, step.split) == ("cpu", 2, "rows")
    finally:
        torch.set_num_threads(before)
    with rnn_ext.use_backend("reference"):
        assert rnn_ext.explain(layers, x).steps[0].kernel == "reference"
        composed = layers(x)[0]
    torch.testing.assert_close(composed, layers(x)[0])
