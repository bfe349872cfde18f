"""Zoneout on the emulated step-wise CUDA kernels: cell x dtype x layout, masks and shares."""

from dataclasses import replace

import pytest
import torch
from cases import (
    CELLS,
    SHARE,
    ZONED,
    assert_gradients_of_each_sample,
    run,
    run_ours,
    with_zoneout,
    zoned,
)
from emulated import emulation
from emulated_checks import check
from gradient_cases import control, reference_gradients
from tolerance import error

from rnn_ext import control as controls
from rnn_ext import library, ops

STEP = "cuda-step"
SHAPE = (5, 6, 4, 21)
masks_and_share = pytest.mark.parametrize("share", [None, SHARE], ids=["masks", "share"])
every_cell = pytest.mark.parametrize("cell", CELLS)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    with emulation(monkeypatch, STEP, STEP) as predicates:
        yield predicates


@masks_and_share
@pytest.mark.parametrize("variant", ZONED)
@every_cell
def test_kernels_follow_the_reference(cell, variant, share, nan_filled):
    check(zoned(cell, SHAPE, variant, share), torch.float64)


@masks_and_share
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_cell
def test_other_numbers(cell, dtype, share, nan_filled):
    check(zoned(cell, SHAPE, "ragged_reverse_resets", share), dtype)


@masks_and_share
@every_cell
def test_without_gradients_the_results_are_the_same(cell, share, nan_filled):
    case = zoned(cell, SHAPE, "ragged", share).to(torch.float32)
    results, _ = run_ours(case)
    output, h_n, c_n, _ = ops.layer(case.cell, *case.tensors, **case.options())
    for name, value in zip(("output", "h_n", "c_n"), (output, h_n, c_n)):
        assert value is None or error(value, results[name].double()) <= 1e-6, name


@masks_and_share
@pytest.mark.parametrize(
    "grad_clip, mode",
    [(0.3, {"checkpoint_every": 2}), (("norm", 0.4), {"save": "states"})],
    ids=["value-checkpoints", "norm-states"],
)
@every_cell
def test_clipped_and_computed_again(cell, grad_clip, mode, share, monkeypatch, nan_filled):
    monkeypatch.setattr(controls, "_SUMMED_ROWS", 4)
    monkeypatch.setattr(controls, "_CACHED_GATES", 0)
    case = zoned(cell, SHAPE, "ragged_reverse_resets", share)
    _, found = run(control(grad_clip, **mode).layer, case)
    truth = reference_gradients(case, grad_clip)
    assert found.keys() == truth.keys()
    for name, exact in truth.items():
        assert error(found[name], exact) <= 1e-10, name


@masks_and_share
@pytest.mark.parametrize("cell", ["rnn_relu", "lstm_projected", "gru"])
def test_each_direction_has_masks_of_its_own(cell, share):
    cases = [zoned(cell, SHAPE, share=share, seed=k).to(torch.float32) for k in range(2)]
    cases[1] = replace(cases[1], zoneout=with_zoneout(cases[1], share, seed=7).zoneout)
    x, zoneout = cases[0].tensors[0], [case.zoneout for case in cases]
    groups = [tuple(case.tensors[1:]) for case in cases]
    pair = ops.both_directions(cases[0].cell, x, *groups, zoneout=zoneout)
    for k, results in enumerate(pair):
        alone = ops.layer(cases[0].cell, x, *groups[k], reverse=bool(k), zoneout=zoneout[k])
        assert all(a is None or torch.equal(a, b) for a, b in zip(results, alone))


@masks_and_share
@every_cell
def test_the_operator_does_the_same(cell, share):
    case = zoned(cell, SHAPE, "ragged", share).to(torch.bfloat16)

    def operator(cell, input, *direction, batch_sizes, reverse, zoneout):
        given = cell, input, [direction], batch_sizes, reverse, True, None, [zoneout]
        return library.layer(*given)[0]

    for ours, theirs in zip(run_ours(case), run(operator, case)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    arguments = case.cell, case.tensors[0], case.tensors[1:], case.batch_sizes, case.reverse
    holds = library._stacked([case.zoneout])
    layer_forward = torch.ops.rnn_ext_emulated.layer_forward.default
    checks = ("test_schema", "test_faketensor")
    with torch.no_grad():
        torch.library.opcheck(layer_forward, (*arguments, None, *holds), test_utils=checks)


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru_reset_before"])
def test_each_sample_gets_its_own_gradients(cell, nan_filled):
    assert_gradients_of_each_sample(zoned(cell, (4, 2, 5, 9), "ragged"), 1e-10)


def test_persistent_kernels_refuse_it(monkeypatch):
    case = zoned("lstm", SHAPE).to(torch.float32)
    expected, _ = run_ours(case)
    with emulation(monkeypatch, "auto", "auto"):
        taken, _ = run_ours(case)
    with emulation(monkeypatch, "cuda-persistent", "cuda-persistent"):
        run_ours(replace(case, zoneout=None))
        with pytest.raises(RuntimeError, match=r"'cuda-persistent' cannot run.*zoneout is in the"):
            run_ours(case)
    assert all(torch.equal(taken[name], value) for name, value in expected.items())
