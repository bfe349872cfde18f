"""Zoneout in layers with layer normalisation or peepholes, kernels and modules."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import DTYPES, RESULTS, VARIANTS, run, run_reference, with_resets, with_zoneout
from hypothesis import given, settings
from hypothesis import strategies as st
from normalized_cases import KINDS, as_function, make, make_normalized, run_ours
from normalized_checks import check
from options_by_numpy import expected, seed_of_next_call
from tolerance import error
from twins import forget_warnings

import rnn_ext
from rnn_ext import composite, normalized

SHARE = 0.375
zones = pytest.mark.parametrize("zoneout", ["masks", SHARE])
every_kind = pytest.mark.parametrize("kind", KINDS)
a_few = pytest.mark.parametrize("kind", ["rnn_relu", "lstm_peephole", "gru", "gru_reset_before"])
composed = pytest.mark.filterwarnings("ignore:.*have no kernel; composed")
LAYERS = ("RNN-relu", "LSTM-both", "GRU", "GRU-before")


@pytest.fixture(autouse=True)
def _fresh():
    forget_warnings()


def zoned(kind, shape, zoneout="masks", *, restored=None, seed=0, **options):
    case = make_normalized(kind, shape, seed=seed, **options)
    if restored is not None:
        case = with_resets(case, restored=restored)
    return with_zoneout(case, None if zoneout == "masks" else zoneout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_kind
def test_layer_is_as_exact_as_a_loop_of_torch(kind, dtype, nan_filled):
    check(kind, (6, 9, 5, 21), dtype, zoneout="masks")
    check(kind, (6, 9, 5, 21), dtype, True, SHARE, **VARIANTS["ragged_reverse"])


@pytest.mark.parametrize("zoneout, restored", [("masks", True), (SHARE, False)])
@every_kind
def test_resets_on_every_instruction_set(isa, kind, zoneout, restored, nan_filled):
    check(kind, (6, 9, 5, 21), torch.float32, restored, zoneout, **VARIANTS["ragged_reverse"])


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 20), st.integers(1, 9), st.integers(2, 40)),
    zoneout=st.sampled_from(["masks", "masks", 0.0, SHARE, 0.96875]),
    ragged=st.booleans(),
    reverse=st.booleans(),
    restored=st.sampled_from([None, False, True]),
    seed=st.integers(0, 1000),
)
def test_any_shape(kind, shape, zoneout, ragged, reverse, restored, seed):
    case = zoned(kind, shape, zoneout, restored=restored, seed=seed, ragged=ragged, reverse=reverse)
    for ours, truth in zip(run_ours(case), run_reference(case), strict=True):
        for name in truth:
            assert error(ours[name], truth[name]) <= 1e-10, name


@zones
@every_kind
def test_composed_of_torch_operations_it_is_the_same(kind, zoneout):
    case = zoned(kind, (5, 4, 6, 11), zoneout, restored=True, ragged=True)
    with rnn_ext.use_backend("reference"):
        chosen = run_ours(case)
    for direct, ours, truth in zip(run(composite.layer, case), chosen, run_reference(case)):
        for name in truth:
            assert error(direct[name], truth[name]) <= 1e-12, name
            assert torch.equal(direct[name], ours[name]), name


@a_few
def test_nothing_held_changes_no_bit_and_all_held_keeps_the_state(isa, kind):
    plain = make_normalized(kind, (4, 3, 5, 19), ragged=True).to(torch.float32)
    masks = with_zoneout(plain).zoneout
    nothing, everything = (
        replace(plain, zoneout=tuple(z if z is None else torch.full_like(z, on) for z in masks))
        for on in (False, True)
    )
    (results, gradients), (same, right) = run_ours(nothing), run_ours(plain)
    assert all(torch.equal(results[name], same[name]) for name in same)
    torch.testing.assert_close(gradients, right)
    results, gradients = run_ours(everything)
    assert torch.equal(results["h_n"], plain.tensors[1])
    for name in gradients.keys() - {"h0", "c0"}:
        assert gradients[name].count_nonzero() == 0, name


@zones
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@a_few
def test_without_gradients_and_in_a_team_the_results_are_the_same(kind, threads, zoneout):
    case = zoned(kind, (40, 9, 20, 40), zoneout, restored=True, ragged=True).to(torch.float32)
    results, _ = run_ours(case)
    truth, _ = run_reference(case)
    for return_cells in (False, True):
        found = normalized.layer(
            case.cell, *case.tensors, **case.options(), return_cells=return_cells
        )
        for name, value in zip(RESULTS, found):
            assert value is None or torch.equal(value, results[name]), name
    assert all(error(results[name], truth[name]) <= 1e-5 for name in truth)


@zones
@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm_peephole", "gru_reset_before"])
def test_a_compiled_layer_is_the_same(kind, zoneout):
    case = zoned(kind, (4, 3, 5, 18), zoneout, restored=True).to(torch.float32)
    torch.compiler.reset()
    layer = partial(normalized.layer, return_cells=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(run(compiled, case), run_ours(case), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@zones
@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm_peephole"])
def test_operators_pass_the_checks_of_torch(kind, zoneout):
    case = zoned(kind, (3, 2, 4, 6), zoneout).to(torch.float32)
    tensors = [t if t is None else t.clone().requires_grad_() for t in case.tensors]
    arguments = (case.cell, tensors[0], tensors[1:], None, False, True, None, *case.zoneout)
    torch.library.opcheck(torch.ops.rnn_ext.normalized_layer.default, arguments)


@composed
@zones
@a_few
def test_gradients_of_gradients(kind, zoneout):
    function, leaves = as_function(zoned(kind, (2, 2, 2, 3), zoneout, ragged=True))
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("lengths", [None, [2, 5, 3]], ids=["padded", "lengths"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_follow_the_reference(name, training, lengths):
    options = {"num_layers": 2, "bidirectional": True, "zoneout": 0.4}
    module = make(name, 5, 12, **options).double().train(training)
    x, resets = torch.randn(5, 3, 5, dtype=torch.float64), torch.rand(5, 3) < 0.3
    seed = seed_of_next_call()
    with rnn_ext.use_backend("cpu"):  # which refuses what it cannot run
        output, _ = module(x, lengths=lengths, resets=resets)
    assert {step.kernel for step in rnn_ext.explain(module, x).steps} == {"cpu"}
    truth, _ = expected(
        module,
        x,
        lengths=None if lengths is None else torch.tensor(lengths).numpy(),
        seed=seed,
        resets=resets.numpy(),
    )
    assert error(output.detach(), truth) <= 1e-12


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_modules_have_the_same_masks(name):
    torch.compiler.reset()
    module, x = make(name, bidirectional=True, zoneout=0.4), torch.randn(4, 3, 5)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    seed_of_next_call()
    found = compiled(x)[0]
    seed_of_next_call()
    assert torch.equal(found, module(x)[0])


@pytest.mark.filterwarnings("ignore:.*torch.func and forward-mode derivatives")
def test_transforms_have_the_masks_of_the_call():
    module = make("LSTM-both", zoneout=0.4).double()
    x = torch.randn(4, 2, 5, dtype=torch.float64, requires_grad=True)
    seed_of_next_call()
    (expected,) = torch.autograd.grad(module(x)[0].square().sum(), x)
    seed_of_next_call()
    found = torch.func.grad(lambda x: module(x)[0].square().sum())(x.detach())
    assert error(found, expected) <= 1e-11
