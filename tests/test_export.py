"""torch.export and AOTInductor; torch's checks of every operator that compiled models hold."""

import io
import warnings

import pytest
import torch
from cases import make_case
from torch.utils._pytree import tree_map
from twins import assert_same, gradients, twins

import rnn_ext

operators = torch.ops.rnn_ext


@pytest.fixture(autouse=True)
def _quiet():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # torch.export.save copies tree specifications, which warns of torch itself.
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`")
        warnings.filterwarnings("ignore", module=r"torch\..*", category=DeprecationWarning)
        yield


class Model(torch.nn.Module):
    """A layer of each kind, both GRUs, a projection, a cell."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        options = {"dtype": dtype}
        self.lstm = rnn_ext.LSTM(4, 6, 2, bidirectional=True, proj_size=3, **options)
        self.gru = rnn_ext.GRU(6, 5, reset_after=False, bidirectional=True, **options)
        self.rnn = rnn_ext.RNN(10, 4, nonlinearity="sigmoid", **options)
        self.cell = rnn_ext.GRUCell(4, 3, **options)

    def forward(self, x):
        x, (h, c) = self.lstm(x)
        x, g = self.gru(x)
        x, s = self.rnn(x)
        return x, h, c, g, s, self.cell(x[-1])


DYNAMIC = {0: torch.export.Dim("steps", min=2), 1: torch.export.Dim("batch", min=2)}


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_export_with_dynamic_steps_and_batch(strict):
    model, x = Model(), torch.randn(5, 3, 4, dtype=torch.float64)
    exported = torch.export.export(model, (x,), dynamic_shapes=(DYNAMIC,), strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    decomposed = exported.run_decompositions()
    for program in (exported, decomposed, torch.export.load(file)):
        calls = [node.target for node in program.graph.nodes if "rnn_ext" in str(node.target)]
        assert calls == [operators.layer.default] * 5  # both directions in one call
        for shape in ((9, 2), (2, 7)):
            x = torch.randn(*shape, 4, dtype=torch.float64)
            assert_same(program.module()(x), model(x))
    trained = exported.module()
    assert_same(gradients(trained, trained(x)), gradients(model, model(x)))


def test_export_from_given_states_and_in_bfloat16():
    x = torch.randn(5, 3, 4)
    layer, _ = twins("LSTM", 4, 6, 2, batch_first=True, dtype=torch.bfloat16)
    hx = tree_map(torch.detach, layer(x.bfloat16())[1])
    program = torch.export.export(layer, (x.bfloat16(), hx)).module()
    assert_same(program(x.bfloat16(), hx), layer(x.bfloat16(), hx))


def test_export_with_lengths():
    class Padded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = rnn_ext.GRU(4, 5, 2, bidirectional=True, dtype=torch.float64)

        def forward(self, x, lengths):
            return self.gru(x, lengths=lengths)

    model = Padded()
    x, lengths = torch.randn(5, 3, 4, dtype=torch.float64), torch.tensor([2, 5, 3])
    dynamic = (DYNAMIC, {0: DYNAMIC[1]})
    program = torch.export.export(model, (x, lengths), dynamic_shapes=dynamic).module()
    x = torch.randn(6, 4, 4, dtype=torch.float64)
    for lengths in ([3, 1, 5, 5], [6, 6, 6, 6]):
        lengths = torch.tensor(lengths)
        assert_same(program(x, lengths), model(x, lengths))


def test_export_of_quantized_layers():
    model = rnn_ext.quantize_weights(rnn_ext.LSTM(4, 6, 2, bidirectional=True), "int8").eval()
    exported = torch.export.export(model, (torch.randn(5, 3, 4),), dynamic_shapes=(DYNAMIC,))
    x = torch.randn(9, 2, 4)
    assert_same(exported.module()(x), model(x))


@pytest.mark.slow
def test_aot_inductor_runs_what_was_exported(tmp_path):
    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = rnn_ext.quantize_weights(rnn_ext.GRU(4, 5), "int8")
            self.lstm = rnn_ext.LSTM(5, 6, bidirectional=True)

        def forward(self, x):
            x, h = self.gru(x)
            return *self.lstm(x), h

    model = Small().eval()
    exported = torch.export.export(model, (torch.randn(5, 3, 4),), dynamic_shapes=(DYNAMIC,))
    path = torch._inductor.aoti_compile_and_package(exported, package_path=f"{tmp_path}/model.pt2")
    loaded = torch._inductor.aoti_load_package(path)
    for shape in ((5, 3), (9, 2)):
        x = torch.randn(*shape, 4)
        with torch.no_grad():
            assert_same(loaded(x), model(x))


def arguments_of(case, both):
    """(cell, input, tensors, batch_sizes, reverse) of an operator, in one direction or both."""
    input, *tensors = case.tensors
    if both:
        tensors += [None if t is None else t.clone() for t in tensors]
    return case.cell, input, tensors, case.batch_sizes, case.reverse


# cell, both directions, packed, with biases, gradients, dtype: every cell, and each option twice.
CHECKED = [
    ("rnn_tanh", True, False, True, True, torch.float32),
    ("rnn_relu", False, True, False, True, torch.float64),
    ("rnn_sigmoid", False, False, True, True, torch.bfloat16),
    ("lstm", True, True, True, True, torch.float32),
    ("lstm", False, False, False, False, torch.bfloat16),
    ("lstm_projected", True, False, True, True, torch.bfloat16),
    ("gru", False, True, True, True, torch.float32),
    ("gru", True, True, False, False, torch.float64),
    ("gru_reset_before", True, False, True, True, torch.float64),
]


def _name(value):
    return str(value)


@pytest.mark.parametrize("cell, both, packed, bias, wants_gradients, dtype", CHECKED, ids=_name)
def test_layer_passes_the_checks_of_torch(cell, both, packed, bias, wants_gradients, dtype):
    case = make_case(cell, (3, 2, 4, 6), bias=bias, ragged=packed, reverse=not both).to(dtype)
    given = arguments_of(case, both)
    for tensor in (given[1], *given[2]):
        if tensor is not None:
            tensor.requires_grad_(wants_gradients)
    torch.library.opcheck(operators.layer.default, (*given, not packed))


@pytest.mark.parametrize(
    "cell, both, dtype",
    [
        ("rnn_tanh", False, torch.bfloat16),
        ("lstm_projected", True, torch.float32),
        ("gru_reset_before", False, torch.float32),
    ],
    ids=_name,
)
def test_operators_behind_it_pass_the_checks_of_torch(cell, both, dtype):
    given = arguments_of(make_case(cell, (3, 2, 4, 6)).to(dtype), both)
    torch.library.opcheck(operators.layer_forward.default, given)
    results = operators.layer_forward(*given)
    directions = 2 if both else 1
    kept, upstream, wanted = [], [], []
    for k in range(directions):
        output, h_n, _, *rest = results[8 * k : 8 * k + 8]
        kept += [output, *rest]
        upstream += [torch.ones_like(output), torch.ones_like(h_n), None, None]
        wanted += [k == 0, *(t is not None for t in given[2][:7])]
    wanted[3] = False
    torch.library.opcheck(operators.layer_backward.default, (*given, kept, upstream, wanted))


@pytest.mark.parametrize("name, kind", [("LSTM", "bf16"), ("GRU", "int8")])
def test_quantized_operator_passes_the_checks_of_torch(name, kind):
    layer = rnn_ext.quantize_weights(getattr(rnn_ext, name)(4, 6), kind)
    (weights,) = layer._weights()
    c0 = torch.randn(2, 6) if name == "LSTM" else None
    arguments = (layer._cell, torch.randn(3, 2, 4), torch.randn(2, 6), c0, weights, None, True)
    torch.library.opcheck(operators.quantized_layer.default, arguments)


def test_what_has_no_gradient_says_so():
    cell, input, tensors, *rest = arguments_of(make_case("gru", (3, 2, 4, 6)), False)
    output, *_ = operators.layer_forward(cell, input.requires_grad_(), tensors, *rest)
    with pytest.raises(RuntimeError, match=r"rnn_ext::layer_forward.*is not implemented"):
        output.sum().backward()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t[:5], "takes seven tensors of one direction or of both, got 5"),
        (lambda t: [None, *t[1:]], "h0, w_ih and w_hh must be given"),
    ],
    ids=["count", "absent"],
)
def test_operators_refuse_what_does_not_fit(change, message):
    cell, input, tensors, *rest = arguments_of(make_case("gru", (3, 2, 4, 6)), False)
    with pytest.raises(RuntimeError, match=message):
        operators.layer(cell, input, change(tensors), *rest, False)
