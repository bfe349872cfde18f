"""torch.onnx.export of models that hold our layers, by both exporters, run by onnxruntime."""

import io
import warnings

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map
from twins import forget_warnings

import rnn_ext

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(autouse=True)
def _quiet():
    forget_warnings()
    with warnings.catch_warnings():
        # What torch's exporters say of themselves.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`")
        warnings.filterwarnings(
            "ignore", message="The tensor attributes? .* assigned during export"
        )
        yield


@pytest.fixture(params=["traced", "dynamo"])
def export(request):
    """``export(model, arguments, dynamic)`` to a model of ONNX; ``dynamic`` is by argument."""
    if request.param == "dynamo":
        pytest.importorskip("onnxscript")

        def with_dynamo(model, arguments, dynamic=None):
            options = {"dynamic_shapes": dynamic} if dynamic else {}
            program = torch.onnx.export(model, arguments, dynamo=True, verbose=False, **options)
            return program.model_proto

        return with_dynamo

    def traced(model, arguments, dynamic=None):
        file, options = io.BytesIO(), {}
        if dynamic:
            names = [f"input_{k}" for k in range(len(dynamic))]
            axes = [{k: f"axis_{n}_{k}" for k in axes} for n, axes in enumerate(dynamic)]
            options = {"input_names": names, "dynamic_axes": dict(zip(names, axes))}
        torch.onnx.export(model, arguments, file, dynamo=False, **options)
        return onnx.load_from_string(file.getvalue())

    return traced


def nodes(proto):
    """(operator, attributes) of the recurrent nodes."""
    found = [node for node in proto.graph.node if node.op_type in ("RNN", "LSTM", "GRU")]
    assert not [node for node in proto.graph.node if node.op_type in ("Loop", "Scan")]
    return [
        (n.op_type, {a.name: onnx.helper.get_attribute_value(a) for a in n.attribute})
        for n in found
    ]


def assert_runs_the_same(proto, model, arguments):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    given = [t.numpy() for t in tree_leaves(arguments)]
    results = session.run(None, {i.name: t for i, t in zip(session.get_inputs(), given)})
    with torch.no_grad():
        expected = tree_leaves(model(*arguments))
    for theirs, ours in zip(results, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=0, atol=1e-5)


class Parallel(torch.nn.Module):
    """Every module on the same input; ``states`` holds what it starts from, if anything."""

    def __init__(self, **modules):
        super().__init__()
        self.each = torch.nn.ModuleDict(modules)

    def forward(self, x, states=None):
        return [
            module(x, None if states is None else states[k])
            for k, module in enumerate(self.each.values())
        ]


def every_layer():
    both = {"num_layers": 2, "bidirectional": True}
    model = Parallel(
        tanh=rnn_ext.RNN(4, 5, **both),
        relu=rnn_ext.RNN(4, 5, nonlinearity="relu"),
        sigmoid=rnn_ext.RNN(4, 5, nonlinearity="sigmoid", bidirectional=True),
        lstm=rnn_ext.LSTM(4, 5, **both),
        lstm_without_bias=rnn_ext.LSTM(4, 5, bias=False),
        lstm_with_peepholes=rnn_ext.LSTM(4, 5, bidirectional=True, peephole=True),
        gru=rnn_ext.GRU(4, 5, **both),
        gru_reset_before=rnn_ext.GRU(4, 5, 2, reset_after=False),
    )
    return model.eval()


LAYER_NODES = [
    *[("RNN", b"bidirectional", [b"Tanh", b"Tanh"], None)] * 2,
    ("RNN", b"forward", [b"Relu"], None),
    ("RNN", b"bidirectional", [b"Sigmoid", b"Sigmoid"], None),
    *[("LSTM", b"bidirectional", None, None)] * 2,
    ("LSTM", b"forward", None, None),
    ("LSTM", b"bidirectional", None, None),
    *[("GRU", b"bidirectional", None, 1)] * 2,
    *[("GRU", b"forward", None, 0)] * 2,
]


