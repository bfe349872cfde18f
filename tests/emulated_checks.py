"""What is asked of a layer on the emulated CUDA kernels, whichever path its passes take."""

import torch
from cases import RESULTS, make_case, run_ours, run_reference, run_torch, with_resets
from tolerance import FORWARD, GRADIENT, assert_as_exact, error
from torch.autograd import grad

from rnn_ext import composite, ops

# (lengths, resets)
PREDICATES = {"lengths": (True, False), "resets": (False, True), "both": (True, True)}


def away_from_the_kink(case):
    """relu's derivative jumps: net inputs that a rounding could push across zero prove nothing."""
    if case.cell == "rnn_relu" and case.tensors[5] is not None:
        case.tensors[4] /= 8
        case.tensors[5][::2] = 3
        case.tensors[5][1::2] = -3
    return case


def check(case, dtype):
    case = away_from_the_kink(case)
    truth, true_gradients = run_reference(case)
    results, gradients = run_ours(case.to(dtype))
    assert results.keys() == truth.keys() and gradients.keys() == true_gradients.keys()
    if dtype == torch.float64:
        for ours, exact in ((results, truth), (gradients, true_gradients)):
            for name in exact:
                assert error(ours[name], exact[name]) <= 1e-10, name
        return
    their_results, their_gradients = run_torch(case.to(dtype))
    for name in truth:
        assert_as_exact(name, results[name], their_results[name], truth[name], FORWARD)
    if case.cell == "rnn_relu" and case.tensors[5] is None and dtype.itemsize == 2:
        return
    for name, exact in true_gradients.items():
        theirs = their_gradients[name]
        assert_as_exact(f"gradient of {name}", gradients[name], theirs, exact, GRADIENT)


def by_hand(case, lengths, resets, dtype):
    """Results and gradients of a loop of torch operations in ``dtype``."""
    case = case.to(dtype)
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in case.tensors]
    input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr = leaves
    projected = torch.nn.functional.linear(input, w_ih, b_ih)
    steps, batch = input.shape[:2]
    state, outputs, cells = (h0, c0), [None] * steps, [None] * steps
    for t in reversed(range(steps)) if case.reverse else range(steps):
        before = state
        if resets is not None:
            state = [None if s is None else s.masked_fill(resets[t, :, None], 0) for s in state]
        state = composite.STEPS[case.cell](projected[t], *state, w_hh, b_hh, w_hr)
        alive = torch.ones(batch, 1, dtype=bool) if lengths is None else (t < lengths)[:, None]
        outputs[t], cells[t] = (None if s is None else s.where(alive, 0) for s in state)
        pairs = zip(state, before)
        state = tuple(None if s is None else s.where(alive, b) for s, b in pairs)
    cells = None if c0 is None else torch.stack(cells)
    results = [torch.stack(outputs), *state, cells]
    return results, gradients_of(results, leaves, case.upstream)


def gradients_of(results, leaves, upstream):
    pairs = [(r, d) for r, d in zip(results, upstream) if r is not None]
    wanted = [t for t in leaves if t is not None]
    found = iter(grad([r for r, _ in pairs], wanted, [d for _, d in pairs]))
    return [None if t is None else next(found) for t in leaves]


def compare(ours, theirs, truth, factor):
    for i, (value, near, right) in enumerate(zip(ours, theirs, truth)):
        assert (value is None) == (right is None)
        if right is not None:
            assert_as_exact(str(i), value, near, right.detach(), factor)


def run_directions(emulated, cases, lengths, resets, paths):
    """[(results, gradients)] of one direction or two over one input, as `by_hand` has them."""
    forward, backward = (getattr(emulated.Path, path) for path in paths)
    inputs = [(c.cell, *c.tensors, c.batch_sizes, c.reverse) for c in cases]
    outputs = emulated.forward(inputs, lengths, resets, True, forward)
    kept, upstream = [out[3] for out in outputs], [c.upstream for c in cases]
    gradients = emulated.backward(inputs, lengths, resets, kept, upstream, backward)
    dtype = cases[0].tensors[0].dtype
    results = [
        (output, h_n, c_n, None if kept[1] is None else kept[1].to(dtype))
        for output, h_n, c_n, kept in outputs
    ]
    return list(zip(results, gradients))


