"""The step-wise CUDA kernels one by one: a layer driven from NumPy, beside rnn_ext.reference."""

import ctypes
from dataclasses import dataclass

import numpy as np
from cuda_on_cpu import Number, from_bits, pointer, to_bits

from rnn_ext import reference

SOURCES = [f"csrc/cuda/{name}.cu" for name in ("step_forward", "step_backward", "column_sums")]
SOURCES += ["tests/cuda_on_cpu/entries/step.cpp"]
CELLS = ("rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm", "gru", "gru_reset_before")  # CellKind
CLIPS = (None, "value", "norm")  # Clip
SHARE = 0.375  # of a state that zoneout holds
STORAGE = {  # cuda::Storage, and the error that it is allowed
    Number.FLOAT32: (0, 1e-5),
    Number.FLOAT64: (1, 1e-12),
    Number.FLOAT16: (2, 0.01),
    Number.BFLOAT16: (3, 0.06),
}


def structure(text):
    """A ctypes struct of "name:type" words; without a type, a pointer."""
    types = {"": ctypes.c_void_p, "long": ctypes.c_int64, "bool": ctypes.c_bool, "rows": Rows}
    types |= {"int": ctypes.c_int, "double": ctypes.c_double, "zoneout": Zoneout}
    fields = [(name, types[kind]) for name, _, kind in (w.partition(":") for w in text.split())]
    return type("Struct", (ctypes.Structure,), {"_fields_": fields})


Rows = Zoneout = None
Rows = structure("step:long count:long lengths resets")
Zoneout = structure("on:bool units_h share_h:double units_c share_c:double")
Forward = structure(
    "rows:rows hidden:long b_ih b_hh product restored_h restored_c restored_product second_product "
    "gates middle h h_state h_wide c_state cells save:bool zoneout:zoneout"
)
Project = structure("rows:rows output:long product h h_state restored_h zoneout:zoneout")
Backward = structure(
    "rows:rows next:rows previous_step:long previous_count:long hidden:long output:long product "
    "second_product gates middle h cells h_before cells_before h0 c0 restored_h restored_c "
    "sum_delta sum_h sum_c d_h d_cells carry dc delta dh clip:int limit:double norms previous "
    "zoneout:zoneout"
)
Sums = structure("rows:long columns:long row_stride:long matrix scratch sums")


@dataclass(frozen=True)
class Case:
    cell: str
    projected: bool = False
    layout: str = "padded"  # or "lengths", "packed"
    reverse: bool = False
    resets: bool = True
    clip: str | None = None  # "value" or "norm": of dL/dh
    restored: bool = False  # resets put another state than zeros in the place of the carried one
    zoneout: str | None = None  # "masks" or "share"
    steps: int = 4
    batch: int = 6
    hidden: int = 37

    @property
    def gates(self):
        return reference.CELLS[self.cell].gates

    @property
    def output(self):
        return 5 if self.projected else self.hidden

    @property
    def order(self):
        return range(self.steps)[:: -1 if self.reverse else 1]

    @property
    def lengths(self):
        lengths = {"padded": [9] * 6, "lengths": [4, 0, 3, 1, 4, 2], "packed": [4, 4, 3, 2, 2, 1]}
        return np.minimum(lengths[self.layout][: self.batch], self.steps)


