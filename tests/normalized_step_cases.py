"""The CUDA kernels of layer normalisation and peepholes: a layer driven from NumPy, in float64."""

from dataclasses import dataclass

import numpy as np
from cuda_on_cpu import pointer
from step_cases import CELLS, SHARE, Rows, Zoneout, structure

from rnn_ext import reference

SOURCES = [f"csrc/cuda/normalized_{name}.cu" for name in ("forward", "backward")]
SOURCES += ["tests/cuda_on_cpu/entries/normalized.cpp"]
WEIGHTS = "b_ih b_hh gain_ih gain_hh gain_cell bias_cell peephole"
RECORD = "gates u u_scale cell"
Forward = structure(
    f"rows:rows hidden:long {WEIGHTS} x product restored_h restored_c restored_product "
    f"second_product {RECORD} middle h h_state h_wide c_state cells zoneout:zoneout"
)
Backward = structure(
    f"rows:rows next:rows previous_count:long hidden:long {WEIGHTS} product second_product "
    f"{RECORD} h cells h_before cells_before h0 c0 restored_h restored_c sum_delta sum_h sum_c d_h "
    "d_cells carry dc delta extra delta_u previous previous_c clip:int limit:double norms x made "
    "zoneout:zoneout"
)
GROUP = "rows:long columns:long first:long count:long groups:int group:int"
NormalizeRows = structure(f"{GROUP} values scales")
NormalizeRowsBackward = structure(f"{GROUP} d gain values scales to")
DOUBLE = 1


@dataclass(frozen=True)
class Case:
    cell: str
    normalized: bool = True
    peephole: bool = False
    counts: tuple = (4, 4, 2)  # rows of each step
    hidden: int = 37
    inputs: int = 5
    grad_clip: float | tuple | None = None
    zoneout: str | None = None  # "masks" or "share"

    @property
    def gates(self):
        return reference.CELLS[self.cell].gates

    @property
    def groups(self):
        """(first column, columns) of what is normalised together."""
        h = self.hidden
        return [(0, 2 * h), (2 * h, h)] if self.gates == 3 else [(0, self.gates * h)]


