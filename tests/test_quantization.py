"""Weights of fewer bits: exact for what they hold, close to the float weights, a good module."""

import copy
import io
import pickle

import pytest
import torch
from tolerance import FORWARD, assert_as_exact, error
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnn_ext
from rnn_ext import _C, quantization

KINDS = ("bf16", "int8")
CELLS = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "rnn_sigmoid": ("RNN", {"nonlinearity": "sigmoid"}),
    "lstm": ("LSTM", {}),
    "lstm_projected": ("LSTM", {"proj_size": 18}),
    "gru": ("GRU", {}),
    "gru_reset_before": ("GRU", {"reset_after": False}),
}
# Of the largest output, at default initialization.
BOUNDS = {"bf16": 1e-2, "int8": 3e-2}


@pytest.fixture(params=[name for name in _C.cpu_isas() if name != "avx512_bf16"])
def isa(request):
    """As in conftest.py; avx512_bf16 has the quantized kernels of avx512."""
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


def make(cell, inputs=7, hidden=37, **options):
    name, fixed = CELLS[cell]
    return getattr(rnn_ext, name)(inputs, hidden, **fixed, **options)


def quantized(layer, kind):
    return rnn_ext.quantize_weights(copy.deepcopy(layer), kind)


def flat(result):
    return torch.utils._pytree.tree_leaves(result)


def states_of(layer, batch):
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(rows, batch, layer.proj_size or layer.hidden_size)
    lstm = isinstance(layer, rnn_ext.LSTM)
    return (h, torch.randn(rows, batch, layer.hidden_size)) if lstm else h


def double(states):
    if isinstance(states, tuple):
        return tuple(state.double() for state in states)
    return None if states is None else states.double()


