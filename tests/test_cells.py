"""Our cells beside torch.nn's."""

import copy
import pickle

import pytest
import torch
from twins import CELLS, assert_same, gradients, twins

import rnn_ext

CASES = [(name, options) for name in CELLS for options in ({}, {"bias": False})]
CASES += [("RNNCell", {"nonlinearity": "relu"})]


def given_state(name, *shape):
    made = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    return tuple(made) if name == "LSTMCell" else made[0]


@pytest.mark.parametrize("shape", [(2, 4), (1, 4), (0, 4), (4,)], ids=str)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_results_and_gradients_are_those_of_torch(name, options, shape):
    ours, theirs = twins(name, 4, 3, **options)
    input = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    given = given_state(name, *shape[:-1], 3)
    for hx, leaves in ((None, ()), (given, given if name == "LSTMCell" else (given,))):
        our_results, their_results = ours(input, hx), theirs(input, hx)
        assert_same(our_results, their_results)
        assert type(our_results) is type(their_results)
        our_gradients = gradients(ours, our_results, input, *leaves)
        if input.numel():
            assert_same(our_gradients, gradients(theirs, their_results, input, *leaves))
        else:
            assert all(g is None or not g.any() for g in our_gradients)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_parameters_repr_and_copies(name, options):
    ours, theirs = twins(name, 4, 3, **options)
    assert isinstance(ours, getattr(torch.nn, name))
    assert str(ours) == str(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same(dict(ours.named_parameters()), dict(theirs.named_parameters()))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    input = torch.randn(2, 4, dtype=torch.float64)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours)
        assert_same(twin(input), ours(input))
    assert_same(ours.float()(input.float()), theirs.float()(input.float()))


def test_positional_arguments_are_those_of_torch():
    for name, args in [
        ("RNNCell", (4, 3, False, "relu", "cpu", torch.float64)),
        ("LSTMCell", (4, 3, False, "cpu", torch.float64)),
        ("GRUCell", (4, 3, False, "cpu", torch.float64)),
    ]:
        ours, theirs = getattr(rnn_ext, name)(*args), getattr(torch.nn, name)(*args)
        assert str(ours) == str(theirs)
        assert ours.weight_hh.dtype == torch.float64
    assert torch.nn.utils.skip_init(rnn_ext.RNNCell, 4, 3).weight_ih.is_cpu


@pytest.mark.parametrize("name", CELLS)
def test_views_in_memory_and_replaced_weights(name):
    ours, theirs = twins(name, 4, 3)
    input = torch.randn(4, 5, dtype=torch.float64).T
    hx = given_state(name, 3, 5)
    hx = tuple(h.T for h in hx) if name == "LSTMCell" else hx.T
    assert_same(ours(input, hx), theirs(input, hx))
    replaced = {key: 0.5 * value.detach() for key, value in ours.named_parameters()}
    assert_same(*(torch.func.functional_call(m, replaced, (input, hx)) for m in (ours, theirs)))
    for module in (ours, theirs):
        torch.nn.utils.parametrizations.weight_norm(module, "weight_hh")
    assert_same(ours(input, hx), theirs(input, hx))


@pytest.mark.parametrize("name", CELLS)
def test_a_loop_over_the_cell_is_the_layer(name):
    cell = getattr(rnn_ext, name)(4, 3, dtype=torch.float64)
    layer = getattr(rnn_ext, name.removesuffix("Cell"))(4, 3, dtype=torch.float64)
    for key, parameter in cell.named_parameters():
        getattr(layer, f"{key}_l0").data = parameter.data
    input = torch.randn(6, 2, 4, dtype=torch.float64)
    hx, outputs = None, []
    for step in input:
        hx = cell(step, hx)
        outputs.append(hx[0] if name == "LSTMCell" else hx)
    output, state = layer(input)
    assert_same(torch.stack(outputs), output)
    assert_same(hx, [part[0] for part in state] if name == "LSTMCell" else state[0])
