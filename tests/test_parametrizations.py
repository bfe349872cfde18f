"""Weights that are computed, pruned, frozen, tied, replaced or averaged: the results and gradients
of torch.nn in the same situation."""

import contextlib
import copy
import io
import warnings

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize, prune
from twins import CELLS, LAYERS, assert_same, assert_twins, gradients, pair, run, tensors, twins

import rnn_ext

NAMES = LAYERS + CELLS


def recurrent(module):
    """Names of the recurrent weights."""
    return [name for name, _ in module.named_parameters() if name.startswith("weight_hh")]


def weight_norm(module):
    for name in recurrent(module):
        parametrizations.weight_norm(module, name)


def old_weight_norm(module):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*weight_norm")
        for name in recurrent(module):
            torch.nn.utils.weight_norm(module, name)


def spectral_norm(module):
    torch.manual_seed(5)  # the power iteration starts from random vectors
    for name in recurrent(module):
        parametrizations.spectral_norm(module, name)
    # It iterates at every access in training, and torch.nn reads a weight twice in a call.
    module.eval()


def old_spectral_norm(module):
    torch.manual_seed(5)
    for name in recurrent(module):
        torch.nn.utils.spectral_norm(module, name)


def orthogonal(module):
    torch.manual_seed(5)  # a tall matrix is completed to a square one at random
    for name in recurrent(module):
        parametrizations.orthogonal(module, name)


def two_parametrizations(module):
    for name in recurrent(module):
        parametrizations.weight_norm(module, name)
        parametrize.register_parametrization(module, name, torch.nn.Tanh())


def pruned(module):
    names = recurrent(module)
    for name in names:
        prune.l1_unstructured(module, name, amount=0.4)
    prune.ln_structured(module, names[0], amount=0.3, n=2, dim=0)


def pruned_for_good(module):
    pruned(module)
    for name in list(module._buffers):
        prune.remove(module, name.removesuffix("_mask"))


def frozen(module):
    for name in recurrent(module):
        getattr(module, name).requires_grad_(False)


def bias_only(module):
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith("bias"))


SITUATIONS = [
    weight_norm, old_weight_norm, spectral_norm, old_spectral_norm, orthogonal,
    two_parametrizations, pruned, pruned_for_good, frozen, bias_only,
]  # fmt: skip


