"""Output feedback: teacher forcing, free running and mixtures follow the reference."""

import copy
import io
import warnings

import numpy as np
import pytest
import torch
from kinds import random

import rnn_ext
from rnn_ext import JordanRNN, reference

PAIRS = [(f, g) for f in ("tanh", "relu", "sigmoid") for g in ("identity", "tanh", "sigmoid")]
PAIRS += [("tanh", "softmax")]
COMPOSED = [("relu", "tanh"), ("relu", "sigmoid"), ("tanh", "softmax")]
FUSED = [pair for pair in PAIRS if pair not in COMPOSED]
each_pair = pytest.mark.parametrize("f, g", PAIRS)
each_fused = pytest.mark.parametrize("f, g", [("tanh", "identity"), ("sigmoid", "tanh")])
each_way = pytest.mark.parametrize("way", ["forced", "free", "mixed"])


def make(f="tanh", g="identity", sizes=(3, 7, 2), **options):
    return JordanRNN(*sizes, f, g, **{"dtype": torch.float64, **options})


def problem(way, steps=9, batch=4, dtype=torch.float64):
    """x, y, teacher_forcing and o_0."""
    x, y = (random(steps, batch, size).to(dtype).requires_grad_() for size in (3, 2))
    forced = {"forced": 1.0, "free": 0.0, "mixed": torch.rand(steps, batch) < 0.4}[way]
    return x, y, forced, random(batch, 2).to(dtype).requires_grad_()


def weights_of(module):
    found = module.weight_ih, module.weight_oh, module.weight_ho, module.bias_h, module.bias_o
    return [weight for weight in found if weight is not None]


def run(module, x, y, forced, o_0):
    """Output, the gradients of x, y, o_0 and the weights, and of what they are."""
    with warnings.catch_warnings():
        if (module.nonlinearity, module.output_nonlinearity) in COMPOSED:
            warnings.simplefilter("ignore", rnn_ext.FallbackWarning)
        output, o_n = module(x, y, forced, o_0=o_0)
    assert torch.equal(o_n, output[-1])
    upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    wanted = [x, y, o_0, *weights_of(module)]
    return output, torch.autograd.grad(output, wanted, upstream, materialize_grads=True), upstream


def by_reference(module, x, y, forced, o_0, upstream):
    numpy = [t.detach().double().numpy() for t in (x, y, o_0, upstream)]
    weights = reference.JordanWeights(*(w.detach().double().numpy() for w in weights_of(module)))
    forced = torch.as_tensor(forced).bool().expand(x.shape[:2]).numpy()
    kinds = {
        "nonlinearity": module.nonlinearity,
        "output_nonlinearity": module.output_nonlinearity,
    }
    result = reference.jordan(numpy[0], weights, numpy[1], forced, numpy[2], **kinds)
    found = reference.jordan_backward(result, numpy[3])
    parts = found.x, found.targets, found.o_0, *found.weights
    return result.output, [part for part in parts if part is not None]


def difference(actual, expected):
    scale = max(1.0, np.abs(expected).max())
    return np.abs(actual.detach().double().numpy() - expected).max() / scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@each_way
@each_pair
def test_outputs_and_gradients_follow_the_reference(f, g, way, dtype):
    module, given = make(f, g, dtype=dtype), problem(way, dtype=dtype)
    output, gradients, upstream = run(module, *given)
    expected, expected_gradients = by_reference(module, *given, upstream)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert difference(output, expected) <= tolerance
    for name, actual, value in zip("x y o_0 W U V b c".split(), gradients, expected_gradients):
        assert difference(actual, value) <= tolerance, name


@each_way
@pytest.mark.parametrize("f, g", [("tanh", "identity"), ("relu", "softmax"), ("sigmoid", "tanh")])
def test_the_reference_has_the_gradients_of_autograd(f, g, way):
    """Of the composed loop, which shares nothing with it."""
    module, (x, y, forced, o_0) = make(f, g), problem(way)
    steps = torch.as_tensor(forced).bool().expand(x.shape[:2])
    output = module._composed(x, y, o_0, steps)
    upstream = random(*output.shape)
    wanted = [x, y, o_0, *weights_of(module)]
    gradients = torch.autograd.grad(output, wanted, upstream, materialize_grads=True)
    expected, expected_gradients = by_reference(module, x, y, forced, o_0, upstream)
    assert difference(output, expected) <= 1e-13
    for actual, value in zip(gradients, expected_gradients, strict=True):
        assert difference(actual, value) <= 1e-12


