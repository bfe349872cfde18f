"""Cell x backend x dtype x shape on a GPU: every result and every gradient of one layer."""

import pytest
import torch
from card import (
    DEVICE,
    ON_GPU,
    each_backend,
    each_dtype,
    layer,
    least_error,
    moved,
    no_tf32,  # noqa: F401, a fixture of every test
    on_cpu,
    require_device,
    run_floor,
    run_ours,
    run_truth,
    skip_too_large,
    skip_uncovered,
)
from cases import CELLS, SHAPES, make_case
from tolerance import FORWARD, GRADIENT, error

import rnn_ext

require_device()
VARIANTS = {
    "reverse": {"reverse": True},
    "ragged": {"ragged": True},
    "ragged_reverse": {"ragged": True, "reverse": True},
    "without_bias": {"bias": False},
}
# More than one block of units, of rows and of both; beyond what one cluster's registers hold.
LARGER = ((6, 70, 40, 200), (4, 33, 64, 640), (3, 5, 32, 1100))


def check(case, backend, dtype):
    skip_too_large(backend, case, dtype)
    truth, true_gradients = run_truth(case)
    case = moved(case, dtype)
    results, gradients = map(on_cpu, run_ours(case, backend))
    floor, floor_gradients = map(on_cpu, run_floor(case))
    assert results.keys() == truth.keys() and gradients.keys() == true_gradients.keys()
    least = least_error(backend, dtype)
    for name in truth:
        compare(name, results[name], floor[name], truth[name], FORWARD, least)
    for name in true_gradients:
        ours, theirs = gradients[name], floor_gradients[name]
        compare(f"gradient of {name}", ours, theirs, true_gradients[name], GRADIENT, least)


def compare(name, ours, theirs, truth, factor, least):
    """As ``tolerance.assert_as_exact``, with a floor of its own under torch's error."""
    assert ours.dtype == theirs.dtype and ours.shape == truth.shape, name
    found, eps = error(ours, truth), torch.finfo(ours.dtype).eps
    if ours.dtype == torch.float64:  # the truth is itself a float64 sum in some order
        assert found <= 1e-13, f"{name}: error {found:.3g}"
        return
    floor = error(theirs, truth)
    allowed = factor * max(floor, eps, least) + eps
    assert found <= allowed, f"{name}: error {found:.3g}, torch's is {floor:.3g}"


@pytest.mark.parametrize("shape", (*SHAPES, *LARGER), ids=str)
@each_dtype
@pytest.mark.parametrize("cell", CELLS)
@each_backend
def test_layer_is_as_exact_as_torch(backend, cell, dtype, shape):
    skip_uncovered(backend, cell, dtype)
    check(make_case(cell, shape), backend, dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@each_dtype
@pytest.mark.parametrize("cell", CELLS)
@each_backend
def test_variants_are_as_exact_as_torch(backend, cell, dtype, variant):
    skip_uncovered(backend, cell, dtype)
    check(make_case(cell, (6, 9, 5, 21), **VARIANTS[variant]), backend, dtype)


@pytest.mark.parametrize("cell", ("rnn_tanh", "lstm", "gru"))
@each_backend
def test_many_steps(backend, cell):
    skip_uncovered(backend, cell)
    check(make_case(cell, (400, 3, 8, 48)), backend, torch.float32)


@pytest.mark.skipif(not ON_GPU, reason="TF32 is a GPU's")
@pytest.mark.parametrize("cell", ("rnn_tanh", "lstm", "gru"))
@each_backend
def test_tf32_is_used_only_when_torch_allows_it(backend, cell):
    skip_uncovered(backend, cell)
    case = make_case(cell, (5, 20, 64, 256))
    # Numbers that TF32 cannot hold; the others are exact in it.
    case.tensors[4] = case.tensors[4] * (1 + 2.0**-13)
    truth, _ = run_truth(case)
    precise = error(
        run_ours(moved(case, torch.float32), backend)[0]["output"].cpu(), truth["output"]
    )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    rounded = error(
        run_ours(moved(case, torch.float32), backend)[0]["output"].cpu(), truth["output"]
    )
    assert precise < 3e-5
    assert rounded < 2e-3


@pytest.mark.parametrize("cell", ("rnn_tanh", "lstm", "gru"))
@each_backend
def test_every_run_gives_the_same_bits(backend, cell):
    skip_uncovered(backend, cell)
    dtype = torch.bfloat16
    case = moved(make_case(cell, (20, 37, 40, 200)), dtype)
    first = run_ours(case, backend)
    for _ in range(5):
        for before, after in zip(first, run_ours(case, backend)):
            for name in before:
                assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("cell", CELLS)
@each_backend
def test_an_empty_batch(backend, cell):
    skip_uncovered(backend, cell)
    case = moved(make_case(cell, (3, 1, 4, 8)), torch.float32)
    width = case.tensors[1].size(1)
    x, h0 = case.tensors[0][:, :0], case.tensors[1][:0]
    c0 = None if case.tensors[2] is None else case.tensors[2][:0]
    with rnn_ext.use_backend(backend):
        output, h_n, *_ = layer(case.cell, x, h0, c0, *case.tensors[3:], None, False)
    assert (
        output.shape == (3, 0, width)
        and h_n.shape == (0, width)
        and output.device.type == DEVICE.type
    )


@pytest.mark.slow
@pytest.mark.skipif(not ON_GPU, reason="it takes the memory of a large GPU")
@each_backend
def test_offsets_beyond_two_to_the_31(backend):
    skip_uncovered(backend, "lstm")
    if torch.cuda.get_device_properties(DEVICE).total_memory < 70e9:
        pytest.skip("needs 70 GB")
    steps, batch, hidden = 33000, 64, 256  # 4 H gates of every step: 2.16e9 numbers
    assert steps * batch * 4 * hidden > 2**31
    torch.manual_seed(0)
    module = rnn_ext.LSTM(16, hidden, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(steps, batch, 16, device=DEVICE, dtype=torch.bfloat16)
    with rnn_ext.use_backend(backend):
        output, (h_n, _) = module(x)
        output[-1].float().sum().backward()
        late = module(x[-200:])[0]
    assert torch.equal(output[-1], h_n[0])
    # 200 steps forget where they began, so the end of the long run is that of a short one.
    torch.testing.assert_close(output[-1], late[-1], rtol=0, atol=0.02)
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())
