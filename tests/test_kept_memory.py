"""The memory of results is kept when they are dropped, and serves the next call: what has been
handed out stays what it was, what is kept is bounded, and torch's tools see it."""

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import rnn_ext

STEPS, BATCH, HIDDEN = 32, 8, 64  # an output of 64 KiB


@pytest.fixture
def layer():
    return rnn_ext.LSTM(16, HIDDEN)


@pytest.fixture
def x():
    return torch.randn(STEPS, BATCH, 16)


def test_a_result_that_is_held_is_never_handed_out_again(layer, x):
    held = [layer(x * scale)[0].detach() for scale in range(8)]
    copies = [result.clone() for result in held]
    for _ in range(8):
        layer(torch.randn_like(x))[0].sum().backward()
    assert len({result.data_ptr() for result in held}) == len(held)
    assert all(torch.equal(*pair) for pair in zip(held, copies, strict=True))


def test_a_view_of_a_result_holds_it(layer, x):
    last = layer(x)[0].detach()[-1]
    copy = last.clone()
    for _ in range(4):
        layer(torch.randn_like(x))
    assert torch.equal(last, copy)


def test_a_result_that_is_dropped_serves_the_next_call(layer, x):
    with torch.no_grad():
        places = set()
        for _ in range(10):
            places.add(layer(x)[0].data_ptr())
    assert len(places) == 1


def test_what_a_call_finds_in_kept_memory_does_not_matter(layer, x):
    def results():
        layer.zero_grad()
        y, state = layer(x)
        y.square().sum().backward()
        return [y.detach().clone(), *state, *(p.grad.clone() for p in layer.parameters())]

    before = results()
    with torch.no_grad():
        layer(torch.full_like(x, torch.nan))  # its result, all NaN, is dropped and kept
    assert all(torch.equal(*pair) for pair in zip(before, results(), strict=True))


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"layer_norm": True}, {"weight_dropout": 0.5}], ids=str)
def test_every_value_of_a_result_is_written(dtype, options):
    layer = rnn_ext.LSTM(16, HIDDEN, num_layers=2, dtype=dtype, **options)
    x = torch.randn(STEPS, BATCH, 16, dtype=dtype, requires_grad=True)
    for _ in range(2):  # in new memory, then in kept memory
        y, _ = layer(x)
        y.square().sum().backward()
        assert y.isfinite().all()
        assert x.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_results_of_many_threads_at_once(layer):
    inputs = [torch.randn(8 + 4 * i, BATCH, 16) for i in range(8)]
    with torch.no_grad():
        expected = [layer(x)[0].clone() for x in inputs]

        def repeated(i):
            return all(torch.equal(layer(inputs[i])[0], expected[i]) for _ in range(50))

        def in_a_thread(i):
            with torch.no_grad():
                return repeated(i)

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(in_a_thread, range(8)))


def test_a_tensor_dropped_by_another_thread(layer, x):
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        expected = layer(x)[0].clone()
        for _ in range(20):
            held = [layer(x)[0]]
            pool.submit(held.clear).result()
            assert torch.equal(layer(x)[0], expected)


def test_storage_can_be_resized(layer, x):
    with torch.no_grad():
        y = layer(x)[0]
    copy = y.clone()
    y.resize_(2 * STEPS, BATCH, HIDDEN)
    assert torch.equal(y[:STEPS], copy)


def test_the_profiler_sees_the_memory(layer, x):
    with (
        torch.no_grad(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
    ):
        y = layer(x)[0]
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert allocated >= y.nbytes


def test_what_is_kept_is_bounded():
    program = textwrap.dedent(
        """
        import ctypes
        import torch, rnn_ext

        def resident():
            ctypes.CDLL(None).malloc_trim(0)
            with open("/proc/self/statm") as f:
                return int(f.read().split()[1]) * 4096 / 2**20

        layer = rnn_ext.RNN(8, 512)
        with torch.no_grad():
            layer(torch.randn(512, 1, 8))
            before = resident()
            outputs = [layer(torch.randn(256 + steps, 8, 8))[0] for steps in range(100)]
            held = resident()
            del outputs
        print(held - before, resident() - before)
        """
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    held, kept = map(float, printed.split())
    assert held > 400  # MiB: what the outputs take
    assert kept < 64 + 40  # what is kept, and the team's own working memory