@pytest.mark.parametrize("change", SITUATIONS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_changed_weights(name, change):
    ours, theirs, x = pair(name)
    for module in (ours, theirs):
        change(module)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_twins(ours, theirs, x)


@pytest.mark.parametrize("name", NAMES)
def test_spectral_norm_in_training(name):
    ours, theirs, x = pair(name)
    for module in (ours, theirs):
        spectral_norm(module)
        module.train()
    for _ in range(3):
        results = []
        for module in (ours, theirs):
            with parametrize.cached():  # one iteration a step for both
                results.append(module(x))
        assert_same(*results)
        assert_same(gradients(ours, results[0]), gradients(theirs, results[1]))
    key = f"parametrizations.{recurrent_key(ours)}.0._u"
    before = ours.state_dict()[key].clone()
    ours(x)
    assert not torch.equal(ours.state_dict()[key], before)


def recurrent_key(module):
    return next(iter(module.parametrizations))


@pytest.mark.parametrize("name", NAMES)
def test_parametrizations_come_off_again(name):
    ours, theirs, x = pair(name)
    for module in (ours, theirs):
        keys = recurrent(module)
        orthogonal(module)
        for key in keys:
            parametrize.remove_parametrizations(module, key)
    assert type(ours) is getattr(rnn_ext, name)
    assert_twins(ours, theirs, x)


@pytest.mark.parametrize("name", LAYERS)
def test_tied_between_layers_and_directions(name):
    ours, theirs = twins(name, 6, 3, 2, bidirectional=True)
    for module in (ours, theirs):
        module.weight_hh_l1 = module.weight_hh_l0
        module.weight_ih_l1 = module.weight_ih_l0
        module.bias_ih_l0_reverse = module.bias_hh_l0_reverse = module.bias_ih_l0
        module.weight_hh_l1_reverse = module.weight_hh_l1
    assert len(list(ours.parameters())) == 16 - 5
    assert_twins(ours, theirs, torch.randn(5, 2, 6, dtype=torch.float64))


class Shared(torch.nn.Module):
    """One layer called twice, and another whose weights are those of a third and of a linear."""

    def __init__(self, library, name):
        super().__init__()
        torch.manual_seed(0)
        layer = getattr(library, name)
        self.twice = layer(4, 4, dtype=torch.float64)
        self.first = layer(4, 4, dtype=torch.float64)
        self.second = layer(4, 4, dtype=torch.float64)
        self.second.weight_hh_l0 = self.first.weight_hh_l0
        self.second.bias_ih_l0 = self.twice.bias_ih_l0
        rows = self.first.weight_ih_l0.size(0)
        self.linear = torch.nn.Linear(4, rows, dtype=torch.float64)
        self.linear.weight = self.first.weight_ih_l0

    def forward(self, x):
        x, _ = self.twice(x)
        x, _ = self.twice(x)
        x, _ = self.first(x)
        x, hidden = self.second(x)
        return self.linear(x), hidden


@pytest.mark.parametrize("name", LAYERS)
def test_shared_between_modules(name):
    ours, theirs = Shared(rnn_ext, name), Shared(torch.nn, name)
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    assert_twins(ours, theirs, x)
    again = copy.deepcopy(ours)
    assert again.linear.weight is again.first.weight_ih_l0 is not ours.linear.weight
    assert_same(again(x), ours(x))


class WeightDrop(torch.nn.Module):
    """Drop-connect as fastai and awd-lstm-lm do it: a plain tensor where the parameter was."""

    def __init__(self, module, names):
        super().__init__()
        self.module, self.names = module, names
        for name in names:
            weight = getattr(module, name)
            delattr(module, name)
            self.register_parameter(f"{name}_raw", torch.nn.Parameter(weight.detach()))

    def forward(self, *args):
        for name in self.names:
            raw = getattr(self, f"{name}_raw")
            setattr(self.module, name, torch.nn.functional.dropout(raw, 0.5, self.training))
        return self.module(*args)


@pytest.mark.parametrize("name", NAMES)
def test_weight_drop(name):
    ours, theirs, x = pair(name)
    ours, theirs = (WeightDrop(module, recurrent(module)) for module in (ours, theirs))
    for mode in (contextlib.nullcontext, torch.no_grad):
        results = []
        for module in (ours, theirs):
            torch.manual_seed(7)
            with mode():
                results.append(run(module, x))
        assert_same(*results)
        if mode is contextlib.nullcontext:
            assert_same(gradients(ours, results[0]), gradients(theirs, results[1]))
    with torch.no_grad():
        assert not torch.equal(tensors(run(ours, x))[0], tensors(run(ours, x))[0])
    assert_twins(ours.eval(), theirs.eval(), x)


@pytest.mark.parametrize("name", NAMES)
def test_functional_call_has_gradients_for_what_it_is_given(name):
    ours, theirs, x = pair(name)
    given = {key: (0.5 * value.detach()).requires_grad_() for key, value in ours.named_parameters()}
    grads = []
    for module in (ours, theirs):
        results = tensors(torch.func.functional_call(module, given, (x,)))
        grads.append(torch.autograd.grad(sum((r**2).sum() for r in results), [*given.values()]))
    assert_same(*grads)
    with torch.no_grad():
        called = [torch.func.functional_call(module, given, (x,)) for module in (ours, theirs)]
        assert_same(*called)
        assert not torch.equal(tensors(called[0])[0], tensors(ours(x))[0])
        assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("name", NAMES)
def test_moving_average_of_weights(name):
    ours, theirs, x = pair(name)
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    averages = [
        torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=ema) for module in (ours, theirs)
    ]
    for module, average in zip((ours, theirs), averages):
        optimizer = torch.optim.SGD(module.parameters(), 0.5)
        for _ in range(3):
            optimizer.zero_grad()
            sum(result.square().sum() for result in tensors(module(x))).backward()
            optimizer.step()
            average.update_parameters(module)
    with torch.no_grad():
        assert_same(averages[0](x), averages[1](x))
        assert not torch.allclose(tensors(averages[0](x))[0], tensors(ours(x))[0], rtol=1e-3)
    assert type(averages[0].module) is getattr(rnn_ext, name)


@pytest.mark.parametrize("change", [None, *SITUATIONS], ids=lambda c: c.__name__ if c else "plain")
@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_copies_and_state_dicts_of_changed_weights(name, change):
    ours, theirs, x = pair(name)
    for module in (ours, theirs):
        if change is not None:
            change(module)
    for module in (ours, theirs):
        module.eval()
    with torch.no_grad():
        expected = ours(x)
        # torch's old hooks leave a tensor with a graph on the module until it runs without.
        assert_same(copy.deepcopy(ours)(x), expected)
        saved = io.BytesIO()
        torch.save(theirs.state_dict(), saved)
        saved.seek(0)
        loaded = torch.load(saved, weights_only=True)
        fresh, _, _ = pair(name)
        if change is not None:
            change(fresh)
        for parameter in fresh.parameters():
            parameter.add_(1)
        fresh.load_state_dict(loaded, strict=True)
        assert_same(fresh.eval()(x), expected)
