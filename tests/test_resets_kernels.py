"""Resets in the kernels of one layer, held to the reference (of modules: test_resets.py)."""

import pytest
import torch
from cases import (
    CELLS,
    DTYPES,
    VARIANTS,
    as_function,
    assert_gradients_of_each_sample,
    assert_second_backward_is_right,
    make_case,
    run_ours,
    run_reference,
    with_resets,
)
from emulated_checks import check
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import error

from rnn_ext import ops, reference


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_kernels_follow_the_reference(isa, cell, dtype, variant, nan_filled):
    case = make_case(cell, (6, 9, 5, 21), **VARIANTS[variant])
    check(with_resets(case, restored=variant != "reverse"), dtype)


# Hidden units split, rows split, sums of more than one piece.
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("shape", [(9, 6, 30, 130), (5, 90, 10, 40), (3, 19, 8, 400)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_threads_share_the_work(cell, shape, threads, nan_filled):
    ragged = shape[1] > 6
    case = make_case(cell, shape, ragged=ragged, reverse=ragged)
    check(with_resets(case, restored=shape[1] != 90), torch.float32)


@settings(max_examples=100, deadline=None)
@given(
    cell=st.sampled_from(CELLS),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 30), st.integers(1, 9), st.integers(1, 40)),
    variant=st.sampled_from(list(VARIANTS)),
    restored=st.booleans(),
    chance=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape(cell, shape, variant, restored, chance, seed):
    case = make_case(cell, shape, seed=seed, **VARIANTS[variant])
    case = with_resets(case, restored=restored, chance=chance, seed=seed)
    for ours, truth in zip(run_ours(case), run_reference(case)):
        assert ours.keys() == truth.keys()
        for name in truth:
            assert error(ours[name], truth[name]) <= 1e-12, name


@pytest.mark.parametrize("cell", CELLS)
def test_without_gradients_the_results_are_the_same(isa, cell):
    case = with_resets(make_case(cell, (6, 9, 5, 21), ragged=True), restored=True)
    results, _ = run_ours(case)
    for return_cells in (False, True):
        alone = ops.layer(case.cell, *case.tensors, **case.options(), return_cells=return_cells)
        for name, value in zip(("output", "h_n", "c_n", "cells"), alone):
            assert value is None or torch.equal(value, results[name])


@pytest.mark.filterwarnings("ignore:rnn_ext. gradients of gradients have no kernel")
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_gradients(cell):
    case = with_resets(make_case(cell, (3, 2, 2, 3), ragged=True), restored=True)
    function, leaves = as_function(case)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
    assert_second_backward_is_right(case)


@pytest.mark.parametrize("restored", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("cell", CELLS)
def test_each_sample_gets_its_own_gradients(cell, restored):
    case = with_resets(make_case(cell, (4, 2, 5, 9), ragged=True), restored=restored)
    assert_gradients_of_each_sample(case, 1e-10)


def test_the_reference_by_finite_differences():
    case = with_resets(make_case("lstm", (4, 3, 2, 3), ragged=True, reverse=True), restored=True)
    h0, c0 = case.tensors[1:3]
    sizes, (h0, reset_h), (c0, reset_c) = case.batch_sizes.numpy(), h0.chunk(2), c0.chunk(2)
    x, weights = case.tensors[0], [None if t is None else t.numpy() for t in case.tensors[3:]]

    def forward(reset_h, reset_c):
        return reference.forward(
            "lstm", x, h0, c0, weights, batch_sizes=sizes, reverse=True, resets=case.resets,
            reset_h=reset_h, reset_c=reset_c,
        )  # fmt: skip

    found = reference.backward(forward(reset_h, reset_c), case.upstream[0])
    for name, i in (("reset_h", 0), ("reset_c", 1)):
        for at in range(reset_h.numel()):
            losses = []
            for step in (1e-6, -1e-6):
                given = [reset_h.clone(), reset_c.clone()]
                given[i].view(-1)[at] += step
                losses.append((forward(*given).output * case.upstream[0].numpy()).sum())
            slope = (losses[0] - losses[1]) / 2e-6
            assert abs(getattr(found, name).flat[at] - slope) <= 1e-7
