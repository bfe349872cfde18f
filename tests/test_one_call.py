"""One call of C++ runs all layers, with the results, gradients and errors of the general path."""

import pytest
import torch
import torch.utils.checkpoint
from twins import forget_warnings

import rnn_ext
from rnn_ext import _C

LAYERS = [
    ("RNN", {}),
    ("RNN", {"nonlinearity": "sigmoid", "num_layers": 2}),
    ("GRU", {"bias": False}),
    ("GRU", {"reset_after": False, "bidirectional": True}),
    ("GRU", {"batch_first": True, "num_layers": 3}),
    ("LSTM", {}),
    ("LSTM", {"proj_size": 3, "num_layers": 2, "bidirectional": True}),
    ("LSTM", {"batch_first": True, "bias": False, "bidirectional": True}),
    ("RNN", {"weight_dropout": 0.3, "num_layers": 2, "bidirectional": True}),
    ("GRU", {"zoneout": 0.3, "variational_dropout": 0.2, "bidirectional": True}),
    ("LSTM", {"zoneout": 0.3, "proj_size": 3, "num_layers": 2, "batch_first": True}),
    (
        "LSTM",
        {
            "zoneout": 0.2,
            "weight_dropout": 0.3,
            "variational_dropout": 0.2,
            "dropout": 0.1,
            "residual": True,
            "num_layers": 3,
            "bias": "single",
        },
    ),
]
CELLS = [
    ("RNNCell", {"nonlinearity": "relu"}),
    ("GRUCell", {}),
    ("GRUCell", {"reset_after": False, "bias": False}),
    ("LSTMCell", {"bias": False}),
    ("LSTMCell", {}),
]


def flat(result):
    return torch.utils._pytree.tree_leaves(result)


def states_of(module, leading, dtype):
    if isinstance(module, torch.nn.RNNBase):
        rows = module.num_layers * (2 if module.bidirectional else 1)
        h = torch.randn(rows, *leading, module.proj_size or module.hidden_size, dtype=dtype)
        c = torch.randn(rows, *leading, module.hidden_size, dtype=dtype)
    else:
        h, c = (torch.randn(*leading, module.hidden_size, dtype=dtype) for _ in range(2))
    return (h, c) if "LSTM" in type(module).__name__ else h


class Calls(list):
    """Whether the one call served, for each time it was tried; not at all if ``refused``."""

    refused = False


@pytest.fixture
def calls(monkeypatch):
    calls = Calls()

    def counted(name):
        run = getattr(_C, name)

        def wrapper(*arguments):
            result = None if calls.refused else run(*arguments)
            calls.append(result is not None)
            return result

        monkeypatch.setattr(_C, name, wrapper)

    counted("run_stack")
    counted("run_cell")
    return calls


