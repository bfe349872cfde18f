"""Options of layers under compilers, transforms, copies and conversions; what they refuse."""

import copy
import io
import pickle

import onnxruntime
import pytest
import torch
from torch.func import functional_call
from twins import assert_same, tensors

import rnn_ext

OPTIONS = {
    "residual=True": {"num_layers": 2, "residual": True},
    "weight_dropout=0.25": {"weight_dropout": 0.25},
    "variational_dropout=0.25": {"variational_dropout": 0.25},
    "zoneout=0.25": {"zoneout": 0.25},
    "learn_initial_state=True": {"learn_initial_state": True},
    "bias='single'": {"bias": "single"},
    "hidden_size=(5, 6)": {"hidden_size": [5, 6]},
}
each_option = pytest.mark.parametrize("option", OPTIONS)
# torch.func.jvp and the exporter use torch.jit.script themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::rnn_ext.FallbackWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]


def make(option, kind="LSTM", **more):
    return getattr(rnn_ext, kind)(4, **({"hidden_size": 5} | OPTIONS[option] | more))


@each_option
def test_repr_copies_and_state_dict(option):
    for kind in ("RNN", "LSTM", "GRU"):
        module = make(option, kind)
        shown = option.replace("hidden_size=", "")
        assert f", {shown}" in str(module)
        x = torch.randn(5, 3, 4)
        torch.manual_seed(1)
        expected = module(x)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert str(twin) == str(module)
            torch.manual_seed(1)
            assert_same(twin(x), expected)
        other = make(option, kind)
        other.load_state_dict(module.state_dict())
        torch.manual_seed(1)
        assert_same(other(x), expected)
    skipped = torch.nn.utils.skip_init(rnn_ext.GRU, 4, **({"hidden_size": 5} | OPTIONS[option]))
    assert str(skipped) == str(module)


def test_options_are_checked_whenever_they_are_set():
    layer = rnn_ext.GRU(4, 5)
    names = set(layer.__dict__)
    layer.weight_dropout = 0.5
    assert str(layer) == "GRU(4, 5, weight_dropout=0.5)"
    with pytest.raises(ValueError, match="weight_dropout is a probability"):
        layer.weight_dropout = 1
    layer.weight_dropout = 0
    assert str(layer) == "GRU(4, 5)" and rnn_ext.restore(layer) is layer
    assert names <= set(torch.nn.GRU(4, 5).__dict__)  # no option, nothing beside torch.nn's
    with pytest.raises(ValueError, match="learn_initial_state is chosen at construction"):
        rnn_ext.GRU(4, 5).learn_initial_state = True


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"zoneout": 1.0}, ValueError, "LSTM: zoneout is a probability of at least 0 and below 1"),
        ({"zoneout": -0.1}, ValueError, "zoneout is a probability"),
        ({"weight_dropout": "0.5"}, TypeError, "weight_dropout must be a number"),
        ({"variational_dropout": float("nan")}, ValueError, "variational_dropout is a probab"),
        ({"residual": 1}, TypeError, "residual must be True or False"),
        ({"residual": True}, ValueError, "residual=True needs a second layer"),
        (
            {"residual": True, "hidden_size": [4, 5]},
            ValueError,
            "residual=True needs a second layer",
        ),
        ({"learn_initial_state": None}, TypeError, "learn_initial_state must be True or False"),
        ({"bias": "double"}, TypeError, "bias should be of type bool"),
        ({"hidden_size": []}, TypeError, "hidden_size must be an int or a list of ints"),
        ({"hidden_size": [5, 6.0]}, TypeError, "hidden_size must be an int or a list of ints"),
        ({"hidden_size": [5, 0]}, ValueError, "every entry of hidden_size must be positive"),
        ({"hidden_size": [5, 6], "num_layers": 3}, ValueError, "but num_layers is 3"),
        ({"hidden_size": [5, 6], "proj_size": 2}, ValueError, "proj_size needs one hidden_size"),
    ],
)
def test_wrong_options_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        rnn_ext.LSTM(4, **({"hidden_size": 5} | arguments))


def test_wrong_states_for_widths_are_named():
    layer, x = rnn_ext.LSTM(4, [5, 6]), torch.randn(5, 3, 4)
    h = [torch.zeros(1, 3, 5), torch.zeros(1, 3, 6)]
    for hx in (h, (h, h[:1]), (h, h[::-1]), torch.zeros(2, 3, 5), (h, [h[0], None])):
        with pytest.raises(RuntimeError, match=r"hx must be a pair .*: \[1, B, 5\], \[1, B, 6\]"):
            layer(x, hx)
    with pytest.raises(RuntimeError, match="Expected 4, got 3"):
        layer(x[..., :3])
    with pytest.raises(RuntimeError, match="input must be a 2-D or 3-D tensor"):
        layer(x[0, 0])
    with pytest.raises(ValueError, match="does not match weight dtype"):
        layer(x.double())


