"""The persistent CUDA kernels in the emulator, beside a float64 loop over rnn_ext.reference."""

import ctypes
from dataclasses import dataclass, field

import numpy as np
from cuda_on_cpu import Kernels, Number, from_bits, pointer, to_bits

from rnn_ext import reference

SOURCE = "tests/cuda_on_cpu/entries/persistent.cpp"
CELLS = {
    "rnn_tanh": "PersistentElman<Tanh>",
    "rnn_relu": "PersistentElman<Relu>",
    "rnn_sigmoid": "PersistentElman<Sigmoid>",
    "lstm": "PersistentLstm",
    "gru": "PersistentGru",
    "gru_reset_before": "PersistentGruResetBefore",
}
GATES = {"lstm": 4, "gru": 3, "gru_reset_before": 3}
# How a number format is stored, and the error that it is allowed, forward and backward.
FORMATS = {
    "bf16": (Number.BFLOAT16, 0.02, 0.04),
    "fp16": (Number.FLOAT16, 0.003, 0.006),
    "Tf32": (Number.FLOAT32, 0.002, 0.004),
    "Tf32x3": (Number.FLOAT32, 2e-5, 5e-5),
}


def kernel_flags(cell, numbers, *flags):
    """Compiler flags for a cell and number format; ``flags`` leave kernels out (see the entry)."""
    sixteen = ["-DSIXTEEN_BIT"] if numbers in ("bf16", "fp16") else []
    return [f"-DCELL={CELLS[cell]}", f"-DNUMBERS={numbers}", *sixteen, *flags]


def kernels_of(cell, numbers, *flags, race=False):
    return Kernels([SOURCE], flags=kernel_flags(cell, numbers, *flags), race=race)


