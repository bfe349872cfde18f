"""What each kernel of entries/conformance.cu must give, from NumPy alone.

The emulator and a GPU are both held to it: `make gpu
STAGE=conformance` runs the cases on the card.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .arrays import Number, from_bits, to_bits

SOURCE = "tests/cuda_on_cpu/entries/conformance.cu"
FLAGS = 64  # words
LANES = np.arange(32)


class Case(NamedTuple):
    """``inputs(case, rng)`` gives words, ``expected(case, words)`` what must come out, or floats
    within ``tolerance`` (relative); ``extra`` is room for exchange behind the results, in words."""

    name: str
    inputs: Callable
    expected: Callable
    blocks: int = 1
    threads: int = 32
    cluster: int = 1
    extra: int = 0
    tolerance: float = 0.0

    @property
    def title(self):
        return self.name if self.cluster == 1 else f"{self.name}, clusters of {self.cluster}"

    def check(self, words, out):
        """Compares the words that came out; NaN equals nothing."""
        expected = self.expected(self, words)
        actual = out[: expected.size].reshape(expected.shape)
        if expected.dtype == np.uint32:
            wrong = actual != expected
        else:
            error = np.abs(actual.view(np.float32) - expected)
            wrong = ~(error <= self.tolerance * np.maximum(np.abs(expected), 1))
        if wrong.any():
            first = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise AssertionError(
                f"{self.title}: {wrong.sum()} of {wrong.size} words differ, the first at {first}: "
                f"{actual[first]:#x}, expected {expected[first]}"
            )


def _words(per_thread):
    def inputs(case, rng):
        return rng.integers(1, 1 << 20, case.blocks * case.threads * per_thread, dtype=np.uint32)

    return inputs


def _special_floats(case, rng):
    special = [0.0, -0.0, 1.0, 65504.0, 65519.0, 65520.0, 1e-8, -3e-6, 3.4e38, np.inf, -np.inf]
    ties = np.arange(1, 9).astype(np.uint32) * 0x1000 + np.float32(1).view(np.uint32)
    usual = rng.normal(size=case.blocks * case.threads - len(special) - len(ties))
    return np.concatenate([np.float32(special), ties.view(np.float32), np.float32(usual)]).view(
        np.uint32
    )


def _numbers(case, words):
    x = words.view(np.float32)
    brain = to_bits(x, Number.BFLOAT16).astype(np.uint32)
    with np.errstate(over="ignore"):
        half = to_bits(x, Number.FLOAT16)
    tf32 = np.where(np.isfinite(x), (words + 0x1000) & ~np.uint32(0x1FFF), words)
    back = half.astype(np.float32).view(np.uint32)
    return np.stack(
        [brain, half.view(np.uint16).astype(np.uint32) << 16, tf32, brain << 16, back], 1
    )


def _moderate_floats(case, rng):
    return np.float32(rng.uniform(0.05, 8, case.threads * case.blocks)).view(np.uint32)


def _approximations(case, words):
    x = words.view(np.float32).astype(np.float64)
    return np.stack([np.exp(x), np.tanh(x), 3 / x], 1)


def _product(number, depth):
    """A case of d + a b; the fragments' layout as platform.h states it."""
    group, thread = LANES // 4, LANES % 4
    width = 2 if depth == 16 else 1  # columns in a register

    def inputs(case, rng):
        a, b, d = (
            rng.normal(size=(16, depth)),
            rng.normal(size=(depth, 8)),
            rng.normal(size=(16, 8)),
        )
        words = np.empty((32, 10), np.uint32)
        rows = [group + 8 * (i % 2) for i in range(4)]
        columns = [width * thread + depth // 2 * (i // 2) for i in range(4)]
        for i in range(4):
            words[:, i] = pack(a, rows[i], columns[i], 0, 1)
            words[:, 6 + i] = np.float32(d[group + 8 * (i // 2), 2 * thread + i % 2]).view(
                np.uint32
            )
        for i in range(2):
            words[:, 4 + i] = pack(b, width * thread + depth // 2 * i, group, 1, 0)
        return words.ravel()

    def pack(matrix, row, column, down, right):
        if width == 1:
            bits = np.float32(matrix[row, column]).view(np.uint32)
            return (bits + 0x1000) & ~np.uint32(0x1FFF)
        low = to_bits(matrix[row, column], number)
        high = to_bits(matrix[row + down, column + right], number)
        return low.view(np.uint16) | high.view(np.uint16).astype(np.uint32) << 16

    def unpack(register):
        if width == 1:
            return [register.view(np.float32).astype(np.float64)]
        halves = (register & 0xFFFF, register >> 16)
        return [from_bits(half.astype(np.uint16).view(number.value), number) for half in halves]

    def expected(case, words):
        a, b, d = np.empty((16, depth)), np.empty((depth, 8)), np.empty((16, 8))
        words = words.reshape(32, 10)
        for i in range(4):
            for j, value in enumerate(unpack(words[:, i].copy())):
                a[group + 8 * (i % 2), width * thread + j + depth // 2 * (i // 2)] = value
            d[group + 8 * (i // 2), 2 * thread + i % 2] = words[:, 6 + i].copy().view(np.float32)
        for i in range(2):
            for j, value in enumerate(unpack(words[:, 4 + i].copy())):
                b[width * thread + j + depth // 2 * i, group] = value
        result = d + a @ b
        return np.stack([result[group + 8 * (i // 2), 2 * thread + i % 2] for i in range(4)], 1)

    return inputs, expected


def _matrix_inputs(case, rng):
    rows = rng.permutation(64)[:32].astype(np.uint32)
    return np.concatenate([rows, rng.integers(0, 1 << 32, 256, dtype=np.uint32)])


def _matrices(case, words):
    rows, elements = words[:32], words[32:].copy().view(np.uint16).reshape(64, 8).astype(np.uint32)
    group, thread = LANES // 4, LANES % 4
    straight, transposed = [], []
    for m in range(4):
        matrix = elements[rows[8 * m : 8 * m + 8]]
        straight.append(matrix[group, 2 * thread] | matrix[group, 2 * thread + 1] << 16)
        transposed.append(matrix[2 * thread, group] | matrix[2 * thread + 1, group] << 16)
    return np.stack(straight[:2] + straight + transposed[:2] + transposed, 1)


def _copies(case, words):
    given = words.reshape(-1, 4)
    part = given.copy()
    part[:, 1] &= 0xFFFF
    part[:, 2:] = 0
    last = given[:, 1:2] & 0xFFFFFF
    return np.roll(np.concatenate([given, part, given[:, 2:], last], 1), -1, axis=0)


def _warps(case, words):
    x = words
    down = np.minimum(LANES % 8 + 2, 7) + LANES // 8 * 8
    picked = [
        x[LANES * 7 % 32],
        x[LANES ^ 5],
        np.where(LANES >= 3, x[LANES - 3], x),
        np.where(LANES < 23, x[(LANES + 9) % 32], x),
        np.where(LANES % 8 < 6, x[down], x),
    ]
    ballot = int(sum(1 << int(i) for i in LANES if x[i] % 3 == 0))
    votes = [ballot, int((x % 2 == 1).any()), int((x > 0).all())]
    return np.stack([*picked, *(np.full(32, v, np.uint32) for v in votes)], 1)


def _pipeline(case, words):
    return words[31::-1].astype(np.uint32) * np.uint32(36)


def _rounds(case, words):
    # Once round the ring gives everyone its own number back, plus what the rounds added, twice.
    added = sum(range(case.blocks)) + sum(range(1, case.blocks + 1))
    return words + np.uint32(added)


def _groups(case, words):
    x = words.reshape(-1, 2, case.threads)
    return (x[:, ::-1] + np.uint32(3)).reshape(-1)


def _clusters(case, words):
    size, blocks, threads = case.cluster, case.blocks, case.threads
    given = words.reshape(blocks // size, size, threads, 4)
    right, left = np.roll(given, -1, axis=1), np.roll(given, 1, axis=1)
    rank = np.broadcast_to(np.arange(size)[None, :, None], given.shape[:3])
    index = np.broadcast_to(np.arange(blocks // size)[:, None, None], given.shape[:3])
    columns = [rank, np.full_like(rank, size), index, right[..., 0], right[..., 2], right[..., 3]]
    columns += [left[..., j] for j in (3, 2, 1, 0)] + [(rank - 1) % size + 100]
    return np.stack(columns, -1).reshape(-1, 11).astype(np.uint32)


def _deliveries(case, words):
    x = words.reshape(-1, case.cluster, case.threads)
    phases = []
    for _ in range(5):
        x = np.roll(4 * x + np.uint32(6), 1, axis=1)
        phases.append(x.reshape(-1))
    return np.stack(phases, 1)


CASES = [
    Case("numbers", _special_floats, _numbers, blocks=2),
    Case("approximations", _moderate_floats, _approximations, blocks=4, tolerance=2e-3),
    Case("product_bf16", *_product(Number.BFLOAT16, 16), tolerance=1e-5),
    Case("product_fp16", *_product(Number.FLOAT16, 16), tolerance=1e-5),
    Case("product_tf32", *_product(Number.FLOAT32, 8), tolerance=1e-5),
    Case("matrices", _matrix_inputs, _matrices),
    Case("copies", _words(4), _copies, threads=96),
    Case("warps", _words(1), _warps),
    Case("pipeline", _words(1), _pipeline, threads=64),
    Case("rounds", _words(1), _rounds, blocks=5, threads=64, extra=2 * 5 * 64),
    Case("groups", _words(1), _groups, blocks=6, threads=64, extra=6 * 64),
    Case("clusters", _words(4), _clusters, blocks=3, threads=64),
    *(Case("clusters", _words(4), _clusters, 2 * n, 64, n) for n in (2, 4, 8, 16)),
    *(Case("deliveries", _words(1), _deliveries, 2 * n, 64, n) for n in (2, 8)),
]