@pytest.fixture(params=LAYERS + CELLS, ids=lambda c: f"{c[0]}-{'-'.join(map(str, c[1].values()))}")
def case(request):
    """A module, and an input for it in the dtype it has: (make, leading sizes of the input)."""
    kind, options = request.param
    torch.manual_seed(1)

    def make(dtype=torch.float32, **more):
        return getattr(rnn_ext, kind)(4, 6, dtype=dtype, **options, **more)

    return make, (2,) if kind.endswith("Cell") else (2, 5) if "batch_first" in options else (5, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
def test_same_bits_as_the_general_path(calls, case, given, dtype):
    make, leading = case
    module = make(dtype)
    x = torch.randn(*leading, 4, dtype=dtype, requires_grad=True)
    hx = states_of(module, (2,), dtype) if given else None
    leaves = [x, *(t.requires_grad_() for t in flat(hx) if given), *module.parameters()]

    def with_gradients():
        torch.manual_seed(3)
        result = module(x, hx)
        torch.manual_seed(2)
        loss = sum((t * torch.randn_like(t)).sum() for t in flat(result))
        return result, torch.autograd.grad(loss, leaves)

    calls.refused = True
    expected, gradients = with_gradients()
    calls.refused = False
    result, ours = with_gradients()
    assert calls == [False, True]
    for a, b in zip((*flat(result), *ours), (*flat(expected), *gradients), strict=True):
        assert torch.equal(a, b) and a.dtype == dtype and a.stride() == b.stride()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.manual_seed(3)
            result = module(x, hx)
        assert type(result) is type(expected)
        for a, b in zip(flat(result), flat(expected), strict=True):
            assert torch.equal(a, b) and a.dtype == dtype and not a.requires_grad
            assert a.stride() == b.stride()
    assert calls == [False, True, True, True]


def test_gradients_only_of_what_asks_for_them(calls, case):
    make, leading = case
    module = make()
    x = torch.randn(*leading, 4)
    next(module.parameters()).requires_grad_(False)
    flat(module(x))[0].sum().backward()
    assert calls == [True] and x.grad is None
    for p in module.parameters():
        assert (p.grad is not None) == p.requires_grad
    module.requires_grad_(False)
    assert not any(t.requires_grad for t in flat(module(x)))
    x.requires_grad_()
    flat(module(x))[0].sum().backward()
    assert x.grad.any() and calls == [True] * 3


@pytest.mark.filterwarnings("ignore::rnn_ext.FallbackWarning")
def test_gradients_of_gradients(calls, case):
    make, leading = case
    module = make(torch.float64)
    x = torch.randn(*leading, 4, dtype=torch.float64, requires_grad=True)
    hx = tuple(t.requires_grad_() for t in flat(states_of(module, (2,), torch.float64)))

    def run(x, *hx):
        torch.manual_seed(3)
        return tuple(flat(module(x, hx if len(hx) > 1 else hx[0])))

    assert torch.autograd.gradgradcheck(run, (x, *hx))
    assert calls and all(calls)


def test_autograd_as_users_know_it(calls):
    module = rnn_ext.LSTM(4, 6, num_layers=2)
    x = torch.randn(5, 2, 4, requires_grad=True)
    output, (h_n, _) = module(x)
    (first,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
    assert torch.equal(first, second)
    forget_warnings()
    with pytest.warns(rnn_ext.FallbackWarning, match="is_grads_batched=True"):
        rows = torch.autograd.grad(
            h_n[1, 0], x, torch.eye(6), retain_graph=True, is_grads_batched=True
        )
    for i, row in enumerate(rows[0]):
        torch.testing.assert_close(row, torch.autograd.grad(h_n[1, 0, i], x, retain_graph=True)[0])
    with torch.no_grad():
        output.zero_()  # what the backward pass reads
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output, _ = module(x)
    assert kept
    output.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()
    again = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)[0]
    (gradient,) = torch.autograd.grad(again.sum(), x)
    assert torch.equal(gradient, x.grad) and all(calls)


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_what_is_not_plain_takes_the_general_path(calls, kind):
    module = getattr(rnn_ext, kind)(4, 6)
    shape = (2, 4) if kind.endswith("Cell") else (5, 2, 4)
    x = torch.randn(shape)
    with torch.no_grad():
        expected = flat(module(x))
        calls.clear()
        noisy = torch.randn(shape).as_subclass(type("Sub", (torch.Tensor,), {}))
        module(noisy)
        with rnn_ext.use_backend("reference"):
            for ours, theirs in zip(flat(module(x)), expected):
                torch.testing.assert_close(ours, theirs)
        with torch.autocast("cpu", torch.bfloat16):
            module(x)
        assert not any(calls)
        twin = getattr(torch.nn, kind)(4, 6)
        wrong = [(x[..., :3],), (x.double(),), (x.to(torch.int64),), (x[0, 0, ..., None, None],)]
        wrong += [(x, states_of(module, (3,), torch.float32)), (x, [x]), ([x],)]
        for arguments in wrong:
            assert error_of(module, arguments) == error_of(twin, arguments)
        assert not any(calls)


def error_of(module, arguments):
    with pytest.raises(Exception) as caught:
        module(*arguments)
    return caught.type, str(caught.value)


def test_weights_are_read_at_every_call(calls):
    module = rnn_ext.LSTM(4, 6)
    x = torch.randn(5, 2, 4)
    with torch.no_grad():
        before = module(x)[0]
        module.weight_hh_l0.mul_(0.5)
        after = module(x)[0]
        assert not torch.equal(before, after) and all(calls)
        swapped = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
        assert not torch.func.functional_call(module, swapped, (x,))[0].any()
        torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
        calls.clear()
        torch.testing.assert_close(module(x)[0], after)
        assert not calls


def test_dropout_falls_as_it_does_in_torch(calls):
    module = rnn_ext.GRU(4, 6, num_layers=3, dropout=0.5)
    x = torch.randn(5, 2, 4)

    def run(of, seed):
        torch.manual_seed(seed)
        return of(x)[0]

    twin = torch.nn.GRU(4, 6, num_layers=3, dropout=0.5)
    twin.load_state_dict(module.state_dict())
    torch.testing.assert_close(run(module, 1), run(twin, 1))
    assert not torch.equal(run(module, 1), run(module, 2))
    module.eval()
    assert torch.equal(run(module, 1), run(module, 2)) and all(calls)
