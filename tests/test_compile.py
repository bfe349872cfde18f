"""Our layers under torch.compile, torch.export and torch.func."""

import warnings

import pytest
import torch
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
    compiled = torch.compile(cell, fullgraph=True, backend="eager")
    x = torch.randn(2, 4, dtype=torch.float64)
    hx = tree_map(torch.detach, cell(x))
    assert_same(compiled(x), hx)
    assert_same(compiled(x, hx), cell(x, hx))


def test_extras_compile():
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    for layer in (
        rnn_ext.RNN(4, 3, nonlinearity="sigmoid", dtype=torch.float64),
        rnn_ext.GRU(4, 3, 2, reset_after=False, dtype=torch.float64),
    ):
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
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


def test_packed_sequences_and_lengths_compile_with_breaks():
    layer, _ = twins("GRU", 4, 3)
    x = torch.randn(5, 2, 4, dtype=torch.float64)

    @torch.compile(backend="eager")
    def run(x):
        _, packed_state = layer(pack_padded_sequence(x, [5, 3]))
        return packed_state, layer(x, lengths=[5, 3])[1]

    with torch.no_grad():
        assert_same(*run(x))


@pytest.mark.parametrize("name", LAYERS)
def test_export(name):
    ours, _ = twins(name, 4, 3, 2, bidirectional=True)
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    model = Model(ours)
    assert_same(torch.export.export(model, (x,)).module()(x), model(x))


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
