"""Rows of the group "online": real-time recurrent learning, beside the same in torch operations.

A call is ``steps`` steps of all streams, each with the gradient of a loss. Ours does not take the
same time at every step ("exact" lets the influence catch up once in `cases.PENDING` steps), so that
many steps are timed and shared out. The peer is what a user of torch writes without a kernel: the
influence of every parameter on every unit as one tensor, and `torch.einsum` over it (exact), or the
influence on its own unit alone, element by element (snap1).
"""

import torch

import rnn_ext

from . import cases, gate, timing
from .measure import describe, first_line
from .peers import OURS, TORCH
from .problem import CLASSES

CHECKED_STEPS, CHECKED_SEQUENCES = 5, 2  # in float64 a large influence takes gigabytes


class InTorch:
    """RTRL of one layer in torch operations; of mode "exact" or "snap1"."""

    def __init__(self, module, mode, batch):
        self.module, self.exact = module, mode == "exact"
        w_ih, w_hh, b_ih, b_hh = (p.detach() for p in module.parameters())
        self.weights, self.hidden = (w_ih, w_hh, b_ih, b_hh), w_hh.size(1)
        self.gates = len(w_hh) // self.hidden
        self.lstm = self.gates == 4
        self.h = w_hh.new_zeros(batch, self.hidden)
        self.c = torch.zeros_like(self.h)
        rows = (1 + self.lstm) * (self.hidden if self.exact else 1)
        count = sum(p.numel() for p in self.weights)
        self.influence = w_hh.new_zeros(batch, rows, count)

    def step(self, x):
        """As docs/learning.md has it: the slopes [B, states, G, H] of the state in W x + b and in
        U h + b', D M, and I, which is added and never stored."""
        w_ih, w_hh, b_ih, b_hh = self.weights
        a, r = torch.addmm(b_ih, x, w_ih.t()), torch.addmm(b_hh, self.h, w_hh.t())
        slopes, jacobian = getattr(self, f"_gates_of_{self.gates}")(a, r, w_hh)
        if self.exact:
            rows = [torch.cat(row, 2) for row in jacobian]
            carried = torch.einsum("bij,bjp->bip", torch.cat(rows, 1), self.influence)
        else:
            d = torch.stack([torch.stack(row, 1) for row in jacobian], 1)  # [B, states, states, H]
            carried = torch.cat([self._by_unit(d, part) for part in self._parts()], -1)
        self.influence = carried
        one = torch.ones_like(x[:, :1])
        operands = (x, 0), (self.before, 1), (one, 0), (one, 1)  # of W, U, b and b'
        for part, (operand, side) in zip(self._parts(), operands):
            part = part.unflatten(-1, (self.gates, self.hidden, -1))
            if self.exact:  # a unit's own row: [B, states, H, G, H, n] to [B, states, G, n, H]
                part = part.unflatten(1, (1 + self.lstm, self.hidden)).diagonal(dim1=2, dim2=4)
                part += slopes[side].unsqueeze(3) * operand[:, None, None, :, None]
            else:
                part += slopes[side].unsqueeze(4) * operand[:, None, None, None]
        return self.h

    def _parts(self):
        return self.influence.split([w.numel() for w in self.weights], -1)

    def _by_unit(self, d, part):
        part = part.unflatten(-1, (self.gates, self.hidden, -1))
        carried = torch.einsum("bsth,btghn->bsghn", d, part)
        if self.lstm:
            carried[:, 1, 3] = 0  # in one step the gate o does not touch c
        return carried.flatten(2)

    def _through(self, slope, w_hh):
        """sum over gates of diag(slope) U, from [B, G, H]; of SnAp-1 its diagonal."""
        blocks = w_hh.view(self.gates, self.hidden, self.hidden)
        if self.exact:
            return torch.einsum("bgi,gij->bij", slope, blocks)
        return torch.einsum("bgi,gi->bi", slope, blocks.diagonal(dim1=1, dim2=2))

    def _diagonal(self, values):
        return torch.diag_embed(values) if self.exact else values

    def _gates_of_1(self, a, r, w_hh):
        self.before, self.h = self.h, torch.tanh(a + r)
        slope = (1 - self.h**2)[:, None, None]
        return (slope, slope), [[self._through(slope[:, 0], w_hh)]]

    def _gates_of_3(self, a, r, w_hh):
        (ar, az, an), (rr, rz, rn) = a.chunk(3, 1), r.chunk(3, 1)
        reset, z = torch.sigmoid(ar + rr), torch.sigmoid(az + rz)
        n, self.before = torch.tanh(an + reset * rn), self.h
        self.h = (1 - z) * n + z * self.before
        s_n, s_z = (1 - z) * (1 - n**2), (self.before - n) * z * (1 - z)
        s_r = s_n * rn * reset * (1 - reset)
        of_input, of_hidden = (torch.stack((s_r, s_z, s), 1) for s in (s_n, s_n * reset))
        jacobian = self._through(of_hidden, w_hh) + self._diagonal(z)
        return (of_input.unsqueeze(1), of_hidden.unsqueeze(1)), [[jacobian]]

    def _gates_of_4(self, a, r, w_hh):
        i, f, g, o = (a + r).chunk(4, 1)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        c, self.before = self.c, self.h
        self.c = f * c + i * g
        tanh_c = torch.tanh(self.c)
        self.h = o * tanh_c
        through = o * (1 - tanh_c**2)
        s_c = torch.stack(
            (g * i * (1 - i), c * f * (1 - f), i * (1 - g**2), torch.zeros_like(o)), 1
        )
        s_h = through.unsqueeze(1) * s_c
        s_h[:, 3] = tanh_c * o * (1 - o)
        of_h = [self._through(s_h, w_hh), self._diagonal(through * f)]
        of_c = [self._through(s_c, w_hh), self._diagonal(f)]
        slopes = torch.stack((s_h, s_c), 1)
        return (slopes, slopes), [of_h, of_c]

    def accumulate(self, d_h):
        if self.exact:
            found = torch.einsum("bi,bip->p", d_h, self.influence[:, : self.hidden])
            found = found.split([w.numel() for w in self.weights])
        else:
            by_unit = (p[:, 0].unflatten(-1, (self.gates, self.hidden, -1)) for p in self._parts())
            found = [torch.einsum("bh,bghn->ghn", d_h, part) for part in by_unit]
        for parameter, gradient in zip(self.module.parameters(), found):
            gradient = gradient.reshape(parameter.shape)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


