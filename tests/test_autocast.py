"""autocast, loss scaling and other dtypes around training: dtypes are torch.nn's, numbers close.

Which dtype each kind of input and state gives is in test_backends.py; CUDA's rules, without a GPU,
in test_cuda_routing.py.
"""

import copy
import warnings

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence
from twins import CELLS, LAYERS, forget_warnings, state, tensors, torch_nn_warnings_ignored, twins

import rnn_ext
from rnn_ext import FallbackWarning, functional

VARIANTS = {
    "plain": {},
    "deep": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "without bias": {"bias": False},
}


@pytest.fixture(autouse=True)
def _each_warning_again():
    forget_warnings()
    with torch_nn_warnings_ignored():
        yield


def autocast(dtype=torch.bfloat16, enabled=True):
    return torch.autocast("cpu", dtype, enabled=enabled)


def squares(results):
    return sum(part.float().square().mean() for part in tensors(results))


def assert_close(ours, theirs, tolerance=3e-2):
    """Dtypes the same, values to ``tolerance`` of the largest."""
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype
        assert (our.double() - their.double()).abs().max() <= tolerance * their.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_arrive_in_the_dtype_of_the_parameters(name, variant):
    modules = twins(name, 4, 8, dtype=torch.float32, **VARIANTS[variant])
    x = torch.randn(5, 3, 4)
    hx = tensors(state(modules[0], 5 if "batch_first" in VARIANTS[variant] else 3, torch.float32))
    found = []
    for module in modules:
        leaves = [t.clone().requires_grad_() for t in (x, *hx)]
        with autocast():
            states = tuple(leaves[1:]) if name == "LSTM" else leaves[1]
            loss = squares(module(leaves[0], states))
        loss.backward()
        found.append([t.grad for t in (*leaves, *module.parameters())])
    assert all(g.dtype == torch.float32 for g in found[0])
    assert_close(*found)


@pytest.mark.parametrize("name", CELLS)
def test_gradients_of_cells_arrive_in_the_dtype_of_the_parameters(name):
    modules = twins(name, 4, 8, dtype=torch.float32)
    found = []
    x = torch.randn(3, 4)
    for module in modules:
        with autocast():
            squares(module(x)).backward()
        found.append([p.grad for p in module.parameters()])
    assert_close(*found)


def test_packed_input_and_lengths_train_under_autocast():
    ours, theirs = twins("GRU", 4, 8, dtype=torch.float32)
    x = torch.randn(5, 3, 4)
    for run in (
        lambda module: module(pack_padded_sequence(x, [5, 2, 1])),
        lambda module: (
            module(x, lengths=[5, 2, 1])
            if module is ours
            else module(pack_padded_sequence(x, [5, 2, 1]))
        ),
    ):
        found = []
        for module in (ours, theirs):
            module.zero_grad()
            with autocast():
                loss = run(module)[1].float().square().mean()
            loss.backward()
            found.append([p.grad for p in module.parameters()])
        assert_close(*found)


def test_autocast_ends_where_it_is_switched_off():
    ours, theirs = twins("LSTM", 4, 8, dtype=torch.float32)
    x = torch.randn(5, 3, 4)
    expected = ours(x)
    with autocast():
        with autocast(enabled=False):
            within = ours(x)
            their_within = theirs(x)
        narrow, their_narrow = ours(x), theirs(x)
    assert all(torch.equal(a, b) for a, b in zip(tensors(within), tensors(expected)))
    assert [t.dtype for t in tensors(within)] == [t.dtype for t in tensors(their_within)]
    assert [t.dtype for t in tensors(narrow)] == [t.dtype for t in tensors(their_narrow)]


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_autocast_computes_what_converting_by_hand_does(kind):
    """The kernels run in bfloat16, and nothing falls back."""
    module = getattr(rnn_ext, kind)(4, 8)
    x = torch.randn(*((3, 4) if kind in CELLS else (5, 3, 4)))
    with autocast():
        found = tensors(module(x))
    expected = tensors(module.bfloat16()(x.bfloat16()))
    # States of the LSTM and of cells stay float32, as torch.nn's do, within the rounding of h.
    assert_close([t.bfloat16() for t in found], expected, 2e-2)


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_inside_and_outside_of_torch_func(name):
    module = getattr(rnn_ext, name)(4, 8)
    parameters = {key: value.detach() for key, value in module.named_parameters()}
    x = torch.randn(3, 5, 2, 4)

    def loss(parameters, x):
        with autocast():
            return squares(functional_call(module, parameters, (x,))[0])

    def alone(k):
        with autocast():
            total = squares(module(x[k])[0])
        return torch.autograd.grad(total, list(module.parameters()))

    each = vmap(grad(loss), (None, 0))(parameters, x)
    for k in range(3):
        assert_close([each[key][k] for key in parameters], alone(k), 1e-2)
    with autocast():
        outside = grad(lambda p: squares(functional_call(module, p, (x[0],))[0]))(parameters)
    assert_close(outside.values(), alone(0), 1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=["bfloat16", "no autocast"])
