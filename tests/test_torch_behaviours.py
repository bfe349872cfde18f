"""What PyTorch's test_nn.py asks of recurrent modules, asked of ours (that file is not installed
with torch, so these are tests of our own for the behaviours it names).

Elsewhere: arguments and state shapes (test_errors.py), pickling, packed input, gradients
(test_torch_database.py, test_modules.py), weight norm (test_parametrizations.py). Here: zero sizes,
dropout of 0, 1 and changed between calls, its state, initial states, nonlinearities, backward
through one of two results, retained graphs, and what is left of flatten_parameters.
"""

import copy

import pytest
import torch
from twins import (
    CELLS,
    LAYERS,
    assert_same,
    forget_warnings,
    gradients,
    state,
    tensors,
    torch_nn_warnings_ignored,
    twins,
)

import rnn_ext


@pytest.mark.parametrize("name", CELLS)
def test_no_input_features(name):
    ours, theirs = twins(name, 0, 3)
    x = torch.randn(2, 0, dtype=torch.float64)
    assert_same(ours(x), theirs(x))
    assert_same(gradients(ours, ours(x)), gradients(theirs, theirs(x)))
    with torch.no_grad():
        assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_refuse_sizes_of_zero(name):
    for sizes, what in (((0, 3), "input_size"), ((4, 0), "hidden_size")):
        for library in (rnn_ext, torch.nn):
            with pytest.raises(ValueError, match=f"{what} must be greater than zero"):
                getattr(library, name)(*sizes)


@pytest.mark.parametrize("name", CELLS)
def test_no_hidden_units(name):
    ours, theirs = twins(name, 4, 0)
    x = torch.randn(2, 4, dtype=torch.float64)
    hx = torch.randn(2, 0, dtype=torch.float64)
    hx = (hx, hx) if name == "LSTMCell" else hx
    forget_warnings()
    with pytest.warns(rnn_ext.FallbackWarning, match="torch.nn's kernel serves"):
        results = ours(x, hx)
    assert_same(results, theirs(x, hx))
    assert all(part.shape == (2, 0) for part in tensors(results))
    with torch.no_grad():
        assert_same(ours(x, hx), theirs(x, hx))


@pytest.mark.parametrize("dropout", [0, 1, 0.0, 1.0])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_dropout_of_nothing_and_of_everything(name, dropout, train):
    ours, theirs = (
        module.train(train) for module in twins(name, 4, 5, 2, dropout=dropout, bias=False)
    )
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            results = ours(x)
            assert_same(results, theirs(x))
    if train and dropout == 1:
        assert not results[0].any()


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_may_change_between_calls(name):
    ours, theirs = twins(name, 4, 5, 3, dropout=0.0)
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    seen = []
    for dropout in (0.0, 0.5, 1.0, 0.2, 0.0):
        results = []
        for module in (ours, theirs):
            module.dropout = dropout
            torch.manual_seed(4)
            results.append(module(x))
        assert_same(*results)
        seen.append(results[0][0])
    assert torch.equal(seen[0], seen[-1]) and not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("name", LAYERS)
def test_the_state_of_dropout_is_that_of_torch(name):
    layer, _ = twins(name, 4, 30, 2, dropout=0.5)
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = layer(x)[0], layer(x)[0]
    torch.set_rng_state(before)
    again = copy.deepcopy(layer)(x)[0]
    assert torch.equal(first, again) and not torch.equal(first, second)


@pytest.mark.parametrize("proj_size", [0, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_no_state_is_a_state_of_zeros(name, proj_size):
    if proj_size and name != "LSTM":
        with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
            getattr(rnn_ext, name)(4, 5, proj_size=proj_size)
        return
    options = {"proj_size": proj_size} if proj_size else {}
    with torch_nn_warnings_ignored():
        layer, theirs = twins(name, 4, 5, 2, bidirectional=True, **options)
        x = torch.randn(3, 2, 4, dtype=torch.float64)
        hx = state(layer, 2)
        zeros = tuple(map(torch.zeros_like, hx)) if name == "LSTM" else torch.zeros_like(hx)
        assert_same(layer(x), layer(x, zeros))
        assert_same(layer(x), theirs(x, zeros))


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_nonlinearity_by_place_and_by_name(nonlinearity):
    x = torch.randn(5, 2, 4)
    made = []
    for library in (rnn_ext, torch.nn):
        for args, kwargs in (((1, nonlinearity), {}), ((), {"nonlinearity": nonlinearity})):
            torch.manual_seed(0)
            made.append(library.RNN(4, 3, *args, **kwargs))
    assert all(module.nonlinearity == nonlinearity for module in made)
    for module in made[1:]:
        assert_same(made[0](x), module(x))
    with pytest.raises(ValueError, match="Unknown nonlinearity 'garbage'"):
        rnn_ext.RNN(4, 3, nonlinearity="garbage")


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_backward_through_one_of_the_results(name):
    ours, theirs = twins(name, 4, 3)
    x = torch.randn(*((2, 4) if name == "LSTMCell" else (5, 2, 4)), dtype=torch.float64)
    for k in range(len(tensors(ours(x)))):
        grads = [
            torch.autograd.grad(tensors(module(x))[k].sum(), list(module.parameters()))
            for module in (ours, theirs)
        ]
        assert_same(*grads)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_a_retained_graph_gives_the_same_gradients_again(name):
    module, _ = twins(name, 4, 3)
    x = torch.randn(*((2, 4) if name in CELLS else (5, 2, 4)), dtype=torch.float64)
    loss = sum(part.square().sum() for part in tensors(module(x)))
    grads = []
    for _ in range(3):
        module.zero_grad()
        loss.backward(retain_graph=True)
        grads.append([parameter.grad.clone() for parameter in module.parameters()])
    assert_same(grads[0], grads[1])
    assert_same(grads[0], grads[2])


@pytest.mark.parametrize("name", LAYERS)
def test_flatten_parameters_keeps_the_parameters(name):
    layer, theirs = twins(name, 4, 3, 2, bidirectional=True)
    before = dict(layer.named_parameters())
    layer.flatten_parameters()
    assert all(parameter is before[key] for key, parameter in layer.named_parameters())
    layer.weight_hh_l0 = torch.nn.Parameter(layer.weight_hh_l0.detach() * 2)
    theirs.weight_hh_l0 = torch.nn.Parameter(theirs.weight_hh_l0.detach() * 2)
    assert layer._flat_weights[1] is layer.weight_hh_l0
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    assert_same(layer(x), theirs(x))


@pytest.mark.parametrize("name", LAYERS)
def test_in_place_changes_through_apply_and_data(name):
    ours, theirs = twins(name, 4, 3)
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    for module in (ours, theirs):
        module._apply(lambda tensor: tensor * 0.5)
        module.weight_ih_l0.data = module.weight_ih_l0.data.t().contiguous().t()
    assert not ours.weight_ih_l0.is_contiguous()
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            assert_same(ours(x), theirs(x))
    assert_same(gradients(ours, ours(x)), gradients(theirs, theirs(x)))
