"""Builds the CUDA kernels, drivers, bindings and all, for CPU tensors: an ``rnn_ext._C``."""

import functools
import importlib.machinery
import importlib.util
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.cpp_extension import load

from rnn_ext import library, normalized, ops, random, recompute, transforms

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["csrc/ops/*.cpp", "tests/emulated_*.cpp"]
SOURCES += [f"csrc/cpu/{name}.cpp" for name in ("plan", "scratch", "team")]
EMULATOR = ["asynchronous", "barriers", "launch", "matrices", "memory", "race_off", "scheduler"]
FLAGS = ["-std=c++20", "-O1", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas"]
# Few enough multiprocessors for the emulator's memory. Clusters are so small that the larger of
# the tests' shapes take groups with flags, the smaller ones clusters.
DEVICE = {"sm_count": 24, "shared_per_block": 227 * 1024, "cluster_size": 4}


@functools.cache
def emulated_modules():
    """(_C, _predicates): layers that run csrc/cuda on CPU tensors (emulated_step.cpp)."""
    sources = [file for pattern in SOURCES for file in sorted(ROOT.glob(pattern))]
    sources += [ROOT / f"tests/cuda_on_cpu/{name}.cpp" for name in EMULATOR]
    folder = ROOT / "build" / f"emulated-torch{torch.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    # Not in extra_include_paths: warnings in our own headers count.
    flags = [*FLAGS, f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/cuda_on_cpu'}", "-DRNN_EXT_EMULATED"]
    flags += [f'-DRNN_EXT_TORCH_VERSION=\\"{torch.__version__}\\"']
    module = load("_C", list(map(str, sources)), extra_cflags=flags, build_directory=str(folder))
    predicates = _import("_predicates", module.__file__)
    predicates.device(*DEVICE.values())
    module.operators = library._register("rnn_ext_emulated")
    return module, predicates


class OnPaths:
    """The emulated ``_C``, with a backend for each pass whatever the caller asks for.

    The backend is the last argument of every function.
    """

    def __init__(self, forward, backward):
        self._extension = emulated_modules()[0]
        self._forward, self._backward = forward, backward

    def __getattr__(self, name):
        return getattr(self._extension, name)

    def layer_forward(self, *arguments):
        return self._extension.layer_forward(*arguments[:-1], self._forward)

    def layer_backward(self, *arguments):
        return self._extension.layer_backward(*arguments[:-1], self._backward)

    def partial_forward(self, *arguments):
        return self._extension.partial_forward(*arguments[:-1], self._forward)

    def partial_backward(self, *arguments):
        return self._extension.partial_backward(*arguments[:-1], self._backward)

    def both_forward(self, *arguments):
        return self._extension.both_forward(*arguments[:-1], self._forward)

    def both_backward(self, *arguments):
        return self._extension.both_backward(*arguments[:-1], self._backward)


@contextmanager
def emulation(monkeypatch, forward, backward):
    """rnn_ext's Python on the emulated kernels; gives `_predicates`."""
    extension = OnPaths(forward, backward)
    for module in (ops, library, normalized, random, recompute, transforms):
        monkeypatch.setattr(module, "_C", extension)
    monkeypatch.setattr(library, "_on_cuda", lambda tensor: True)
    monkeypatch.setattr(library, "_operators", torch.ops.rnn_ext_emulated)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small products: a second thread would only be waited for
    yield emulated_modules()[1]
    torch.set_num_threads(threads)


def _import(name, path):
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module
