"""The step-wise CUDA kernels on guarded memory and under the race checker."""

import mmap

import numpy as np
import pytest
from cuda_on_cpu import (
    WANTED,
    KernelError,
    Kernels,
    Number,
    from_bits,
    pointer,
    to_bits,
)
from step_cases import CELLS, SOURCES, STORAGE, Case, Run, Sums

VARIANTS = [(cell, False) for cell in CELLS] + [("lstm", True)]
variants = pytest.mark.parametrize("cell, projected", VARIANTS, ids=[*CELLS, "lstm_projected"])


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("layout", ["padded", "lengths", "packed"])
@variants
def test_results_in_float64_without_races(cell, projected, layout, reverse):
    kernels = Kernels(SOURCES, race=True)
    kernels.schedule(seed=1)
    Run(kernels, Case(cell, projected, layout, reverse, restored=reverse), Number.FLOAT64).check()


@pytest.mark.parametrize("number", STORAGE, ids=lambda number: number.name)
@variants
def test_every_number_format(cell, projected, number):
    Run(Kernels(SOURCES), Case(cell, projected, "packed", clip="value"), number).check()
    Run(Kernels(SOURCES), Case(cell, projected, "lengths", True, restored=True), number).check()


@pytest.mark.parametrize("clip", ["value", "norm"])
@pytest.mark.parametrize("number", [Number.FLOAT32, Number.BFLOAT16], ids=lambda n: n.name)
@variants
def test_clipped_gradients(cell, projected, number, clip):
    Run(Kernels(SOURCES), Case(cell, projected, "lengths", hidden=150, clip=clip), number).check()


@variants
def test_clipped_norms_in_float64_without_races(cell, projected):
    kernels = Kernels(SOURCES, race=True)
    kernels.schedule(seed=2)
    Run(kernels, Case(cell, projected, "packed", clip="norm"), Number.FLOAT64).check()


@pytest.mark.parametrize("zoneout", ["masks", "share"])
@pytest.mark.parametrize("number", STORAGE, ids=lambda number: number.name)
@variants
def test_states_that_are_held(cell, projected, number, zoneout):
    kernels = Kernels(SOURCES, race=number is Number.FLOAT64)
    for options in ({"layout": "packed", "restored": True}, {"layout": "lengths", "reverse": True}):
        clip = "norm" if options["layout"] == "lengths" else None
        Run(kernels, Case(cell, projected, **options, clip=clip, zoneout=zoneout), number).check()


@pytest.mark.parametrize("rows", [0, 1, 7, 256, 257, 700, 256 * 256 + 1])
def test_column_sums(rows):
    kernels = Kernels(SOURCES)
    values = np.random.default_rng(0).normal(size=(rows, 5))
    matrix = kernels.array(np.pad(values, ((0, 0), (0, 2)), constant_values=np.nan))
    chunks = -(-rows // 256)
    scratch = kernels.empty((chunks + -(-chunks // 256), 5), np.float64)
    sums = kernels.empty(5, np.float64)
    kernels.call("run_column_sums", 1, Sums(rows, 5, 7, *map(pointer, (matrix, scratch, sums))))
    assert np.abs(sums - values.sum(0)).max() <= 1e-12 * max(1, rows)


def test_column_sums_do_not_swamp_small_numbers():
    """Eight lines and chunks of 256 rows add up like a tree: 16-bit numbers keep their sum."""
    kernels, rows = Kernels(SOURCES), 40_000
    matrix = kernels.array(to_bits(np.full((rows, 1), 0.001), Number.FLOAT16))
    scratch, sums = kernels.empty((200, 1), np.float32), kernels.empty(1, np.float16)
    kernels.call("run_column_sums", 2, Sums(rows, 1, 1, *map(pointer, (matrix, scratch, sums))))
    exact = rows * from_bits(matrix, Number.FLOAT16)[0, 0]
    assert abs(float(sums[0]) - exact) <= exact * 2**-11


emulated_only = pytest.mark.skipif(WANTED, reason="only the emulator has this")


@emulated_only
def test_offsets_beyond_32_bits():
    """Two rows 2**31 + 2 elements apart, in memory that is not there until it is written to."""
    stride = 2**31 + 2
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # in Python 3.13
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = np.frombuffer(mmap.mmap(-1, 2 * (stride + 3), flags=flags), np.float16)
    memory[:3], memory[stride:] = (1, 2, 3), (10, 20, 30)
    kernels = Kernels(SOURCES)
    sums = kernels.empty(3, np.float16)
    args = Sums(2, 3, stride, memory.ctypes.data, None, pointer(sums))
    kernels.call("run_column_sums", 2, args)
    assert sums.tolist() == [11, 22, 33]


@emulated_only
def test_a_launch_that_cannot_be_is_an_error():
    kernels = Kernels(SOURCES)
    kernels.device(shared_per_block=1024)
    matrix, sums = kernels.array(np.ones((2, 3))), kernels.empty(3, np.float64)
    args = Sums(2, 3, 3, pointer(matrix), None, pointer(sums))
    with pytest.raises(KernelError, match="column_sums: it needs 2048 bytes of shared memory"):
        kernels.call("run_column_sums", 1, args)
