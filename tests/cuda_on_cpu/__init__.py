"""Runs CUDA kernels on the host: builds them with g++ and the emulator, calls them through ctypes.

    kernels = Kernels(["csrc/cuda/elman.cu", "tests/cuda_on_cpu/entries/elman.cpp"], race=True)
    kernels.schedule(seed=3)
    x = kernels.array(values, name="x")            # guarded memory; an overrun is an error
    y = kernels.empty((4, 8), np.float32, name="y")  # NaN until a kernel writes
    kernels.call("elman_forward", Params(pointer(x), pointer(y)))

README.md beside this file says what is emulated and what is not.
"""

from .arrays import Number, from_bits, pointer, to_bits
from .build import ROOT, build, build_ahead
from .isolation import Crash, isolated
from .kernels import KernelError
from .mutants import Mutant, catch
from .on_device import WANTED, DeviceKernels

if WANTED:
    Kernels = DeviceKernels
else:
    from .kernels import Kernels

__all__ = [
    "ROOT",
    "Crash",
    "KernelError",
    "Kernels",
    "Mutant",
    "Number",
    "build",
    "build_ahead",
    "catch",
    "from_bits",
    "isolated",
    "pointer",
    "to_bits",
]
