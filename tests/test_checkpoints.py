"""Modules that get their weights late or from a file: meta device, skip_init, lazy neighbours,
torch.load with weights_only, mmap and assign."""

import inspect
import io
import pickle

import pytest
import torch
from twins import CELLS, LAYERS, assert_same, assert_twins, pair, tensors, twins

import rnn_ext

NAMES = LAYERS + CELLS


def made_on_meta(cls, args):
    module = cls(*args, device="meta", dtype=torch.float64).to_empty(device="cpu")
    torch.manual_seed(0)
    module.reset_parameters()
    return module


def made_under_a_device(cls, args):
    with torch.device("meta"):
        module = cls(*args, dtype=torch.float64)
    torch.manual_seed(0)
    weights = {key: torch.randn(value.shape).double() for key, value in module.state_dict().items()}
    module.load_state_dict(weights, assign=True)
    return module


def skip_init(cls, args):
    if cls in (torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU):  # whose signature names no device
        module = cls(*args, dtype=torch.float64)
    else:
        module = torch.nn.utils.skip_init(cls, *args, dtype=torch.float64)
    torch.manual_seed(0)
    module.reset_parameters()
    return module


@pytest.mark.parametrize("name", LAYERS)
def test_the_signature_is_the_documented_one(name):
    cls = getattr(rnn_ext, name)
    shown = inspect.signature(cls)
    documented = cls.__doc__.split(f"``{name}(")[1].split(")``")[0].split()
    first = [str(p) for p in shown.parameters.values() if p.kind is not p.KEYWORD_ONLY]
    assert ", ".join(first).replace("'", '"') == " ".join(documented)
    keywords = {name for name, p in shown.parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert str(cls(4, 3, **{key: shown.parameters[key].default for key in keywords})) == str(
        cls(4, 3)
    )


@pytest.mark.parametrize("make", [made_on_meta, made_under_a_device, skip_init])
@pytest.mark.parametrize("name", NAMES)
def test_deferred_initialization(name, make):
    args = (4, 3) if name in CELLS else (4, 3, 2)
    ours, theirs = make(getattr(rnn_ext, name), args), make(getattr(torch.nn, name), args)
    assert type(ours) is getattr(rnn_ext, name)
    x = torch.randn(*((2, 4) if name in CELLS else (5, 2, 4)), dtype=torch.float64)
    assert_twins(ours, theirs, x)


class Between(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.before, self.layer = torch.nn.LazyLinear(4), layer
        self.after = torch.nn.LazyLinear(2)

    def forward(self, x):
        results = tensors(self.layer(self.before(x)))
        return self.after(results[0])


@pytest.mark.parametrize("name", NAMES)
def test_lazy_neighbours(name):
    ours, theirs = (Between(module).double() for module in twins(name, 4, 3))
    x = torch.randn(*((2, 9) if name in CELLS else (5, 2, 9)), dtype=torch.float64)
    assert isinstance(ours.before, torch.nn.LazyLinear)
    for module in (ours, theirs):
        torch.manual_seed(1)
        module(x)
    assert ours.before.in_features == 9 and ours.after.in_features == 3
    assert_twins(ours, theirs, x)


def saved(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("name", NAMES)
def test_whole_modules_load_with_weights_only(name):
    ours, _, x = pair(name)
    model = torch.nn.Sequential(ours)
    with pytest.raises(pickle.UnpicklingError, match=f"rnn_ext.*{name}"):
        with torch.serialization.safe_globals([torch.nn.Sequential]):
            torch.load(saved(model), weights_only=True)
    allowed = [torch.nn.Sequential, type(ours)]
    with torch.serialization.safe_globals(allowed):
        loaded = torch.load(saved(model), weights_only=True)
    assert type(loaded[0]) is type(ours)
    with torch.no_grad():
        assert_same(loaded(x), model(x))
    assert_twins(loaded, model, x)


@pytest.mark.parametrize("name", NAMES)
def test_loading_with_mmap_and_assign(name, tmp_path):
    ours, theirs, x = pair(name)
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    mapped = torch.load(tmp_path / "weights.pt", weights_only=True, mmap=True)
    with torch.device("meta"):
        empty, _, _ = pair(name)
    x = torch.randn(x.shape, dtype=x.dtype)
    empty.load_state_dict(mapped, assign=True)
    assert all(
        parameter.data_ptr() == mapped[key].data_ptr()
        for key, parameter in empty.named_parameters()
    )
    with torch.no_grad():
        assert_same(empty(x), theirs(x))
        ours.load_state_dict(mapped, assign=True)
        assert_same(ours(x), theirs(x))
    assert_twins(ours, theirs, x)
