"""The cells and shapes that tests run over, and one way to run a layer on each side."""

from dataclasses import dataclass, replace

import torch

from rnn_ext import composite, ops, reference

CELLS = ("rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm", "lstm_projected", "gru", "gru_reset_before")
GATES = {"lstm": 4, "gru": 3, "gru_reset_before": 3}
TORCH = {"rnn_tanh": "RNN", "rnn_relu": "RNN", "lstm": "LSTM", "gru": "GRU"}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# T, B, I, H: single entries, tails of every vector width, many rows, one row, many units.
SHAPES = (
    (1, 1, 1, 1),
    (1, 5, 3, 16),
    (5, 3, 7, 5),
    (3, 2, 40, 17),
    (9, 1, 16, 64),
    (4, 13, 31, 33),
    (2, 41, 8, 70),
    (3, 4, 5, 300),
)
# Layouts of a batch, for make_case.
VARIANTS = {
    "padded": {},
    "reverse": {"reverse": True},
    "ragged": {"ragged": True},
    "ragged_reverse": {"ragged": True, "reverse": True},
    "without_bias": {"bias": False},
}
# Layouts, and whether resets restore a state (None: no resets), for zoned.
ZONED = {
    "padded": ({}, None),
    "reverse_resets": ({"reverse": True}, False),
    "ragged": ({"ragged": True}, None),
    "ragged_reverse_resets": ({"ragged": True, "reverse": True}, True),
}
SHARE = 0.375  # of a state that zoneout holds
NAMES = ("input", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
EXTRAS = ("gain_ih", "gain_hh", "gain_cell", "bias_cell", "peephole")  # see normalized_cases.py
ALL_NAMES = NAMES + EXTRAS
RESULTS = ("output", "h_n", "c_n", "cells")
REFERENCE_GRADIENTS = ("x", *ALL_NAMES[1:], "reset_h", "reset_c")


@dataclass
class Case:
    """Arguments of a layer (None where the cell has none) and gradients of its results."""

    cell: str
    tensors: list
    batch_sizes: torch.Tensor | None
    reverse: bool
    upstream: list
    resets: torch.Tensor | None = None  # h0 and c0 may then have what they restore below them
    zoneout: tuple | None = None

    def options(self):
        given = {"batch_sizes": self.batch_sizes, "reverse": self.reverse}
        more = {"resets": self.resets, "zoneout": self.zoneout}
        return given | {name: value for name, value in more.items() if value is not None}

    def to(self, dtype):
        def convert(tensors):
            return [None if t is None else t.to(dtype) for t in tensors]

        return replace(self, tensors=convert(self.tensors), upstream=convert(self.upstream))


def make_case(cell, shape, *, bias=True, ragged=False, reverse=False, seed=0):
    """A random case in float64 whose numbers are exact in bfloat16: each dtype gets the same."""
    steps, batch, inputs, hidden = shape
    generator = torch.Generator().manual_seed(seed)

    def random(*size, bound=1.0):
        values = (torch.rand(*size, generator=generator, dtype=torch.float64) * 2 - 1) * bound
        return values.bfloat16().double()

    projected = cell == "lstm_projected"
    cell = "lstm" if projected else cell
    outputs = max(1, hidden // 2) if projected else hidden
    rows, batch_sizes = (steps, batch), None
    if ragged:
        lengths = torch.randint(1, steps + 1, (batch,), generator=generator)
        lengths[0] = steps
        batch_sizes = torch.stack([(lengths > t).sum() for t in range(steps)])
        rows = (int(batch_sizes.sum()),)
    gates, bound = GATES.get(cell, 1) * hidden, hidden**-0.5
    lstm = cell == "lstm"
    tensors = [
        random(*rows, inputs),
        random(batch, outputs),
        random(batch, hidden) if lstm else None,
        random(gates, inputs, bound=bound),
        random(gates, outputs, bound=bound),
        random(gates, bound=bound) if bias else None,
        random(gates, bound=bound) if bias else None,
        random(outputs, hidden, bound=bound) if projected else None,
    ]
    upstream = [random(*rows, outputs), random(batch, outputs)]
    upstream += [random(batch, hidden), random(*rows, hidden)] if lstm else [None, None]
    return Case(cell, tensors, batch_sizes, reverse, upstream)


def with_resets(case, *, restored, chance=0.4, seed=1):
    """The case with resets, to a random state or to zeros."""
    generator = torch.Generator().manual_seed(seed)
    resets = torch.rand(case.tensors[0].shape[:-1], generator=generator) < chance
    tensors = list(case.tensors)
    for i in (1, 2) if restored else ():
        if tensors[i] is not None:
            tensors[i] = torch.cat((tensors[i], tensors[i].flip(0) * 0.75 + 0.125))
    return replace(case, tensors=tensors, resets=resets)


def with_zoneout(case, share=None, *, seed=2):
    """The case with units that are held at random or, with ``share``, all to that extent."""
    rows, (gates, outputs) = case.tensors[0].shape[:-1], case.tensors[4].shape
    hidden = gates // GATES.get(case.cell, 1)
    generator = torch.Generator().manual_seed(seed)
    holds = [torch.rand(*rows, size, generator=generator) < 0.3 for size in (outputs, hidden)]
    if share is not None:
        holds = [torch.tensor(share, dtype=torch.float64)] * 2
    return replace(case, zoneout=(holds[0], holds[1] if case.cell == "lstm" else None))


def zoned(cell, shape, variant="padded", share=None, seed=0):
    """`with_zoneout` of one of ``ZONED``."""
    options, restored = ZONED[variant]
    case = make_case(cell, shape, seed=seed, **options)
    if restored is not None:
        case = with_resets(case, restored=restored)
    return with_zoneout(case, share)


def run(layer, case):
    """Results and gradients of ``layer`` (``ops.layer``, ``composite.layer``), dicts by name."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in case.tensors]
    results = layer(case.cell, *leaves, **case.options())
    pairs = [(r, d) for r, d in zip(results, case.upstream) if d is not None]
    torch.autograd.backward([r for r, _ in pairs], [d for _, d in pairs])
    results = {n: r.detach() for n, r in zip(RESULTS, results) if r is not None}
    return results, {n: t.grad for n, t in zip(ALL_NAMES, leaves) if t is not None}


def run_ours(case):
    return run(ops.layer, case)


def run_torch(case):
    """torch.nn's own kernels, or for what torch.nn lacks, the same arithmetic by ``composite``."""
    kind, hidden = TORCH.get(case.cell), case.tensors[3].size(0) // GATES.get(case.cell, 1)
    # torch.nn projects to fewer units only.
    lacks = kind is None or case.resets is not None or case.zoneout is not None
    if lacks or (case.tensors[7] is not None and hidden == 1):
        return run(composite.layer, case)

    def layer(cell, input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse):
        options = {"nonlinearity": cell[4:]} if kind == "RNN" else {}
        if w_hr is not None:
            options["proj_size"] = w_hr.size(0)
        module = getattr(torch.nn, kind)(
            input.size(-1),
            hidden,
            bias=b_ih is not None,
            bidirectional=reverse,
            dtype=input.dtype,
            **options,
        )
        # It runs backwards only beside a forward direction, whose results nobody uses.
        directions = 2 if reverse else 1
        weights = [w for w in (w_ih, w_hh, b_ih, b_hh, w_hr) if w is not None] * directions
        named = dict(zip((name for name, _ in module.named_parameters()), weights))
        hx = torch.stack([h0] * directions)
        hx = hx if c0 is None else (hx, torch.stack([c0] * directions))
        if batch_sizes is not None:
            input = torch.nn.utils.rnn.PackedSequence(input, batch_sizes)
        output, h = torch.func.functional_call(module, named, (input, hx))
        output = output if batch_sizes is None else output.data
        output = output[..., -h0.size(1) :]
        return (output, h[-1], None) if c0 is None else (output, h[0][-1], h[1][-1])

    def without_cells(case):
        return replace(case, upstream=[*case.upstream[:3], None])

    if case.cell != "lstm":
        return run(_positional(layer), case)
    # torch.nn has no gradient of the cell states: composite measures what that one costs.
    results, _ = run(_positional(layer), without_cells(case))
    composed, gradients = run(composite.layer, case)
    return results | {"cells": composed["cells"]}, gradients


def _positional(layer):
    def call(cell, *tensors, batch_sizes, reverse):
        return layer(cell, *tensors, batch_sizes, reverse)

    return call


def run_reference(case, grad_clip=None):
    """The NumPy reference, as float64 tensors."""
    arrays = [None if t is None else t.double().numpy() for t in case.tensors]
    x, h0, c0, *weights = arrays
    sizes = None if case.batch_sizes is None else case.batch_sizes.numpy()
    options = {"batch_sizes": sizes, "reverse": case.reverse}
    batch = x.shape[1] if sizes is None else sizes[0]
    restored = len(h0) != batch
    if case.resets is not None:
        options["resets"] = case.resets.numpy()
        if restored:
            halves = [(None, None) if s is None else (s[:batch], s[batch:]) for s in (h0, c0)]
            (h0, options["reset_h"]), (c0, options["reset_c"]) = halves
    if case.zoneout is not None:
        options["zoneout"] = [0.0 if hold is None else hold.numpy() for hold in case.zoneout]
    result = reference.forward(case.cell, x, h0, c0, weights, **options)
    upstream = (None if d is None else d.double().numpy() for d in case.upstream)
    gradients = reference.backward(result, *upstream, grad_clip=grad_clip)

    def tensors(record, names, keys):
        values = {n: getattr(record, k) for n, k in zip(names, keys)}
        return {n: torch.as_tensor(v) for n, v in values.items() if v is not None}

    gradients = tensors(gradients, (*ALL_NAMES, "reset_h", "reset_c"), REFERENCE_GRADIENTS)
    for name in ("h", "c"):
        if f"reset_{name}" in gradients:
            halves = gradients[f"{name}0"], gradients.pop(f"reset_{name}")
            gradients[f"{name}0"] = torch.cat(halves)
    return tensors(result, RESULTS, RESULTS), gradients


def as_function(case):
    """``ops.layer`` as a function of the tensors that the case has, and these: for gradcheck."""
    present = [i for i, t in enumerate(case.tensors) if t is not None]

    def function(*given):
        tensors = list(case.tensors)
        for i, t in zip(present, given):
            tensors[i] = t
        results = ops.layer(case.cell, *tensors, **{**case.options(), "reverse": False})
        return tuple(r for r in results if r is not None)

    return function, [case.tensors[i].clone().requires_grad_() for i in present]


def assert_second_backward_is_right(case):
    function, leaves = as_function(case)
    results = function(*leaves)
    upstream = [d for d in case.upstream if d is not None]
    first = torch.autograd.grad(results, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(results, leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def assert_gradients_of_each_sample(case, tolerance, samples=3):
    """``vmap(grad(...))`` of `ops.layer`, weights shared, is a loop over ``samples``."""
    function, leaves = as_function(case)
    leaves = [leaf.detach() for leaf in leaves]
    states = 2 if case.tensors[2] is None else 3
    scale = torch.linspace(0.5, 1.0, samples)
    given = [torch.stack([leaf * s for s in scale]) for leaf in leaves[:states]] + leaves[states:]
    upstream = [d for d in case.upstream if d is not None]

    def loss(*leaves):
        return sum((r * d).sum() for r, d in zip(function(*leaves), upstream))

    gradient = torch.func.grad(loss, tuple(range(len(leaves))))
    in_dims = [0] * states + [None] * (len(leaves) - states)
    found = torch.func.vmap(gradient, tuple(in_dims))(*given)
    for k in range(samples):
        alone = [g[k] if i < states else g for i, g in enumerate(given)]
        alone = [leaf.clone().requires_grad_() for leaf in alone]
        expected = torch.autograd.grad(loss(*alone), alone)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.dtype
            assert (ours[k] - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1)