class Run:
    """A case in one number format: what goes in, what the reference says, what the kernels say."""

    def __init__(self, kernels, case, number):
        self.kernels, self.case, self.number = kernels, case, number
        self.wide = np.float64 if number is Number.FLOAT64 else np.float32
        self.storage, self.tolerance = STORAGE[number]
        random = np.random.default_rng(len(case.cell))
        t, b, h, p, g = case.steps, case.batch, case.hidden, case.output, case.gates

        def draw(*shape, scale=1.0):
            return from_bits(to_bits(random.uniform(-scale, scale, shape), number), number)

        self.wx, self.h0, self.c0 = draw(t, b, g * h, scale=2), draw(b, p), draw(b, h)
        self.u, self.w_hr = draw(g * h, p, scale=h**-0.5), draw(p, h, scale=h**-0.5)
        self.b_ih, self.b_hh = draw(g * h, scale=0.5), draw(g * h, scale=0.5)
        if case.cell == "rnn_relu":  # away from the kink
            self.b_ih = np.where(np.arange(h) % 2, 4.0, -4.0)
            self.u /= 8
        self.d_h, self.d_cells, self.d_h_n = draw(t, b, p), draw(t, b, h), draw(b, p)
        self.d_c_n = draw(b, h)
        self.resets = (random.random((t, b)) < 0.3) & case.resets
        # Well within what arrives; where numbers are rounded, few of them are close to it.
        self.limit = 0.4 if case.clip == "value" else 0.4 * np.sqrt(p)
        self.restored = draw(b, p) * case.restored, draw(b, h) * case.restored
        self.holds = [random.random((t, b, units)) < 0.3 for units in (p, h)]
        if case.zoneout == "share":
            self.holds = [np.full(hold.shape, SHARE) for hold in self.holds]
        self.alive = np.arange(t)[:, None] < case.lengths
        self.counts = self.alive.sum(1) if case.layout == "packed" else np.full(t, b)
        self.offsets = np.cumsum(self.counts) - self.counts

    def check(self):
        self.forward()
        self.backward()
        truth = self.expected()
        for name, wanted in truth.items():
            got = self.results[name]
            if wanted.ndim == 3:
                wanted = np.concatenate([w[:n] for w, n in zip(wanted, self.counts)])
            got = from_bits(got, self.number) if got.dtype != self.wide else got.astype(float)
            scale = max(1.0, np.abs(wanted).max())
            error = np.abs(got - wanted).max() / scale  # NaN fails below
            assert error <= self.tolerance, f"{name}: off by {error:.2g}"

    def expected(self):
        """name -> [T, B, ...] or [B, ...] in float64, from the steps of the reference."""
        case, cell = self.case, reference.CELLS[self.case.cell]
        lstm = case.cell == "lstm"
        identity = np.eye(case.gates * case.hidden)
        w_hr = self.w_hr if case.projected else None
        weights = reference.Weights(identity, self.u, self.b_ih, self.b_hh, w_hr)
        state = [self.h0.copy(), self.c0.copy()][: 1 + lstm]
        shape = (case.steps, case.batch)
        out = {"h": np.zeros((*shape, case.output)), "previous": np.zeros((*shape, case.output))}
        if lstm:
            out["cells"] = np.zeros((*shape, case.hidden))
        records = {}
        for t in case.order:
            rows = np.flatnonzero(self.alive[t])
            cut = rows[self.resets[t, rows]]
            for s, restored in zip(state, self.restored):
                s[cut] = restored[cut]
            out["previous"][t, rows] = state[0][rows]
            records[t] = cell.step(self.wx[t, rows], *(s[rows] for s in state), weights)
            each = zip(state, records[t].state, ("h", "cells"), self.holds)
            for s, new, name, hold in each:
                z = hold[t, rows] * bool(case.zoneout)
                s[rows] = out[name][t, rows] = z * s[rows] + (1 - z) * new
        out["h_state"] = state[0]
        if lstm:
            out["c_state"] = state[1]

        out["delta"] = np.zeros((*shape, case.gates * case.hidden))
        if case.clip == "norm":
            out["norms"] = np.zeros((*shape, 1))
        d_state = [self.d_h_n.copy(), self.d_c_n.copy()][: 1 + lstm]
        d_restored = [np.zeros_like(d) for d in d_state]
        for t in case.order[::-1]:
            rows = np.flatnonzero(self.alive[t])
            upstream = zip(d_state, (self.d_h, self.d_cells))
            reaching = [d[rows] + at[t, rows] for d, at in upstream]
            norms = np.linalg.norm(reaching[0], axis=-1, keepdims=True)
            if case.clip == "norm":
                out["norms"][t, rows] = norms
                reaching[0] = reaching[0] * np.minimum(1, self.limit / norms)
            elif case.clip:
                reaching[0] = reaching[0].clip(-self.limit, self.limit)
            held = [z[t, rows] * bool(case.zoneout) * d for z, d in zip(self.holds, reaching)]
            made = (d - kept for d, kept in zip(reaching, held))
            step = cell.step_backward(records[t], *made, weights)
            out["delta"][t, rows] = step.x
            cut = self.resets[t, rows][:, None]
            each = zip(d_state, d_restored, map(np.add, step.state, held))
            for d, kept, before in each:
                d[rows] = np.where(cut, 0, before)
                kept[rows] += np.where(cut, before, 0)
        out["carry"] = d_state[0]
        if lstm:
            out["dc"] = d_state[1]
        if case.restored:
            out |= zip(("d_restored_h", "d_restored_c"), d_restored)
        out["sums"] = out["delta"].sum((0, 1))
        return out

    # Kernels. Arrays are kept in `own`; where an address is taken, `at` is a row.

    def forward(self):
        case, own = self.case, {}
        self.own, h = own, case.hidden
        before = case.cell == "gru_reset_before"
        rows = int(self.counts.sum())
        flat = self._rows_of(self.wx)
        own["lengths"] = self.kernels.array(case.lengths.astype(np.int64), "lengths")
        own["resets"] = self.kernels.array(self._rows_of(self.resets), "resets")
        if case.zoneout == "masks":
            for name, hold in zip(("units_h", "units_c"), self.holds):
                own[name] = self.kernels.array(self._rows_of(hold), name)
        for name in ("b_ih", "b_hh", "h0"):
            own[name] = self._stored(getattr(self, name), name)
        own["c0"] = self._wide(self.c0, "c0")
        own["h_state"], own["c_state"] = self._stored(self.h0, "h_state"), self._wide(self.c0, "c")
        own["gates"] = self._stored(flat, "gates")
        own["h"] = own["gates"] if case.gates == 1 else self._empty(rows, case.output, "h")
        own["middle"] = self._empty(rows, h, "middle")
        if self.number.value != self.wide and case.gates == 3:
            own["h_wide"] = self._wide(self.h0, "h_wide")
        if case.cell == "lstm":
            own["cells"] = self.kernels.empty((rows, h), self.wide, "cells")
        if case.restored:
            own["restored_h"] = self._stored(self.restored[0], "restored_h")
            own["restored_c"] = self._wide(self.restored[1], "restored_c")
            u = self.u[: 2 * h] if before else self.u
            own["restored_product"] = self._product(own["restored_h"], u.T)
        for t in case.order:
            at, count = self.offsets[t], self.counts[t]
            u = self.u[: 2 * h] if before else self.u
            product = self._product(own["h_state"][:count], u.T)
            p = Forward(self._rows(t), h, *self._at(0, "b_ih", "b_hh"), pointer(product))
            p.gates, p.h, p.cells, p.middle = self._at(at, "gates", "h", "cells", "middle")
            p.h_state, p.h_wide = self._at(0, "h_state", "h_wide")
            p.c_state = self._at(0, "c_state")[0] if case.cell == "lstm" else None
            p.restored_h, p.restored_c = self._at(0, "restored_h", "restored_c")
            p.restored_product = self._at(0, "restored_product")[0]
            p.save, p.zoneout = True, self._zoneout(at)
            if not self._keeps_middle:
                p.middle = None
            if case.projected:
                p.h = None
            self._call("run_step_forward", p, phase=0)
            if before:
                middle = own["middle"][at : at + count]
                second = self._product(middle, self.u[2 * h :].T)
                p.second_product = pointer(second)
                self._call("run_step_forward", p, phase=1)
            if case.projected:
                middle = self._product(own["middle"][at : at + count], self.w_hr.T)
                args = Project(self._rows(t), case.output, pointer(middle), *self._at(at, "h"))
                args.h_state, args.restored_h = self._at(0, "h_state", "restored_h")
                args.zoneout = p.zoneout
                self.kernels.call("run_step_project", self.storage, args)

    def backward(self):
        case, own, h = self.case, self.own, self.case.hidden
        gru, before = case.cell == "gru", case.cell == "gru_reset_before"
        rows, deltas = int(self.counts.sum()), 4 if gru else case.gates
        own["delta"] = self._empty(rows, deltas * h, "delta")
        own["previous"] = self._empty(rows, case.output, "previous")
        own["norms"] = self.kernels.empty((rows, 1), self.wide, "norms")
        own["carry"], own["dc"] = self._wide(self.d_h_n, "carry"), self._wide(self.d_c_n, "dc")
        own["d_h"] = self._stored(self._rows_of(self.d_h), "d_h")
        own["d_cells"] = self._stored(self._rows_of(self.d_cells), "d_cells")
        if case.projected:
            own["dh"] = self._empty(rows, case.output, "dh")
        u = np.concatenate([self.u[2 * h :], self.u[: 2 * h]]) if gru else self.u
        u, columns = (u[: 2 * h], 2 * h) if before else (u, len(u))
        if case.restored:
            own["sum_delta"] = self._wide(np.zeros((case.batch, columns)), "sum_delta")
            own["sum_h"] = self._wide(np.zeros_like(self.d_h_n), "sum_h")
            own["sum_c"] = self._wide(np.zeros_like(self.d_c_n), "sum_c")
        product, following = None, Rows()
        for i in reversed(range(case.steps)):
            t = case.order[i]
            at, count = self.offsets[t], self.counts[t]
            p = Backward(self._rows(t), following, hidden=h, output=case.output)
            p.product = pointer(product)
            if i:
                p.previous_step = case.order[i - 1]
                p.previous_count = min(count, self.counts[p.previous_step])
                there = self.offsets[p.previous_step]
                p.h_before, p.cells_before = self._at(there, "h", "cells")
            p.gates, p.middle, p.h, p.cells = self._at(at, "gates", "middle", "h", "cells")
            p.h0, p.c0, p.carry, p.dc = self._at(0, "h0", "c0", "carry", "dc")
            p.restored_h, p.restored_c = self._at(0, "restored_h", "restored_c")
            p.sum_delta, p.sum_h, p.sum_c = self._at(0, "sum_delta", "sum_h", "sum_c")
            p.d_h, p.d_cells, p.delta = self._at(at, "d_h", "d_cells", "delta")
            p.dh, p.previous, p.norms = self._at(at, "dh", "previous", "norms")
            p.clip, p.limit = CLIPS.index(case.clip), self.limit
            p.zoneout = self._zoneout(at)
            if not self._keeps_middle:
                p.middle = None
            if case.clip == "norm":
                kind = CELLS.index(case.cell)
                self.kernels.call("run_step_norms", kind, self.storage, p)
            self._call("run_step_backward", p, phase=0)
            if before or case.projected:
                if before:
                    second = self._product(own["delta"][at : at + count, 2 * h :], self.u[2 * h :])
                else:
                    second = self._product(own["dh"][at : at + count], self.w_hr)
                p.second_product = pointer(second)
                self._call("run_step_backward", p, phase=1)
            product = self._product(own["delta"][at : at + count, :columns], u)
            following = p.rows
        p = Backward(Rows(), following, hidden=h, output=case.output, product=pointer(product))
        p.carry, p.zoneout.on = self._at(0, "carry")[0], bool(case.zoneout)
        self._call("run_step_backward", p, phase=0)
        self.results = dict(own)
        if case.restored:
            through_u = own["sum_delta"] @ self.u[:columns]
            self.results["d_restored_h"] = self._wide(own["sum_h"] + through_u, "d_restored_h")
            self.results["d_restored_c"] = own["sum_c"]
        self.results["delta"] = own["delta"][:, h if gru else 0 :]
        scratch = self.kernels.empty((4, deltas * h), self.wide, "scratch")
        sums = self._empty(1, deltas * h, "sums")
        args = Sums(rows, deltas * h, deltas * h, *map(pointer, (own["delta"], scratch, sums)))
        self.kernels.call("run_column_sums", self.storage, args)
        self.results["sums"] = sums[0, h if gru else 0 :]

    def _call(self, name, args, phase):
        self.kernels.call(name, CELLS.index(self.case.cell), self.storage, phase, args)

    def _rows(self, t):
        rows = Rows(t, self.counts[t])
        if self.case.layout == "lengths":
            rows.lengths = pointer(self.own["lengths"])
        if self.case.resets:
            rows.resets = self._at(self.offsets[t], "resets")[0]
        return rows

    @property
    def _keeps_middle(self):
        case = self.case
        return case.gates == 3 or case.projected or (case.gates == 1 and case.zoneout == "share")

    def _zoneout(self, row):
        if not self.case.zoneout:
            return Zoneout()
        units_h, units_c = self._at(row, "units_h", "units_c")
        return Zoneout(True, units_h, SHARE, units_c, SHARE)

    def _at(self, row, *names):
        """Addresses of a row of arrays, None for arrays that are not there."""
        return [pointer(self.own[name][row:]) if name in self.own else None for name in names]

    def _rows_of(self, values):
        return np.concatenate([v[:n] for v, n in zip(values, self.counts)])

    def _product(self, a, b):
        return self._wide(from_bits(a, self.number) @ b, "product")

    def _stored(self, values, name):
        return self.kernels.array(to_bits(values, self.number), name)

    def _wide(self, values, name):
        return self.kernels.array(values.astype(self.wide), name)

    def _empty(self, rows, columns, name):
        return self.kernels.empty((rows, columns), self.number.value, name)
