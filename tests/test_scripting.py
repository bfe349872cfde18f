"""Our layers in TorchScript (trace, script, freeze, files) and in graphs of torch.fx."""

import io
import warnings

import pytest
import torch
from torch.fx.passes.shape_prop import ShapeProp
from torch.fx.proxy import TraceError
from torch.nn.utils.rnn import pack_padded_sequence
from twins import (
    CELLS,
    LAYERS,
    assert_same,
    forget_warnings,
    gradients,
    state,
    tensors,
    torch_nn_warnings_ignored,
    twins,
)

import rnn_ext
from rnn_ext import FallbackWarning


@pytest.fixture(autouse=True)
def _torch_may_warn():
    forget_warnings()
    with torch_nn_warnings_ignored(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        yield


class Model(torch.nn.Module):
    """A layer between two linear ones."""

    def __init__(self, library, name, **options):
        super().__init__()
        torch.manual_seed(0)
        self.before = torch.nn.Linear(5, 4, dtype=torch.float64)
        self.layer = getattr(library, name)(4, 3, dtype=torch.float64, **options)
        width = options.get("proj_size", 3) * (2 if options.get("bidirectional") else 1)
        self.after = torch.nn.Linear(width, 2, dtype=torch.float64)

    def forward(self, x):
        output, _ = self.layer(self.before(x))
        return self.after(output)


class CellModel(Model):
    def forward(self, x):
        return self.after(self.layer(self.before(x)))


CASES = [(name, {}) for name in LAYERS + CELLS] + [
    ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    ("LSTM", {"proj_size": 2}),
    ("GRU", {"bias": False, "num_layers": 2}),
    ("RNN", {"nonlinearity": "relu", "bidirectional": True}),
]


def models(name, options):
    """(ours, torch.nn's, input, input of other sizes)."""
    shapes = ((2, 5), (7, 5)) if name in CELLS else ((5, 2, 5), (9, 3, 5))
    model = CellModel if name in ("RNNCell", "GRUCell") else Model
    made = [model(library, name, **options) for library in (rnn_ext, torch.nn)]
    return *made, *(torch.randn(shape, dtype=torch.float64) for shape in shapes)


def through_a_file(module):
    saved = io.BytesIO()
    torch.jit.save(module, saved)
    saved.seek(0)
    return torch.jit.load(saved)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_trace(name, options):
    ours, theirs, x, other = models(name, options)
    with pytest.warns(FallbackWarning, match="torch.jit.trace records only operators of torch"):
        traced = torch.jit.trace(ours, (x,))
    assert_same(traced(x), theirs(x))
    assert_same(traced(other), theirs(other))
    assert_same(through_a_file(traced)(other), theirs(other))
    assert_same(
        torch.autograd.grad(traced(other).sum(), list(traced.parameters())),
        torch.autograd.grad(theirs(other).sum(), list(theirs.parameters())),
    )
    assert type(ours.layer) is getattr(rnn_ext, name)  # and runs its kernels again
    assert_same(ours(other), theirs(other))
    frozen = torch.jit.freeze(traced.eval())
    with torch.no_grad():
        assert_same(frozen(other), theirs(other))


def test_trace_with_states_and_packed_input():
    class Ragged(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x, lengths, h, c):
            packed = pack_padded_sequence(x, lengths)
            output, (h, c) = self.layer(packed, (h, c))
            return output.data, h, c

    ours, theirs = twins("LSTM", 4, 3, 2)
    x, lengths = torch.randn(5, 2, 4, dtype=torch.float64), torch.tensor([5, 3])
    with pytest.warns(FallbackWarning, match=r"torch\.jit\.trace"):
        traced = torch.jit.trace(Ragged(ours), (x, lengths, *state(ours, 2)))
    hx, lengths = state(ours, 2), torch.tensor([4, 1])
    assert_same(traced(x, lengths, *hx), Ragged(theirs)(x, lengths, *hx))


@pytest.mark.parametrize(
    "make",
    [
        lambda: rnn_ext.GRU(4, 3, reset_after=False),
        lambda: rnn_ext.RNN(4, 3, nonlinearity="sigmoid"),
    ],
)
def test_trace_of_what_torch_nn_has_not_keeps_the_length(make):
    """The time loop is unrolled; another length is an error and no wrong number."""
    layer, x = make(), torch.randn(5, 2, 4)
    with pytest.warns(FallbackWarning, match=r"torch\.jit\.trace.*composed of torch operations"):
        traced = torch.jit.trace(layer, (x,))
    other = torch.randn(5, 2, 4)
    assert_same(traced(other), layer(other))
    for steps in (4, 6):
        with pytest.raises(RuntimeError, match="Expected 5 elements"):
            traced(torch.randn(steps, 2, 4))


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_script(name, options):
    ours, theirs, x, other = models(name, options)
    with pytest.warns(FallbackWarning, match="torch.jit.script puts torch.nn's in its place"):
        scripted = torch.jit.script(ours.eval())
    assert_same(scripted(x), theirs(x))
    assert_same(through_a_file(scripted)(other), theirs(other))
    frozen = torch.jit.freeze(scripted)
    with torch.no_grad():
        assert_same(frozen(other), theirs(other))
    assert type(ours.layer) is getattr(torch.nn, name)
    assert type(rnn_ext.accelerate(ours).layer) is getattr(rnn_ext, name)
    assert_same(ours(other), theirs(other))


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_script_of_a_restored_model_warns_of_nothing(name):
    ours, theirs, x, _ = models(name, {})
    assert_same(torch.jit.script(rnn_ext.restore(ours))(x), theirs(x))


def test_script_refuses_what_torch_nn_has_not():
    for module in (
        rnn_ext.GRU(4, 3, reset_after=False),
        rnn_ext.RNNCell(4, 3, nonlinearity="sigmoid"),
    ):
        with pytest.raises(RuntimeError, match="cannot be scripted"):
            torch.jit.script(module)


def called(graph_module):
    return [node.target for node in graph_module.graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_fx_gives_the_graph_of_torch_nn(name):
    ours, theirs, x, _ = models(name, {})
    graphs = [torch.fx.symbolic_trace(model) for model in (ours, theirs)]
    assert called(graphs[0]) == ["before", "layer", "after"]
    assert graphs[0].code == graphs[1].code
    for graph in graphs:
        graph.graph.lint()
    assert_same(graphs[0](x), theirs(x))
    assert_same(gradients(graphs[0], graphs[0](x)), gradients(theirs, theirs(x)))
    with torch.no_grad():
        ours.layer.get_parameter("weight_hh_l0" if name in LAYERS else "weight_hh").mul_(2)
        assert_same(graphs[0](x), ours(x))


@pytest.mark.parametrize("name", LAYERS)
def test_fx_with_states_and_keywords(name):
    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = getattr(rnn_ext, name)(4, 3)
            self.cell = getattr(rnn_ext, f"{name}Cell")(4, 3)
            self.ragged = rnn_ext.LSTM(4, 3)
            self.register_buffer("start", torch.randn(5, 2, 4))

        def forward(self, x, hx, lengths):
            output, state = self.layer(x, hx)
            again = self.layer(self.start, hx)  # only the state is traced
            cells = self.ragged(x, lengths=lengths, return_cells=True)[2]
            return output, state, again, cells, self.cell(x[0])

    pair = Pair()
    traced = torch.fx.symbolic_trace(pair)
    assert called(traced) == ["layer", "layer", "ragged", "cell"]
    x, lengths = torch.randn(5, 2, 4), torch.tensor([5, 3])
    hx = pair.layer(x)[1]
    assert_same(traced(x, hx, lengths), pair(x, hx, lengths))


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_fx_refuses_a_layer_without_a_model(name):
    with pytest.raises(TraceError, match=f"{name} is a leaf in the graphs of torch.fx"):
        torch.fx.symbolic_trace(getattr(rnn_ext, name)(4, 3))


@pytest.mark.parametrize("name", LAYERS)
def test_fx_transformations(name):
    ours, theirs, x, _ = models(name, {})
    graph = torch.fx.symbolic_trace(ours)

    shapes = ShapeProp(graph).propagate(x).shape
    assert shapes == (5, 2, 2)
    layer_node = next(node for node in graph.graph.nodes if node.target == "layer")
    assert layer_node.meta["tensor_meta"][0].shape == (5, 2, 3)
    assert_same(torch.fx.Interpreter(graph).run(x), theirs(x))
    assert_same(torch.fx.Transformer(graph).transform()(x), theirs(x))

    # A pass that finds the layers by class, and puts others in their place.
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and isinstance(graph.get_submodule(node.target), rnn_ext_layer):
            with graph.graph.inserting_after(node):
                wider = getattr(rnn_ext, name)(4, 3, dtype=torch.float64)
                graph.add_submodule("another", wider)
                new = graph.graph.call_module("another", node.args, node.kwargs)
                node.replace_all_uses_with(new)
            graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    assert called(graph) == ["before", "another", "after"]
    graph.another.load_state_dict(theirs.layer.state_dict())
    assert_same(graph(x), theirs(x))


rnn_ext_layer = (rnn_ext.RNN, rnn_ext.LSTM, rnn_ext.GRU)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_accelerate_and_restore_in_a_graph(name):
    _, theirs, x, _ = models(name, {})
    graph = torch.fx.symbolic_trace(theirs)
    expected, code = theirs(x), graph.code
    assert type(rnn_ext.accelerate(graph).layer) is getattr(rnn_ext, name)
    assert_same(graph(x), expected)
    again = torch.fx.symbolic_trace(graph)
    assert again.code == code and type(again.layer) is getattr(rnn_ext, name)
    assert_same(tensors(again(x)), tensors(expected))
    assert type(rnn_ext.restore(graph).layer) is getattr(torch.nn, name)
    assert_same(graph(x), expected)