class Ours:
    def __init__(self, module, mode, batch):
        self.rtrl = rnn_ext.online.RTRL(module, mode)
        self.step, self.accumulate = self.rtrl.step, self.rtrl.accumulate


class Problem:
    """The weights, and the input and upstream gradient of a few steps."""

    def __init__(self, case, cell):
        self.case, self.cell = case, cell
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.weights = getattr(torch.nn, CLASSES[cell])(case.inputs, case.hidden).state_dict()
            self.x = torch.randn(CHECKED_STEPS, case.batch, case.inputs)
            self.d_h = torch.randn(CHECKED_STEPS, case.batch, case.hidden)

    def module(self, dtype):
        module = getattr(rnn_ext, CLASSES[self.cell])(self.case.inputs, self.case.hidden)
        module.load_state_dict(self.weights)
        return module.to(dtype)

    @torch.no_grad()
    def results(self, kind, mode, dtype):
        """The states of a few steps and the gradients of their losses."""
        module = self.module(dtype)
        some = [part[:, :CHECKED_SEQUENCES].to(dtype) for part in (self.x, self.d_h)]
        learner, states = kind(module, mode, some[0].size(1)), []
        for x, d_h in zip(*some):
            states.append(learner.step(x))
            learner.accumulate(d_h)
        if kind is Ours:
            learner.rtrl.flush()
        gradients = {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
        return {"h": torch.stack(states), **gradients}

    def call(self, kind, mode, rounds=1):
        """What is timed: the case's steps, so many times, with a gradient after each."""
        dtype = getattr(torch, self.case.dtype)
        module = self.module(dtype)
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        learner = kind(module, mode, self.case.batch)
        x, d_h, steps = self.x[0].to(dtype), self.d_h[0].to(dtype), range(rounds * self.case.steps)

        def call():
            for _ in steps:
                learner.step(x)
                learner.accumulate(d_h)

        call()
        return call


def time_row(case, cell, mode, threads, seconds, limits):
    """As `measure.time_row`."""
    row = describe(case, cell, mode, threads) | {"skipped": {}}
    torch.set_num_threads(threads)
    try:
        problem = Problem(case, cell)
        form = "snap1" if mode == "snap1" else "exact"  # chunked has the gradients of exact
        truth = problem.results(InTorch, form, torch.float64)
        rough = problem.results(InTorch, form, torch.float32)
        floor = gate.errors(rough, truth)
        dtype = getattr(torch, case.dtype)
        ours = gate.errors(problem.results(Ours, mode, dtype), truth)
        row["errors"] = {OURS: gate.check_ours(ours, floor, dtype)}
        rounds = cases.PENDING if mode == "exact" else 1
        calls = {OURS: problem.call(Ours, mode, rounds)}
        if mode == "chunked":
            calls["exact"] = problem.call(Ours, "exact")
        else:
            row["errors"][TORCH] = gate.check_peer(floor, dtype)
            calls[TORCH] = problem.call(InTorch, mode)
        with torch.no_grad():
            samples = timing.alternate(calls, seconds)
        samples[OURS] = [sample / rounds for sample in samples[OURS]]
    except gate.Wrong as wrong:
        return row | {"wrong": str(wrong)}
    except Exception as error:  # the other rows are still worth having
        return row | {"wrong": first_line(error)}
    mine = samples[OURS]
    row["times"] = {name: timing.summary(samples[name]) for name in calls if name != "exact"}
    row["ratios"] = {name: timing.ratio(mine, samples[name]) for name in calls if name == TORCH}
    if mode == "chunked":
        ratio = timing.ratio(mine, samples["exact"])
        row["variants"] = {"exact": {"ratio": ratio, "error": row["errors"][OURS]}}
    row["plan"] = f"cpu: real-time recurrent learning, {mode}"
    if limits is not None:
        bound = limits.seconds(case, cell, mode)
        row["limit"] = {"seconds": bound[0], "bound": bound[1]}
    return row
