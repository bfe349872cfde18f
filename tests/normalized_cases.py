"""Layers with layer normalisation or peepholes: cases, and a loop of torch functions."""

from dataclasses import replace

import torch
from cases import ALL_NAMES, GATES, make_case, run
from torch.nn.functional import layer_norm, linear

import rnn_ext
from rnn_ext import normalized
from rnn_ext.zoneout import with_masks

# Cell, whether it is normalised, whether it has peepholes.
KINDS = {
    "rnn_tanh": ("rnn_tanh", True, False),
    "rnn_relu": ("rnn_relu", True, False),
    "rnn_sigmoid": ("rnn_sigmoid", True, False),
    "lstm": ("lstm", True, False),
    "peephole": ("lstm", False, True),
    "lstm_peephole": ("lstm", True, True),
    "gru": ("gru", True, False),
    "gru_reset_before": ("gru_reset_before", True, False),
}

# Layers of modules.
OPTIONS = {
    "RNN": (rnn_ext.RNN, {"layer_norm": True}),
    "RNN-relu": (rnn_ext.RNN, {"layer_norm": True, "nonlinearity": "relu"}),
    "LSTM": (rnn_ext.LSTM, {"layer_norm": True}),
    "LSTM-peephole": (rnn_ext.LSTM, {"peephole": True}),
    "LSTM-both": (rnn_ext.LSTM, {"layer_norm": True, "peephole": True}),
    "GRU": (rnn_ext.GRU, {"layer_norm": True}),
    "GRU-before": (rnn_ext.GRU, {"layer_norm": True, "reset_after": False}),
}


def make_normalized(kind, shape, *, bias=True, seed=0, **options):
    """A case of `cases.make_case`, with the extras among its tensors."""
    cell, norm, peephole = KINDS[kind]
    case = make_case(cell, shape, bias=bias, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed + 1)

    def random(size, around=0.0):
        values = torch.rand(size, generator=generator, dtype=torch.float64) - 0.5 + around
        return values.bfloat16().double()

    hidden = shape[3]
    rows, lstm = GATES.get(cell, 1) * hidden, norm and cell == "lstm"
    extras = [
        random(rows, 1.0) if norm else None,
        random(rows, 1.0) if norm else None,
        random(hidden, 1.0) if lstm else None,
        random(hidden) if lstm and bias else None,
        random(3 * hidden) if peephole else None,
    ]
    return replace(case, tensors=case.tensors + extras)


def reordered(case, order):
    """The case with its hidden units in another order: the same but for the order of the sums."""
    hidden = len(order)

    def by_unit(name, t):
        if t is None or name == "input":
            return t
        if name in ("h0", "c0"):
            return t[:, order]
        t = t.unflatten(0, (-1, hidden))[:, order].flatten(0, 1)
        return t[:, order] if name == "w_hh" else t

    tensors = [by_unit(name, t) for name, t in zip(ALL_NAMES, case.tensors)]
    upstream = [None if d is None else d[..., order] for d in case.upstream]
    zoneout = with_masks(case.zoneout, lambda hold: hold[..., order])
    return replace(case, tensors=tensors, upstream=upstream, zoneout=zoneout)


def make(name, *args, **more):
    kind, options = OPTIONS[name]
    layers = kind(*(args or (5, 12)), **options, **more)
    with torch.no_grad():
        for key, parameter in layers.named_parameters():
            if "layer_norm" in key:
                parameter.add_(torch.rand_like(parameter) - 0.5)
    return layers


def as_function(case):
    """``normalized.layer`` of the tensors that the case has, and these."""
    present = [i for i, t in enumerate(case.tensors) if t is not None]

    def function(*given):
        tensors = list(case.tensors)
        for i, t in zip(present, given):
            tensors[i] = t
        results = normalized.layer(case.cell, *tensors, **case.options())
        return tuple(r for r in results if r is not None)

    return function, [case.tensors[i].clone().requires_grad_() for i in present]


def run_ours(case):
    return run(normalized.layer, case)


def run_loop(case):
    return run(loop, case)


