"""Layer normalisation and peepholes: kind x instruction set x dtype x shape, of one layer."""

from functools import partial

import pytest
import torch
from cases import DTYPES, VARIANTS, run, run_reference, with_resets
from hypothesis import given, settings
from hypothesis import strategies as st
from normalized_cases import KINDS, as_function, make_normalized, run_ours
from normalized_checks import SHAPES, check
from tolerance import error
from twins import forget_warnings

import rnn_ext
from rnn_ext import _C, composite, normalized, reference

composed = pytest.mark.filterwarnings("ignore:.*have no kernel; composed")


@pytest.fixture(autouse=True)
def _fresh():
    forget_warnings()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_layer_is_as_exact_as_a_loop_of_torch(isa, kind, dtype, shape, nan_filled):
    check(kind, shape, dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_variants_are_as_exact_as_a_loop_of_torch(isa, kind, dtype, variant, nan_filled):
    check(kind, (6, 9, 5, 21), dtype, **VARIANTS[variant])


@pytest.mark.parametrize("restored", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("variant", ["padded", "ragged", "ragged_reverse"])
@pytest.mark.parametrize("kind", KINDS)
def test_resets(isa, kind, variant, restored, nan_filled):
    check(kind, (6, 9, 5, 21), torch.float32, restored, **VARIANTS[variant])


# More rows than a block of sums and than a chunk of the input's projection has; one sequence.
@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("shape", [(90, 6, 20, 40), (6, 130, 20, 24), (150, 1, 90, 56)], ids=str)
@pytest.mark.parametrize("kind", ["lstm_peephole", "gru", "gru_reset_before"])
def test_threads_share_the_work(kind, shape, threads, nan_filled):
    ragged = shape[1] == 6
    check(kind, shape, torch.float32, ragged=ragged, reverse=ragged)


FEW = (7, 3, 10, 100)  # sequences, so that threads split the columns of the product


@pytest.mark.parametrize("threads", [2, 3], indirect=True)
@pytest.mark.parametrize("resets", [{}, {"restored": True}], ids=["", "resets"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_threads_share_the_columns(kind, variant, resets, threads, nan_filled):
    assert split_of(kind, FEW) == "columns"
    check(kind, FEW, torch.float32, **resets, **VARIANTS[variant])


def split_of(kind, shape):
    return _C.plan_rows(make_normalized(kind, shape).cell, "float32", *shape)["split"]


@pytest.mark.parametrize("shape", [(40, 6, 30, 48), FEW], ids=["rows", "columns"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_result_does_not_depend_on_the_number_of_threads(kind, shape):
    case = make_normalized(kind, shape).to(torch.float32)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(run_ours(case))
    torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        for name in one:
            assert error(two[name], one[name].double()) <= 1e-5, name


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 20), st.integers(1, 40), st.integers(2, 50)),
    bias=st.booleans(),
    ragged=st.booleans(),
    reverse=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(kind, shape, bias, ragged, reverse, seed):
    case = make_normalized(kind, shape, bias=bias, ragged=ragged, reverse=reverse, seed=seed)
    for ours, truth in zip(run_ours(case), run_reference(case), strict=True):
        for name in truth:
            assert error(ours[name], truth[name]) <= 1e-10, name


@pytest.mark.parametrize("kind", KINDS)
def test_composed_of_torch_operations_it_is_the_same(kind):
    case = with_resets(make_normalized(kind, (5, 4, 6, 11), ragged=True), restored=True)

    def layer(cell, *tensors, **options):
        return composite.layer(cell, *tensors, **options)

    with rnn_ext.use_backend("reference"):
        chosen = run_ours(case)
    for direct, ours, truth in zip(run(layer, case), chosen, run_reference(case), strict=True):
        for name in truth:
            assert error(direct[name], truth[name]) <= 1e-12, name
            assert torch.equal(direct[name], ours[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_the_results_are_the_same(isa, kind):
    case = make_normalized(kind, (6, 9, 5, 21), ragged=True).to(torch.float32)
    results, _ = run_ours(case)
    options = {"batch_sizes": case.batch_sizes, "return_cells": True}
    alone = normalized.layer(case.cell, *case.tensors, **options)
    for name, value in zip(results, alone):
        assert not value.requires_grad and error(value, results[name].double()) <= 1e-6, name


@composed
@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm_peephole", "gru", "gru_reset_before"])
def test_gradcheck(kind):
    function, leaves = as_function(make_normalized(kind, (2, 2, 2, 3), ragged=True))
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_gradients_of_gradients_warn_once():
    function, leaves = as_function(make_normalized("lstm", (2, 2, 3, 4)))
    with pytest.warns(rnn_ext.FallbackWarning, match="gradients of gradients") as found:
        for _ in range(2):
            torch.autograd.grad(function(*leaves)[0].sum(), leaves, create_graph=True)
    assert len(found) == 1


@composed
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch.func.jvp's own
@pytest.mark.parametrize("kind", ["lstm_peephole", "gru"])
def test_gradients_of_each_sample_and_forward_mode(kind):
    function, leaves = as_function(make_normalized(kind, (3, 2, 3, 4)))
    leaves = [leaf.detach() for leaf in leaves]
    loss = lambda x, *rest: function(x, *rest)[0].square().sum()  # noqa: E731
    gradient = torch.func.grad(loss)
    xs = torch.stack([leaves[0] * s for s in (0.5, 1.0, -1.0)])
    found = torch.func.vmap(lambda x: gradient(x, *leaves[1:]))(xs)
    for x, each in zip(xs, found):
        alone = x.clone().requires_grad_()
        loss(alone, *leaves[1:]).backward()
        assert error(each, alone.grad) <= 1e-12
    _, slope = torch.func.jvp(lambda x: loss(x, *leaves[1:]), (xs[1],), (xs[0],))
    assert error(slope, (found[1] * xs[0]).sum()) <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_every_subset_of_gradients_is_right(kind):
    case = make_normalized(kind, (4, 3, 5, 18)).to(torch.float32)
    _, everything = run_ours(case)
    for index, name in enumerate(everything):
        function, leaves = as_function(case)
        leaves = [leaf.detach().requires_grad_(i == index) for i, leaf in enumerate(leaves)]
        upstream = [d for d in case.upstream if d is not None]
        (found,) = torch.autograd.grad(function(*leaves), leaves[index], upstream)
        assert torch.equal(found, everything[name]), name


@pytest.mark.parametrize("kind", ["lstm_peephole", "gru"])
def test_a_second_backward_is_right(kind):
    function, leaves = as_function(make_normalized(kind, (4, 3, 5, 18)).to(torch.float32))
    results = function(*leaves)
    upstream = [torch.ones_like(r) for r in results]
    first = torch.autograd.grad(results, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(results, leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_layer_is_the_same(kind):
    case = make_normalized(kind, (4, 3, 5, 18)).to(torch.float32)
    torch.compiler.reset()
    layer = partial(normalized.layer, return_cells=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(run(compiled, case), run_ours(case), strict=True):
        for name in theirs.keys() & ours.keys():
            assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm_peephole", "peephole"])
def test_operators_pass_the_checks_of_torch(isa, kind, dtype):
    case = with_resets(make_normalized(kind, (3, 2, 4, 18)), restored=True).to(dtype)
    tensors = [t if t is None else t.clone().requires_grad_() for t in case.tensors]
    arguments = (case.cell, tensors[0], tensors[1:], None, False, True, case.resets)
    torch.library.opcheck(torch.ops.rnn_ext.normalized_layer.default, arguments)
    given = case.tensors
    arguments = (case.cell, given[0], given[1:], None, False, case.resets)
    which = ("test_schema", "test_faketensor")
    operators = torch.ops.rnn_ext
    torch.library.opcheck(operators.normalized_forward.default, arguments, test_utils=which)
    output, _, _, cells, *kept = operators.normalized_forward(*arguments)
    kept, upstream = [output, cells, *kept], [torch.ones_like(output), None, None, None]
    arguments = (*arguments[:5], kept, upstream, [t is not None for t in given], case.resets)
    torch.library.opcheck(operators.normalized_backward.default, arguments, test_utils=which)


def test_what_does_not_fit_is_refused():
    case = make_normalized("lstm_peephole", (3, 2, 4, 5))

    def refused(message, **changes):
        tensors = list(case.tensors)
        for index, value in changes.items():
            tensors[int(index[1:])] = value
        with pytest.raises(RuntimeError, match=message):
            normalized.layer(case.cell, *tensors)

    t = case.tensors
    refused("expected gain_ih of shape", _8=t[8][1:])
    refused("expected peephole of shape", _12=t[12].float())
    refused("needs gains for input and state", _9=None)
    refused("needs gains for input and state", _10=None)
    refused(
        "no projection", _7=torch.zeros(2, 5, dtype=torch.float64), _1=t[1][:, :2], _4=t[4][:, :2]
    )
    refused("give gains, or peepholes", _8=None, _9=None, _10=None, _11=None, _12=None)
    gru = make_normalized("gru", (3, 2, 4, 5)).tensors
    with pytest.raises(RuntimeError, match="peepholes belong to the LSTM"):
        normalized.layer("gru", *gru[:12], t[12])


def test_the_reference_refuses_what_does_not_fit():
    case = make_normalized("gru", (3, 2, 4, 5))
    x, h0, _, *weights = (None if t is None else t.numpy() for t in case.tensors)
    weights[-1] = weights[2]
    with pytest.raises(ValueError, match="no peepholes"):
        reference.forward("gru", x, h0, None, weights)
    with pytest.raises(ValueError, match="needs gains"):
        reference.forward("gru", x, h0, None, [*weights[:6], None, None, None, None])


@pytest.mark.parametrize("kind", ["lstm_peephole", "gru"])
def test_nan_comes_through(isa, kind):
    case = make_normalized(kind, (3, 2, 4, 20)).to(torch.float32)
    case.tensors[0][1, 0, 0] = float("nan")
    output = normalized.layer(case.cell, *case.tensors)[0]
    assert not output[0].isnan().any()
    assert output[1:, 0].isnan().all() and not output[:, 1].isnan().any()


def test_how_many_threads_is_a_function_of_the_shape():
    plan = lambda batch, steps=64: _C.plan_rows("lstm", "float32", steps, batch, 256, 256)  # noqa: E731
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for batch in (1, 3):
            assert plan(batch) | {"threads": 2, "split": "columns"} == plan(batch)
        assert plan(4) | {"threads": 2, "split": "rows"} == plan(4)
        assert plan(32, 1)["threads"] == 2
        small = _C.plan_rows("gru", "float32", 900, 1, 20, 20)
        assert small["threads"] == 1 and "one sequence" in small["reason"]
        assert _C.plan_rows("gru", "float32", 1, 2, 4, 4)["threads"] == 1
    finally:
        torch.set_num_threads(before)