@pytest.mark.parametrize("given", [False, True], ids=["from_zero", "from_states"])
def test_layers_are_the_nodes_of_onnx(export, given):
    model, x = every_layer(), torch.randn(6, 3, 4)
    arguments = (x,)
    if given:
        states = [tree_map(lambda h: torch.rand_like(h) - 0.5, r[1]) for r in model(x)]
        arguments = (x, states)
    proto = export(model, arguments)
    keys = ("direction", "activations", "linear_before_reset")
    assert [(name, *map(a.get, keys)) for name, a in nodes(proto)] == LAYER_NODES
    assert_runs_the_same(proto, model, arguments)


@pytest.mark.parametrize("cls", [rnn_ext.RNN, rnn_ext.LSTM, rnn_ext.GRU])
def test_a_layer_by_itself(export, cls):
    model, x = cls(4, 5).eval(), torch.randn(6, 3, 4)
    assert_runs_the_same(export(model, (x,)), model, (x,))


def test_cells_are_nodes_of_one_step(export):
    model = Parallel(
        rnn=rnn_ext.RNNCell(4, 5, nonlinearity="relu"),
        lstm=rnn_ext.LSTMCell(4, 5),
        gru=rnn_ext.GRUCell(4, 5, bias=False),
        gru_reset_before=rnn_ext.GRUCell(4, 5, reset_after=False),
    ).eval()
    x = torch.randn(3, 4)
    arguments = (x, tree_map(torch.detach, model(x)))
    proto = export(model, arguments)
    assert [name for name, _ in nodes(proto)] == ["RNN", "LSTM", "GRU", "GRU"]
    assert_runs_the_same(proto, model, arguments)


def test_batch_and_steps_may_change(export):
    model = Parallel(
        lstm=rnn_ext.LSTM(4, 5, 2, bidirectional=True, batch_first=True),
        gru=rnn_ext.GRU(4, 5, batch_first=True),
    ).eval()
    if "dynamo" in str(export):
        dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("steps")}
    else:
        dims = {0: None, 1: None}
    proto = export(model, (torch.randn(3, 6, 4),), (dims,))
    for shape in ((3, 6), (2, 9), (1, 2)):
        assert_runs_the_same(proto, model, (torch.randn(*shape, 4),))


def test_lengths_are_sequence_lens(export):
    class Padded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = rnn_ext.LSTM(4, 5, 2, bidirectional=True)

        def forward(self, x, lengths):
            return self.lstm(x, lengths=lengths)

    model, x = Padded().eval(), torch.randn(6, 3, 4)
    proto = export(model, (x, torch.tensor([2, 6, 3])))
    assert [name for name, _ in nodes(proto)] == ["LSTM", "LSTM"]
    assert_runs_the_same(proto, model, (x, torch.tensor([2, 6, 3])))
    assert_runs_the_same(proto, model, (x, torch.tensor([6, 1, 4])))


def test_a_sequence_without_a_batch(export):
    model, x = Parallel(lstm=rnn_ext.LSTM(4, 5), gru=rnn_ext.GRU(4, 5, 2)).eval(), torch.randn(6, 4)
    assert_runs_the_same(export(model, (x,)), model, (x,))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: rnn_ext.LSTM(4, 5, proj_size=3), "LSTM: ONNX's LSTM has no projection"),
        (lambda: rnn_ext.GRU(4, 5, layer_norm=True), "GRU: ONNX's layers have no layer_norm=True"),
        (lambda: rnn_ext.LSTM(4, 5, zoneout=0.1), "LSTM: ONNX has no zoneout"),
        (lambda: ReturnsCells(), "LSTM: ONNX's LSTM does not give every cell state"),
        (
            lambda: rnn_ext.quantize_weights(rnn_ext.LSTM(4, 5), "int8"),
            "QuantizedLSTM: .*ONNX has no such weights",
        ),
    ],
    ids=["projection", "layer_norm", "zoneout", "return_cells", "quantized"],
)
def test_what_onnx_has_not_is_refused(export, make, message):
    x = torch.randn(6, 3, 4)
    for model in (make(), torch.nn.Sequential(make())):
        with torch.no_grad(), pytest.raises(Exception, match=message):
            export(model.eval(), (x,))


class ReturnsCells(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = rnn_ext.LSTM(4, 5)

    def forward(self, x):
        return self.lstm(x, return_cells=True)[2]
