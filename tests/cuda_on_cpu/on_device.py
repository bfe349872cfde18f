"""The same tests on a GPU: kernels built with nvcc, arrays copied there and back around a call.

Chosen for a whole process by RNN_EXT_KERNELS_ON=gpu (see `make gpu STAGE=conformance`). Schedules
and the limits of the emulated GPU mean nothing there, and race builds are plain ones.
"""

import ctypes
import hashlib
import os
import sys
import weakref
from functools import cache

import numpy as np

from .arrays import device_copies
from .build import FOLDER, HERE, ROOT, run_compiler
from .kernels import KernelError

WANTED = os.environ.get("RNN_EXT_KERNELS_ON") == "gpu"
GUARD = 256  # bytes behind every array, which must stay as they are


@cache
def _toolkit():
    """nvcc, and its flags for the GPU that is there."""
    sys.path.insert(0, str(ROOT))
    from build_backend import cuda

    toolkit = cuda.find_toolkit()
    if toolkit is None:
        raise RuntimeError("kernels on a GPU need nvcc: put it on PATH or set CUDA_HOME")
    return toolkit.nvcc, [cuda.gencode(name) for name in cuda.architectures(toolkit)]


@cache
def build_for_device(sources, flags):
    """A shared object of ``sources``, by nvcc; tuples of strings as for `build`."""
    nvcc, architectures = _toolkit()
    includes = [f"-I{HERE}", f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/cuda"]
    command = [nvcc, "-std=c++20", "-O3", "-lineinfo", "-shared", "-Xcompiler=-fPIC", *includes]
    command += [*architectures, *flags, "-x", "cu"]
    files = [ROOT / s for s in sources] + [HERE / "device_runtime.cu", ROOT / "csrc/cuda/device.cu"]
    command += list(dict.fromkeys(map(str, files)))
    headers = sorted([*(ROOT / "csrc").rglob("*.*h"), *HERE.rglob("*.*h")])
    content = b"".join(f.read_bytes() for f in [*headers, *files])
    key = hashlib.sha256(content + " ".join(command).encode()).hexdigest()[:16]
    library = FOLDER / f"gpu-{key}.so"
    if not library.exists():
        run_compiler(command, library)
    return library


class DeviceKernels:
    """As `Kernels`, on the current GPU."""

    def __init__(self, sources, *, race=False, flags=(), mutant=None):
        if mutant:
            raise RuntimeError("mutants are planted in the emulator only")
        self.path = build_for_device(tuple(sources), tuple(flags))
        self._library = ctypes.CDLL(str(self.path))
        self._library.cuda_on_cpu_error.restype = ctypes.c_char_p
        self._library.on_device_allocate.restype = ctypes.c_void_p
        self._arrays = {}  # host address -> (whole memory, address on the device, bytes, name)

    def schedule(self, seed=0, preempt=0):
        """Does nothing: the hardware has its own schedule."""

    def device(self, **limits):
        """Does nothing: the hardware has its own limits."""

    def initialise(self, array):
        """Does nothing: there is no race checker."""

    def empty(self, shape, dtype, name="array"):
        """An array of NaN (all bits set)."""
        dtype = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        memory = np.full(size + GUARD, 0xFF, np.uint8)
        copy = self._library.on_device_allocate(ctypes.c_size_t(memory.nbytes))
        if not copy:
            raise KernelError(self._library.cuda_on_cpu_error().decode())
        address = memory.ctypes.data
        place = (address, memory.nbytes, copy)
        device_copies.append(place)
        self._arrays[address] = weakref.ref(memory), copy, size, name
        weakref.finalize(memory, _forget, self._library, self._arrays, place)
        return memory[:size].view(dtype).reshape(shape)

    def array(self, values, name="array"):
        """A copy of ``values`` that kernels may read and write."""
        values = np.ascontiguousarray(values)
        array = self.empty(values.shape, values.dtype, name)
        array[...] = values
        return array

    def call(self, name, *arguments):
        """Copies all arrays to the device, calls an entry function, waits and copies them back.

        Raises:
            KernelError: the launch or the kernel failed, or it wrote behind the end of an array.
        """
        passed = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments]
        self._copy(to_device=True)
        if getattr(self._library, name)(*passed) or self._library.on_device_wait():
            raise KernelError(f"{name}: {self._library.cuda_on_cpu_error().decode()}")
        self._copy(to_device=False)
        for memory, _, size, label in list(self._arrays.values()):
            whole = memory()
            if whole is not None and (whole[size:] != 0xFF).any():
                raise KernelError(f"{name}: written behind the end of {label}")

    def _copy(self, to_device):
        for address, (memory, copy, *_) in list(self._arrays.items()):
            whole = memory()  # held, so that it is not freed meanwhile
            if whole is None:
                continue
            pair = (copy, address) if to_device else (address, copy)
            size = ctypes.c_size_t(whole.nbytes)
            if self._library.on_device_copy(*map(ctypes.c_void_p, pair), size):
                raise KernelError(self._library.cuda_on_cpu_error().decode())


def _forget(library, arrays, place):
    device_copies.remove(place)
    del arrays[place[0]]
    library.on_device_free(ctypes.c_void_p(place[2]))