@each_way
@each_fused
def test_without_bias(f, g, way):
    module, given = make(f, g, bias=False), problem(way)
    output, gradients, upstream = run(module, *given)
    expected, expected_gradients = by_reference(module, *given, upstream)
    assert difference(output, expected) <= 1e-12
    for actual, value in zip(gradients, expected_gradients, strict=True):
        assert difference(actual, value) <= 1e-12


@pytest.mark.filterwarnings("ignore:.*gradients of gradients:rnn_ext.FallbackWarning")
@each_way
@each_fused
def test_derivatives_of_second_order(f, g, way):
    module = make(f, g, sizes=(2, 3, 2))
    forced = {"forced": 1.0, "free": 0.0, "mixed": torch.tensor([[True], [False], [True]])}[way]

    def outputs(x, y, o_0, *weights):
        names = "weight_ih", "weight_oh", "weight_ho", "bias_h", "bias_o"
        parameters = dict(zip(names, weights))
        call = (x, y, forced), {"o_0": o_0}
        return torch.func.functional_call(module, parameters, *call)[0]

    y = random(3, 1, 2, requires_grad=way != "free")
    inputs = random(3, 1, 2, requires_grad=True), y, random(1, 2, requires_grad=True)
    assert torch.autograd.gradgradcheck(outputs, (*inputs, *weights_of(module)))


@pytest.mark.parametrize("f, g", FUSED)
def test_what_has_a_kernel_is_not_composed(f, g, monkeypatch):
    """No warning, and no step of its own for each step of time."""
    monkeypatch.setattr(JordanRNN, "_composed", None)
    module, (x, y, _, _) = make(f, g), problem("free")
    with rnn_ext.use_backend("cpu"):
        module(x), module(x, y, 0.5), module(x, y)


@pytest.mark.parametrize("f, g", COMPOSED)
def test_what_has_no_kernel_warns_once_and_is_refused_where_one_is_asked_for(f, g, monkeypatch):
    monkeypatch.setattr("rnn_ext.backend._warned", set())
    module, (x, y, _, _) = make(f, g), problem("free")
    with pytest.warns(rnn_ext.FallbackWarning, match=f"free running {f} with {g} has no kernel"):
        module(x)
    module(x), module(x, y, 0.5)
    with rnn_ext.use_backend("cpu"):
        module(x, y)  # teacher forcing waits for nothing
        with pytest.raises(RuntimeError, match=f"backend 'cpu' cannot run this: {f} with {g}"):
            module(x)


@each_way
@each_fused
def test_wide_layers_run_as_a_loop_because_that_is_faster(f, g, way, monkeypatch):
    module, (x, y, forced, o_0) = make(f, g, sizes=(3, 300, 2)), problem(way, steps=3, batch=8)
    with rnn_ext.use_backend("cpu"):
        expected, gradients, _ = run(module, x, y, forced, o_0)
    monkeypatch.setattr(JordanRNN, "_elman", None)
    output, found, _ = run(module, x, y, forced, o_0)
    assert (output - expected).abs().max() <= 1e-12
    for actual, gradient in zip(found, gradients, strict=True):
        assert (actual - gradient).abs().max() <= 1e-11


# In use


def test_defaults():
    """Targets are fed if there are any; without, the network is fed its output, at first zeros."""
    module, (x, y, _, _) = make(), problem("free")
    zeros = x.new_zeros(4, 2)
    free, forced = module(x)[0], module(x, y)[0]
    assert torch.equal(free, module(x, y, 0, o_0=zeros)[0])
    assert torch.equal(forced, module(x, y, 1, o_0=zeros)[0])
    assert (free[0] - forced[0]).abs().max() <= 1e-14 < (free[1] - forced[1]).abs().max()


