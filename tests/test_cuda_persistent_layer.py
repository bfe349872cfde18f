"""Layers whose passes are persistent CUDA kernels, drivers and all, emulated on CPU tensors.

What one path saves the other must be able to read, so the passes are mixed as well.
"""

import pytest
import torch
from cases import (
    SHAPES,
    VARIANTS,
    assert_second_backward_is_right,
    make_case,
    run_ours,
    with_resets,
)
from emulated import emulated_modules, emulation
from emulated_checks import (
    PREDICATES,
    away_from_the_kink,
    by_hand,
    check,
    check_both_directions_with_resets,
    check_packed_resets,
    check_predicates,
)
from tolerance import error

import rnn_ext
from rnn_ext import ops

CELLS = ("rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm", "gru", "gru_reset_before")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEP, PERSISTENT = "cuda-step", "cuda-persistent"
PATHS = {
    "persistent": (PERSISTENT, PERSISTENT),
    "forward": (PERSISTENT, STEP),
    "backward": (STEP, PERSISTENT),
}
every_path = pytest.mark.parametrize("paths", PATHS.values(), ids=PATHS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_cell = pytest.mark.parametrize("cell", CELLS)


@pytest.fixture(autouse=True)
def emulated(monkeypatch, request):
    """On the paths that the test has as a parameter, otherwise persistent both ways."""
    given = getattr(request.node, "callspec", None)
    paths = given.params.get("paths") if given else None
    with emulation(monkeypatch, *(paths or PATHS["persistent"])) as predicates:
        yield predicates
        predicates.schedule(0, 0)


def plans(cell, dtype, shape, directions):
    """[(kernel, reason) of forward, of backward] on the emulated device."""
    extension = emulated_modules()[0]
    steps, batch, _, hidden = shape
    limits = extension.cuda_device_limits(0)
    rest = directions, False, False, False, PERSISTENT, limits
    return extension.plan_cuda(cell, dtype, steps, batch, hidden, *rest)


def test_what_these_tests_run():
    """Both passes of every case are persistent; blocks meet in clusters, in others by flags."""
    shapes = [(shape, 1) for shape in (*SHAPES, (6, 9, 5, 21))]
    shapes += [(shape, n) for shape in ((7, 9, 5, 21), (6, 5, 3, 11)) for n in (1, 2)]
    found = [p for c in CELLS for d in DTYPES for s, n in shapes for p in plans(c, d, s, n)]
    assert {kernel for kernel, _ in found} == {PERSISTENT}
    reasons = " ".join(reason for _, reason in found)
    for text in ("1 cluster of 1 block,", "6 clusters of 4 blocks,", "1 group of 19 blocks,"):
        assert text in reasons


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_dtype
@every_cell
def test_layer_is_as_exact_as_torch(cell, dtype, shape, nan_filled):
    check(make_case(cell, shape), dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@every_dtype
@every_cell
@every_path
def test_variants_are_as_exact_as_torch(cell, dtype, variant, paths, nan_filled):
    check(make_case(cell, (6, 9, 5, 21), **VARIANTS[variant]), dtype)


@pytest.mark.parametrize("restored", [False, True], ids=["zeros", "restored"])
@pytest.mark.parametrize("variant", ["padded", "ragged_reverse"])
@every_cell
@every_path
def test_layers_with_resets(cell, variant, restored, paths, nan_filled):
    case = make_case(cell, (6, 9, 5, 21), **VARIANTS[variant])
    check(with_resets(case, restored=restored), torch.float32)


@every_dtype
@every_cell
def test_restored_states_are_as_exact_as_torch(cell, dtype, nan_filled):
    check(with_resets(make_case(cell, (6, 9, 5, 33), ragged=True), restored=True), dtype)


@pytest.mark.parametrize("restored", [False, True], ids=["zeros", "restored"])
@every_cell
def test_both_directions_with_resets(cell, restored, nan_filled):
    check_both_directions_with_resets(cell, torch.float32, restored)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", PREDICATES)
@every_dtype
@every_cell
def test_rows_end_early_and_start_afresh(emulated, cell, dtype, kind, reverse, nan_filled):
    check_predicates(emulated, cell, dtype, kind, reverse, PATHS["persistent"])


@pytest.mark.parametrize(
    "paths", [PATHS["forward"], PATHS["backward"]], ids=["forward", "backward"]
)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@every_cell
def test_predicates_on_either_path(emulated, cell, dtype, paths, nan_filled):
    check_predicates(emulated, cell, dtype, "both", True, paths)


@pytest.mark.parametrize("directions", [1, 2])
@every_dtype
@every_cell
def test_resets_of_packed_rows(emulated, cell, dtype, directions, nan_filled):
    check_packed_resets(emulated, cell, dtype, PATHS["persistent"], directions)


@pytest.mark.parametrize("kind", PREDICATES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@every_cell
@every_path
def test_two_directions_in_one_launch(emulated, cell, dtype, kind, paths, nan_filled):
    check_predicates(emulated, cell, dtype, kind, False, paths, directions=2)


@every_cell
def test_every_schedule_gives_the_same_bits(emulated, cell):
    case = make_case(cell, (4, 13, 31, 33), ragged=True).to(torch.bfloat16)
    first = run_ours(case)
    for seed in (1, 2, 3):
        emulated.schedule(seed, 0)
        for ours, same in zip(run_ours(case), first):
            assert all(torch.equal(ours[name], same[name]) for name in same)


@every_cell
def test_tf32_products_where_torch_may(cell):
    case = away_from_the_kink(make_case(cell, (5, 9, 5, 21))).to(torch.float32)
    for t in (case.tensors[1], case.tensors[4]):  # numbers that TF32 has to round
        t.mul_(1 + 2**-12)
    truth = by_hand(case, None, None, torch.float64)[1]
    exact = run_ours(case)[1].values()
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        rounded = run_ours(case)[1].values()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    truth = [t for t in truth if t is not None]
    worst = [max(error(a, t) for a, t in zip(values, truth)) for values in (exact, rounded)]
    assert worst[0] <= 1e-5 < 1e-4 <= worst[1] <= 5e-3


@every_dtype
@every_cell
def test_without_gradients_the_results_are_the_same(cell, dtype, nan_filled):
    case = make_case(cell, (6, 9, 5, 21), ragged=True).to(dtype)
    results, _ = run_ours(case)
    alone = ops.layer(case.cell, *case.tensors, batch_sizes=case.batch_sizes)
    assert not alone[0].requires_grad
    for name, value in zip(("output", "h_n", "c_n"), alone):
        if value is not None:
            assert torch.equal(value, results[name]), name


@every_path
@every_cell
def test_every_subset_of_gradients_is_right(cell, paths, nan_filled):
    case = make_case(cell, (4, 3, 5, 18)).to(torch.bfloat16)
    _, everything = run_ours(case)
    for index, name in enumerate(("input", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh")):
        if case.tensors[index] is None:
            continue
        tensors = [None if t is None else t.clone() for t in case.tensors]
        tensors[index].requires_grad_()
        results = ops.layer(case.cell, *tensors)
        pairs = [(r, d) for r, d in zip(results, case.upstream) if d is not None]
        torch.autograd.backward([r for r, _ in pairs], [d for _, d in pairs])
        assert torch.equal(tensors[index].grad, everything[name]), name


@every_cell
def test_a_second_backward_is_right(cell):
    case = make_case(cell, (4, 3, 5, 18)).to(torch.bfloat16)
    assert_second_backward_is_right(case)


@every_path
@every_cell
def test_an_empty_batch(cell, paths):
    case = make_case(cell, (3, 1, 4, 5)).to(torch.float32)
    tensors = [None if t is None else t.clone() for t in case.tensors]
    tensors[0] = tensors[0][:, :0]
    tensors[1:3] = [None if t is None else t[:0] for t in tensors[1:3]]
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    output = ops.layer(case.cell, *leaves)[0]
    output.sum().backward()
    assert output.shape == (3, 0, 5)
    assert all(t.grad.count_nonzero() == 0 for t in leaves if t is not None and t.grad is not None)


@every_dtype
@every_cell
def test_nan_stays_in_its_row(cell, dtype):
    case = make_case(cell, (3, 2, 4, 40)).to(dtype)
    case.tensors[0][1, 0, 0] = float("nan")
    output = ops.layer(case.cell, *case.tensors)[0]
    assert not output[0].isnan().any()
    assert output[1:, 0].isnan().all() and not output[:, 1].isnan().any()


@pytest.mark.parametrize(
    "cell, dtype, reason",
    [
        ("lstm", torch.float64, "tensor cores have no float64 fit for it"),
        ("lstm_projected", torch.float32, "a projected LSTM multiplies twice a step"),
    ],
)
def test_what_has_no_persistent_kernel_is_said(cell, dtype, reason, emulated):
    case = make_case(cell, (3, 2, 4, 5)).to(dtype)
    with pytest.raises(RuntimeError, match=f"'cuda-persistent' cannot run this .*: .*{reason}"):
        ops.layer(case.cell, *case.tensors)
    inputs = [(case.cell, *case.tensors, None, False)]
    by_default = emulated.forward(inputs, None, None, False, emulated.Path.auto)
    step_wise = emulated.forward(inputs, None, None, False, getattr(emulated.Path, STEP))
    assert torch.equal(by_default[0][0], step_wise[0][0])


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_modules_of_two_layers_and_directions(kind):
    theirs = getattr(torch.nn, kind)(5, 7, 2, bidirectional=True, batch_first=True)
    ours = getattr(rnn_ext, kind)(5, 7, 2, bidirectional=True, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 6, 5)
    for module in (theirs, ours):
        module(x)[0].square().sum().backward()
    assert torch.allclose(ours(x)[0], theirs(x)[0], rtol=0, atol=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-5)
