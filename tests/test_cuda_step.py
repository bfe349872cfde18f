"""The step-wise CUDA kernels, bindings and all, emulated on CPU tensors: cell x dtype x shape."""

import pytest
import torch
from cases import (
    CELLS,
    SHAPES,
    VARIANTS,
    as_function,
    assert_gradients_of_each_sample,
    make_case,
    run_ours,
    run_reference,
    with_resets,
)
from emulated import emulation
from emulated_checks import (
    PREDICATES,
    check,
    check_both_directions_with_resets,
    check_packed_resets,
    check_predicates,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import error
from torch.autograd import grad

import rnn_ext
from rnn_ext import library, ops

PATHS = ("cuda-step", "cuda-step")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    with emulation(monkeypatch, *PATHS) as predicates:
        yield predicates


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_layer_is_as_exact_as_torch(cell, dtype, shape, nan_filled):
    check(make_case(cell, shape), dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_variants_are_as_exact_as_torch(cell, dtype, variant, nan_filled):
    check(make_case(cell, (6, 9, 5, 21), **VARIANTS[variant]), dtype)


@pytest.mark.parametrize("restored", [False, True], ids=["zeros", "restored"])
@pytest.mark.parametrize("variant", ["padded", "reverse", "ragged_reverse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_resets_are_as_exact_as_torch(cell, dtype, variant, restored, nan_filled):
    case = make_case(cell, (6, 9, 5, 21), **VARIANTS[variant])
    check(with_resets(case, restored=restored), dtype)


@pytest.mark.parametrize("restored", [False, True], ids=["zeros", "restored"])
@pytest.mark.parametrize("cell", CELLS)
def test_both_directions_with_resets(cell, restored, nan_filled):
    check_both_directions_with_resets(cell, torch.float64, restored)


@pytest.mark.parametrize("wanted", [1, 2])
def test_the_restored_state_alone_gets_its_gradient(wanted, nan_filled):
    case = with_resets(make_case("lstm", (6, 4, 5, 18)), restored=True)
    _, everything = run_ours(case)
    tensors = [t if i != wanted or t is None else t.clone() for i, t in enumerate(case.tensors)]
    tensors[wanted].requires_grad_()
    results = ops.layer(case.cell, *tensors, **case.options())
    (found,) = grad(results, tensors[wanted], case.upstream)
    assert torch.equal(found, everything[("h0", "c0")[wanted - 1]])


@settings(max_examples=60, deadline=None)
@given(
    cell=st.sampled_from(CELLS),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 40)),
    bias=st.booleans(),
    ragged=st.booleans(),
    reverse=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(cell, shape, bias, ragged, reverse, seed):
    case = make_case(cell, shape, bias=bias, ragged=ragged, reverse=reverse, seed=seed)
    for ours, truth in zip(run_ours(case), run_reference(case)):
        for name in truth:
            assert error(ours[name], truth[name]) <= 1e-10, name


def test_bias_gradients_over_many_rows(nan_filled):
    """Column sums in one, two and three rounds of chunks of 256 rows."""
    for batch in (250, 300, 66_000):
        check(make_case("rnn_tanh", (1, batch, 1, 2)), torch.float64)


def test_long_memory_survives_16_bits():
    """A gate of 0.999 is a bfloat16 of 1: what is saved must not lose the difference."""
    steps = 400
    tensors = [torch.zeros(steps, 1, 1), torch.zeros(1, 1), torch.ones(1, 1)]
    tensors += [torch.zeros(4, 1), torch.zeros(4, 1), torch.tensor([-20.0, 6.90625, 0, 20])]
    tensors += [torch.zeros(4), None]
    kept = torch.sigmoid(torch.tensor(6.90625)) ** steps  # 0.67
    tensors = [None if t is None else t.bfloat16().requires_grad_() for t in tensors]
    _, _, c_n, _ = ops.layer("lstm", *tensors)
    (d_c0,) = grad(c_n.sum(), tensors[2])
    assert abs(c_n.item() / kept - 1) <= 0.01 and abs(d_c0.item() / kept - 1) <= 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_without_gradients_the_results_are_the_same(cell, dtype, nan_filled):
    case = make_case(cell, (6, 9, 5, 21), ragged=True).to(dtype)
    results, _ = run_ours(case)
    alone = ops.layer(
        case.cell, *case.tensors, batch_sizes=case.batch_sizes, return_cells=dtype != torch.float32
    )
    assert not alone[0].requires_grad
    for name, value in zip(("output", "h_n", "c_n", "cells"), alone):
        if value is not None:
            assert error(value, results[name].double()) <= 4 * torch.finfo(dtype).eps, name


@pytest.mark.filterwarnings("ignore:rnn_ext. gradients of gradients have no kernel")
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell):
    function, leaves = as_function(make_case(cell, (3, 2, 3, 5), ragged=True))
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_each_sample_gets_its_own_gradients(cell, dtype, nan_filled):
    case = make_case(cell, (4, 2, 5, 18), ragged=True).to(dtype)
    assert_gradients_of_each_sample(case, 1e-10 if dtype == torch.float64 else 2e-3)


@pytest.mark.parametrize("cell", CELLS)
def test_every_subset_of_gradients_is_right(cell, nan_filled):
    case = make_case(cell, (4, 3, 5, 18)).to(torch.bfloat16)
    _, everything = run_ours(case)
    names = ("input", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
    for index, name in enumerate(names):
        if case.tensors[index] is None:
            continue
        tensors = [None if t is None else t.clone() for t in case.tensors]
        tensors[index].requires_grad_()
        pairs = [
            (r, d) for r, d in zip(ops.layer(case.cell, *tensors), case.upstream) if d is not None
        ]
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
        assert error(ours, truth) <= 1e-10


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_a_second_backward_is_right(cell, dtype):
    case = make_case(cell, (4, 3, 5, 18)).to(dtype)
    leaves = [None if t is None else t.clone().requires_grad_() for t in case.tensors]
    results = [r for r in ops.layer(case.cell, *leaves) if r is not None]
    upstream = [d for d in case.upstream if d is not None]
    wanted = [t for t in leaves if t is not None]
    first = grad(results, wanted, upstream, retain_graph=True)
    second = grad(results, wanted, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("cell", CELLS)
def test_an_empty_batch(cell):
    case = make_case(cell, (3, 1, 4, 5))
    tensors = [None if t is None else t.clone() for t in case.tensors]
    tensors[0] = tensors[0][:, :0]
    tensors[1:3] = [None if t is None else t[:0] for t in tensors[1:3]]
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    output = ops.layer(case.cell, *leaves)[0]
    output.sum().backward()
    assert output.shape[:2] == (3, 0)
    assert all(t.grad.count_nonzero() == 0 for t in leaves if t is not None and t.grad is not None)


@pytest.mark.parametrize("cell", CELLS)
def test_nan_and_infinity_come_through(cell):
    case = make_case(cell, (3, 2, 4, 20)).to(torch.float32)
    case.tensors[0][1, 0, 0] = float("nan")
    output = ops.layer(case.cell, *case.tensors)[0]
    assert not output[0].isnan().any()
    assert output[1:, 0].isnan().all() and not output[:, 1].isnan().any()


# Rows that end early or start afresh


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", PREDICATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_rows_end_early_and_start_afresh(emulated, cell, dtype, kind, reverse, nan_filled):
    check_predicates(emulated, cell, dtype, kind, reverse, PATHS)


@pytest.mark.parametrize("cell", CELLS)
def test_resets_of_packed_rows(emulated, cell, nan_filled):
    check_packed_resets(emulated, cell, torch.float64, PATHS)


# What lies above the kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_operators_of_torch_library(cell, dtype, monkeypatch):
    for path in ("_forward", "_backward"):  # the operators choose for themselves
        monkeypatch.setattr(ops._C, path, "auto")
    case = make_case(cell, (3, 2, 4, 6)).to(dtype)
    leaves = [None if t is None else t.clone().requires_grad_() for t in case.tensors]
    arguments = (case.cell, leaves[0], leaves[1:], None, False)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    operators = torch.ops.rnn_ext_emulated
    torch.library.opcheck(operators.layer.default, (*arguments, True), test_utils=checks)
    with torch.no_grad():
        torch.library.opcheck(operators.layer_forward.default, arguments, test_utils=checks)
    results, gradients = run_ours(case)
    (through,) = library.layer(case.cell, leaves[0], [leaves[1:]], None, False, True)
    pairs = [(r, d) for r, d in zip(through, case.upstream) if r is not None]
    torch.autograd.backward([r for r, _ in pairs], [d for _, d in pairs])
    assert all(torch.equal(r, results[n]) for n, (r, _) in zip(results, pairs))
    assert all(
        torch.equal(t.grad, g)
        for t, g in zip([t for t in leaves if t is not None], gradients.values())
    )


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_modules_of_two_layers_and_directions(kind):
    theirs = getattr(torch.nn, kind)(5, 7, 2, bidirectional=True, batch_first=True).double()
    ours = getattr(rnn_ext, kind)(5, 7, 2, bidirectional=True, batch_first=True).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    for module in (theirs, ours):
        module(x)[0].square().sum().backward()
    assert torch.allclose(ours(x)[0], theirs(x)[0], rtol=0, atol=1e-12)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=0, atol=1e-10)
