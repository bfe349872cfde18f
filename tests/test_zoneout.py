"""Zoneout in the kernels of one layer, held to the reference (of modules: test_options.py)."""

from dataclasses import replace

import pytest
import torch
from cases import (
    CELLS,
    DTYPES,
    RESULTS,
    SHARE,
    ZONED,
    as_function,
    assert_gradients_of_each_sample,
    assert_second_backward_is_right,
    make_case,
    run,
    run_ours,
    run_reference,
    with_zoneout,
    zoned,
)
from emulated_checks import away_from_the_kink, check
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import KINDS, make, random
from tolerance import error
from twins import forget_warnings

import rnn_ext
from rnn_ext import composite, library, ops

masks_and_share = pytest.mark.parametrize("share", [None, SHARE], ids=["masks", "share"])


@pytest.fixture(autouse=True)
def _fresh():
    forget_warnings()


@masks_and_share
@pytest.mark.parametrize("variant", ZONED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_kernels_follow_the_reference(cell, dtype, variant, share, nan_filled):
    check(zoned(cell, (6, 9, 5, 21), variant, share), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_every_instruction_set_does(isa, cell, dtype, nan_filled):
    share = SHARE if cell == "rnn_sigmoid" else None
    check(zoned(cell, (4, 9, 5, 21), "ragged_reverse_resets", share), dtype)


# Hidden units split, rows split, sums of more than one piece.
@pytest.mark.parametrize("shape", [(9, 6, 30, 130), (5, 90, 10, 40), (3, 19, 8, 400)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_threads_share_the_work_and_change_no_bit(cell, shape, nan_filled):
    def case():
        return zoned(cell, shape, "reverse_resets")

    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(run_ours(case().to(torch.float32))[0])
        check(case(), torch.float32)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@settings(max_examples=60, deadline=None)
@given(
    cell=st.sampled_from(CELLS),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 30), st.integers(1, 9), st.integers(1, 40)),
    variant=st.sampled_from(list(ZONED)),
    share=st.sampled_from([None, None, 0.0, SHARE, 0.96875]),
    seed=st.integers(0, 1000),
)
def test_any_shape(cell, shape, variant, share, seed):
    case = away_from_the_kink(zoned(cell, shape, variant, share, seed))
    for ours, truth in zip(run_ours(case), run_reference(case)):
        assert ours.keys() == truth.keys()
        for name in truth:
            assert error(ours[name], truth[name]) <= 1e-11, name


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_held_changes_no_bit_and_all_held_keeps_the_state(isa, cell):
    plain = make_case(cell, (4, 3, 5, 19), ragged=True).to(torch.float32)
    zones = with_zoneout(plain).zoneout
    nothing, everything = (
        replace(plain, zoneout=tuple(z if z is None else torch.full_like(z, on) for z in zones))
        for on in (False, True)
    )
    (results, gradients), (expected, right) = run_ours(nothing), run_ours(plain)
    assert all(torch.equal(results[name], expected[name]) for name in expected)
    torch.testing.assert_close(gradients, right)
    results, gradients = run_ours(everything)
    assert torch.equal(results["h_n"], plain.tensors[1])
    assert all(gradients[n].count_nonzero() == 0 for n in ("input", "w_ih", "w_hh", "b_ih"))
    upstream = [d for d in plain.upstream if d is not None]
    by_step = upstream[0].split(plain.batch_sizes.tolist())
    sums = upstream[1] + sum(torch.cat((d, d.new_zeros(3 - len(d), d.size(1)))) for d in by_step)
    torch.testing.assert_close(gradients["h0"], sums)


@masks_and_share
@pytest.mark.parametrize("cell", CELLS)
def test_without_gradients_the_results_are_the_same(isa, cell, share):
    case = zoned(cell, (6, 9, 5, 21), "ragged_reverse_resets", share)
    results, _ = run_ours(case)
    for return_cells in (False, True):
        alone = ops.layer(case.cell, *case.tensors, **case.options(), return_cells=return_cells)
        for name, value in zip(RESULTS, alone):
            assert value is None or torch.equal(value, results[name])


@masks_and_share
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_the_operator_does_the_same(cell, dtype, share):
    case = zoned(cell, (5, 4, 6, 19), "ragged", share).to(dtype)

    def operator(cell, input, *direction, batch_sizes, reverse, zoneout):
        given = cell, input, [direction], batch_sizes, reverse, True, None, [zoneout]
        return library.layer(*given)[0]

    for ours, theirs in zip(run_ours(case), run(operator, case)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)


@masks_and_share
@pytest.mark.parametrize("cell", ["rnn_relu", "lstm_projected", "gru"])
def test_operators_pass_the_checks_of_torch(cell, share):
    case = zoned(cell, (3, 2, 4, 6), share=share).to(torch.float32)
    tensors = case.tensors[1:] * 2
    holds = library._stacked([case.zoneout] * 2)
    given = case.cell, case.tensors[0], tensors, None, False
    checks = ("test_schema", "test_faketensor")
    operator = torch.ops.rnn_ext.layer_forward.default
    torch.library.opcheck(operator, (*given, None, *holds), test_utils=checks)
    for tensor in (case.tensors[0], *tensors):
        if tensor is not None:
            tensor.requires_grad_()
    torch.library.opcheck(torch.ops.rnn_ext.layer.default, (*given, True, None, *holds))


@masks_and_share
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_both_directions_are_each_alone(cell, dtype, share):
    cases = [zoned(cell, (5, 4, 3, 18), share=share, seed=k).to(dtype) for k in range(2)]
    cases[1] = replace(cases[1], zoneout=with_zoneout(cases[1], share, seed=7).zoneout)
    x = cases[0].tensors[0].requires_grad_()
    groups = [tuple(case.tensors[1:]) for case in cases]
    leaves = [x] + [t.requires_grad_() for group in groups for t in group if t is not None]
    zoneout = [case.zoneout for case in cases]
    pair = ops.both_directions(cases[0].cell, x, *groups, zoneout=zoneout)
    alone = [
        ops.layer(cases[0].cell, x, *group, reverse=bool(k), zoneout=zoneout[k])
        for k, group in enumerate(groups)
    ]
    upstream = [d for case in cases for d in case.upstream if d is not None]
    found = []
    for results in (pair, alone):
        flat = [r for both in results for r in both if r is not None]
        found.append((flat, torch.autograd.grad(flat, leaves, upstream)))
    assert all(map(torch.equal, found[0][0], found[1][0]))
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:rnn_ext. gradients of gradients have no kernel")
@masks_and_share
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_gradients(cell, share):
    case = zoned(cell, (3, 2, 2, 3), "ragged", share)
    function, leaves = as_function(case)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
    assert_second_backward_is_right(case)


@masks_and_share
@pytest.mark.parametrize("cell", CELLS)
def test_each_sample_gets_its_own_gradients(cell, share):
    assert_gradients_of_each_sample(zoned(cell, (4, 2, 5, 9), "ragged", share), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_training_keeps_one_byte_more_for_each_unit(kind):
    x, kept = random(5, 3, 2), []
    for zoneout in (0.0, 0.3):
        module, saved = make(kind, 2, 4, zoneout=zoneout), {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.setdefault(t.data_ptr(), t), lambda t: t
        ):
            module(x)[0]
        kept.append(sum(t.untyped_storage().nbytes() for t in saved.values()))
    outputs = module.weight_hh_l0.size(1)
    assert kept[1] - kept[0] == 5 * 3 * (outputs + 4 if kind.startswith("lstm") else outputs)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h, c: (h[1:], c), "hold_h must be bool of shape"),
        (lambda h, c: (h, c.double()), "hold_c must be bool of shape"),
        (lambda h, c: (h, None), "zoneout holds h, and of the LSTM h and c"),
        (
            lambda h, c: (torch.tensor(0.5), c),
            "or float64 without dimensions on the CPU, got Float",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    case = zoned("lstm", (3, 2, 4, 6))
    with pytest.raises(RuntimeError, match=message):
        ops.layer("lstm", *case.tensors, zoneout=change(*case.zoneout))
    gru = zoned("gru", (3, 2, 4, 6))
    with pytest.raises(RuntimeError, match="zoneout holds h, and of the LSTM"):
        ops.layer("gru", *gru.tensors, zoneout=gru.zoneout[:1] * 2)


def test_the_composition_agrees_for_a_share_of_the_relu():
    """Its derivative is that of what the cell makes, not of the state it has."""
    case = zoned("rnn_relu", (6, 9, 5, 21), share=SHARE)
    (results, ours), (expected, theirs) = run_ours(case), run(composite.layer, case)
    assert all(error(results[n], expected[n]) <= 1e-12 for n in expected)
    assert all(error(ours[n], theirs[n]) <= 1e-12 for n in theirs)
    assert (results["output"] > 0).float().mean() > 0.7  # which says nothing of f(a)


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_serve_it_in_training_and_evaluation(kind):
    module = make(kind, 2, 3, num_layers=2, bidirectional=True, zoneout=0.4)
    x = random(4, 3, 2, requires_grad=True)
    for training in (True, False):
        module.train(training)
        assert {step.kernel for step in rnn_ext.explain(module, x).steps} == {"cpu"}
        with rnn_ext.use_backend("cpu"):  # which refuses what it cannot run
            module(x, lengths=[2, 4, 1])[0].sum().backward()
