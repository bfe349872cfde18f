"""Our layers under torch.compile and torch.func."""

import warnings

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_map
from twins import CELLS, LAYERS, assert_same, forget_warnings, gradients, tensors, twins

import rnn_ext
from rnn_ext import FallbackWarning


@pytest.fixture(autouse=True)
def _fresh():
    forget_warnings()
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # Warnings of torch's about its own compilers, which are not ours to mend.
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", module=r"torch\..*", category=DeprecationWarning)
        yield


class Model(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, torch.nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, x, hx=None):
        output, state = self.layer(x, hx)
        if self.layer.bidirectional:
            output = output.unflatten(-1, (2, 3)).sum(-2)
        return self.head(output), state


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}]
)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_compile_without_a_graph_break(name, options):
    ours, _ = twins(name, 4, 3, **options)
    model = Model(ours)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for steps in (5, 6, 1):
        x = torch.randn(steps, 2, 4, dtype=torch.float64, requires_grad=True)
        results = model(x)
        assert_same(compiled(x), results)
        assert_same(gradients(model, compiled(x), x), gradients(model, results, x))
    hx = tree_map(torch.detach, results[1])
    assert_same(compiled(x, hx), model(x, hx))
    unbatched = (x[0] if options else x[:, 0]).detach()
    assert_same(compiled(unbatched), model(unbatched))
    with torch.no_grad():
        assert_same(compiled(x), model(x))


@pytest.mark.parametrize("name", CELLS)
def test_cells_compile_without_a_graph_break(name):
    cell, _ = twins(name, 4, 3)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    hx = tree_map(torch.detach, cell(x))
    assert_same(compiled(x), hx)
    results = cell(x, hx)
    assert_same(compiled(x, hx), results)
    assert_same(gradients(cell, compiled(x, hx), x), gradients(cell, results, x))


def test_extras_compile():
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    for layer in (
        rnn_ext.RNN(4, 3, nonlinearity="relu", dtype=torch.float64),
        rnn_ext.RNN(4, 3, nonlinearity="sigmoid", dtype=torch.float64),
        rnn_ext.GRU(4, 3, 2, reset_after=False, dtype=torch.float64),
    ):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert_same(compiled(x), layer(x))
    lstm = rnn_ext.LSTM(4, 3, 2, bidirectional=True, dropout=0.5, dtype=torch.float64).eval()
    compiled = torch.compile(lambda x: lstm(x, return_cells=True), fullgraph=True, backend="eager")
    assert_same(compiled(x), lstm(x, return_cells=True))


