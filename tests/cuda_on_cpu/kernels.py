"""A shared object of kernels, loaded."""

import ctypes
import re
import subprocess
import weakref

import numpy as np

from .build import build

EMULATOR_HEADERS = ("emulated_platform.h", "cuda_language.h")


class KernelError(AssertionError):
    """A launch failed, a race was found, or something was written behind the end of an array."""


class Kernels:
    """Kernels built for the emulator. Arguments are those of `build`."""

    def __init__(self, sources, *, race=False, flags=(), mutant=None):
        self.path = build(sources, race=race, flags=flags, mutant=mutant)
        self._library = ctypes.CDLL(str(self.path))
        self._library.cuda_on_cpu_error.restype = ctypes.c_char_p
        self._library.cuda_on_cpu_allocate.restype = ctypes.c_void_p
        self._library.cuda_on_cpu_switches.restype = ctypes.c_uint64
        self._allocations = {}  # address -> bytes
        self.schedule()

    def schedule(self, seed=0, preempt=0):
        """Sets the schedule of the launches to come.

        Args:
            seed: 0 resumes threads in the order in which they became ready; every other number is
                a random order of its own.
            preempt: race builds may also stop a thread at about every n-th access to memory.
        """
        self._library.cuda_on_cpu_schedule(ctypes.c_uint64(seed), ctypes.c_uint(preempt))

    def device(self, sm_count=132, shared_per_block=227 * 1024, cluster_size=16):
        """Sets the limits of the emulated GPU, by which launches that do not fit are refused."""
        self._library.cuda_on_cpu_device(sm_count, shared_per_block, cluster_size)

    def empty(self, shape, dtype, name="array"):
        """An array of NaN (all bits set) that counts as uninitialised for the race checker."""
        return self._allocate(shape, dtype, name, initialised=False)

    def array(self, values, name="array"):
        """A copy of ``values`` that kernels may read and write."""
        values = np.ascontiguousarray(values)
        array = self._allocate(values.shape, values.dtype, name, initialised=True)
        array[...] = values
        return array

    def initialise(self, array):
        """Declares the numbers of an array of `empty` to be set."""
        address, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        self._library.cuda_on_cpu_initialise(address, size)

    def call(self, name, *arguments):
        """Calls an entry function; structures are passed by address.

        Raises:
            KernelError: the launch failed, the race checker found something, or something was
                written behind the end of an array.
        """
        passed = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments]
        failed = getattr(self._library, name)(*passed)
        problems = self._races()
        if failed:
            problems.insert(0, self._library.cuda_on_cpu_error().decode())
        for address, (size, label) in self._allocations.items():
            if not self._library.cuda_on_cpu_intact(
                ctypes.c_void_p(address), ctypes.c_size_t(size)
            ):
                problems.append(f"written behind the end of {label}")
        if problems:
            raise KernelError(f"{name}: " + "\n".join(problems))

    @property
    def switches(self):
        """How often the machine has gone from one thread to another."""
        return self._library.cuda_on_cpu_switches()

    def _allocate(self, shape, dtype, name, initialised):
        dtype = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        address = self._library.cuda_on_cpu_allocate(
            ctypes.c_size_t(size), name.encode(), initialised
        )
        memory = (ctypes.c_byte * size).from_address(address)
        weakref.finalize(memory, _free, self._library, self._allocations, address, size)
        self._allocations[address] = size, name
        return np.frombuffer(memory, dtype).reshape(shape)

    def _races(self):
        text = ctypes.create_string_buffer(16384)
        self._library.cuda_on_cpu_reports(text, ctypes.c_size_t(len(text)))
        return [self._with_lines(line) for line in text.value.decode().splitlines()]

    def _with_lines(self, report):
        """Replaces the code addresses (@1f2c) of a report by source lines."""
        for address in re.findall(r"@([0-9a-f]+)", report):
            command = ["addr2line", "-i", "-e", str(self.path), address]
            try:
                lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
            except FileNotFoundError:
                return report
            # Innermost first, the emulator's own functions left out.
            places = [line.rsplit("/", 1)[-1].split(" ")[0] for line in lines]
            places = [p for p in places if not p.startswith(EMULATOR_HEADERS)] or places
            report = report.replace(f"@{address}", places[0], 1)
        return report


def _free(library, allocations, address, size):
    del allocations[address]
    library.cuda_on_cpu_free(ctypes.c_void_p(address), ctypes.c_size_t(size))
