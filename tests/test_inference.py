"""Without gradients one call runs all layers, with the same results and errors as otherwise."""

import pytest
import torch

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


@pytest.fixture
def calls(monkeypatch):
    """How often the one call served."""
    served = []

    def counted(name):
        run = getattr(_C, name)

        def wrapper(*arguments):
            result = run(*arguments)
            served.append(result is not None)
            return result

        monkeypatch.setattr(_C, name, wrapper)

    counted("run_stack")
    counted("run_cell")
    return served


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("kind, options", LAYERS + CELLS)
def test_same_bits_as_with_gradients(calls, kind, options, given, dtype):
    torch.manual_seed(1)
    module = getattr(rnn_ext, kind)(4, 6, dtype=dtype, **options)
    leading = (2,) if kind.endswith("Cell") else (2, 5) if module.batch_first else (5, 2)
    x = torch.randn(*leading, 4, dtype=dtype)
    hx = states_of(module, (2,), dtype) if given else None
    expected = module(x, hx)
    assert not any(calls)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            result = module(x, hx)
        assert type(result) is type(expected)
        for ours, theirs in zip(flat(result), flat(expected), strict=True):
            assert torch.equal(ours, theirs) and ours.dtype == dtype and not ours.requires_grad
            assert ours.stride() == theirs.stride()
    assert calls == [True, True]


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


def test_dropout_in_training_mode_is_kept(calls):
    module = rnn_ext.GRU(4, 6, num_layers=2, dropout=0.5)
    x = torch.randn(5, 2, 4)
    with torch.no_grad():
        assert not torch.equal(module(x)[0], module(x)[0]) and not calls
        module.eval()
        assert torch.equal(module(x)[0], module(x)[0]) and all(calls)
