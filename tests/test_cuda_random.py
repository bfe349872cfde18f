"""Random masks on the emulated CUDA kernel: the bits that NumPy computes, and planted bugs."""

import ctypes

import numpy as np
import pytest
import torch
from cuda_on_cpu import WANTED, Kernels, Mutant, catch, from_bits, pointer
from emulated import emulation
from step_cases import STORAGE

import rnn_ext
from rnn_ext import random
from rnn_ext.reference.random import keep, threshold

SOURCE = "csrc/cuda/random.cu"
SOURCES = [SOURCE, "tests/cuda_on_cpu/entries/random.cpp"]
SEED, STREAM = 0x299F31D0_082EFA98, 9
STEPS, ROWS = np.array([0, 1, 5, 2**31, 2]), np.array([3, 0, 2**32 - 1, 7, 7])


class Mask(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("steps", ctypes.c_void_p),
        ("sequences", ctypes.c_void_p),
        ("seed", ctypes.c_uint64),
        ("stream", ctypes.c_uint32),
        ("threshold", ctypes.c_uint32),
        ("dropped", ctypes.c_double),
        ("kept", ctypes.c_double),
        ("mask", ctypes.c_void_p),
    ]


def filled(kernels, columns, number=None, dropped=0.0, kept=1.0):
    """The mask as float64, or of bool without a number format."""
    steps, rows = kernels.array(STEPS, "steps"), kernels.array(ROWS, "rows")
    dtype = np.bool_ if number is None else number.value
    mask = kernels.empty((len(STEPS), columns), dtype, "mask")
    args = Mask(len(STEPS), columns, pointer(steps), pointer(rows), SEED, STREAM)
    args.threshold, args.mask = threshold(0.3), pointer(mask)
    args.dropped, args.kept = dropped, kept
    if number is None:
        kernels.call("run_random_flags", args)
        return mask
    kernels.call("run_random_mask", STORAGE[number][0], args)
    return from_bits(mask, number)


def expected(columns):
    return keep(SEED, STREAM, STEPS, ROWS, columns, 0.3)


@pytest.mark.parametrize("columns", [1, 4, 63, 64, 129, 300])
def test_the_kernel_fills_what_numpy_does(columns):
    kernels = Kernels(SOURCES, race=True)
    for number in STORAGE:
        mask = filled(kernels, columns, number, -2.0, 1.25)
        np.testing.assert_array_equal(mask, np.where(expected(columns), 1.25, -2.0))
    kernels = Kernels(SOURCES)  # the race checker does not tell neighbouring bytes apart
    np.testing.assert_array_equal(filled(kernels, columns), expected(columns))
    np.testing.assert_array_equal(filled(kernels, columns, None, 1.0, 0.0), ~expected(columns))


MUTANTS = [
    ("a round less", "round < 10", "round < 9"),
    ("the key stays", "k1 += 0xBB67AE85;", ""),
    ("steps for sequences", "p.sequences[at.row]", "p.steps[at.row]"),
    ("the other side of the threshold", "words[i] >= p.threshold", "words[i] < p.threshold"),
    ("columns behind the last", "i < p.columns) row", "i <= p.columns) row"),
    ("a column too few", "(p.columns + kWords - 1) / kWords", "p.columns / kWords"),
]


@pytest.mark.skipif(WANTED, reason="only the emulator has this")
@pytest.mark.parametrize("name, old, new", MUTANTS, ids=[m[0].replace(" ", "-") for m in MUTANTS])
def test_a_planted_bug_is_caught(name, old, new):
    def run(kernels):
        for columns in (300, 63):
            np.testing.assert_array_equal(filled(kernels, columns), expected(columns))

    catch(Mutant(name, SOURCE, old, new), SOURCES, run, race=False)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64, torch.float16], ids=str)
def test_tensors_are_filled(dtype, monkeypatch, nan_filled):
    steps, rows = torch.from_numpy(STEPS), torch.from_numpy(ROWS)
    with emulation(monkeypatch, "auto", "auto"):
        like = torch.empty(0, dtype=dtype)
        mask = random.mask(torch.tensor(SEED), STREAM, steps, rows, 10, 0.3, 1.25, like)
        none = random.mask(torch.tensor(SEED), STREAM, steps[:0], rows[:0], 10, 0.3, 1.25, like)
    kept = True if dtype == torch.bool else 1.25
    assert mask.dtype == dtype and none.shape == (0, 10)
    np.testing.assert_array_equal(mask.numpy(), expected(10) * kept)


def test_the_operator_fills_the_same(monkeypatch):
    with emulation(monkeypatch, "auto", "auto"):
        steps, rows = torch.from_numpy(STEPS), torch.from_numpy(ROWS)
        given = torch.tensor(SEED), STREAM, steps, rows, 10, threshold(0.3), 0.0, 1.0, torch.bool
        operator = torch.ops.rnn_ext_emulated.random_mask.default
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(operator, given, test_utils=checks)
        np.testing.assert_array_equal(operator(*given), expected(10))


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_a_layer_is_trained_with_every_mask(kind, monkeypatch):
    """The emulated kernels and the CPU's draw the same, from the same seed of torch."""
    options = {"zoneout": 0.3, "weight_dropout": 0.2, "variational_dropout": 0.1, "num_layers": 2}
    layer = getattr(rnn_ext, kind)(3, 5, **options).double()
    x, found = torch.randn(4, 2, 3, dtype=torch.float64), []

    def run():
        torch.manual_seed(5)
        output, _ = layer(x, lengths=[4, 2])
        found.append([output, *torch.autograd.grad(output.square().sum(), layer.parameters())])

    run()
    with emulation(monkeypatch, "cuda-step", "cuda-step"):
        run()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
