"""Threads that share a module, processes that fork or spawn, shared memory, and ten thousand calls
that leave nothing behind."""

import gc
import os
import pathlib
import subprocess
import sys
import threading

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from twins import CELLS, LAYERS, assert_same, tensors

import rnn_ext

LARGE = {"RNN": 256, "LSTM": 160, "GRU": 192}  # units enough for a team of two threads


def make(name):
    """(module, input) with work enough for a team, but for the cells."""
    torch.manual_seed(0)
    if name in CELLS:
        return getattr(rnn_ext, name)(4, 32), torch.randn(8, 4)
    return getattr(rnn_ext, name)(4, LARGE[name], 2, bidirectional=True), torch.randn(6, 8, 4)


def results_and_gradients(module, x):
    """Everything computed from ``x`` without touching what threads share."""
    x = x.clone().requires_grad_()
    results = tensors(module(x))
    loss = sum((result**2).sum() for result in results)
    return [r.detach() for r in results] + [*torch.autograd.grad(loss, [x, *module.parameters()])]


def results_alone(module, x):
    with torch.no_grad():
        return tensors(module(x))


def in_threads(count, work):
    """Runs ``work(k)`` in ``count`` threads at once; raises what one of them raised."""
    failures, start = [], threading.Barrier(count)

    def body(k):
        start.wait()
        try:
            work(k)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=body, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("compute", [results_alone, results_and_gradients])
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_threads_that_share_a_module(name, compute, threads):
    module, x = make(name)
    inputs = [x * (k + 1) for k in range(3)]
    serial = [compute(module, own) for own in inputs]

    def work(k):
        torch.set_num_threads(threads)
        for _ in range(3):
            for ours, expected in zip(compute(module, inputs[k]), serial[k], strict=True):
                assert torch.equal(ours, expected)

    in_threads(3, work)


def test_threads_in_different_modes():
    module, x = make("LSTM")
    packed = pack_padded_sequence(x, [6, 6, 5, 4, 4, 3, 2, 1])
    double = rnn_ext.GRU(4, 3).double()

    def gradients():
        return results_and_gradients(module, x)

    def reference():
        with rnn_ext.use_backend("reference"):
            return results_and_gradients(double, x[:3].double())

    def inference():
        with torch.inference_mode():
            return tensors(module(x))

    def ragged():
        return tensors(module(packed))

    works = [gradients, reference, inference, ragged]
    serial = [work() for work in works]

    def work(k):
        for _ in range(5):
            assert_same(works[k](), serial[k])

    in_threads(4, work)


@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.parametrize("compute", [results_alone, results_and_gradients])
def test_backward_in_another_thread(compute, threads):
    """The graph of one thread may be walked by another: working memory is each thread's own."""
    module, x = make("LSTM")
    expected = results_and_gradients(module, x)
    leaf = x.clone().requires_grad_()
    results = tensors(module(leaf))
    loss = sum((result**2).sum() for result in results)
    grads = []

    def work(k):
        compute(module, x)
        grads.append(torch.autograd.grad(loss, [leaf, *module.parameters()], retain_graph=True))

    in_threads(3, work)
    for own in grads:
        assert_same(list(own), expected[len(results) :])


PROCESSES = ("fork", "fork_in_a_thread", "loader_fork", "loader_spawn", "shared_memory")


@pytest.mark.parametrize("case", PROCESSES)
def test_processes(case):
    program = pathlib.Path(__file__).with_name("processes.py")
    done = subprocess.run(
        [sys.executable, "-W", "error", program, case], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


def inference(module, x):
    with torch.no_grad():
        module(x)


def training(module, x):
    sum(result.sum() for result in tensors(module(x))).backward()
    module.zero_grad()


def packed_training(module, x):
    training(module, pack_padded_sequence(x, [4, 4, 3, 2, 2, 1, 1, 1]))


def refused(module, x):
    with pytest.raises(RuntimeError):
        module(x[..., :3])


def stopped_in_forward(module, x):
    handle = module.register_forward_hook(stop)
    with pytest.raises(KeyError):
        module(x)
    handle.remove()


def stopped_in_backward(module, x):
    output = tensors(module(x))[0]
    handle = output.register_hook(stop)
    with pytest.raises(KeyError):
        output.sum().backward()
    handle.remove()
    output.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()
    module.zero_grad()


def stop(*_):
    raise KeyError


def belongings():
    """(resident bytes, Python objects, threads, open files) of this process."""
    gc.collect()
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    counts = [len(os.listdir(f"/proc/self/{kind}")) for kind in ("task", "fd")]
    return pages * os.sysconf("SC_PAGE_SIZE"), sys.getallocatedblocks(), *counts


@pytest.mark.parametrize(
    "call, calls",
    [
        (inference, 10_000), (training, 10_000), (packed_training, 2_000), (refused, 2_000),
        (stopped_in_forward, 2_000), (stopped_in_backward, 2_000),
    ],
)  # fmt: skip
def test_many_calls_leave_nothing_behind(call, calls):
    modules = [rnn_ext.LSTM(16, 24, bidirectional=True), rnn_ext.GRU(16, 64)]
    x = torch.randn(4, 8, 16)
    for _ in range(200):
        for module in modules:
            call(module, x)
    before = belongings()
    for k in range(calls):
        call(modules[k % 2], x)
    after = belongings()
    # Every tensor of a call has over a thousand bytes.
    assert after[0] - before[0] < 300 * calls + (1 << 20)
    assert after[1] - before[1] < calls / 10 + 500  # pools fill up slowly
    assert after[2:] == before[2:]
