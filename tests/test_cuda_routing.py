"""Which tensors go to the CUDA kernels, and what is said where they cannot; needs no GPU."""

import re

import pytest
import torch
from torch._subclasses import FakeTensorMode

import rnn_ext
from rnn_ext import _C, functional, library
from rnn_ext.backend import _runs_on
from rnn_ext.backend import uncovered as why_uncovered
from rnn_ext.control import Control


def limits(**fields):
    device = _C.CudaDeviceLimits()
    for name, value in fields.items():
        setattr(device, name, value)
    return device


H200 = limits(
    major=9,
    sm_count=132,
    registers_per_sm=65536,
    shared_per_sm=228 << 10,
    shared_per_block=227 << 10,
    shared_reserved=1 << 10,
    threads_per_sm=2048,
    blocks_per_sm=32,
    l2_bytes=50 << 20,
    cluster_size=16,
    cooperative=True,
)


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU, as do the results of operations on it."""

    device = torch.device("cuda:0")
    is_cuda, is_cpu = True, False


def on_cuda(kind, dtype=torch.float32, **options):
    module = getattr(rnn_ext, kind)(5, 7, dtype=dtype, **options)
    for name, parameter in module._parameters.items():
        module._parameters[name] = parameter.detach().as_subclass(OnCuda)
    return module, torch.zeros(3, 2, 5, dtype=dtype).as_subclass(OnCuda)


@pytest.fixture
def built(monkeypatch):
    """As if this were a build with CUDA kernels, on a machine with one H200."""
    monkeypatch.setattr(_C, "cuda_architectures", "8.0;9.0a")
    monkeypatch.setattr(_C, "cuda_unavailable", lambda: "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(_C, "cuda_device_limits", lambda device: H200)


@pytest.fixture
def autocast(monkeypatch):
    """autocast("cuda") to the dtype given, which torch without CUDA would refuse."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)

    def enable(dtype):
        torch.set_autocast_dtype("cuda", dtype)
        torch.set_autocast_enabled("cuda", True)

    before = torch.get_autocast_dtype("cuda")
    yield enable
    torch.set_autocast_dtype("cuda", before)
    torch.set_autocast_enabled("cuda", False)


def uncovered(module, x):
    return why_uncovered(x, [], module._weights())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_four_dtypes_are_covered(built, dtype):
    module, x = on_cuda("LSTM", dtype)
    assert uncovered(module, x) is None
    (step,) = rnn_ext.explain(module, x).steps
    kernel = "cuda-step" if dtype == torch.float64 else "cuda-persistent"
    assert step.kernel == kernel and str(step).startswith(f"{kernel} kernel: ")


def test_explain_tells_the_passes_and_the_backends_apart(built, autocast):
    module, x = on_cuda("LSTM")
    plan = rnn_ext.explain(module, x).steps[0]
    assert "weights in registers" in plan.reason
    with rnn_ext.use_backend("cuda-step"):
        assert rnn_ext.explain(module, x).steps[0].kernel == "cuda-step"
    x64, module64 = x.double(), on_cuda("LSTM", torch.float64)[0]
    with rnn_ext.use_backend("cuda-persistent"):
        assert rnn_ext.explain(module, x).steps[0].kernel == "cuda-persistent"
        refused = rnn_ext.explain(module64, x64).steps[0]
        assert refused.kernel == "none" and "float64" in refused.reason
    autocast(torch.bfloat16)
    assert rnn_ext.explain(module, x).steps[0].kernel == "cuda-persistent"


def test_what_is_not_covered_says_why(built, monkeypatch):
    module, x = on_cuda("LSTM")
    assert uncovered(module, x.half()) == "its tensors have different dtypes"
    assert uncovered(module, torch.empty(3, 2, 5)) == "its tensors are on different devices"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert uncovered(module, x) == (
        "its kernels were compiled for compute capability 8.0, 9.0a, and this GPU has 7.5"
    )
    monkeypatch.setattr(_C, "cuda_architectures", "")
    assert uncovered(module, x) == "this build has no CUDA kernels"
    assert rnn_ext.explain(module, x).steps[0].kernel == "torch.nn"