def test_autocast_and_fallback_compile():
    layer = rnn_ext.GRU(4, 3)
    x = torch.randn(5, 2, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(compiled(x), layer(x))
    layer.half()
    with pytest.warns(FallbackWarning):
        results = layer(x.half())
    assert_same(compiled(x.half()), results)


def test_backends_in_a_compiled_model():
    layer, _ = twins("LSTM", 4, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    for backend in ("auto", "reference", "cpu"):
        with rnn_ext.use_backend(backend):
            assert_same(compiled(x), layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_packed_sequences_compile_without_a_graph_break(name):
    layer, _ = twins(name, 4, 3, 2, bidirectional=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    for lengths in ([5, 3, 2], [2, 4, 4]):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=lengths[0] == 5)
        results = layer(packed)
        assert_same(compiled(packed), results)
        ours = gradients(layer, compiled(packed), retain_graph=False)
        assert_same(ours, gradients(layer, results))
        hx = tree_map(torch.detach, results[1])
        assert_same(compiled(packed, hx), layer(packed, hx))


@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_compile_without_a_graph_break(batch_first):
    layer, _ = twins("LSTM", 4, 3, 2, bidirectional=True, batch_first=batch_first)
    run = lambda x, lengths: layer(x, lengths=lengths, return_cells=True)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    shape = (3, 5, 4) if batch_first else (5, 3, 4)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for lengths in ([2, 5, 3], [4, 1, 4], [5, 5, 5]):
        lengths = torch.tensor(lengths)
        results = run(x, lengths)
        assert_same(compiled(x, lengths), results)
        ours = gradients(layer, compiled(x, lengths), x, retain_graph=False)
        assert_same(ours, gradients(layer, results, x))
    for lengths in ([0, 5, 3], [2, 6, 3]):
        with pytest.raises(ValueError, match="lengths must be between 1 and the 5 steps of input"):
            compiled(x, torch.tensor(lengths))


class Several(torch.nn.Module):
    """Layers of each kind behind one another, and a cell."""

    def __init__(self):
        super().__init__()
        self.lstm = rnn_ext.LSTM(4, 6, 2, bidirectional=True, proj_size=3)
        self.gru = rnn_ext.GRU(6, 5, reset_after=False, batch_first=True)
        self.rnn = rnn_ext.RNN(5, 4, nonlinearity="sigmoid", batch_first=True)
        self.cell = rnn_ext.LSTMCell(4, 3)

    def forward(self, x):
        x, states = self.lstm(x)
        x, last = self.gru(x.transpose(0, 1))
        x, _ = self.rnn(x)
        return x, *states, last, *self.cell(x[:, -1])


# Steps and batch of the calls that one compilation has to serve.
SIZES = ((5, 3), (7, 2), (2, 9))


@pytest.mark.parametrize(
    "backend, make",
    [("aot_eager", Several), ("inductor", lambda: rnn_ext.LSTM(4, 6, bidirectional=True))],
    ids=["aot_eager", "inductor"],
)
def test_compiled_once_for_every_batch_and_length(backend, make):
    model, counter = make(), CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for steps, batch in SIZES:
        x = torch.randn(steps, batch, 4, requires_grad=True)
        results = model(x)
        assert_same(compiled(x), results)
        ours = gradients(model, compiled(x), x, retain_graph=False)
        assert_same(ours, gradients(model, results, x))
        compilations.append(counter.frame_count)
    for steps, batch in SIZES:
        x = torch.randn(steps, batch, 4)
        with torch.no_grad():
            assert_same(compiled(x), model(x))
        compilations.append(counter.frame_count)
    training, inference = compilations[:3], compilations[3:]
    assert len(set(training)) == len(set(inference)) == 1 and inference > training


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_what_a_compiled_model_holds(context):
    """Both directions in one call, and nothing saved for gradients that nobody asks for."""
    held = []

    def keep(graph, _):
        targets = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
        held.append([name for name in targets if name.startswith("rnn_ext")])
        return make_boxed_func(graph.forward)

    model = rnn_ext.LSTM(4, 3, 2, bidirectional=True)
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(5, 2, 4)
    with context():
        output = compiled(x)[0]
        if output.requires_grad:
            output.sum().backward()
    layer = "rnn_ext.layer{}.default".format
    if context is torch.enable_grad:
        assert held == [[layer("_forward")] * 2, [layer("_backward")] * 2]
    else:
        assert held == [[layer("")] * 2]


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_under_autocast(name):
    layer = getattr(rnn_ext, name)(4, 3, 2, bidirectional=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 2, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        results, ours = layer(x), compiled(x)
    assert_same(ours, results)
    assert_same(gradients(layer, ours, x), gradients(layer, results, x))


def test_quantized_layers_compile():
    model = rnn_ext.quantize_weights(rnn_ext.GRU(4, 6, 2, bidirectional=True), "int8")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps, batch in SIZES:
        x = torch.randn(steps, batch, 4)
        assert_same(compiled(x), model(x))
    with pytest.raises(Exception, match="give no gradients"):
        compiled(x.requires_grad_())


@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradients_of_gradients_of_a_compiled_model(bidirectional):
    layer, _ = twins("GRU", 4, 3, bidirectional=bidirectional)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)

    def penalty(run):
        (gradient,) = torch.autograd.grad(run(x)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [x, *layer.parameters()])

    with pytest.warns(FallbackWarning, match="gradients of gradients have no kernel"):
        ours = penalty(compiled)
    assert_same(ours, penalty(layer))


@pytest.mark.parametrize("name", LAYERS)
def test_transforms_of_torch_func(name):
    ours, theirs = twins(name, 4, 3)
    x = torch.randn(6, 5, 4, dtype=torch.float64)  # six sequences without a batch
    parameters = {key: value.detach() for key, value in ours.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(ours, parameters, (x,))[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for k in range(6):
        total = theirs(x[k])[0].square().sum()
        alone = torch.autograd.grad(total, list(theirs.parameters()))
        assert_same([each[key][k] for key in parameters], alone)

    tangent = torch.randn_like(x[0])
    with pytest.warns(FallbackWarning, match="forward-mode .* composed of torch operations"):
        _, forward = torch.func.jvp(lambda x: ours(x)[0], (x[0],), (tangent,))
    step = 1e-6
    difference = ours(x[0] + step * tangent)[0] - ours(x[0] - step * tangent)[0]
    torch.testing.assert_close(forward, difference / (2 * step), rtol=1e-6, atol=1e-8)


def test_second_order_gradients():
    layer = rnn_ext.LSTM(2, 2, proj_size=1, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    run = lambda x, *_: tuple(tensors(layer(x)))  # noqa: E731
    with pytest.warns(FallbackWarning, match="gradients of gradients have no kernel"):
        assert torch.autograd.gradgradcheck(run, (x, *layer.parameters()))