@each_option
def test_what_has_no_such_layer_refuses(option):
    module = make(option)
    with pytest.raises(ValueError, match=rf"a LSTM with .*{option.split('=')[0]}"):
        rnn_ext.restore(torch.nn.Sequential(module))
    with pytest.raises(RuntimeError, match="cannot be scripted"):
        torch.jit.script(module)
    if "dropout" in option:  # which inference does without
        assert_same(
            rnn_ext.quantize_weights(copy.deepcopy(module), "bf16")(torch.ones(2, 1, 4))[0].shape,
            (2, 1, 5),
        )
    else:
        with pytest.raises(ValueError, match="which quantized layers have not"):
            rnn_ext.quantize_weights(module, "int8")


@each_option
def test_transforms(option):
    module = make(option, dtype=torch.float64)
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters, x):
        return sum(t.square().sum() for t in tensors(functional_call(module, parameters, (x,))))

    torch.manual_seed(2)
    found = torch.func.grad(loss)(parameters, x)
    torch.manual_seed(2)
    leaves = list(module.parameters())
    expected = torch.autograd.grad(loss(dict(module.named_parameters()), x), leaves)
    assert_same(list(found.values()), list(expected))
    torch.manual_seed(2)
    batched = torch.func.vmap(lambda x: module(x)[0], randomness="same")(torch.stack((x, x)))
    torch.manual_seed(2)
    assert_same(batched[1], module(x)[0])
    torch.manual_seed(2)
    _, tangent = torch.func.jvp(lambda x: module(x)[0], (x,), (x,))
    torch.manual_seed(2)
    x = x.requires_grad_()
    output = module(x)[0]
    (slope,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(tangent.sum(), (slope * x).sum())


@each_option
def test_compile_without_a_graph_break(option):
    torch.compiler.reset()
    module = make(option)
    x, lengths = torch.randn(4, 3, 4), torch.tensor([2, 4, 1])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        module.train(training)
        torch.manual_seed(3)
        found = compiled(x)
        torch.manual_seed(3)
        torch.testing.assert_close(tensors(found), tensors(module(x)))
    found[0].sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    torch.testing.assert_close(
        tensors(compiled(x, return_gates=True)), tensors(module(x, return_gates=True))
    )
    torch.testing.assert_close(
        tensors(compiled(x, lengths=lengths)), tensors(module(x, lengths=lengths))
    )


def test_compiled_layers_may_have_other_probabilities():
    torch.compiler.reset()
    stack = torch.nn.ModuleList(
        rnn_ext.GRU(4, 4, weight_dropout=p, variational_dropout=p / 2) for p in (0.5, 0.2)
    )

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(layer, x):
        return layer(x)[0]

    for layer in stack:
        x = torch.randn(4, 3, 4)
        for _ in range(2):
            torch.manual_seed(3)
            found = run(layer, x)
            torch.manual_seed(3)
            torch.testing.assert_close(found, layer(x)[0])
            layer.variational_dropout += 0.125  # and change them afterwards


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@each_option
def test_onnx(option):
    module = torch.nn.Sequential(make(option, bidirectional=True)).eval()
    x, file = torch.randn(4, 3, 4), io.BytesIO()

    def export():
        torch.onnx.export(module, (x,), file, dynamo=False)

    if "zoneout" in option:
        with pytest.raises(RuntimeError, match="LSTM: ONNX has no zoneout"):
            export()
        return
    export()
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    results = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for theirs, ours in zip(results, tensors(module(x)), strict=True):
        torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=0, atol=1e-5)


@each_option
def test_dtypes(option):
    module = make(option, bidirectional=True)
    x = torch.randn(4, 3, 4)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = copy.deepcopy(module).to(dtype)
        torch.manual_seed(4)
        found = narrow(x.to(dtype))
        torch.manual_seed(4)
        for part, exact in zip(tensors(found), tensors(module(x)), strict=True):
            assert part.dtype == dtype
            torch.testing.assert_close(part.float(), exact, rtol=0, atol=0.06)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)[0]
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_torch_checkpoint_recomputes_with_the_same_masks():
    module = make("weight_dropout=0.25", dtype=torch.float64, variational_dropout=0.5)
    x = torch.randn(4, 3, 4, dtype=torch.float64, requires_grad=True)
    gradients = []
    for run in (
        module,
        lambda x: torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False),
    ):
        torch.manual_seed(5)
        output, _ = run(x)
        torch.manual_seed(6)  # what the recomputation must not see
        gradients.append(torch.autograd.grad(output.sum(), [x, *module.parameters()]))
    assert_same(*map(list, gradients))
