"""Builds the step-wise CUDA kernels, bindings and all, for CPU tensors: an ``rnn_ext._C``."""

import functools
import importlib.machinery
import importlib.util
from pathlib import Path

import torch
from torch.utils.cpp_extension import load

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["csrc/ops/*.cpp", "csrc/cpu/plan.cpp", "csrc/cpu/scratch.cpp", "tests/emulated_step.cpp"]
EMULATOR = ["asynchronous", "barriers", "launch", "matrices", "memory", "race_off", "scheduler"]
FLAGS = ["-std=c++20", "-O2", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]


@functools.cache
def step_modules():
    """(_C, _predicates): layers that run csrc/cuda on CPU tensors (emulated_step.cpp)."""
    sources = [file for pattern in SOURCES for file in sorted(ROOT.glob(pattern))]
    sources += [ROOT / f"tests/cuda_on_cpu/{name}.cpp" for name in EMULATOR]
    folder = ROOT / "build" / f"emulated-torch{torch.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    # Not in extra_include_paths: warnings in our own headers count.
    flags = [*FLAGS, f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/cuda_on_cpu'}", "-DRNN_EXT_EMULATED"]
    flags += [f'-DRNN_EXT_TORCH_VERSION=\\"{torch.__version__}\\"']
    module = load("_C", list(map(str, sources)), extra_cflags=flags, build_directory=str(folder))
    return module, _import("_predicates", module.__file__)


def _import(name, path):
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module
