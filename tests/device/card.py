"""The GPU that the tests of this folder need, and one layer on it beside torch's.

RNN_EXT_TEST_DEVICE=cpu runs the same tests with the CPU's kernels, to check the tests themselves.
"""

import os

import pytest
import torch
from cases import GATES, NAMES, RESULTS, Case, run, run_reference

import rnn_ext
from rnn_ext import composite, functional

DEVICE = torch.device(os.environ.get("RNN_EXT_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
BACKENDS = ("cuda-step", "cuda-persistent", "auto") if ON_GPU else ("cpu", "auto")
DTYPES = (torch.float32, torch.float64, torch.bfloat16) + (torch.float16,) * ON_GPU
# What the persistent kernels do not cover, and why.
NOT_PERSISTENT = {
    "lstm_projected": "it needs two products a step",
    torch.float64: "there are no tensor cores for it",
}
# Where the plan must find room for every other shape of these tests: H100, H200, B200.
LARGE = (9, 0), 100  # at least this compute capability and so many multiprocessors
# float on tensor cores is two TF32 numbers, and what a product leaves out is up to 2^-20 of it.
SPLIT_PRODUCT = 2.0**-20


def obstacle():
    """Why nothing here can run, or None."""
    if not ON_GPU:
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    entry = rnn_ext.backends()["cuda-step"]
    return None if entry["available"] else entry["reason"]


def require_device():
    """Skips the module that calls it, as a whole, where nothing here can run."""
    if reason := obstacle():
        pytest.skip(reason, allow_module_level=True)


each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def skip_uncovered(backend, cell, dtype=torch.float32):
    """Skips what a backend is not made for."""
    if backend == "cuda-persistent":
        for what in (cell, dtype):
            if what in NOT_PERSISTENT:
                pytest.skip(NOT_PERSISTENT[what])


def skip_too_large(backend, case, dtype):
    """Skips what the plan refuses on a GPU that is smaller than those of ``LARGE``."""
    if backend != "cuda-persistent":
        return
    card = torch.cuda.get_device_properties(DEVICE)
    if (card.major, card.minor) >= LARGE[0] and card.multi_processor_count >= LARGE[1]:
        return
    kind = {"lstm": "LSTM", "gru": "GRU", "gru_reset_before": "GRU"}.get(case.cell, "RNN")
    options = {"device": DEVICE, "dtype": dtype}
    if case.cell == "gru_reset_before":
        options["reset_after"] = False
    rows, hidden = case.tensors[3].shape[0], case.tensors[4].shape[1]
    assert rows == GATES.get(case.cell, 1) * hidden
    module = getattr(rnn_ext, kind)(case.tensors[0].size(-1), hidden, **options)
    x = case.tensors[0].to(DEVICE, dtype)
    if case.batch_sizes is not None:
        x = torch.nn.utils.rnn.PackedSequence(x, case.batch_sizes)
    with rnn_ext.use_backend(backend):
        (step,) = rnn_ext.explain(module, x).steps
    if step.kernel == "none":
        pytest.skip(step.reason)


def least_error(backend, dtype):
    """An error, relative to the largest number, that a backend may have where torch's is less."""
    if dtype == torch.float32 and backend in ("cuda-persistent", "auto") and ON_GPU:
        return SPLIT_PRODUCT
    return 0.0


@pytest.fixture(autouse=True)
def no_tf32():
    """Products of float are products of float, until a test says otherwise."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, value in zip(switches, before):
        switch.allow_tf32 = value


def moved(case, dtype):
    """``case`` in ``dtype`` on the device; batch sizes stay where torch wants them."""

    def move(tensors):
        return [None if t is None else t.to(DEVICE, dtype) for t in tensors]

    upstream = move(case.upstream)
    return Case(case.cell, move(case.tensors), case.batch_sizes, case.reverse, upstream)


def layer(cell, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse):
    """`rnn_ext.functional` with the signature and results of `rnn_ext.ops.layer`."""
    weights, options = (w_ih, w_hh, b_ih, b_hh), {"batch_sizes": batch_sizes, "reverse": reverse}
    if cell == "lstm":
        output, (h_n, c_n), cells = functional.lstm(
            x, (h0, c0), *weights, w_hr, return_cells=True, **options
        )
        return output, h_n, c_n, cells
    if cell.startswith("gru"):
        return *functional.gru(x, h0, *weights, reset_after=cell == "gru", **options), None, None
    return *functional.rnn(x, h0, *weights, nonlinearity=cell[4:], **options), None, None


def run_ours(case, backend):
    """Results and gradients by name."""
    with rnn_ext.use_backend(backend):
        return run(_keywords(layer), case)


def run_floor(case):
    """The same by torch: cuDNN where it has the cell, else torch operations in the same dtype."""
    kinds = {"rnn_tanh": "RNN", "rnn_relu": "RNN", "lstm": "LSTM", "gru": "GRU"}
    if case.cell not in kinds or case.reverse or case.tensors[7] is not None:
        return run(composite.layer, case)
    composed, composed_gradients = run(composite.layer, case)
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in case.tensors]
    x, h0, c0, *weights = leaves
    options = {"nonlinearity": case.cell[4:]} if case.cell.startswith("rnn") else {}
    hidden = weights[0].size(0) // GATES.get(case.cell, 1)
    module = getattr(torch.nn, kinds[case.cell])(
        x.size(-1), hidden, bias=weights[2] is not None, device=DEVICE, dtype=x.dtype, **options
    )
    given = [w for w in weights if w is not None]
    with torch.no_grad():
        for parameter, w in zip(module.parameters(), given, strict=True):
            parameter.copy_(w)
    state = h0[None] if c0 is None else (h0[None], c0[None])
    if case.batch_sizes is not None:
        x = torch.nn.utils.rnn.PackedSequence(x, case.batch_sizes)
    output, state = module(x, state)
    output = output if case.batch_sizes is None else output.data
    results = [output, *(s[0] for s in (state if c0 is not None else (state,)))]
    torch.autograd.backward(results, case.upstream[: len(results)])
    sources = [leaves[0], h0, c0, *module.parameters()]
    names = [n for n, t in zip(NAMES, leaves) if t is not None]
    gradients = {n: t.grad for n, t in zip(names, (s for s in sources if s is not None))}
    results = {n: r.detach() for n, r in zip(RESULTS, results)}
    if case.cell == "lstm":  # cuDNN gives neither the cells nor their gradient's share
        return composed | results, composed_gradients
    return results, gradients


def run_truth(case):
    """The NumPy reference in float64, on the CPU."""
    return run_reference(case)


def on_cpu(results):
    return {name: tensor.cpu() for name, tensor in results.items()}


def _keywords(function):
    def call(cell, *tensors, batch_sizes, reverse):
        return function(cell, *tensors, batch_sizes, reverse)

    return call
