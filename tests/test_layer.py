"""Cell x instruction set x dtype x shape: every result and every gradient of one layer."""

import pytest
import torch
from cases import (
    CELLS,
    DTYPES,
    SHAPES,
    VARIANTS,
    as_function,
    assert_second_backward_is_right,
    make_case,
    run_ours,
    run_reference,
    run_torch,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import FORWARD, GRADIENT, assert_as_exact, error

from rnn_ext import ops

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def check(case, dtype):
    truth, true_gradients = run_reference(case)
    results, gradients = run_ours(case.to(dtype))
    their_results, their_gradients = run_torch(case.to(dtype))
    assert results.keys() == truth.keys() and gradients.keys() == true_gradients.keys()
    for name in truth:
        assert_as_exact(name, results[name], their_results[name], truth[name], FORWARD)
    for name in true_gradients:
        assert_as_exact(
            f"gradient of {name}",
            gradients[name],
            their_gradients[name],
            true_gradients[name],
            GRADIENT,
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_layer_is_as_exact_as_torch(isa, cell, dtype, shape, nan_filled):
    check(make_case(cell, shape), dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_variants_are_as_exact_as_torch(isa, cell, dtype, variant, nan_filled):
    check(make_case(cell, (6, 9, 5, 21), **VARIANTS[variant]), dtype)


@pytest.mark.parametrize("cell", CELLS)
def test_long_sums_keep_the_bound(isa, cell):
    check(make_case(cell, (3, 3, 64, 1024)), torch.float32)


# Sums longer than one piece: over units, inputs and rows; an odd number of each. Not for relu:
# rounding moves net inputs across the jump of its derivative, and not the same ones as torch's.
@pytest.mark.parametrize("shape", [(2, 13, 600, 521), (3, 181, 15, 21)], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("cell", [c for c in CELLS if c != "rnn_relu"])
def test_long_sums_of_bfloat16(cell, shape, threads, ragged, nan_filled):
    check(make_case(cell, shape, ragged=ragged), torch.bfloat16)


# Enough work for a team: hidden units split, rows split, more threads than panels of units.
@pytest.mark.parametrize("threads", [1, 2, 3, 7], indirect=True)
@pytest.mark.parametrize("shape", [(12, 6, 40, 170), (6, 130, 20, 40), (150, 2, 90, 112)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_threads_share_the_work(cell, shape, threads, nan_filled):
    check(make_case(cell, shape), torch.float32)


@pytest.mark.parametrize("threads", [2, 5], indirect=True)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("batch", [6, 120])
@pytest.mark.parametrize("cell", CELLS)
def test_threads_share_ragged_batches(cell, batch, reverse, threads, nan_filled):
    check(make_case(cell, (14, batch, 24, 100), ragged=True, reverse=reverse), torch.float32)


# So many rows that the backward pass goes through them in several pieces.
@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("variant", ["padded", "reverse", "ragged", "ragged_reverse"])
@pytest.mark.parametrize("cell", [c for c in CELLS if c != "rnn_relu"])
def test_pieces_of_the_backward_walk(cell, variant, threads, nan_filled):
    check(make_case(cell, (90, 13, 9, 18), **VARIANTS[variant]), torch.float32)
    check(make_case(cell, (3, 700, 5, 18), **VARIANTS[variant]), torch.bfloat16)


@settings(max_examples=150, deadline=None)
@given(
    cell=st.sampled_from(CELLS),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 30), st.integers(1, 40), st.integers(1, 70)),
    bias=st.booleans(),
    ragged=st.booleans(),
    reverse=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(cell, shape, bias, ragged, reverse, seed):
    case = make_case(cell, shape, bias=bias, ragged=ragged, reverse=reverse, seed=seed)
    for ours, truth in zip(run_ours(case), run_reference(case)):
        for name in truth:
            assert error(ours[name], truth[name]) <= 1e-12, name


@pytest.mark.parametrize("cell", CELLS)
def test_without_gradients_the_results_are_the_same(isa, cell):
    case = make_case(cell, (6, 9, 5, 21), ragged=True).to(torch.float32)
    results, _ = run_ours(case)
    options = {"batch_sizes": case.batch_sizes, "return_cells": True}
    alone = ops.layer(case.cell, *case.tensors, **options)
    assert not alone[0].requires_grad
    for name, value in zip(("output", "h_n", "c_n", "cells"), alone):
        assert (value is None) == (name not in results)
        if value is not None:
            assert error(value, results[name].double()) <= 1e-6, name


@pytest.mark.filterwarnings("ignore:.*gradients of gradients have no kernel")
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell):
    function, leaves = as_function(make_case(cell, (3, 2, 3, 5), ragged=True))
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("cell", CELLS)
def test_every_subset_of_gradients_is_right(cell):
    case = make_case(cell, (4, 3, 5, 18)).to(torch.float32)
    _, everything = run_ours(case)
    present = {
        n: i for i, n in enumerate(("input", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr"))
    }
    for name, index in present.items():
        if case.tensors[index] is None:
            continue
        tensors = [None if t is None else t.clone() for t in case.tensors]
        tensors[index].requires_grad_()
        results = ops.layer(case.cell, *tensors)
        pairs = [(r, d) for r, d in zip(results, case.upstream) if d is not None]
        torch.autograd.backward([r for r, _ in pairs], [d for _, d in pairs])
        assert torch.equal(tensors[index].grad, everything[name]), name


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("cell", CELLS)
def test_each_result_alone_has_the_right_gradient(cell, which):
    case = make_case(cell, (4, 3, 5, 18), ragged=True)
    if case.upstream[which] is None:
        pytest.skip("this cell has no such result")
    case.upstream = [d if i == which else None for i, d in enumerate(case.upstream)]
    for ours, truth in zip(run_ours(case)[1].values(), run_reference(case)[1].values()):
        assert error(ours, truth) <= 1e-12


@pytest.mark.parametrize("cell", CELLS)
def test_a_second_backward_is_right(cell):
    case = make_case(cell, (4, 3, 5, 18)).to(torch.float32)
    assert_second_backward_is_right(case)


def test_changing_a_saved_tensor_is_noticed():
    case = make_case("lstm", (4, 3, 5, 18)).to(torch.float32)
    leaves = [None if t is None else t.clone().requires_grad_() for t in case.tensors]
    output = ops.layer("lstm", *leaves)[0]
    with torch.no_grad():
        leaves[4].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("cell", CELLS)
def test_nan_and_infinity_come_through(isa, cell):
    case = make_case(cell, (3, 2, 4, 20)).to(torch.float32)
    case.tensors[0][1, 0, 0] = float("nan")
    output = ops.layer(case.cell, *case.tensors)[0]
    assert not output[0].isnan().any()
    assert output[1:, 0].isnan().all() and not output[:, 1].isnan().any()
    case.tensors[0][1, 0, 0] = float("inf")
    case.tensors[3].abs_()
    assert not ops.layer(case.cell, *case.tensors)[0][1, 0].isnan().any()