def make_directions(cell, shape, directions, *, reverse, **options):
    """Cases for `run_directions`: the second runs the other way, with its own weights."""
    cases = [
        make_case(cell, shape, reverse=reverse != bool(k), seed=k, **options)
        for k in range(directions)
    ]
    for case in cases[1:]:
        case.tensors[0], case.batch_sizes = cases[0].tensors[0], cases[0].batch_sizes
        case.upstream = [None if d is None else d.roll(1, -1) for d in cases[0].upstream]
    return [away_from_the_kink(case) for case in cases]


def check_predicates(emulated, cell, dtype, kind, reverse, paths, directions=1):
    """``paths``: the backends of the two passes."""
    has_lengths, has_resets = PREDICATES[kind]
    cases = make_directions(cell, (7, 9, 5, 21), directions, reverse=reverse)
    lengths = torch.tensor([7, 0, 3, 1, 6, 5, 2, 7, 4]) if has_lengths else None
    resets = torch.rand(7, 9) < 0.3 if has_resets else None
    ours = [case.to(dtype) for case in cases]
    found = run_directions(emulated, ours, lengths, resets, paths)
    for case, given, (results, gradients) in zip(cases, ours, found):
        truth = by_hand(case, lengths, resets, torch.float64)
        theirs = by_hand(case, lengths, resets, dtype)
        compare(results, theirs[0], truth[0], FORWARD)
        compare(gradients, theirs[1], truth[1], GRADIENT)
        if has_lengths:
            dead = torch.arange(7)[:, None] >= lengths
            assert results[0][dead].count_nonzero() == 0
            assert gradients[0][dead].count_nonzero() == 0
            assert torch.equal(results[1][1], given.tensors[1][1])


def check_packed_resets(emulated, cell, dtype, paths, directions=1):
    """``paths``: the backends of the two passes."""
    cases = make_directions(cell, (6, 5, 3, 11), directions, ragged=True, reverse=True)
    sizes = cases[0].batch_sizes
    resets = torch.rand(int(sizes.sum())) < 0.4
    lengths = (torch.arange(1, 6)[:, None] <= sizes).sum(1)
    alive = torch.arange(6)[:, None] < lengths

    def padded(rows):
        there = torch.zeros(*alive.shape, *rows.shape[1:], dtype=rows.dtype)
        there[alive] = rows
        return there

    found = run_directions(emulated, [case.to(dtype) for case in cases], None, resets, paths)
    for case, (results, gradients) in zip(cases, found):
        case.tensors[0], case.upstream[0] = padded(case.tensors[0]), padded(case.upstream[0])
        if case.upstream[3] is not None:
            case.upstream[3] = padded(case.upstream[3])
        truth = by_hand(case, lengths, padded(resets), torch.float64)
        theirs = by_hand(case, lengths, padded(resets), dtype)
        for values, others in (truth, theirs):
            for which, i in ((values, 0), (values, 3), (others, 0)):
                which[i] = None if which[i] is None else which[i][alive]
        compare(results, theirs[0], truth[0], FORWARD)
        compare(gradients, theirs[1], truth[1], GRADIENT)


def check_both_directions_with_resets(cell, dtype, restored):
    """`ops.both_directions` does what `ops.layer` does for each: a reset parts the same steps."""
    cases = [
        with_resets(
            away_from_the_kink(make_case(cell, (6, 9, 5, 21), reverse=r)), restored=restored
        )
        for r in (False, True)
    ]
    expected = [run_ours(case.to(dtype))[0] for case in cases]
    first, second = (case.to(dtype).tensors for case in cases)
    leaves = [t.requires_grad_() for t in (first[0], *first[1:], *second[1:]) if t is not None]
    pair = ops.both_directions(
        cases[0].cell, first[0], tuple(first[1:]), tuple(second[1:]), resets=cases[0].resets
    )
    alone = [
        ops.layer(case.cell, first[0], *tensors[1:], **case.options())
        for case, tensors in zip(cases, (first, second))
    ]
    for results, known in zip(pair, expected):
        for name, value in zip(RESULTS, results):
            assert value is None or torch.equal(value, known[name]), name
    found, right = (
        grad([d[0] for d in both], leaves, [case.to(dtype).upstream[0] for case in cases])
        for both in (pair, alone)
    )
    for ours, theirs in zip(found, right, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1)