@each_fused
def test_free_running_goes_on_where_it_was(f, g):
    module, (x, _, _, o_0) = make(f, g), problem("free")
    output, o_n = module(x, o_0=o_0)
    parts = [module(x[:4], o_0=o_0)]
    parts.append(module(x[4:], o_0=parts[0][1]))
    assert (torch.cat([part[0] for part in parts]) - output).abs().max() <= 1e-14
    assert (parts[1][1] - o_n).abs().max() <= 1e-14


def test_windows_of_a_stream():
    module, (x, y, _, _) = make(), problem("free")
    losses = []
    for window in rnn_ext.online.tbptt(lambda x, o=None: module(x, o_0=o), x, 4, targets=y):
        losses.append((window.output - window.targets).square().sum())
        losses[-1].backward()
    assert (sum(losses) - (module(x)[0] - y).square().sum()).abs() <= 1e-12
    assert module.weight_oh.grad.abs().sum() > 0


@each_way
@each_fused
def test_layouts(f, g, way):
    module, (x, y, forced, o_0) = make(f, g), problem(way)
    other = make(f, g, batch_first=True)
    other.load_state_dict(module.state_dict())
    expected, o_n = module(x, y, forced, o_0=o_0)
    mixed = isinstance(forced, torch.Tensor)
    swapped = forced.t() if mixed else forced
    output, last = other(x.transpose(0, 1), y.transpose(0, 1), swapped, o_0=o_0)
    assert output.shape == (4, 9, 2) and last.shape == (4, 2)
    assert (output.transpose(0, 1) - expected).abs().max() <= 1e-14
    for unbatched in (module, other):
        column = forced[:, 1] if mixed else forced
        output, last = unbatched(x[:, 1], y[:, 1], column, o_0=o_0[1])
        assert output.shape == (9, 2) and last.shape == (2,)
        assert (output - expected[:, 1]).abs().max() <= 1e-14
        assert (last - o_n[1]).abs().max() <= 1e-14


def test_scheduled_sampling_draws_for_each_step_and_sequence():
    module = make("relu", sizes=(1, 2, 1))
    with torch.no_grad():
        for weight in module.parameters():
            weight.zero_()
        module.weight_oh.fill_(1), module.weight_ho.fill_(0.5)  # o_t = what was fed
    y = torch.arange(1.0, 401).double().view(400, 1, 1).expand(400, 50, 1)
    x = torch.zeros_like(y)
    generator = torch.Generator().manual_seed(5)
    output = module(x, y, 0.3, generator=generator)[0]
    followed = output[1:] == y[:-1]
    assert abs(followed.double().mean() - 0.3) <= 0.01
    assert followed.any(1).all() and not followed.all(1).any()  # sequences differ
    repeated = torch.where(followed, y[:-1], output[:-1])
    assert torch.equal(output[1:], repeated) and (output[0] == 0).all()
    generator.manual_seed(5)
    assert torch.equal(module(x, y, 0.3, generator=generator)[0], output)
    torch.manual_seed(7)
    first = module(x, y, 0.3)[0]
    torch.manual_seed(7)
    assert torch.equal(module(x, y, 0.3)[0], first) and not torch.equal(first, output)


def test_learns_to_oscillate_on_its_own():
    """Teacher forced, then free running: a sine from a constant input."""
    t = torch.arange(1, 61).float()
    y = torch.stack((torch.sin(t / 5), torch.cos(t / 5)), -1)
    x = torch.ones(60, 1)
    module = JordanRNN(1, 24, 2)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    start = {"o_0": torch.tensor([0.0, 1.0])}
    for step in range(300):
        loss = (module(x, y, 1 - step / 600, **start)[0] - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert (module(x, **start)[0] - y).square().mean() < 0.1  # a guess: 0.5


@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 33, 17), (2, 5, 40)])
@each_fused
def test_sizes_and_single_steps(f, g, sizes):
    module = make(f, g, sizes=sizes)
    for steps, batch in ((1, 1), (5, 3), (5, 0)):
        x = random(steps, batch, sizes[0])
        expected = module._composed(x, None, x.new_zeros(batch, sizes[2]), None)
        difference = (module(x)[0] - expected).abs()
        assert difference.shape == (steps, batch, sizes[2])
        assert batch == 0 or difference.max() <= 1e-12