def loop(
    cell, input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, *extras, batch_sizes, reverse, resets=None,
    zoneout=None,
):  # fmt: skip
    """As a user would write it, in the dtype of the input; one sequence at a time if ragged."""
    weights = w_ih, w_hh, b_ih, b_hh, *extras
    if batch_sizes is None:
        return _loop(cell, input, h0, c0, weights, reverse, resets, zoneout)
    batch, offset = (
        int(batch_sizes[0]),
        torch.cat((batch_sizes.new_zeros(1), batch_sizes.cumsum(0))),
    )
    found = []
    for b in range(batch):
        rows = [int(offset[t]) + b for t in range(len(batch_sizes)) if batch_sizes[t] > b]
        states = [None if s is None else s[b::batch] for s in (h0, c0)]
        cut = None if resets is None else resets[rows].unsqueeze(1)
        holds = with_masks(zoneout, lambda hold, rows=rows: hold[rows].unsqueeze(1))
        results = _loop(cell, input[rows].unsqueeze(1), *states, weights, reverse, cut, holds)
        found.append((rows, results))
    order = torch.tensor([row for rows, _ in found for row in rows]).argsort()

    def packed(k):
        if found[0][1][k] is None:
            return None
        return torch.cat([results[k].squeeze(1) for _, results in found])[order]

    def last(k):
        return None if found[0][1][k] is None else torch.cat([results[k] for _, results in found])

    return packed(0), last(1), last(2), packed(3)


def _share(hold, step):
    return hold if hold.dim() == 0 else hold[step]


def _loop(cell, input, h0, c0, weights, reverse, resets, zoneout=None):
    w_ih, w_hh, b_ih, b_hh, gain_ih, gain_hh, gain_cell, bias_cell, peephole = weights
    steps, batch = input.shape[:2]
    hidden = w_hh.size(1)
    h, c = h0[:batch], None if c0 is None else c0[:batch]
    restored = (h0[batch:], None if c0 is None else c0[batch:])
    if len(h0) == batch:
        restored = torch.zeros_like(h), None if c is None else torch.zeros_like(c)

    def norm(v, gain, bias=None):
        return v if gain is None else layer_norm(v, v.shape[-1:], gain, bias)

    def half(v, w, gain, bias, first, last):
        first, last = first * hidden, last * hidden
        a = norm(linear(v, w[first:last]), None if gain is None else gain[first:last])
        return a if bias is None else a + bias[first:last]

    def both(v, x, first, last):
        return half(x, w_ih, gain_ih, b_ih, first, last) + half(v, w_hh, gain_hh, b_hh, first, last)

    outputs, cells = [None] * steps, [None] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        at = t + 1 if reverse else t
        if resets is not None and at < steps:
            cut = resets[at].unsqueeze(1)
            h = torch.where(cut, restored[0], h)
            c = None if c is None else torch.where(cut, restored[1], c)
        x, before = input[t], (h, c)
        if cell == "lstm":
            i, f, g, o = both(h, x, 0, 4).chunk(4, 1)
            p_i, p_f, p_o = (0, 0, 0) if peephole is None else peephole.chunk(3)
            c = torch.sigmoid(f + p_f * c) * c + torch.sigmoid(i + p_i * c) * torch.tanh(g)
            h = torch.sigmoid(o + p_o * c) * torch.tanh(norm(c, gain_cell, bias_cell))
        elif cell.startswith("rnn"):
            h = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid}[cell[4:]](
                both(h, x, 0, 1)
            )
        else:
            r, z = torch.sigmoid(both(h, x, 0, 2)).chunk(2, 1)
            of_x = half(x, w_ih, gain_ih, b_ih, 2, 3)
            if cell == "gru":
                n = torch.tanh(of_x + r * half(h, w_hh, gain_hh, b_hh, 2, 3))
            else:
                n = torch.tanh(of_x + half(r * h, w_hh, gain_hh, b_hh, 2, 3))
            h = (1 - z) * n + z * h
        if zoneout is not None:
            h, c = (
                None if old is None else torch.lerp(new, old, _share(hold, t).to(new.dtype))
                for new, old, hold in zip((h, c), before, zoneout)
            )
        outputs[t], cells[t] = h, c
    return torch.stack(outputs), h, c, None if c is None else torch.stack(cells)