def assert_exact(isa, layer, kind, input, states=None):
    """What is computed with the weights that are stored is as exact as in float32.

    Where bytes are multiplied as bytes an activation is off by at most half of max|a| / 32512, at
    random, and a sum of them with weights w by that / sqrt(3) * |w|: six times as much is allowed.
    """
    fewer = quantized(layer, kind)
    same = copy.deepcopy(layer)
    weights = fewer.dequantized()
    same.load_state_dict(weights)
    with torch.no_grad(), rnn_ext.use_backend("reference"):
        theirs = flat(same(input, states))
        truth = flat(same.double()(input.double(), double(states)))
    with torch.no_grad():
        ours = flat(fewer(input, states))
    assert len(ours) == len(truth) == len(theirs)
    for name, mine, their, exact in zip(("output", "h_n", "c_n"), ours, theirs, truth):
        if kind == "bf16" or not isa.startswith("avx512"):
            assert_as_exact(name, mine, their, exact, FORWARD)
            continue
        given = [] if states is None else flat(states)
        largest = max(t.abs().max().item() for t in (input, *given, truth[0]))
        norm = max(w.norm(dim=1).max().item() for n, w in weights.items() if "weight" in n)
        assert mine.dtype == torch.float32 and mine.shape == exact.shape
        assert (mine - exact).abs().max() <= 6 * norm * largest / 32512 / 12**0.5, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps, batch", [(1, 1), (7, 1), (1, 3), (7, 3), (7, 17)])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_exact_for_the_stored_weights(
    isa, nan_filled, cell, num_layers, bidirectional, steps, batch, kind
):
    layer = make(cell, num_layers=num_layers, bidirectional=bidirectional)
    input = torch.randn(steps, batch, 7)
    assert_exact(isa, layer, kind, input, states_of(layer, batch))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"bias": False}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_options(isa, cell, options, kind):
    assert_exact(isa, make(cell, **options), kind, torch.randn(4, 5, 7))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "steps, batch, inputs, hidden",
    [(1, 1, 1, 18), (3, 2, 601, 19), (2, 60, 5, 300), (130, 3, 4, 20)],
)
def test_shapes(isa, cell, steps, batch, inputs, hidden, kind):
    """Long sums, many rows, several chunks of steps, tails of every vector width."""
    if cell == "lstm_projected":
        hidden += 1
    layer = make(cell, inputs, hidden)
    assert_exact(isa, layer, kind, torch.randn(steps, batch, inputs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.parametrize("cell", CELLS)
def test_threads_do_not_change_a_bit(isa, threads, cell, kind):
    layer = quantized(make(cell, 64, 333, num_layers=2), kind)
    input = torch.randn(9, 2, 64)
    with torch.no_grad():
        two = flat(layer(input))
        torch.set_num_threads(1)
        one = flat(layer(input))
    assert all(a.equal(b) for a, b in zip(one, two))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("hidden", [32, 256])
def test_close_to_the_float_weights(isa, cell, hidden, kind):
    layer = make(cell, hidden, hidden, num_layers=2)
    fewer, input = quantized(layer, kind), torch.randn(20, 2, hidden)
    with torch.no_grad():
        for mine, truth in zip(flat(fewer(input)), flat(layer.double()(input.double()))):
            assert 0 < error(mine, truth) <= BOUNDS[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", CELLS)
def test_ragged_batches(isa, cell, kind):
    layer = quantized(make(cell, bidirectional=True, num_layers=2), kind)
    lengths, input = [3, 6, 1, 6], torch.randn(6, 4, 7)
    packed = pack_padded_sequence(input, lengths, enforce_sorted=False)
    with torch.no_grad():
        output, state = layer(packed)
        output = pad_packed_sequence(output)[0]
        again, same = layer(input, lengths=lengths)
        assert output.equal(again) and all(a.equal(b) for a, b in zip(flat(state), flat(same)))
        for b, steps in enumerate(lengths):
            alone, last = layer(input[:steps, b])
            torch.testing.assert_close(output[:steps, b], alone, rtol=1e-5, atol=1e-6)
            for joined, own in zip(flat(state), flat(last)):
                torch.testing.assert_close(joined[:, b], own, rtol=1e-5, atol=1e-6)
            assert (output[steps:, b] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gates, units, depth", [(1, 1, 1), (1, 40, 6), (2, 16, 9), (4, 33, 128)])
def test_packing_is_undone(gates, units, depth, kind):
    weight = torch.randn(gates * units, depth)
    weight[0] = 0
    weight[-1] *= 1e-42  # denormal
    back = quantization.unpack(*quantization.pack(weight, gates, kind), units, depth)
    if kind == "bf16":
        assert back.equal(weight.bfloat16().float())
    else:
        largest = weight.abs().amax(1, keepdim=True)
        assert ((back - weight).abs() <= largest / 254 * 1.001 + 1e-40).all()
        assert back.abs().amax(1).sub(largest[:, 0]).abs().max() <= 1e-6 * largest.max()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_seen(isa, kind):
    layer = quantized(make("gru"), kind)
    for bad in (float("nan"), float("inf")):
        input = torch.randn(1, 3, 7)
        input[0, 1, 4] = bad
        with torch.no_grad():
            output, _ = layer(input)
        assert output[0, [0, 2]].isfinite().all()
        if bad != bad:  # infinity may saturate a gate
            assert output[0, 1].isnan().any()


def test_rows_of_very_different_size(isa):
    """A sequence's digits are its own."""
    layer = quantized(make("rnn_relu", bias=False), "int8")
    input = torch.randn(1, 3, 7)
    scale = torch.tensor([1e-6, 1.0, 1e6])[:, None]
    with torch.no_grad():
        expected = layer(input)[0] * scale
        actual = layer(input * scale)[0]
    torch.testing.assert_close(actual / scale, expected / scale, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert (layer(torch.zeros(2, 1, 7))[0] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", CELLS)
def test_copies(cell, kind):
    """Pickle, deepcopy, torch.save and state_dict give the same results."""
    layer = quantized(make(cell, bidirectional=True), kind)
    other = quantized(make(cell, bidirectional=True), kind)
    input, file = torch.randn(3, 2, 7), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        expected = flat(layer(input))
        assert not flat(other(input))[0].equal(expected[0])
        other.load_state_dict(torch.load(file))
        for twin in (other, pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), layer.float()):
            assert str(twin) == str(layer)
            assert all(a.equal(b) for a, b in zip(flat(twin(input)), expected))


def test_whole_model():
    lstm, hooked = rnn_ext.LSTM(8, 16), []
    model = torch.nn.ModuleDict(
        {"embed": torch.nn.Embedding(5, 8), "first": lstm, "again": lstm, "gru": rnn_ext.GRU(16, 4)}
    )
    model.eval()
    lstm.register_forward_hook(lambda *_: hooked.append(1))
    before = sum(p.numel() for p in model.parameters())
    assert rnn_ext.quantize_weights(model, "int8") is model
    assert model["first"] is model["again"] is lstm and not lstm.training
    assert type(lstm) is quantization.QuantizedLayers
    assert [n for n, _ in model.named_parameters()] == ["embed.weight"] and before > 40
    with torch.no_grad():
        output, _ = model["gru"](lstm(model["embed"](torch.tensor([[0], [3]])))[0])
    assert output.shape == (2, 1, 4) and hooked == [1]
    assert rnn_ext.quantize_weights(model, "int8") is model
    with pytest.raises(ValueError, match="first has int8 weights already"):
        rnn_ext.quantize_weights(model, "bf16")


@pytest.mark.parametrize("kind, least", [("bf16", 1.9), ("int8", 3.7)])
def test_it_is_smaller_and_says_so(kind, least):
    layer = rnn_ext.LSTM(256, 256)
    before = sum(p.numel() * 4 for p in layer.parameters())
    rnn_ext.quantize_weights(layer, kind)
    after = sum(b.numel() * b.element_size() for b in layer.buffers())
    assert before / after > least and not list(layer.parameters())
    assert str(layer).startswith(f"QuantizedLSTM(256, 256, {kind} weights: ")
    assert str(layer).endswith("instead of 2.0 MiB)")


def test_no_gradients():
    layer = rnn_ext.quantize_weights(rnn_ext.GRU(4, 3), "bf16")
    input = torch.randn(2, 1, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"QuantizedGRU: .* give no gradients; call it under"):
        layer(input)
    with pytest.raises(RuntimeError, match="give no gradients"):
        layer(input.detach(), torch.zeros(1, 1, 3, requires_grad=True))
    with torch.no_grad():
        assert not layer(input)[0].requires_grad
    assert not layer(input.detach())[0].requires_grad


def test_what_cannot_be_quantized_is_left_as_it_was():
    quantize = rnn_ext.quantize_weights
    layer = rnn_ext.LSTM(4, 3)
    with pytest.raises(ValueError, match="kind must be 'bf16' or 'int8', got 'int4'"):
        quantize(layer, "int4")
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got list"):
        quantize([layer], "int8")
    with pytest.raises(ValueError, match=r"no RNN, LSTM or GRU of rnn_ext; rnn_ext.accelerate"):
        quantize(torch.nn.LSTM(4, 3), "int8")
    bad = rnn_ext.RNN(4, 3)
    with torch.no_grad():
        bad.weight_hh_l0[1, 1] = float("nan")
    parametrized = rnn_ext.GRU(4, 3)
    torch.nn.utils.parametrize.register_parametrization(
        parametrized, "weight_hh_l0", torch.nn.Identity()
    )
    for other, match in (
        (rnn_ext.GRU(4, 3).double(), r"1 \(GRU\) has .* in torch.float64 on cpu"),
        (bad, r"1 \(RNN\) has an entry of weight_hh_l0 that is not finite"),
        (parametrized, "is parametrized"),
    ):
        model = torch.nn.Sequential(layer, other)
        with pytest.raises(ValueError, match=match):
            quantize(model, "bf16")
        assert type(layer) is rnn_ext.LSTM and layer.weight_hh_l0.requires_grad


def test_conversions_are_refused():
    layer = rnn_ext.quantize_weights(rnn_ext.LSTM(4, 3), "bf16")
    for convert in (layer.double, layer.half, layer.bfloat16, lambda: layer.to("meta")):
        with pytest.raises(RuntimeError, match="QuantizedLSTM: stays on the CPU with float32"):
            convert()
    assert layer.weight_ih_l0.dtype == torch.bfloat16
    assert layer.float().weight_ih_l0.dtype == torch.bfloat16


def test_input_that_does_not_fit():
    layer = rnn_ext.quantize_weights(rnn_ext.LSTM(4, 3), "int8")
    input = torch.randn(2, 1, 4)
    for bad, hx, match in (
        (input.double(), None, "takes float32 tensors on the CPU, got torch.float64"),
        (torch.randn(2, 1, 5), None, r"input torch.Size\(\[2, 1, 5\]\); input has 4 features"),
        (input, torch.zeros(1, 1, 3), "hx Tensor"),
        (input, (torch.zeros(1, 2, 3), torch.zeros(1, 1, 3)), "a pair with 3 units"),
        ("text", None, "input str"),
    ):
        with pytest.raises(RuntimeError, match=match):
            layer(bad, hx)
    with pytest.raises(ValueError, match="return_cells needs the float32 layer"):
        layer(input, return_cells=True)
    with pytest.raises(ValueError, match="lengths must be between 1 and the 2 steps"):
        layer(input, lengths=[3])
    with pytest.raises(TypeError, match=r"made by rnn_ext\.quantize_weights"):
        quantization.QuantizedLayers()


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_who_watches():
    """autocast leaves it alone; torch.jit.trace would record constants and is refused."""
    layer = rnn_ext.quantize_weights(rnn_ext.GRU(4, 3, batch_first=True), "bf16")
    input = torch.randn(2, 5, 4)
    expected = layer(input)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(input)[0].equal(expected)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace and torch\.func"):
        torch.jit.trace(layer, input)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace and torch\.func"):
        torch.func.vmap(lambda x: layer(x)[0])(input[None])
    graph = torch.fx.symbolic_trace(torch.nn.Sequential(layer))
    assert graph(input)[0].equal(expected)
    compiled = torch.compile(lambda x: layer(x * 1)[0] + 0, backend="eager")
    assert compiled(input).equal(expected)


def test_an_empty_batch(isa):
    for kind in KINDS:
        layer = rnn_ext.quantize_weights(rnn_ext.LSTM(4, 3), kind)
        output, (h_n, c_n) = layer(torch.randn(2, 0, 4))
        assert output.shape == (2, 0, 3) and h_n.shape == c_n.shape == (1, 0, 3)


def test_one_call_and_many_agree():
    """The shortcut for all layers, and layer by layer as under another backend."""
    for cell in CELLS:
        layer = quantized(make(cell, num_layers=2, bidirectional=True, batch_first=True), "int8")
        input = torch.randn(3, 4, 7)
        with torch.no_grad():
            one = flat(layer(-input))
            with rnn_ext.use_backend("cpu"):
                many = flat(layer(torch._neg_view(input)))
        assert all(a.equal(b) for a, b in zip(one, many))


def test_the_kernel_checks_what_it_reads():
    x, h = torch.randn(2, 1, 4), torch.zeros(1, 3)
    matrices = [quantization.pack(torch.randn(9, n), 3, "bf16")[0] for n in (4, 3)]
    rest = [None] * 6
    _C.quantized_layer("gru", x, h, None, [*matrices, *rest], None, False)
    for wrong in (matrices[0].float(), matrices[0][:, :1], matrices[0].transpose(1, 4)):
        with pytest.raises(RuntimeError, match="weight_ih must"):
            _C.quantized_layer("gru", x, h, None, [wrong, matrices[1], *rest], None, False)
    with pytest.raises(RuntimeError, match="hx must have shape"):
        _C.quantized_layer("gru", x, h.expand(2, 3), None, [*matrices, *rest], None, False)


def test_explain_names_the_kind():
    layer = rnn_ext.quantize_weights(rnn_ext.GRU(4, 6, num_layers=2, bidirectional=True), "int8")
    plan = rnn_ext.explain(layer, torch.zeros(3, 1, 4))
    assert len(plan.steps) == 4 and all("int8" in step.reason for step in plan.steps)
