"""One row: ours beside torch.nn (cuDNN) and FlashRNN, right first, then timed in turns."""

import contextlib
import statistics
import time

import torch

import rnn_ext

from ..gate import FACTOR, Wrong, error

OURS, CUDNN, FLASHRNN = "rnn_ext", "torch.nn", "flashrnn"
DEVICE = "cuda"
LEAST_ROUNDS, BLOCK = 5, 2e-3  # a block of calls lasts at least so many seconds
GATED = (32, 16)  # most rows and steps of the check


@contextlib.contextmanager
def tf32(allowed):
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = allowed
    try:
        yield
    finally:
        for switch, value in zip(switches, before):
            switch.allow_tf32 = value


def torch_dtype(case):
    return torch.float32 if case.dtype in ("tf32", "float32") else getattr(torch, case.dtype)


def make_module(library, case, dtype):
    torch.manual_seed(0)
    kind = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}[case.cell]
    module = getattr(library, kind)(case.inputs, case.hidden, device=DEVICE, dtype=torch.float32)
    return module.to(dtype)


def make_call(module, x, training, upstream=None):
    """One step of what is timed; returns a list of the tensors that are compared."""
    if not training:

        def infer():
            with torch.no_grad():
                return [module(x)[0]]

        return infer
    leaf = x.detach().requires_grad_()
    leaves = [leaf, *module.parameters()]
    if upstream is None:
        upstream = torch.randn(*x.shape[:2], module.hidden_size, device=DEVICE).to(x.dtype)

    def train():
        output = module(leaf)[0]
        return [output, *torch.autograd.grad(output, leaves, upstream)]

    return train


def check(case):
    """Largest errors of ours and of torch.nn on a part of the case; raises Wrong."""
    batch, steps = min(case.batch, GATED[0]), min(case.steps, GATED[1])
    dtype, training = torch_dtype(case), case.mode == "training"
    torch.manual_seed(1)
    x = torch.randn(steps, batch, case.inputs, device=DEVICE).to(dtype)

    upstream = torch.randn(steps, batch, case.hidden, device=DEVICE).to(dtype)

    def results(library, number):
        # The weights of every run are the same numbers, those of the dtype that is checked.
        module = make_module(library, case, dtype).to(number)
        return make_call(module, x.to(number), training, upstream.to(number))()

    truth = results(torch.nn, torch.float64)
    found = [results(library, dtype) for library in (rnn_ext, torch.nn)]
    worst = [0.0, 0.0]
    eps = torch.finfo(dtype).eps if case.dtype != "tf32" else 2.0**-11
    for ours, theirs, right in zip(*found, truth, strict=True):
        errors = error(ours, right), error(theirs, right)
        worst = [max(pair) for pair in zip(worst, errors)]
        if not errors[0] <= FACTOR * max(errors[1], 2 * eps):
            raise Wrong(f"off by {errors[0]:.2g}, torch.nn by {errors[1]:.2g}")
    return worst


def flashrnn_call(case, training):
    """FlashRNN's fused kernel on the same shape; it has no input projection. None without it.

    Only on its own grid, since it is compiled anew, for minutes, for every shape. It has no fused
    GRU.
    """
    function = {"lstm": "lstm", "rnn": "elman"}.get(case.cell)
    if case.group != "flashrnn" or function is None or case.dtype == "tf32":
        return None
    try:
        from flashrnn import flashrnn
    except ImportError:
        return None
    shape, dtype = (case.gates, 1, case.hidden), torch_dtype(case)
    wx = torch.randn(case.batch, case.steps, *shape, device=DEVICE).to(dtype)
    r = (torch.randn(*shape, case.hidden, device=DEVICE) / case.hidden**0.5).to(dtype)
    b = torch.zeros(*shape, device=DEVICE, dtype=dtype)
    leaves = [t.requires_grad_(training) for t in (wx, r, b)]

    def infer():
        with torch.no_grad():
            return run()

    def run():
        return flashrnn(*leaves, function=function, backend="cuda_fused", dtype=case.dtype)[0]

    if not training:
        return infer
    upstream = torch.randn_like(infer())

    def train():
        torch.autograd.grad(run(), leaves, upstream)

    return train


def block(call, count):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / count


def alternate(calls, seconds):
    """Seconds of a call, in each round, a list by name; the calls take turns."""
    counts = {}
    for name, call in calls.items():
        block(call, 2)
        counts[name] = max(1, round(BLOCK / block(call, 2)))
    samples = {name: [] for name in calls}
    start = time.perf_counter()
    while len(samples[OURS]) < LEAST_ROUNDS or time.perf_counter() - start < seconds:
        for name, call in calls.items():
            samples[name].append(block(call, counts[name]))
        if len(samples[OURS]) >= 200:
            break
    return samples


def peak_memory(call):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(case, limits, seconds):
    """The row of a case, a dict; with "wrong" in it ours failed the check and was not timed."""
    training = case.mode == "training"
    row = {"case": case.name, "group": case.group, "in_cudnn_region": case.in_cudnn_region}
    row |= {name: getattr(case, name) for name in ("cell", "mode", "dtype")}
    row |= {name: getattr(case, name) for name in ("batch", "steps", "inputs", "hidden")}
    with tf32(case.dtype == "tf32"):
        try:
            row["errors"] = check(case)
        except Wrong as wrong:
            return row | {"wrong": str(wrong)}
        torch.manual_seed(1)
        x = torch.randn(case.steps, case.batch, case.inputs, device=DEVICE).to(torch_dtype(case))
        modules = {OURS: make_module(rnn_ext, case, x.dtype)}
        modules[CUDNN] = make_module(torch.nn, case, x.dtype)
        modules[CUDNN].flatten_parameters()
        calls = {name: make_call(module, x, training) for name, module in modules.items()}
        try:
            if flash := flashrnn_call(case, training):
                flash()
                calls[FLASHRNN] = flash
        except Exception as reason:  # it compiles for every shape, and refuses many
            row["skipped"] = {FLASHRNN: (str(reason) or repr(reason)).splitlines()[0][:200]}
        row["plan"] = str(rnn_ext.explain(modules[OURS], x).steps[0])
        row["peak_bytes"] = {name: peak_memory(call) for name, call in calls.items()}
        samples = alternate(calls, seconds)
    row["seconds"] = {name: statistics.median(values) for name, values in samples.items()}
    row["spread"] = {
        name: (max(values) - min(values)) / statistics.median(values)
        for name, values in samples.items()
    }
    row["ratios"] = {
        name: statistics.median(b / a for a, b in zip(samples[OURS], values))
        for name, values in samples.items()
        if name != OURS
    }
    row["us_per_step"] = row["seconds"][OURS] / case.steps * 1e6
    row["fraction_of_limit"] = limits.seconds(case) / row["seconds"][OURS]
    return row
