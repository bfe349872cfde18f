"""torch.func's vmap and grad: a loop's results, by the kernels."""

import copy

import pytest
import torch
from cases import CELLS, assert_gradients_of_each_sample, make_case
from kinds import KINDS, gradients_alone, loss_of, make, parameters_of, random, squares
from torch.func import (
    functional_call,
    grad,
    stack_module_state,
    vmap,
)
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from twins import assert_same, forget_warnings, tensors

from rnn_ext import FallbackWarning, functional, ops, transforms, use_backend

COMPOSED = pytest.mark.filterwarnings("ignore::rnn_ext.FallbackWarning")


@pytest.fixture(autouse=True)
def _each_warning_again():
    forget_warnings()


# Which of an operator's tensors vmap adds a dimension to, and where.
MAPPED = {
    "input": {0: 0},
    "states": {1: 1, 2: 2},
    "input and states": {0: 1, 1: -1, 2: 0},
    "input weights": {3: 0},
    "biases": {5: 1, 6: 0},
    "weights": {3: 0, 4: 2, 5: 0, 6: 0, 7: 0},
    "everything": dict.fromkeys(range(8), 0),
}


@pytest.mark.parametrize("mapped", MAPPED)
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
@pytest.mark.parametrize("cell", CELLS)
def test_vmap_is_a_loop(cell, ragged, mapped):
    cases = [make_case(cell, (3, 2, 4, 5), ragged=ragged) for _ in range(3)]
    for k, case in enumerate(cases):
        case.tensors = [None if t is None else t * (1 - 0.2 * k) for t in case.tensors]
    dims = MAPPED[mapped]
    given, in_dims = [], []
    for i, same in enumerate(zip(*(case.tensors for case in cases))):
        in_dims.append(None if same[0] is None else dims.get(i))
        given.append(same[0] if in_dims[-1] is None else torch.stack(same, in_dims[-1]))
    if all(dim is None for dim in in_dims):
        pytest.skip("this cell has none of these")
    options = {"batch_sizes": cases[0].batch_sizes, "reverse": True}
    present = [i for i, t in enumerate(given) if t is not None]

    def gradients(*tensors):
        def loss(*leaves):
            tensors = [None] * 8
            for i, leaf in zip(present, leaves):
                tensors[i] = leaf
            results = [r for r in ops.layer(cases[0].cell, *tensors, **options) if r is not None]
            return squares(results), results

        argnums = tuple(range(len(present)))
        return grad(loss, argnums, has_aux=True)(*(tensors[i] for i in present))

    found = vmap(gradients, tuple(in_dims))(*given)
    for k in range(3):
        alone = [g if dim is None else g.select(dim, k) for g, dim in zip(given, in_dims)]
        leaves = [None if t is None else t.clone().requires_grad_() for t in alone]
        results = [r for r in ops.layer(cases[0].cell, *leaves, **options) if r is not None]
        expected = torch.autograd.grad(squares(results), [leaves[i] for i in present])
        assert_same([part[k] for part in tensors(found)], [expected, results])


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_each_sample(isa, cell, threads, nan_filled):
    for options in ({}, {"ragged": True, "reverse": True, "bias": False}):
        case = make_case(cell, (5, 4, 7, 37), **options)
        assert_gradients_of_each_sample(case, 1e-12)
        assert_gradients_of_each_sample(case.to(torch.float32), 1e-5)
    assert_gradients_of_each_sample(case.to(torch.bfloat16), 2e-2)


class Counted:
    """The extension, counting calls of its functions."""

    def __init__(self, extension):
        self._extension, self.calls = extension, []

    def __getattr__(self, name):
        self.calls.append(name)
        return getattr(self._extension, name)


@pytest.mark.parametrize("kind", KINDS)
def test_one_call_serves_all_samples(kind, monkeypatch):
    """One forward and one backward kernel for each layer and direction, and no warning."""
    layer = make(kind, num_layers=2, bidirectional=True, batch_first=True)
    x = random(6, 5, 2)  # six sequences without a batch
    counted = Counted(transforms._C)
    monkeypatch.setattr(transforms, "_C", counted)
    each = vmap(grad(loss_of(layer)), (None, 0))(parameters_of(layer), x)
    assert sorted(counted.calls) == ["layer_backward"] * 4 + ["layer_forward"] * 4
    for k in range(6):
        assert_same({name: g[k] for name, g in each.items()}, gradients_alone(layer, x[k]))


def test_nested_vmap_and_ensembles():
    layers = [make("lstm") for _ in range(3)]
    parameters, _ = stack_module_state(layers)
    parameters = {name: value.detach() for name, value in parameters.items()}
    x = random(4, 2, 5, 3, 2)
    shared = layers[0]
    nested = vmap(vmap(grad(loss_of(shared)), (None, 0)), (None, 1))(parameters_of(shared), x)
    outputs = vmap(lambda p, x: functional_call(layers[0], p, (x,))[0], (0, None))(
        parameters, x[0, 0]
    )
    per_sample = vmap(grad(loss_of(shared)), (None, 0))
    ensemble = vmap(per_sample, (0, None))(parameters, x[:, 0])
    for k, layer in enumerate(layers):
        assert_same(outputs[k], layer(x[0, 0])[0])
        for n in range(4):
            found = {name: g[k, n] for name, g in ensemble.items()}
            assert_same(found, gradients_alone(layer, x[n, 0]))
    for i in range(2):
        for n in range(4):
            found = {name: g[i, n] for name, g in nested.items()}
            assert_same(found, gradients_alone(shared, x[n, i]))