@dataclass(frozen=True)
class Case:
    """A problem and how a launch is laid out for it: groups of each direction, rows of a tile."""

    cell: str = "lstm"
    steps: int = 3
    batch: int = 3
    hidden: int = 20
    directions: int = 1
    reverse: bool = False  # of the first direction; the second runs the other way
    layout: str = "padded"  # or "lengths", "packed"
    resets: bool = False
    limit: float = np.inf  # of the values of dL/dh
    restored: bool = False  # resets put another state than zeros in the place of the carried one
    bias: bool = True
    cluster: bool = False
    units: int = 16
    groups: int = 1
    rows: int = 8
    optional: bool = True  # give what may be null: d_cells, previous
    in_place: bool = False  # Elman: h replaces W x
    seed: int = field(default=0, repr=False)

    @property
    def gates(self):
        return GATES.get(self.cell, 1)

    @property
    def columns(self):
        """Of the product with h': the gates that it reaches."""
        return (2 if self.cell == "gru_reset_before" else self.gates) * self.hidden

    @property
    def blocks(self):
        blocks = -(-self.hidden // self.units)
        return 1 << (blocks - 1).bit_length() if self.cluster else blocks

    @property
    def arrangement(self):
        return Arrangement(self.groups, self.blocks, self.cluster, self.units, self.rows)

    @property
    def lengths(self):
        """Steps of each row, [B]; packed batches have theirs sorted."""
        if self.layout == "padded":
            return np.full(self.batch, self.steps)
        lengths = np.random.default_rng(self.seed + 7).integers(1, self.steps + 1, self.batch)
        lengths[0] = self.steps
        return np.sort(lengths)[::-1].copy() if self.layout == "packed" else np.roll(lengths, 1)

    @property
    def alive(self):
        return np.arange(self.steps)[:, None] < self.lengths

    def rows_of(self, values):
        """[T, B, F] as the kernel has it: [N, F], N = T * B or the rows that are there."""
        if self.layout == "packed":
            return values[self.alive]
        return values.reshape(-1, *values.shape[2:])


class Arrangement(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("groups", "blocks", "cluster", "units", "rows")]


class Sequences(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("steps", "batch", "hidden", "directions")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("offsets", "lengths")]


def _direction(pointers):
    """A struct of pointers; names ending in _stride are int64, reverse is a bool."""
    types = {"_stride": ctypes.c_int64, "reverse": ctypes.c_bool}
    fields = [
        (name, next((t for end, t in types.items() if name.endswith(end)), ctypes.c_void_p))
        for name in pointers.split()
    ]
    return type("Direction", (ctypes.Structure,), {"_fields_": fields})


ForwardDirection = _direction(
    "weights b_ih b_hh gates gates_stride h h_stride middle cells h0 c0 resets restored_h "
    "restored_c restored_product h_n c_n reverse"
)
BackwardDirection = _direction(
    "weights gates middle h gates_stride h_stride cells h0 c0 resets restored_h restored_c "
    "sum_delta sum_h sum_c d_h d_h_stride d_cells carry dc delta delta_stride previous reverse"
)


class PersistentForward(ctypes.Structure):
    _fields_ = [
        ("sequences", Sequences),
        ("direction", ForwardDirection * 2),
        ("workspace", ctypes.c_void_p),
        ("save", ctypes.c_bool),
    ]


class PersistentBackward(ctypes.Structure):
    _fields_ = [
        ("sequences", Sequences),
        ("direction", BackwardDirection * 2),
        ("workspace", ctypes.c_void_p),
        ("limit", ctypes.c_float),
    ]


class Problem:
    """Random data of a case in one number format, and the float64 results for one direction."""

    def __init__(self, case, number, direction):
        self.case, self.number = case, number
        self.reverse = case.reverse != bool(direction)
        random = np.random.default_rng([case.seed, direction])
        t, b, h, g = case.steps, case.batch, case.hidden, case.gates

        def draw(*shape, scale=1.0):
            return from_bits(to_bits(random.normal(size=shape) * scale, number), number)

        self.wx = draw(t, b, g * h)
        self.weights = draw(g * h, h, scale=1.2 / np.sqrt(h))
        self.b_ih, self.b_hh = draw(g * h, scale=0.5), draw(g * h, scale=0.5)
        if not case.bias:
            self.b_ih, self.b_hh = np.zeros(g * h), np.zeros(g * h)
        self.h0, self.c0 = draw(b, h), random.normal(size=(b, h)).astype(np.float32).astype(float)
        self.d_h, self.d_cells = draw(t, b, h), draw(t, b, h) * case.optional
        self.d_h_n = random.normal(size=(b, h)).astype(np.float32).astype(float)
        self.d_c_n = random.normal(size=(b, h)).astype(np.float32).astype(float)
        self.restored = draw(b, h) * case.restored, draw(b, h) * case.restored
        self.resets = random.random((t, b)) < (0.4 if case.resets else 0)

    def expected(self):
        """(forward, backward): name -> [T, B, ...] or [B, ...], float64."""
        case, cell = self.case, reference.CELLS[self.case.cell]
        lstm = case.cell == "lstm"
        identity = np.eye(case.gates * case.hidden)
        weights = reference.Weights(identity, self.weights, self.b_ih, self.b_hh)
        state = [self.h0.copy(), self.c0.copy()][: 1 + lstm]
        shape = (case.steps, case.batch, case.hidden)
        forward = {"h": np.zeros(shape), "cells": np.zeros(shape), "middle": np.zeros(shape)}
        backward = {"previous": np.zeros(shape)}
        records = {}
        order = range(case.steps)
        order = order[::-1] if self.reverse else order
        for t in order:
            rows = np.flatnonzero(case.alive[t])
            cut = rows[self.resets[t, rows]]
            for s, restored in zip(state, self.restored):
                s[cut] = restored[cut]
            backward["previous"][t, rows] = state[0][rows]
            records[t] = cell.step(self.wx[t, rows], *(s[rows] for s in state), weights)
            for s, new, name in zip(state, records[t].state, ("h", "cells"), strict=False):
                s[rows] = new
                forward[name][t, rows] = new
            if case.cell == "gru_reset_before":
                forward["middle"][t, rows] = records[t].r * records[t].h_prev
        forward["h_n"], forward["c_n"] = state[0], state[-1]

        blocks = 4 if case.cell == "gru" else case.gates
        delta = np.zeros((case.steps, case.batch, blocks * case.hidden))
        d_state = [self.d_h_n.copy(), self.d_c_n.copy()][: 1 + lstm]
        d_restored = [np.zeros_like(d) for d in d_state]
        for t in order[::-1]:
            rows = np.flatnonzero(case.alive[t])
            reaching = [
                d[rows] + at[t, rows]
                for d, at in zip(d_state, (self.d_h, self.d_cells), strict=False)
            ]
            reaching[0] = reaching[0].clip(-case.limit, case.limit)
            step = cell.step_backward(records[t], *reaching, weights)
            parts = step.x
            if case.cell == "gru":
                parts = np.concatenate([records[t].r * step.x[:, 2 * case.hidden :], step.x], -1)
            delta[t, rows] = parts
            cut = self.resets[t, rows][:, None]
            for d, kept, before in zip(d_state, d_restored, step.state, strict=True):
                d[rows] = np.where(cut, 0, before)
                kept[rows] += np.where(cut, before, 0)
        backward |= {"delta": delta, "carry": d_state[0], "dc": d_state[-1]}
        backward |= {"d_restored_h": d_restored[0], "d_restored_c": d_restored[-1]}
        return forward, backward


class Run:
    """A case on the kernels: `forward`, then `backward` from what it saved."""

    def __init__(self, kernels, case, numbers):
        self.kernels, self.case = kernels, case
        self.number, *self.tolerance = FORMATS[numbers]
        self.problems = [Problem(case, self.number, d) for d in range(case.directions)]
        self.buffers = [{} for _ in self.problems]
        self.worst = 0.0

    def check(self):
        self.forward()
        self.backward()
        return self.worst

    def forward(self):
        case = self.case
        args = PersistentForward(self._sequences(), save=True)
        for own, problem, d in zip(self.buffers, self.problems, args.direction, strict=False):
            wx = self._stored(case.rows_of(problem.wx))
            rows = len(wx)
            own["gates"] = self._array(
                np.pad(wx, ((0, 0), (0, 5))), "gates"
            )  # rows are further apart
            if case.in_place:
                own["h"] = own["gates"]
            else:
                own["h"] = self.kernels.empty((rows, case.hidden + 3), self.number.value, "h")
            own["h0"], own["c0"] = (
                self._array(self._stored(problem.h0), "h0"),
                self._array(problem.c0, "c0"),
            )
            own["h_n"] = self.kernels.empty((case.batch, case.hidden), self.number.value, "h_n")
            weights = own["weights"] = self._array(self._stored(problem.weights), "weights")
            d.weights, d.h0, d.h_n = pointer(weights), pointer(own["h0"]), pointer(own["h_n"])
            if case.resets:
                own["resets"] = self._array(case.rows_of(problem.resets), "resets")
                d.resets = pointer(own["resets"])
            if case.bias:
                own["biases"] = [
                    self._array(self._stored(b), "bias") for b in (problem.b_ih, problem.b_hh)
                ]
                d.b_ih, d.b_hh = map(pointer, own["biases"])
            d.gates, d.gates_stride = pointer(own["gates"]), own["gates"].shape[1]
            d.h, d.h_stride = pointer(own["h"]), own["h"].shape[1]
            if case.cell == "lstm":
                own["cells"] = self.kernels.empty((rows, case.hidden), np.float32, "cells")
                own["c_n"] = self.kernels.empty((case.batch, case.hidden), np.float32, "c_n")
                d.c0, d.c_n, d.cells = map(pointer, (own["c0"], own["c_n"], own["cells"]))
            if case.cell in ("gru", "gru_reset_before"):
                own["middle"] = self.kernels.empty((rows, case.hidden), self.number.value, "middle")
                d.middle = pointer(own["middle"])
            if case.restored:
                h, c = problem.restored
                own["restored_h"] = self._array(self._stored(h), "restored_h")
                own["restored_c"] = self._array(c, "restored_c")
                own["restored_product"] = self._array(
                    h @ problem.weights[: case.columns].T, "product"
                )
                d.restored_h, d.restored_product = map(
                    pointer, (own["restored_h"], own["restored_product"])
                )
                d.restored_c = pointer(own["restored_c"])
            d.reverse = problem.reverse
        self._launch("forward", args)
        more = {"lstm": ["cells", "c_n"], "gru_reset_before": ["middle"]}
        self._compare(0, ["h", "h_n", *more.get(case.cell, [])])

    def backward(self):
        case = self.case
        args = PersistentBackward(self._sequences(), limit=case.limit)
        blocks = 4 if case.cell == "gru" else case.gates
        for own, problem, d in zip(self.buffers, self.problems, args.direction, strict=False):
            u = problem.weights.reshape(case.gates, case.hidden, case.hidden)
            order = (0, 2, 1) if case.cell == "gru_reset_before" else (2, 1, 0)
            own["transposed"] = self._array(self._stored(u.transpose(order)), "weights")
            d.weights = pointer(own["transposed"])
            d.gates, d.gates_stride = pointer(own["gates"]), own["gates"].shape[1]
            d.h, d.h_stride = pointer(own["h"]), own["h"].shape[1]
            d.middle, d.cells = pointer(own.get("middle")), pointer(own.get("cells"))
            d.h0, d.c0 = pointer(own["h0"]), pointer(own["c0"])
            own["d_h"] = self._array(self._stored(case.rows_of(problem.d_h)), "d_h")
            d.d_h, d.d_h_stride = pointer(own["d_h"]), case.hidden
            own["carry"], own["dc"] = (
                self._array(problem.d_h_n, "carry"),
                self._array(problem.d_c_n, "dc"),
            )
            d.carry, d.dc = pointer(own["carry"]), pointer(own["dc"])
            rows = len(own["d_h"])
            own["delta"] = self.kernels.empty(
                (rows, blocks * case.hidden + 2), self.number.value, "delta"
            )
            d.delta, d.delta_stride = pointer(own["delta"]), own["delta"].shape[1]
            if case.optional:
                own["d_cells"] = self._array(self._stored(case.rows_of(problem.d_cells)), "d_cells")
                own["previous"] = self.kernels.empty(
                    (rows, case.hidden), self.number.value, "previous"
                )
                d.d_cells, d.previous = pointer(own["d_cells"]), pointer(own["previous"])
            d.resets, d.restored_h = pointer(own.get("resets")), pointer(own.get("restored_h"))
            d.restored_c = pointer(own.get("restored_c"))
            if case.restored:
                sizes = {"sum_delta": case.columns, "sum_h": case.hidden}
                for name, size in (sizes | {"sum_c": case.hidden}).items():
                    own[name] = self._array(np.zeros((case.batch, size)), name)
                    setattr(d, name, pointer(own[name]))
            d.reverse = problem.reverse
        self._launch("backward", args)
        names = ["delta", "carry", *(["dc"] if case.cell == "lstm" else [])]
        if case.restored:
            for own, problem in zip(self.buffers, self.problems):
                own["d_restored_h"] = own["sum_h"] + np.float32(
                    own["sum_delta"] @ problem.weights[: case.columns]
                )
                own["d_restored_c"] = own["sum_c"]
            names += ["d_restored_h", *(["d_restored_c"] if case.cell == "lstm" else [])]
        self._compare(1, [*names, *(["previous"] if case.optional else [])])

    def _sequences(self):
        case = self.case
        s = Sequences(case.steps, case.batch, case.hidden, case.directions)
        if case.layout != "padded":
            self._lengths = self._array(case.lengths.astype(np.int64), "lengths")
            s.lengths = pointer(self._lengths)
        if case.layout == "packed":
            counts = case.alive.sum(1)
            self._offsets = self._array(np.cumsum(counts) - counts, "offsets")
            s.offsets = pointer(self._offsets)
        return s

    def _launch(self, name, args):
        arrangement, forward = self.case.arrangement, name == "forward"
        size = self.kernels._library.workspace_bytes
        size.restype = ctypes.c_int64
        count = size(ctypes.byref(arrangement), int(forward), ctypes.byref(args.sequences))
        workspace = self.kernels.array(np.full(count, 0xFF, np.uint8), "workspace")
        args.workspace = pointer(workspace) if count else None
        self.kernels.call(name, arrangement, args)

    def _compare(self, which, names):
        tolerance = self.tolerance[which]
        for direction, (own, problem) in enumerate(zip(self.buffers, self.problems, strict=True)):
            expected = problem.expected()[which]
            for name in names:
                wanted = expected[name]
                if wanted.ndim == 3:
                    wanted = self.case.rows_of(wanted)
                got = own[name][:, : wanted.shape[-1]]
                got = from_bits(got, self.number) if got.dtype != np.float32 else got.astype(float)
                error = np.abs(got - wanted).max()
                assert error <= tolerance, f"{name}, direction {direction}: off by {error:.2g}"
                self.worst = max(self.worst, error / tolerance)

    def _stored(self, values):
        return to_bits(values, self.number)

    def _array(self, values, name):
        return self.kernels.array(
            values if values.dtype != np.float64 else values.astype(np.float32), name
        )


def run(kernels, case, numbers):
    """The worst error over its tolerance; AssertionError on a wrong result or a race."""
    return Run(kernels, case, numbers).check()