class Run:
    """What goes in, what the kernels say and what the reference says."""

    def __init__(self, kernels, case):
        self.kernels, self.case = kernels, case
        random = np.random.default_rng(len(case.cell))
        g, h, rows, batch = case.gates, case.hidden, sum(case.counts), case.counts[0]

        def draw(*shape, around=0.0, there=True):
            return random.uniform(-1, 1, shape) + around if there else None

        lstm = case.cell == "lstm"
        self.x, self.w_ih, self.w_hh = (
            draw(rows, case.inputs),
            draw(g * h, case.inputs),
            draw(g * h, h),
        )
        self.h0, self.c0 = draw(batch, h), draw(batch, h, there=lstm)
        self.restored = draw(batch, h), draw(batch, h, there=lstm)
        self.resets = random.random(rows) < 0.4
        norm = case.normalized
        self.weights = {
            "b_ih": draw(g * h),
            "b_hh": draw(g * h),
            "gain_ih": draw(g * h, around=1, there=norm),
            "gain_hh": draw(g * h, around=1, there=norm),
            "gain_cell": draw(h, around=1, there=norm and lstm),
            "bias_cell": draw(h, there=norm and lstm),
            "peephole": draw(3 * h, there=case.peephole),
        }
        self.d_h, self.d_h_n = draw(rows, h), draw(batch, h)
        self.d_cells, self.d_c_n = draw(rows, h, there=lstm), draw(batch, h, there=lstm)
        self.offsets = np.cumsum(case.counts) - case.counts
        self.holds = [random.random((rows, h)) < 0.3 for _ in range(1 + lstm)]
        if case.zoneout != "masks":
            self.holds = [np.array(SHARE if case.zoneout else 0.0)] * (1 + lstm)

    def check(self):
        self.forward()
        found = self.backward()
        for name, wanted in self.expected().items():
            error = np.abs(found[name] - wanted).max() / max(1, np.abs(wanted).max())
            assert error <= 1e-11, f"{name}: off by {error:.2g}"

    def expected(self):
        w = self.weights
        weights = [self.w_ih, self.w_hh, w["b_ih"], w["b_hh"], None]
        weights += [w[name] for name in WEIGHTS.split()[2:]]
        options = {"batch_sizes": list(self.case.counts), "resets": self.resets}
        options |= {"reset_h": self.restored[0], "reset_c": self.restored[1]}
        options["zoneout"] = (*self.holds, 0.0)[:2]
        result = reference.forward(self.case.cell, self.x, self.h0, self.c0, weights, **options)
        upstream = self.d_h, self.d_h_n, self.d_c_n, self.d_cells
        clip = {"grad_clip": self.case.grad_clip}
        gradients = reference.backward(result, *upstream, **clip)
        dh = reference.hidden_gradients(result, *upstream, **clip)
        names = ["w_ih", "w_hh", "h0", "reset_h", "b_ih"]
        names += ["c0", "reset_c"] if self.c0 is not None else []
        truth = {name: getattr(gradients, name) for name in names}
        truth |= {"output": result.output, "h_n": result.h_n}
        truth["norms"] = np.linalg.norm(dh, axis=-1)
        return truth | ({} if self.c0 is None else {"cells": result.cells, "c_n": result.c_n})

    # Arrays are kept in `own`; where an address is taken, `at` is a row.

    def forward(self):
        case, own, kernels = self.case, {}, self.kernels
        self.own, rows, g, h = own, len(self.x), case.gates, case.hidden
        for name, value in self.weights.items():
            self._put(name, value)
        self._put("wx", self.x @ self.w_ih.T)
        self._empty("x_scale", rows, len(case.groups))
        for k, (first, count) in enumerate(case.groups if case.normalized else ()):
            group = rows, g * h, first, count, len(case.groups), k
            args = NormalizeRows(*group, *self._at(0, "wx", "x_scale"))
            kernels.call("run_normalize_rows", DOUBLE, args)
        for name, columns in {"h": h, "cells": h, "middle": h}.items():
            self._empty(name, rows, columns)
        for name, columns in {"gates": g * h, "u": g * h, "u_scale": len(case.groups)}.items():
            self._empty(name, rows, columns)
        self._empty("cell", rows, 2)
        for name, value in {"h_state": self.h0, "c_state": self.c0, "resets": self.resets}.items():
            self._put(name, value)
        if case.zoneout == "masks":
            for name, hold in zip(("units_h", "units_c"), self.holds):
                self._put(name, hold)
        self._put("restored_h", self.restored[0])
        self._put("restored_c", self.restored[1])
        recurrent = self.w_hh[: 2 * h] if case.cell == "gru_reset_before" else self.w_hh
        self._put("restored_product", self.restored[0] @ recurrent.T)
        for step, count in enumerate(case.counts):
            at = self.offsets[step]
            product = kernels.array(own["h_state"][:count] @ recurrent.T, "product")
            p = Forward(self._rows(step), h, *self._at(0, *WEIGHTS.split()))
            (p.x,), p.product = self._at(at, "wx"), pointer(product)
            for name in ("restored_h", "restored_c", "restored_product", "h_state", "c_state"):
                setattr(p, name, self._at(0, name)[0])
            for name in (*RECORD.split(), "middle", "h", "cells"):
                setattr(p, name, self._at(at, name)[0])
            p.zoneout = self._zoneout(at)
            self._call("run_normalized_forward", p, 0)
            if case.cell == "gru_reset_before":
                second = own["middle"][at : at + count] @ self.w_hh[2 * h :].T
                second = kernels.array(second, "second")
                p.second_product = pointer(second)
                self._call("run_normalized_forward", p, 1)

    def backward(self):
        case, own, kernels = self.case, self.own, self.kernels
        rows, g, h, batch = len(self.x), case.gates, case.hidden, case.counts[0]
        before = case.cell == "gru_reset_before"
        recurrent = 2 * h if before else g * h
        given = {"h0": self.h0, "c0": self.c0, "d_h": self.d_h, "d_cells": self.d_cells}
        given |= {"carry": self.d_h_n, "dc": self.d_c_n, "sum_delta": np.zeros((batch, recurrent))}
        given |= {"sum_h": np.zeros((batch, h)), "sum_c": np.zeros((batch, h))}
        for name, value in given.items():
            self._put(name, value)
        each = {"delta": g * h, "delta_u": g * h, "extra": h, "previous": h, "previous_c": h}
        each |= {"norms": 1, "made": h}
        kinds = {float: 1, tuple: 2}  # of Clip
        clip, limit = kinds.get(type(case.grad_clip), 0), case.grad_clip or 0.0
        limit = limit[1] if clip == 2 else limit
        for name, columns in each.items():
            self._empty(name, rows, columns)
        if not case.peephole:
            own.pop("previous_c")
        product, following = None, Rows()
        shared = [
            "h0",
            "c0",
            "restored_h",
            "restored_c",
            "sum_delta",
            "sum_h",
            "sum_c",
            "carry",
            "dc",
        ]
        for step in reversed(range(len(case.counts))):
            at, count = self.offsets[step], case.counts[step]
            p = Backward(self._rows(step), following, hidden=h, product=pointer(product))
            p.clip, p.limit, p.zoneout = clip, limit, self._zoneout(at)
            (p.x,) = self._at(at, "wx")
            for name in (*WEIGHTS.split(), *shared):
                setattr(p, name, self._at(0, name)[0])
            for name in (*RECORD.split(), "h", "cells", "d_h", "d_cells", *each):
                setattr(p, name, self._at(at, name)[0])
            if step:
                p.previous_count = count
                p.h_before, p.cells_before = self._at(self.offsets[step - 1], "h", "cells")
            self._call("run_normalized_backward", p, 0)
            part = slice(at, at + count)
            if before:
                second = own["delta_u"][part, recurrent:] @ self.w_hh[recurrent:]
                second = kernels.array(second, "second")
                p.second_product = pointer(second)
                self._call("run_normalized_backward", p, 1)
            product = own["delta_u"][part, :recurrent] @ self.w_hh[:recurrent]
            product, following = kernels.array(product, "product"), p.rows
        p = Backward(Rows(), following, hidden=h, product=pointer(product))
        (p.carry,), p.zoneout = self._at(0, "carry"), self._zoneout(0)
        self._call("run_normalized_backward", p, 0)

        delta_x = own["delta"]
        if case.normalized:
            delta_x = self._empty("delta_x", rows, g * h)
            for k, (first, count) in enumerate(case.groups):
                group = rows, g * h, first, count, len(case.groups), k
                names = "delta", "gain_ih", "wx", "x_scale", "delta_x"
                args = NormalizeRowsBackward(*group, *self._at(0, *names))
                kernels.call("run_normalize_rows_backward", DOUBLE, args)
        delta_u, operands = own["delta_u"], [own["previous"]] * g
        if before:
            operands[2] = own["middle"]
        parts = [d.T @ o for d, o in zip(np.split(delta_u, g, 1), operands)]
        return {
            "output": own["h"],
            "h_n": own["h_state"],
            "cells": own["cells"],
            "c_n": own.get("c_state"),
            "w_ih": delta_x.T @ self.x,
            "w_hh": np.concatenate(parts),
            "b_ih": own["delta"].sum(0),
            "h0": own["carry"],
            "c0": own.get("dc"),
            "reset_h": own["sum_h"] + own["sum_delta"] @ self.w_hh[:recurrent],
            "reset_c": own["sum_c"],
            "norms": own["norms"][:, 0],
        }

    def _call(self, name, args, phase):
        self.kernels.call(name, CELLS.index(self.case.cell), DOUBLE, phase, args)

    def _rows(self, step):
        rows = Rows(step, self.case.counts[step])
        (rows.resets,) = self._at(self.offsets[step], "resets")
        return rows

    def _zoneout(self, row):
        if not self.case.zoneout:
            return Zoneout()
        units_h, units_c = self._at(row, "units_h", "units_c")
        return Zoneout(True, units_h, SHARE, units_c, SHARE)

    def _at(self, row, *names):
        """Addresses of a row of arrays, None for arrays that are not there."""
        return [pointer(self.own[name][row:]) if name in self.own else None for name in names]

    def _put(self, name, value):
        if value is not None:
            self.own[name] = self.kernels.array(value, name)

    def _empty(self, name, rows, columns):
        self.own[name] = self.kernels.empty((rows, columns), np.float64, name)
        return self.own[name]