@each_fused
def test_copies_and_files(f, g):
    module, x = make(f, g, batch_first=True), random(4, 9, 3)
    expected = module(x)[0]
    assert torch.equal(copy.deepcopy(module)(x)[0], expected)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = make(f, g, batch_first=True)
    assert not torch.equal(other(x)[0], expected)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x)[0], expected)
    assert repr(module).startswith(f"JordanRNN(3, 7, 2, nonlinearity={f!r}")


@each_way
@each_fused
def test_compiles_whole(f, g, way):
    torch._dynamo.reset()
    module, (x, y, forced, o_0) = make(f, g), problem(way, steps=4, batch=2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    output, gradients, _ = run(module, x, y, forced, o_0)
    found = compiled(x, y, forced, o_0=o_0)[0]
    assert (found - output).abs().max() <= 1e-14
    (found * torch.linspace(-1, 1, found.numel()).double().view_as(found)).sum().backward()
    assert (x.grad - gradients[0]).abs().max() <= 1e-6
    assert (module.weight_oh.grad - gradients[4]).abs().max() <= 1e-6


def test_autocast_and_half_precision():
    module, x = JordanRNN(3, 7, 2), torch.randn(9, 4, 3)
    expected = module(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)[0]
    assert output.dtype == torch.bfloat16 and (output - expected).abs().max() <= 0.05
    output = module.bfloat16()(x.bfloat16())[0]
    assert output.dtype == torch.bfloat16 and (output - expected).abs().max() <= 0.05


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((0, 4, 2), ValueError, "input_size must be at least 1, got 0"),
        ((3, 4.0, 2), TypeError, "hidden_size must be an int, got 4.0"),
        ((3, 4, 2, "identity"), ValueError, "nonlinearity must be one of tanh, relu, sigmoid"),
        ((3, 4, 2, "tanh", "gelu"), ValueError, "output_nonlinearity must be one of identity, "),
    ],
)
def test_constructor_errors(arguments, error, message):
    with pytest.raises(error, match=f"JordanRNN: {message}"):
        JordanRNN(*arguments)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m, x, y: m(x[..., :2]), ValueError, r"input must be \[T, B, I\] or .* I = 3"),
        (lambda m, x, y: m(x[:0]), ValueError, "at least one time step"),
        (lambda m, x, y: m(x.float()), TypeError, "input is torch.float32 but the weights are"),
        (lambda m, x, y: m(x.to("meta")), ValueError, "input is on meta but the weights are on"),
        (lambda m, x, y: m([1.0]), TypeError, "input must be a tensor, got list"),
        (lambda m, x, y: m(x, y[:4]), ValueError, r"targets must be \[9, 4, 2\], got \[4, 4, 2\]"),
        (lambda m, x, y: m(x, o_0=y), ValueError, r"o_0 must be \[4, 2\], got \[9, 4, 2\]"),
        (lambda m, x, y: m(x[:, 0], o_0=y[0]), ValueError, r"o_0 must be \[2\], got"),
        (lambda m, x, y: m(x, y, 1.5), ValueError, r"must be in \[0, 1\], got 1.5"),
        (lambda m, x, y: m(x, y, float("nan")), ValueError, r"must be in \[0, 1\], got nan"),
        (lambda m, x, y: m(x, y, True), TypeError, "a number or a bool tensor, got True"),
        (lambda m, x, y: m(x, y, y[..., 0]), ValueError, r"bool \[9, 4\], got torch.float64"),
        (lambda m, x, y: m(x, y, y[:4, :, 0] > 0), ValueError, r"got torch.bool \[4, 4\]"),
        (lambda m, x, y: m(x, None, y[..., 0] > 0), ValueError, "targets are fed; give them"),
    ],
)
def test_errors_say_what_to_do(call, error, message):
    x, y, _, _ = problem("free")
    with pytest.raises(error, match=f"JordanRNN: .*{message}"):
        call(make(), x, y)
