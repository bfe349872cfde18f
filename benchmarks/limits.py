"""What this CPU can do at most: multiply-adds a second, bytes read a second, and so a time.

limits.c is compiled for this CPU when a measurement starts, into a temporary folder.
"""

import bisect
import ctypes
import math
import os
import shutil
import subprocess
import sysconfig
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .cases import products

SIZES = [2**n for n in range(15, 28, 2)]  # bytes read over and over, by all threads together
ATTEMPT_SECONDS, ATTEMPTS = 0.004, 40  # the best counts: a disturbance only takes away
FAST = 0.7  # of the peak; below it, a matrix product does not use this CPU's instructions well


class NoCompiler(Exception):
    """One sentence on why the limits cannot be measured."""


@dataclass(frozen=True)
class Limits:
    """What ``threads`` threads reach together.

    flops: multiplications and additions a second in registers, by dtype. read: bytes a second, by
    the size of what is read over and over.
    """

    threads: int
    flops: dict
    read: dict

    def bandwidth(self, size):
        """Bytes a second for ``size`` bytes, between the measured sizes by the logarithm."""
        sizes = sorted(self.read)
        k = bisect.bisect(sizes, size)
        if k in (0, len(sizes)):
            return self.read[sizes[max(0, k - 1)]]
        low, high = sizes[k - 1 : k + 1]
        share = math.log(size / low) / math.log(high / low)
        return self.read[low] * (self.read[high] / self.read[low]) ** share

    def seconds(self, case, cell, mode):
        """(seconds, what bounds most of them) that no implementation of the call can beat.

        Each product takes its arithmetic or the reading of its weights, whichever is longer. None
        for a dtype without a measured peak.
        """
        if case.dtype not in self.flops:
            return None
        time_bound = {"arithmetic": 0.0, "weights": 0.0}
        for product in products(case, cell, mode):
            arithmetic = product.flops / self.flops[case.dtype]
            reading = 0.0
            if product.weight_bytes:
                rate = self.bandwidth(product.working_set)
                reading = product.weight_bytes * product.reads / rate
            longer = "weights" if reading > arithmetic else "arithmetic"
            time_bound[longer] += max(arithmetic, reading)
        return sum(time_bound.values()), max(time_bound, key=time_bound.get)

    def to_json(self):
        return asdict(self) | {"read": {str(size): rate for size, rate in self.read.items()}}

    @classmethod
    def from_json(cls, saved):
        read = {int(size): rate for size, rate in saved["read"].items()}
        return cls(saved["threads"], saved["flops"], read)


def blas_name():
    """The library behind torch.mm, as torch was configured."""
    settings = torch.__config__.show()
    for known in ("mkl", "open", "accelerate", "nvpl", "blis", "eigen"):
        if f"BLAS_INFO={known}" in settings:
            return {"mkl": "MKL", "open": "OpenBLAS"}.get(known, known)
    return "torch's BLAS"


def compile_rates():
    """limits.c as a ctypes library. Raises NoCompiler."""
    configured = (sysconfig.get_config_var("CC") or "").split()[:1]
    names = [os.environ.get("CC"), *configured, "cc", "gcc", "clang", "g++"]
    compiler = next((path for path in map(shutil.which, filter(None, names)) if path), None)
    if compiler is None:
        raise NoCompiler("no C compiler, so no limits: install gcc or clang, or set CC")
    options = [*([] if "clang" in compiler else ["-x", "c"]), "-O3", "-ffp-contract=fast"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "limits.so")
        source = [str(Path(__file__).with_suffix(".c")), "-shared", "-fPIC", "-o", str(library)]
        for tuned in ("-march=native", "-mcpu=native"):  # clang on ARM knows the second only
            command = [compiler, tuned, *options, *source]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                break
        else:
            reason = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise NoCompiler(f"{compiler} could not compile limits.c, so no limits: {reason}")
        rates = ctypes.CDLL(str(library))
    for dtype in ("float32", "float64"):
        getattr(rates, f"multiply_add_{dtype}").argtypes = [ctypes.c_long]
    rates.flops_per_repeat.argtypes, rates.flops_per_repeat.restype = [ctypes.c_long], ctypes.c_long
    rates.read_memory.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_long]
    return rates


def together(threads, work):
    """Seconds from the start of the first to the end of the last of ``work(thread)``."""
    if threads == 1:  # here, because torch makes new threads of its own for every caller's thread
        start = time.perf_counter()
        work(0)
        return time.perf_counter() - start
    barrier, spans = threading.Barrier(threads), []

    def one(thread):
        barrier.wait()
        start = time.perf_counter()
        work(thread)
        spans.append((start, time.perf_counter()))

    workers = [threading.Thread(target=one, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return max(end for _, end in spans) - min(start for start, _ in spans)


def best_rates(probes, threads):
    """The most that each probe did in a second, by name; probes take turns, so that a disturbance
    hits them all and spoils none.

    A probe is (amount, work): ``work(repeats)(thread)`` does ``amount`` on each thread ``repeats``
    times.
    """
    repeats = {}
    for name, (_, work) in probes.items():
        n = 1
        while (taken := together(threads, work(n))) < ATTEMPT_SECONDS / 2:
            n = max(2 * n, min(int(n * ATTEMPT_SECONDS / max(taken, 1e-9)), 64 * n))
        repeats[name] = n
    best = dict.fromkeys(probes, 0.0)
    for _ in range(ATTEMPTS):
        for name, (amount, work) in probes.items():
            rate = amount * repeats[name] * threads / together(threads, work(repeats[name]))
            best[name] = max(best[name], rate)
    return best


def multiply_adds(rates, dtype):
    """The probe of the FMA peak."""
    run, count = getattr(rates, f"multiply_add_{dtype}"), 1000
    flops = count * rates.flops_per_repeat(getattr(torch, dtype).itemsize)
    return flops, lambda repeats: lambda thread: run(count * repeats)


def reading(rates, memory, size, threads):
    """The probe of reading ``size`` bytes of ``memory``, each thread its own part."""
    share = size // threads // 512 * 512
    start = memory.data_ptr()
    return share, lambda passes: lambda k: rates.read_memory(start + k * share, share, passes)


def measure(rates, threads):
    """The `Limits` of ``threads`` threads; about two seconds."""
    memory = torch.ones(SIZES[-1] // 4)
    probes = {dtype: multiply_adds(rates, dtype) for dtype in ("float32", "float64")}
    probes |= {size: reading(rates, memory, size, threads) for size in SIZES}
    best = best_rates(probes, threads)
    read = {size: best.pop(size) for size in SIZES}
    return Limits(threads, best, read)


def blas(rates):
    """How well torch.mm uses this CPU, on one thread: a dict with a sentence for every table."""
    name, a, b = blas_name(), *torch.rand(2, 768, 768)
    product = 2 * len(a) ** 3, lambda repeats: lambda _: [torch.mm(a, b) for _ in range(repeats)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best = best_rates({"mm": product, "peak": multiply_adds(rates, "float32")}, 1)
    finally:
        torch.set_num_threads(before)
    share = best["mm"] / best["peak"]
    text = f"torch.mm reaches {share:.0%} of one thread's FMA peak: "
    possible = share <= 1.02
    if not possible:
        text += f"impossible, so the machine is too busy to tell whether {name} runs its fast path."
    elif share >= FAST:
        text += f"{name} runs a fast path on this CPU."
    else:
        text += (
            f"{name} does NOT run its fast path on this CPU. torch.nn.RNN and GRU are made of its "
            "products, so their ratios owe part to that, and are smaller where it is fast."
        )
    return {"library": name, **best, "fast": possible and share >= FAST, "text": text}