def test_grad_scaler_on_the_cpu(dtype):
    """A step with a scaler is a step without; an infinite gradient is skipped."""
    scaled = rnn_ext.LSTM(4, 8)
    plain = copy.deepcopy(scaled)
    x = torch.randn(5, 3, 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (scaled, plain)]
    for _ in range(3):
        for module, optimizer in zip((scaled, plain), optimizers):
            optimizer.zero_grad()
            with autocast(enabled=dtype is not None):
                loss = squares(module(x))
            if module is plain:
                loss.backward()
                optimizer.step()
                continue
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1e9)
            scaler.step(optimizer)
            scaler.update()
    assert scaler.get_scale() == 2048.0
    assert_close(list(scaled.parameters()), list(plain.parameters()), 1e-5)

    before = [p.detach().clone() for p in scaled.parameters()]
    optimizers[0].zero_grad()
    scaler.scale(squares(scaled(x * float("inf")))).backward()
    scaler.step(optimizers[0])
    scaler.update()
    assert scaler.get_scale() == 1024.0
    assert all(torch.equal(a, b) for a, b in zip(before, scaled.parameters()))


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_modules_converted_to_other_dtypes_train(kind):
    """float64 and bfloat16 by kernels; float16 by torch.nn, which says so once."""
    module, twin = twins(kind, 4, 8, dtype=torch.float32)
    x = torch.randn(*((3, 4) if kind in CELLS else (5, 3, 4)))
    for convert, dtype in (("double", torch.float64), ("bfloat16", torch.bfloat16)):
        results = []
        for m in (module, twin):
            getattr(m, convert)().zero_grad()
            outputs = tensors(m(x.to(dtype)))
            squares(outputs).backward()
            results.append([*outputs, *(p.grad for p in m.parameters())])
            assert all(r.dtype == dtype for r in results[-1])
        assert_close(*results, 1e-6 if dtype == torch.float64 else 5e-2)
    with pytest.warns(FallbackWarning, match="float16 has no CPU kernel"):
        outputs = tensors(module.half()(x.half()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(part.dtype == torch.float16 for part in tensors(module(x.half())))
    assert all(part.dtype == torch.float16 for part in outputs)
    assert {p.dtype for p in module.float().parameters()} == {torch.float32}


def test_autocast_to_float16_says_that_it_has_no_kernel():
    """torch.nn's kernel serves."""
    ours, theirs = twins("GRU", 4, 8, dtype=torch.float32)
    x = torch.randn(5, 3, 4)
    with autocast(torch.float16):
        with pytest.warns(FallbackWarning, match="autocast to float16 .* has no CPU kernel"):
            found = ours(x)
        expected = theirs(x)
    assert_close(tensors(found), tensors(expected), 1e-6)
    squares(found).backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())
    with rnn_ext.use_backend("cpu"), autocast(torch.float16):
        with pytest.raises(RuntimeError, match="GRU: the backend 'cpu' cannot run this"):
            ours(x)


def test_functional_under_autocast():
    lstm = rnn_ext.LSTM(4, 8)
    x = torch.randn(5, 3, 4, requires_grad=True)
    weights = list(lstm.parameters())
    with autocast():
        output, (h, c) = functional.lstm(x, None, *weights)
        expected, (h_n, c_n) = lstm(x)
    assert torch.equal(output, expected) and torch.equal(h, h_n[0]) and torch.equal(c, c_n[0])
    found = torch.autograd.grad(squares((output, h, c)), [x, *weights])
    assert all(g.dtype == torch.float32 for g in found)