@COMPOSED
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_the_gradients_of_each_sample(kind):
    """As a penalty on their norms takes them; once more with two dimensions of samples."""
    layer = make(kind, bidirectional=True)
    x = random(2, 2, 3, 1, 2)
    parameters = parameters_of(layer)

    def penalty(parameters, x):
        each = vmap(vmap(grad(loss_of(layer)), (None, 0)), (None, 1))(parameters, x)
        return squares(each)

    found = grad(penalty, (0, 1))(parameters, x)
    leaf = x.clone().requires_grad_()
    total = 0
    for n in range(2):
        for i in range(2):
            alone = squares(layer(leaf[n, i]))
            total += squares(
                torch.autograd.grad(alone, list(layer.parameters()), create_graph=True)
            )
    expected = torch.autograd.grad(total, [*layer.parameters(), leaf])
    assert_same([*found[0].values(), found[1]], expected)


def test_functional_and_every_cell_state_under_vmap():
    layer, x = make("lstm"), random(3, 4, 2, 2)
    weights = [w.detach() for w in layer.parameters()]
    found = vmap(lambda x: functional.lstm(x, None, *weights, return_cells=True))(x)
    modules = vmap(lambda x: layer(x, return_cells=True))(x)
    with torch.no_grad():
        without = vmap(lambda x: layer(x, return_cells=True))(x)
        assert_same(vmap(lambda x: layer(x))(x), without[:2])
    for k in range(3):
        expected = functional.lstm(x[k], None, *weights, return_cells=True)
        assert_same([part[k] for part in tensors(found)], expected)
    output, (h_n, c_n), cells = modules
    assert_same((output, (h_n.squeeze(1), c_n.squeeze(1)), cells), found)
    assert_same(without, modules)


@pytest.mark.parametrize("batch_first", [False, True])
def test_packed_sequences_and_lengths_under_vmap(batch_first):
    layer = make("lstm", bidirectional=True, batch_first=batch_first)
    x = random(3, 2, 4, 2) if batch_first else random(3, 4, 2, 2)
    lengths = [2, 4]
    found = vmap(lambda x: layer(x, lengths=lengths, return_cells=True))(x)
    packed = [pack_padded_sequence(part, lengths, batch_first, enforce_sorted=False) for part in x]
    data = torch.stack([part.data for part in packed])
    from_packed = vmap(lambda data: layer(PackedSequence(data, *packed[0][1:]))[0].data)(data)
    for k in range(3):
        expected = layer(x[k], lengths=lengths, return_cells=True)
        assert_same([part[k] for part in tensors(found)], expected)
        output = PackedSequence(from_packed[k], *packed[0][1:])
        assert_same(pad_packed_sequence(output, batch_first)[0], expected[0])
    with pytest.raises(ValueError, match="lengths must be the same for every entry"):
        vmap(lambda x, n: layer(x, lengths=n))(x, torch.tensor([[1, 2], [2, 2], [3, 4]]))


def test_vmap_over_nothing():
    layer = make("lstm")
    none = random(0, 3, 2, 2)
    assert vmap(lambda x: layer(x)[0])(none).shape == (0, 3, 2, 2)
    # Not of squares, whose derivative torch refuses here.
    total = lambda p, x: functional_call(layer, p, (x,))[0].sum()  # noqa: E731
    each = vmap(grad(total), (None, 0))(parameters_of(layer), none)
    assert each["weight_ih_l0"].shape == (0, 8, 2) and each["bias_hh_l0"].shape == (0, 8)
    empty = vmap(grad(loss_of(layer)), (None, 0))(parameters_of(layer), random(3, 4, 0, 2))
    assert not empty["weight_ih_l0"].any() and empty["weight_ih_l0"].shape == (3, 8, 2)


def test_dropout_follows_vmaps_randomness():
    layer = make("gru", hidden=8, num_layers=2, dropout=0.5)
    x = random(1, 3, 2, 2).expand(4, 3, 2, 2)
    run = lambda x: layer(x)[0]  # noqa: E731
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(run)(x)
    different, same = (vmap(run, randomness=r)(x) for r in ("different", "same"))
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])


def test_the_cpu_backend_serves_transforms():
    layer, x = make("gru"), random(3, 4, 2, 2)
    with use_backend("cpu"):
        each = vmap(grad(loss_of(layer)), (None, 0))(parameters_of(layer), x)
    with use_backend("reference"):
        assert_same(vmap(grad(loss_of(layer)), (None, 0))(parameters_of(layer), x), each)
    with pytest.warns(FallbackWarning, match="this transform of torch.func has no kernel"):
        assert_same(torch.func.functionalize(lambda x: layer(x)[0])(x[0]), layer(x[0])[0])


@COMPOSED
def test_transforms_inside_ordinary_autograd():
    """Per-sample gradients of parameters that require gradients themselves."""
    layer, x = make("gru"), random(3, 4, 2, 2)
    twin = copy.deepcopy(layer)
    each = vmap(grad(loss_of(layer)), (None, 0))(dict(layer.named_parameters()), x)
    squares(each).backward()
    for k in range(3):
        leaves = list(twin.parameters())
        squares(torch.autograd.grad(squares(twin(x[k])), leaves, create_graph=True)).backward()
    assert_same([p.grad for p in layer.parameters()], [p.grad for p in twin.parameters()])