@pytest.mark.parametrize(
    "architecture, runs_on",
    [
        ("8.0", [(8, 0), (8, 6), (8, 9)]),
        ("9.0a", [(9, 0)]),
        ("10.0f", [(10, 0), (10, 3)]),
        ("8.9+PTX", [(8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]),
        ("12.0a+PTX", [(12, 0)]),
    ],
)
def test_architectures(architecture, runs_on):
    cards = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
    assert [card for card in cards if _runs_on(architecture, card)] == runs_on


def test_backends_say_what_is_missing(built, monkeypatch):
    known = rnn_ext.backends()
    assert known["cuda-step"]["available"] and "8.0, 9.0a" in known["cuda-step"]["reason"]
    monkeypatch.setattr(torch.version, "cuda", None)
    without = "has no CUDA"
    monkeypatch.setattr(_C, "cuda_unavailable", lambda: "no NVIDIA driver is installed")
    for reason in ("no NVIDIA driver is installed", without):
        for name in ("cuda-step", "cuda-persistent"):
            entry = rnn_ext.backends()[name]
            assert not entry["available"] and reason in entry["reason"]
        with pytest.raises(RuntimeError, match=f"'cuda-step' is not available: .*{reason}"):
            with rnn_ext.use_backend("cuda-step"):
                pass
        monkeypatch.setattr(_C, "cuda_unavailable", lambda: "")


def test_this_build_says_what_it_has():
    assert bool(_C.cuda_architectures) == (
        _C.cuda_unavailable() != "this build has no CUDA kernels"
    )
    assert all(
        re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", a) for a in _C.cuda_architectures.split(";") if a
    )


def test_a_forced_backend_refuses_the_other_device(built):
    module, x = on_cuda("LSTM")
    with rnn_ext.use_backend("cpu"):
        assert uncovered(module, x) == "its input is on cuda:0"
        with pytest.raises(
            RuntimeError, match="LSTM: the backend 'cpu' cannot run this: its input"
        ):
            module(x)
        assert rnn_ext.explain(module, x).steps[0].kernel == "none"
    with rnn_ext.use_backend("cuda-step"):
        assert uncovered(module, x) is None
        on_cpu = rnn_ext.LSTM(5, 7)
        for run in (on_cpu, lambda x: functional.lstm(x, None, *on_cpu._weights()[0][:4])):
            with pytest.raises(RuntimeError, match="backend 'cuda-step' cannot run this"):
                run(torch.randn(3, 2, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_autocast_casts_everything(built, autocast, kind, dtype, monkeypatch):
    seen = []

    def layer(cell, x, h0, c0, *weights, **options):
        assert not torch.is_autocast_enabled("cuda")
        seen.extend(t.dtype for t in (x, h0, c0, *weights) if t is not None)
        c_n = None if c0 is None else c0.clone()
        return x.new_empty(*x.shape[:2], h0.size(1)), h0.clone(), c_n, None

    monkeypatch.setattr(functional.ops, "layer", layer)
    module, x = on_cuda(kind)
    autocast(dtype)
    result = module(x[0] if kind.endswith("Cell") else x)
    flat = torch.utils._pytree.tree_leaves(result)
    assert set(seen) == {dtype} == {t.dtype for t in flat}


@pytest.mark.parametrize("other", [torch.float64, torch.int32])
def test_autocast_leaves_other_dtypes_alone(built, autocast, other):
    module, x = on_cuda("LSTM")
    autocast(torch.float16)
    assert uncovered(module, x) is None and uncovered(module, x.bfloat16()) is None
    if other == torch.float64:
        assert uncovered(module, x.double()) == "its tensors have different dtypes"
    autocast(torch.float64)
    assert uncovered(module, x) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru", "gru_reset_before"])
def test_fake_kernels_know_what_is_saved_on_cuda(cell, dtype):
    gates, lstm = {"lstm": 4, "rnn_tanh": 1}.get(cell, 3), cell == "lstm"
    with FakeTensorMode():

        def empty(*shape):
            return torch.empty(shape, device="cuda:0", dtype=dtype)

        weights = [empty(gates * 7, 5), empty(gates * 7, 7), None, None, None]
        c0 = empty(2, 7) if lstm else None
        tensors = [empty(2, 7), c0, *weights]
        results = torch.ops.rnn_ext.layer_forward(cell, empty(3, 2, 5), tensors, None, False)
    output, h_n, c_n, cells, states, wide_cells, kept, middle = results
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert output.shape == (3, 2, 7) and h_n.shape == (2, 7) and states.numel() == 0
    assert (wide_cells.numel() > 0) == (lstm and wide != dtype)
    assert wide_cells.dtype == (wide if wide_cells.numel() else dtype)
    assert kept.numel() == (6 * gates * 7 if gates > 1 else 0) and kept.dtype == dtype
    assert middle.numel() == (6 * 7 if gates == 3 else 0) and middle.dtype == dtype
    assert {t.dtype for t in (output, h_n, c_n, cells)} == {dtype}
    assert library._on_cuda(output)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_a_state_that_resets_restore_goes_to_the_kernels(built, kind, monkeypatch):
    """Below h0 and c0, where the kernels look for it."""
    seen = []

    def layer(cell, x, h0, c0, *weights, resets, **options):
        seen.extend((resets, h0, c0) if kind == "LSTM" else (resets, h0))
        c_n = None if c0 is None else c0[:2].clone()
        return x.new_empty(*x.shape[:2], h0.size(1)), h0[:2].clone(), c_n, None

    monkeypatch.setattr(functional.ops, "layer", layer)
    module, x = on_cuda(kind)
    initial = torch.ones(1, 2, 7).as_subclass(OnCuda)
    resets = torch.ones(3, 2, dtype=torch.bool).as_subclass(OnCuda)
    pair = (initial, initial) if kind == "LSTM" else initial
    module(x, resets=resets, initial_state=pair)
    assert torch.equal(seen[0], resets)
    for state in seen[1:]:
        assert state.shape == (4, 7) and not state[:2].any() and (state[2:] == 1).all()


def test_gradients_that_are_clipped_have_kernels(built):
    module, x = on_cuda("LSTM")
    for clip, backward in ((("value", 1.0), ""), (("norm", 1.0), "the norm of dL/dh_t is a sum")):
        module._control = Control(clip=clip)
        (step,) = rnn_ext.explain(module, x).steps
        assert step.kernel == "cuda-persistent" and backward in step.reason
        assert ("; backward step: " in step.reason) == bool(backward)
        with torch.no_grad():
            assert "; backward" not in rnn_ext.explain(module, x).steps[0].reason


def test_how_much_is_computed_again_on_cuda():
    x = torch.zeros(0).as_subclass(OnCuda)
    assert Control().stretch(256, 100, 3, False, x) is None
    assert Control(checkpoint_every=7).stretch(256, 100, 3, False, x) == 7
    assert Control(checkpoint_every=700).stretch(256, 100, 3, False, x) == 100
    assert Control(save="states").stretch(256, 100, 3, False, x) == 100
    assert Control(save="states").stretch(1 << 14, 1000, 128, False, x) == 16


def test_normalised_layers_run_step_by_step(built):
    module, x = on_cuda("LSTM", layer_norm=True, peephole=True)
    (step,) = rnn_ext.explain(module, x).steps
    assert str(step) == "cuda-step kernel: step-wise: a row is normalised as a whole"
    with rnn_ext.use_backend("cuda-persistent"):
        (refused,) = rnn_ext.explain(module, x).steps
        assert refused.kernel == "none" and "step-wise kernels alone" in refused.reason
        with pytest.raises(RuntimeError, match=r"LSTM.*'cuda-persistent' cannot run this"):
            module(x)


def test_normalised_layers_under_control_and_with_zoneout(built):
    for options in ({"grad_clip": 1.0, "checkpoint_every": 2}, {"zoneout": 0.5}):
        module, x = on_cuda("LSTM", layer_norm=True, **options)
        assert rnn_ext.explain(module, x).steps[0].kernel == "cuda-step"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fake_kernels_know_what_normalised_layers_save_on_cuda(dtype):
    with FakeTensorMode():

        def empty(*shape):
            return torch.empty(shape, device="cuda:0", dtype=dtype)

        tensors = [empty(2, 7), empty(2, 7), empty(28, 5), empty(28, 7), None, None, None]
        tensors += [empty(28), empty(28), empty(7), None, None]
        results = torch.ops.rnn_ext.normalized_forward("lstm", empty(3, 2, 5), tensors, None, False)
    output, h_n, c_n, cells, states, wide_cells, records = results
    assert output.shape == cells.shape == (3, 2, 7) and h_n.shape == c_n.shape == (2, 7)
    assert states.numel() == 0 and (wide_cells.numel() > 0) == (dtype != torch.float32)
    assert records.shape == (6, 3 * 28 + 4) and records.dtype == torch.float32


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_zoneout_runs_step_by_step(built, kind, monkeypatch):
    seen = []

    def layer(cell, x, h0, c0, *weights, zoneout, **options):
        seen.append(zoneout)
        c_n = None if c0 is None else c0.clone()
        return x.new_empty(*x.shape[:2], h0.size(1)), h0.clone(), c_n, None

    monkeypatch.setattr(functional.ops, "layer", layer)
    module, x = on_cuda(kind)
    module.zoneout = 0.5
    module.eval()
    (step,) = rnn_ext.explain(module, x).steps
    assert str(step) == "cuda-step kernel: zoneout is in the step-wise kernels alone"
    with rnn_ext.use_backend("cuda-persistent"):
        (refused,) = rnn_ext.explain(module, x).steps
        assert refused.kernel == "none" and "step-wise kernels alone" in refused.reason
    module(x)
    ((of_h, of_c),) = seen
    assert of_h.is_cpu and of_h.item() == 0.5 and (of_c is of_h) == (kind == "LSTM")
