"""Modules on a GPU as users have them: the same calls as torch.nn's, streams, graphs, autocast."""

import pytest
import torch
from card import (
    DEVICE,
    ON_GPU,
    each_backend,
    no_tf32,  # noqa: F401, a fixture of every test
    require_device,
    skip_uncovered,
)
from torch.nn.utils.rnn import pack_padded_sequence
from torch.profiler import ProfilerActivity, profile
from twins import tensors

import rnn_ext
from rnn_ext import random
from rnn_ext.reference.random import keep

require_device()
on_gpu_only = pytest.mark.skipif(not ON_GPU, reason="is about CUDA")
LAYERS = ("RNN", "LSTM", "GRU")
CONFIGURATIONS = {
    "plain": {},
    "stacked": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "batch_first": {"batch_first": True, "num_layers": 2, "bidirectional": True},
    "without_bias": {"bias": False, "bidirectional": True},
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def pair(name, *args, device=DEVICE, dtype=torch.float32, **options):
    """(ours, torch.nn's) with the same weights."""
    modules = []
    for library in (rnn_ext, torch.nn):
        torch.manual_seed(0)
        modules.append(getattr(library, name)(*args, device=device, dtype=dtype, **options))
    return modules


def gradients(module, results, *inputs):
    torch.manual_seed(1)
    outputs = [r for r in tensors(results) if r.requires_grad]
    upstream = [torch.randn(r.shape).to(r) for r in outputs]
    return torch.autograd.grad(outputs, [*module.parameters(), *inputs], upstream)


def close(ours, theirs, tolerance=2e-4):
    ours, theirs = tensors(ours), tensors(theirs)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.device == b.device
        scale = b.abs().max().item()
        assert ((a - b).abs().max() <= tolerance * max(scale, 1)).item()


@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@each_layer
@each_backend
def test_a_module_computes_what_torch_nn_computes(backend, name, options):
    skip_uncovered(backend, name)
    ours, theirs = pair(name, 12, 40, **options)
    x = torch.randn(9, 7, 12, device=DEVICE, requires_grad=True)
    with rnn_ext.use_backend(backend):
        mine = ours(x)
        my_gradients = gradients(ours, mine, x)
    expected = theirs(x)
    close(mine, expected)
    close(my_gradients, gradients(theirs, expected, x))


@each_layer
@each_backend
def test_packed_sequences(backend, name):
    skip_uncovered(backend, name)
    ours, theirs = pair(name, 6, 24, num_layers=2, bidirectional=True)
    x = torch.randn(8, 5, 6, device=DEVICE, requires_grad=True)

    def packed():
        return pack_padded_sequence(x, torch.tensor([3, 8, 1, 8, 5]), enforce_sorted=False)

    with rnn_ext.use_backend(backend):
        mine = ours(packed())
        my_gradients = gradients(ours, mine, x)
    expected = theirs(packed())
    close(mine, expected)
    close(my_gradients, gradients(theirs, expected, x))


def states(module, batch):
    """A state for each layer and direction, as the module takes it."""
    shape = module.num_layers * (2 if module.bidirectional else 1), batch, module.hidden_size
    made = [torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(2)]
    return tuple(made) if module.mode == "LSTM" else made[0]


def both_ways(backend, module, x, hx, **options):
    """[(results, gradients)] of the kernels and of torch operations."""
    found = []
    for way in (backend, "reference"):
        with rnn_ext.use_backend(way):
            results = module(x, hx, **options)
            leaves = x, *tensors(hx), *tensors(options.get("initial_state"))
            found.append((results, gradients(module, results, *leaves)))
    return found


@pytest.mark.parametrize("restored", [False, True], ids=["zeros", "initial_state"])
@each_layer
@each_backend
def test_resets(backend, name, restored):
    skip_uncovered(backend, name)
    ours, _ = pair(name, 6, 40, num_layers=2, bidirectional=True)
    x = torch.randn(9, 7, 6, device=DEVICE, requires_grad=True)
    resets = torch.rand(9, 7, device=DEVICE) < 0.3
    initial = states(ours, 7) if restored else None
    mine, expected = both_ways(
        backend, ours, x, states(ours, 7), resets=resets, initial_state=initial
    )
    close(mine[0], expected[0])
    close(mine[1], expected[1])


CONTROLS = {
    "value": {"grad_clip": 0.05},
    "norm": {"grad_clip": ("norm", 0.1)},
    "checkpoints": {"checkpoint_every": 4},
    "states": {"save": "states"},
}


@pytest.mark.parametrize("options", CONTROLS.values(), ids=CONTROLS)
@each_layer
@each_backend
def test_controlled_training(backend, name, options):
    skip_uncovered(backend, name)
    ours = getattr(rnn_ext, name)(6, 40, 2, bidirectional=True, device=DEVICE, **options)
    x = torch.randn(9, 7, 6, device=DEVICE, requires_grad=True)
    mine, expected = both_ways(backend, ours, x, states(ours, 7))
    close(mine[0], expected[0])
    close(mine[1], expected[1])


NORMALIZED = [
    ("RNN", {"layer_norm": True}),
    ("LSTM", {"layer_norm": True}),
    ("LSTM", {"layer_norm": True, "peephole": True}),
    ("LSTM", {"peephole": True}),
    ("GRU", {"layer_norm": True}),
    ("GRU", {"layer_norm": True, "reset_after": False}),
]


@pytest.mark.parametrize("name, options", NORMALIZED, ids=str)
def test_layer_normalisation_and_peepholes(name, options):
    ours = getattr(rnn_ext, name)(6, 300, 2, bidirectional=True, device=DEVICE, **options)
    x = torch.randn(9, 7, 6, device=DEVICE, requires_grad=True)
    resets = torch.rand(9, 7, device=DEVICE) < 0.3
    given = {"resets": resets, "initial_state": states(ours, 7)}
    mine, expected = both_ways("auto", ours, x, states(ours, 7), **given)
    close(mine[0], expected[0])
    close(mine[1], expected[1], 1e-3)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    again = compiled(x)
    close(again, ours(x))
    close(gradients(ours, again), gradients(ours, ours(x)))


HELD = [
    ("RNN", {}),
    ("LSTM", {}),
    ("LSTM", {"proj_size": 20}),
    ("GRU", {}),
    ("GRU", {"reset_after": False}),
]


@pytest.mark.parametrize("training", [True, False], ids=["masks", "share"])
@pytest.mark.parametrize("name, options", HELD, ids=str)
def test_zoneout_and_the_masks_of_dropouts(name, options, training):
    dropped = {"zoneout": 0.3, "weight_dropout": 0.2, "variational_dropout": 0.1}
    ours = getattr(rnn_ext, name)(6, 40, 2, bidirectional=True, device=DEVICE, **options, **dropped)
    ours.train(training)
    x = torch.randn(9, 7, 6, device=DEVICE, requires_grad=True)
    with rnn_ext.use_backend("reference"):
        torch.manual_seed(5)
        results = ours(x)
        expected = results, gradients(ours, results, x)
    for call in (ours, torch.compile(ours, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(5)
        results = call(x)
        close(results, expected[0])
        close(gradients(ours, results, x), expected[1])


def test_masks_are_those_of_numpy():
    steps, rows = torch.tensor([0, 1, 5, 2**31]), torch.tensor([3, 0, 2**32 - 1, 7])
    kept = keep(2**40 + 7, 9, steps, rows, 63, 0.3)
    for dtype in (torch.bool, torch.float32, torch.float64, torch.bfloat16, torch.float16):
        like = torch.empty(0, dtype=dtype, device=DEVICE)
        mask = random.mask(torch.tensor(2**40 + 7), 9, steps, rows, 63, 0.3, 2.0, like)
        assert mask.dtype == dtype and mask.device.type == like.device.type
        values = kept if dtype == torch.bool else 2.0 * kept
        assert torch.equal(mask.cpu().double(), torch.from_numpy(values).double())


@each_layer
@each_backend
def test_gradient_flow(backend, name):
    skip_uncovered(backend, name)
    ours, _ = pair(name, 6, 150, num_layers=2, bidirectional=True)
    x, upstream = torch.randn(9, 7, 6, device=DEVICE), torch.randn(9, 7, 300, device=DEVICE)
    found = []
    for way in (backend, "reference"):
        with rnn_ext.use_backend(way):
            found.append(rnn_ext.gradient_flow(ours, x, upstream=upstream).per_sample)
    close(*found)


each_half = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"]
)


@each_half
@each_layer
@each_backend
@on_gpu_only
def test_autocast(backend, name, dtype):
    ours, theirs = pair(name, 16, 64)
    x = torch.randn(6, 9, 16, device=DEVICE)
    with torch.autocast("cuda", dtype):
        with rnn_ext.use_backend(backend):
            mine = ours(x)
        expected = theirs(x)
    close(mine, expected, 0.02 if dtype == torch.bfloat16 else 0.003)
    close(gradients(ours, mine), gradients(theirs, expected), 0.05)


@pytest.mark.filterwarnings("ignore")  # the profiler's own
@each_half
@each_layer
@each_backend
@on_gpu_only
def test_explain_names_the_kernel_that_runs(backend, name, dtype):
    ours, _ = pair(name, 16, 64, dtype=dtype)
    x = torch.randn(6, 9, 16, device=DEVICE, dtype=dtype)
    with rnn_ext.use_backend(backend):
        (step,) = rnn_ext.explain(ours, x).steps
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            ours(x)[0].sum().backward()
            torch.cuda.synchronize()
    ran = {event.key for event in record.key_averages()}
    persistent = any("persistent_forward_kernel" in key for key in ran)
    step_wise = any("::forward_kernel" in key for key in ran)
    assert step.reason and step.kernel in ("cuda-step", "cuda-persistent")
    assert step.kernel == backend or backend == "auto"
    assert (step.kernel == "cuda-persistent", step.kernel == "cuda-step") == (persistent, step_wise)


@each_layer
@each_backend
@on_gpu_only
def test_a_stream_of_its_own(backend, name):
    skip_uncovered(backend, name)
    ours, _ = pair(name, 16, 64)
    x = torch.randn(30, 8, 16, device=DEVICE)
    big = torch.randn(4096, 4096, device=DEVICE)
    stream = torch.cuda.Stream()
    with rnn_ext.use_backend(backend):
        expected = ours(x)[0]
        late = torch.zeros_like(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(20):  # the input is there only when these are done
                big = big @ big / 4096
            late.copy_(x)
            result = ours(late)[0]
        stream.synchronize()
    assert torch.equal(result, expected)


@each_layer
@each_backend
@on_gpu_only
def test_the_second_gpu(backend, name):
    skip_uncovered(backend, name)
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    ours, _ = pair(name, 16, 64)
    x = torch.randn(5, 8, 16, device=DEVICE)
    with rnn_ext.use_backend(backend):
        expected = ours(x)[0]
        there = ours.to("cuda:1")(x.to("cuda:1"))[0]
    assert torch.cuda.current_device() == 0 and there.device.index == 1
    assert torch.equal(there.cpu(), expected.cpu())


@each_layer
@each_backend
@on_gpu_only
def test_cuda_graphs(backend, name):
    skip_uncovered(backend, name)
    ours, _ = pair(name, 16, 64)
    inputs = [torch.randn(10, 8, 16, device=DEVICE) for _ in range(3)]
    x = inputs[0].clone().requires_grad_()

    def step():
        output = ours(x)[0]
        return output, *torch.autograd.grad(output.square().sum(), [x, *ours.parameters()])

    with rnn_ext.use_backend(backend):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for values in inputs:
            with torch.no_grad():
                x.copy_(values)
            graph.replay()
            replayed = [t.clone() for t in captured]
            for a, b in zip(replayed, step(), strict=True):
                assert torch.equal(a, b)


@each_layer
@each_backend
def test_two_backward_passes_and_unusual_strides(backend, name):
    skip_uncovered(backend, name)
    ours, theirs = pair(name, 12, 40)
    x = torch.randn(7, 5, 24, device=DEVICE)[..., ::2].transpose(0, 1).requires_grad_()
    with rnn_ext.use_backend(backend):
        mine = ours(x)
        first = torch.autograd.grad(mine[0].sum(), [x, *ours.parameters()], retain_graph=True)
        second = torch.autograd.grad(mine[0].sum(), [x, *ours.parameters()])
    expected = theirs(x)[0]
    close(first, torch.autograd.grad(expected.sum(), [x, *theirs.parameters()]))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore::rnn_ext.FallbackWarning")
@each_layer
@each_backend
def test_second_derivatives(backend, name):
    skip_uncovered(backend, name, torch.float64)
    ours, _ = pair(name, 3, 4, dtype=torch.float64)
    x = torch.randn(3, 2, 3, device=DEVICE, dtype=torch.float64, requires_grad=True)
    with rnn_ext.use_backend(backend):
        assert torch.autograd.gradgradcheck(lambda x: ours(x)[0], (x,))


@each_layer
@on_gpu_only
def test_a_training_step_compiles(name):
    ours, theirs = pair(name, 16, 64)
    x = torch.randn(6, 9, 16, device=DEVICE)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    mine, expected = compiled(x), theirs(x)
    close(mine, expected)
    close(gradients(ours, mine), gradients(theirs, expected))


@on_gpu_only
def test_tensors_on_two_devices_are_refused():
    ours, _ = pair("GRU", 4, 8)
    with pytest.raises(RuntimeError, match="not at the same device"):
        ours(torch.randn(3, 2, 4))
