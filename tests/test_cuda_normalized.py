"""Layer normalisation and peepholes on the emulated CUDA kernels, drivers and all."""

import pytest
import torch
from cases import SHARE, VARIANTS, run, run_reference, with_resets, with_zoneout
from emulated import emulated_modules, emulation
from gradient_cases import CLIPS, control, reference_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from normalized_cases import KINDS, make_normalized, run_ours
from normalized_checks import check
from tolerance import error

from rnn_ext import control as controls
from rnn_ext import normalized
from rnn_ext.control import Control

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    with emulation(monkeypatch, "auto", "auto") as predicates:
        yield predicates


# One unit of a row a thread, several, and many rows.
@pytest.mark.parametrize("shape", [(1, 1, 3, 4), (4, 13, 31, 33), (2, 3, 5, 300)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_kind
def test_layer_is_as_exact_as_a_loop_of_torch(kind, dtype, shape, nan_filled):
    check(kind, shape, dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@every_kind
def test_variants_are_as_exact_as_a_loop_of_torch(kind, variant, nan_filled):
    check(kind, (6, 9, 5, 21), torch.float32, **VARIANTS[variant])


@pytest.mark.parametrize("restored", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("variant", ["padded", "ragged_reverse"])
@every_kind
def test_resets(kind, variant, restored, nan_filled):
    check(kind, (6, 9, 5, 21), torch.float32, restored, **VARIANTS[variant])


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(3, 9), st.integers(3, 40)),
    bias=st.booleans(),
    ragged=st.booleans(),
    restored=st.sampled_from([None, False, True]),
    seed=st.integers(0, 1000),
)
def test_any_shape(kind, shape, bias, ragged, restored, seed):
    case = make_normalized(kind, shape, bias=bias, ragged=ragged, seed=seed)
    if restored is not None:
        case = with_resets(case, restored=restored)
    for ours, truth in zip(run_ours(case), run_reference(case), strict=True):
        for name in truth:
            assert error(ours[name], truth[name]) <= 1e-9, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_kind
def test_every_subset_of_gradients_is_right(kind, dtype, nan_filled):
    case = make_normalized(kind, (4, 3, 5, 18)).to(dtype)
    _, everything = run_ours(case)
    pairs = [i for i, d in enumerate(case.upstream) if d is not None]
    for (name, whole), index in zip(
        everything.items(), [i for i, t in enumerate(case.tensors) if t is not None], strict=True
    ):
        tensors = [None if t is None else t.clone() for t in case.tensors]
        tensors[index].requires_grad_()
        results = normalized.layer(case.cell, *tensors, return_cells=True)
        torch.autograd.backward([results[i] for i in pairs], [case.upstream[i] for i in pairs])
        assert torch.equal(tensors[index].grad, whole), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_kind
def test_without_gradients_the_results_are_the_same(kind, dtype, nan_filled):
    """Although the input is then projected for some steps at a time."""
    case = make_normalized(kind, (40, 9, 5, 33), ragged=True).to(dtype)
    results, _ = run_ours(case)
    alone = normalized.layer(case.cell, *case.tensors, batch_sizes=case.batch_sizes)
    for name, value in zip(("output", "h_n", "c_n"), alone):
        assert value is None or error(value, results[name].double()) <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@every_kind
def test_what_is_saved_has_the_width_that_compiled_models_expect(kind, dtype):
    case = make_normalized(kind, (3, 2, 4, 18)).to(dtype)
    *_, records, isa = emulated_modules()[0].normalized_forward(
        case.cell, case.tensors[:8], case.tensors[8:], None, False, None, None, True
    )
    compute = torch.promote_types(dtype, torch.float32)
    width = normalized._record_width(case.cell, 18, case.tensors[8] is not None, compute, True)
    assert records.shape == (6, width) and records.dtype == compute and isa == "cuda"


@every_kind
def test_an_empty_batch_and_what_is_not_a_number(kind):
    case = make_normalized(kind, (3, 2, 4, 20)).to(torch.float32)
    tensors = [None if t is None else t.clone() for t in case.tensors]
    tensors[0][1, 0, 0] = torch.nan
    output = normalized.layer(case.cell, *tensors)[0]
    assert not output[0].isnan().any() and not output[:, 1].isnan().any()
    assert output[1:, 0].isnan().all()
    tensors[0] = tensors[0][:, :0]
    tensors[1:3] = [None if t is None else t[:0] for t in tensors[1:3]]
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    output = normalized.layer(case.cell, *leaves)[0]
    output.sum().backward()
    assert output.shape == (3, 0, 20)
    assert all(not t.grad.any() for t in leaves if t is not None and t.grad is not None)


MODES = {"all": {}, "checkpoints": {"checkpoint_every": 2}, "states": {"save": "states"}}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grad_clip", CLIPS, ids=str)
@every_kind
def test_clipped_gradients_follow_the_reference(kind, grad_clip, mode, nan_filled):
    for variant in ("padded", "ragged_reverse"):
        case = make_normalized(kind, (6, 9, 5, 21), **VARIANTS[variant])
        truth, flows = reference_gradients(case, grad_clip), []
        how = control(grad_clip, **MODES[mode]).watching(flows)
        _, found = run(how.layer, case)
        for name in truth:
            assert error(found[name], truth[name]) <= 1e-10, name
        run(control(grad_clip).watching(flows).composed, case)
        assert error(flows[0].norms.reshape(-1), flows[1].norms.reshape(-1)) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["checkpoints", "states"])
@every_kind
def test_less_is_kept_and_all_else_stays(kind, mode, dtype, monkeypatch, nan_filled):
    monkeypatch.setattr(controls, "_SUMMED_ROWS", 4)
    monkeypatch.setattr(controls, "_CACHED_GATES", 0)
    case = make_normalized(kind, (7, 1 if mode == "states" else 9, 5, 33), ragged=True)
    case = with_resets(case, restored=True).to(dtype)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 4e-2}[dtype]
    for found, expected in zip(run(Control(**MODES[mode]).layer, case), run_ours(case)):
        for name in expected:
            assert error(found[name], expected[name].double()) <= tolerance, name


@pytest.mark.parametrize("share", [None, SHARE], ids=["masks", "share"])
@pytest.mark.parametrize("mode", MODES)
@every_kind
def test_states_that_are_held(kind, mode, share, nan_filled):
    for variant, grad_clip in (("padded", None), ("ragged_reverse", CLIPS[1])):
        case = make_normalized(kind, (6, 9, 5, 21), **VARIANTS[variant])
        case = with_zoneout(with_resets(case, restored=True), share)
        how = Control(**MODES[mode]) if grad_clip is None else control(grad_clip, **MODES[mode])
        results, gradients = run(how.layer, case)
        truth, exact = run_reference(case, grad_clip)
        for name, value in (truth | exact).items():
            assert error((results | gradients)[name], value) <= 1e-10, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "rnn_relu"])  # has a kink
def test_states_that_are_held_in_other_numbers(kind, dtype, nan_filled):
    case = with_zoneout(make_normalized(kind, (5, 9, 4, 33), ragged=True))
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]
    for found, truth in zip(run_ours(case.to(dtype)), run_reference(case), strict=True):
        for name, exact in truth.items():
            assert error(found[name], exact) <= tolerance, name
