"""Layers that train under a `Control`, on the emulated CUDA kernels.

Gradients are clipped and looked at in the backward loop, and less is kept than it reads.
"""

import numpy as np
import pytest
import torch
from cases import CELLS, VARIANTS, make_case, run, run_ours, with_resets
from emulated import emulation
from emulated_checks import away_from_the_kink
from gradient_cases import CLIPS, control, reference_gradients

from rnn_ext import control as controls
from rnn_ext import reference
from rnn_ext.control import Control

STEP, PERSISTENT = "cuda-step", "cuda-persistent"
# Have persistent kernels.
SINGLE = ("rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm", "gru", "gru_reset_before")
MODES = {"all": {}, "checkpoints": {"checkpoint_every": 2}, "states": {"save": "states"}}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
every_path = pytest.mark.parametrize("path", [STEP, PERSISTENT])
every_clip = pytest.mark.parametrize("grad_clip", CLIPS, ids=str)
every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def emulated(monkeypatch, request):
    given = getattr(request.node, "callspec", None)
    path = given.params.get("path", STEP) if given else STEP
    with emulation(monkeypatch, path, path) as predicates:
        yield predicates


def assert_close(found, expected, dtype):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name].double() - value.double()).abs().max() / value.abs().max().clamp(min=1)
        assert error <= TOLERANCE[dtype], (name, error)


@every_mode
@every_clip
@pytest.mark.parametrize("variant", ["padded", "ragged_reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_clipped_gradients_follow_the_reference(cell, variant, grad_clip, mode, nan_filled):
    case = make_case(cell, (6, 9, 5, 21), **VARIANTS[variant])
    _, found = run(control(grad_clip, **MODES[mode]).layer, case)
    assert_close(found, reference_gradients(case, grad_clip), torch.float64)


@every_clip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", SINGLE)
@every_path
def test_other_numbers(path, cell, dtype, grad_clip, nan_filled):
    """By norm the backward pass is step-wise whatever the path."""
    case = away_from_the_kink(make_case(cell, (5, 9, 4, 33)))
    truth = reference_gradients(case, grad_clip)
    free = reference_gradients(case, None)
    assert not torch.allclose(truth["w_hh"], free["w_hh"], rtol=1e-2)  # the limit is felt
    _, found = run(control(grad_clip).layer, case.to(dtype))
    assert_close(found, truth, dtype)


@pytest.mark.parametrize("grad_clip", [1e6, ("norm", 1e6)], ids=str)
@pytest.mark.parametrize("cell", SINGLE)
def test_a_limit_that_is_never_reached_changes_no_bit(cell, grad_clip):
    case = make_case(cell, (5, 9, 4, 33)).to(torch.float32)
    _, expected = run_ours(case)
    _, found = run(control(grad_clip).layer, case)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@every_clip
@every_path
def test_what_is_not_a_number_stays_so(path, grad_clip):
    case = make_case("gru", (4, 2, 3, 20)).to(torch.float32)
    case.upstream[0][3, 0, 0] = torch.nan
    _, found = run(control(grad_clip).layer, case)
    assert found["h0"][0].isnan().all() and not found["h0"][1].isnan().any()


@pytest.mark.parametrize("restored", [False, True], ids=["zeros", "restored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["checkpoints", "states"])
@pytest.mark.parametrize("cell", SINGLE)
@every_path
def test_less_is_kept_and_all_else_stays(
    path, cell, mode, dtype, restored, monkeypatch, nan_filled
):
    """Parts of two steps, whatever is kept."""
    monkeypatch.setattr(controls, "_SUMMED_ROWS", 4)
    monkeypatch.setattr(controls, "_CACHED_GATES", 0)
    case = make_case(cell, (7, 1, 5, 33) if mode == "states" else (7, 9, 5, 33), ragged=True)
    case = with_resets(case, restored=restored).to(dtype)
    results, expected = run_ours(case)
    again, found = run(Control(**MODES[mode]).layer, case)
    assert_close(again, results, dtype)
    assert_close(found, expected, dtype)


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
@every_path
def test_what_is_kept(path, cell):
    case = make_case(cell, (40, 8, 3, 32)).to(torch.float32)
    kept = {}
    for mode, options in MODES.items():
        sizes = {}

        def note(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            leaves = [None if t is None else t.clone().requires_grad_() for t in case.tensors]
            output, *_ = Control(**options).layer(case.cell, *leaves)
        given = {t.data_ptr() for t in (*leaves, output) if t is not None}
        kept[mode] = sum(size for address, size in sizes.items() if address not in given)
    rows, states = 40 * 8 * 32, {"lstm": 2}.get(cell, 1)
    assert kept["checkpoints"] == 19 * 8 * 32 * states
    assert kept["states"] == rows * (states - 1)  # h is the output itself
    assert kept["all"] == rows * {"rnn_tanh": 0, "lstm": 5, "gru": 4}[cell]


@every_mode
@every_clip
@pytest.mark.parametrize("cell", CELLS)
def test_the_norms_that_are_seen(cell, grad_clip, mode, nan_filled):
    """Of dL/dh_t before it is clipped."""
    case = make_case(cell, (6, 9, 5, 150))
    case.upstream = [case.upstream[0], None, None, None]
    x, h0, c0, *weights = (None if t is None else t.numpy() for t in case.tensors)
    result = reference.forward(case.cell, x, h0, c0, weights)
    dh = reference.hidden_gradients(result, case.upstream[0].numpy(), grad_clip=grad_clip)
    flows = []
    run(control(grad_clip, **MODES[mode]).watching(flows).layer, case)
    norms = flows[0].norms.reshape(6, 9).numpy()
    assert np.abs(norms - np.linalg.norm(dh, axis=-1)).max() <= 1e-10
