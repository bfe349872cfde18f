"""The same seed gives the same bits: again, in another process, elsewhere in memory and, for
results, with any number of threads."""

import hashlib
import subprocess
import sys

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from twins import CELLS, LAYERS, tensors

import rnn_ext

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
KINDS = [
    ("RNN", {}),
    ("RNN", {"nonlinearity": "relu"}),
    ("RNN", {"nonlinearity": "sigmoid"}),
    ("LSTM", {}),
    ("LSTM", {"proj_size": 5}),
    ("GRU", {}),
    ("GRU", {"reset_after": False}),
    ("RNNCell", {}),
    ("LSTMCell", {}),
    ("GRUCell", {}),
    ("GRUCell", {"reset_after": False}),
]


def training(name, options, dtype, hidden=40, shape=(5, 6)):
    """Everything a seeded training of two steps computes."""
    torch.manual_seed(11)
    if name in CELLS:
        module, shape = getattr(rnn_ext, name)(7, hidden, dtype=dtype, **options), shape[1:]
    else:
        module = getattr(rnn_ext, name)(
            7, hidden, 2, bidirectional=True, dropout=0.4, dtype=dtype, **options
        )
    seen = []
    for _ in range(2):
        x = torch.randn(*shape, 7, dtype=dtype, requires_grad=True)
        results = tensors(module(x))
        grads = torch.autograd.grad(results, [x, *module.parameters()], results)
        with torch.no_grad():
            for parameter, grad in zip(module.parameters(), grads[1:]):
                parameter.sub_(0.1 * grad)
            seen += [*(r.detach() for r in results), *grads, *tensors(module.eval()(x))]
        module.train()
    return seen


def same_bits(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "options"), KINDS, ids=str)
def test_again(isa, name, options, dtype):
    first = training(name, options, dtype)
    assert all(part.isfinite().all() for part in first)
    occupied = [torch.full((k,), 3.0) for k in range(1, 50, 7)]  # the allocator goes elsewhere
    assert same_bits(first, training(name, options, dtype))
    del occupied


@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.parametrize("name", LAYERS)
def test_again_in_a_team(name, threads):
    first = training(name, {}, torch.float32, 260, (4, 3))
    for _ in range(3):
        assert same_bits(first, training(name, {}, torch.float32, 260, (4, 3)))


def digest():
    digest = hashlib.sha256()
    for name, options in KINDS:
        for part in training(name, options, torch.float32):
            digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()


def test_in_another_process():
    program = "import torch, test_determinism; print(test_determinism.digest())"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{program}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == digest()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_elsewhere_in_memory(name, dtype):
    torch.manual_seed(3)
    module = getattr(rnn_ext, name)(7, 37, dtype=dtype)
    x = torch.randn(*((3, 7) if name in CELLS else (4, 3, 7)), dtype=dtype)

    def displaced(tensor):
        return torch.cat([torch.zeros(3, dtype=dtype), tensor.flatten()])[3:].view(tensor.shape)

    weights = {key: displaced(value.detach()) for key, value in module.named_parameters()}
    assert all(weight.data_ptr() % 64 for weight in weights.values())
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            expected = tensors(module(x))
            moved = tensors(torch.func.functional_call(module, weights, (displaced(x),)))
        assert same_bits(expected, moved)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "options"), KINDS, ids=str)
def test_with_any_number_of_threads(name, options, dtype):
    """Sums over the batch or the time are cut up by thread, so gradients may differ in rounding."""
    module = getattr(rnn_ext, name)(33, 200, dtype=dtype, **options)
    steps = () if name in CELLS else (3,)
    before = torch.get_num_threads()
    for batch in (1, 8, 130):
        x = torch.randn(*steps, batch, 33, dtype=dtype, requires_grad=True)
        results, grads = [], []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                with torch.no_grad():
                    results.append(tensors(module(x)))
                shown = tensors(module(x))
                grads.append(torch.autograd.grad(shown, [x, *module.parameters()], shown))
                results[-1] += [part.detach() for part in shown]
        finally:
            torch.set_num_threads(before)
        assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])
        eps = torch.finfo(dtype).eps
        for other in grads[1:]:
            for one, two in zip(grads[0], other, strict=True):
                scale = one.abs().max().item()
                torch.testing.assert_close(one, two, rtol=0, atol=64 * eps * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "options"), KINDS, ids=str)
def test_use_deterministic_algorithms(request, name, options, dtype):
    expected = training(name, options, dtype)
    request.getfixturevalue("nan_filled")
    assert torch.are_deterministic_algorithms_enabled()
    assert same_bits(expected, training(name, options, dtype))


@pytest.mark.parametrize("name", LAYERS)
def test_use_deterministic_algorithms_with_ragged_batches(name, nan_filled):
    module = getattr(rnn_ext, name)(7, 9, 2, bidirectional=True)
    x = torch.randn(5, 3, 7, requires_grad=True)
    packed = pack_padded_sequence(x, [2, 5, 3], enforce_sorted=False)
    for results in (module(packed), module(x, lengths=[2, 5, 3])):
        outputs = tensors(results)
        grads = torch.autograd.grad(outputs, [x, *module.parameters()], outputs)
        assert all(part.isfinite().all() for part in (*outputs, *grads))


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_random_numbers_are_drawn_for_dropout_alone(name):
    x = torch.randn(*((3, 7) if name in CELLS else (4, 3, 7)))
    modules = [getattr(rnn_ext, name)(7, 9)]
    if name in LAYERS:
        modules.append(getattr(rnn_ext, name)(7, 9, 2, dropout=0.5).eval())
    before = torch.get_rng_state()
    for module in modules:
        sum(part.sum() for part in tensors(module(x))).backward()
    assert torch.equal(torch.get_rng_state(), before)
    if name in LAYERS:
        module.train()(x)
        assert not torch.equal(torch.get_rng_state(), before)
