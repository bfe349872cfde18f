"""Derivatives of every order and kind, and torch.func's transforms: which agree, and who computes.

The kernels themselves are held to the reference in test_layer.py; here what torch makes of them.
"""

import copy
import warnings

import pytest
import torch
from cases import CELLS, assert_gradients_of_each_sample, make_case
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint
from twins import assert_same, forget_warnings, state, tensors

import rnn_ext
from rnn_ext import FallbackWarning, functional, ops, transforms, use_backend

KINDS = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "rnn_sigmoid": ("RNN", {"nonlinearity": "sigmoid"}),
    "lstm": ("LSTM", {}),
    "lstm_projected": ("LSTM", {"proj_size": 1}),
    "gru": ("GRU", {}),
    "gru_reset_before": ("GRU", {"reset_after": False}),
}
COMPOSED = pytest.mark.filterwarnings("ignore::rnn_ext.FallbackWarning")


@pytest.fixture(autouse=True)
def _each_warning_again():
    forget_warnings()
    with warnings.catch_warnings():
        # torch's own: it scripts the decompositions that forward mode uses.
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        yield


def make(kind, inputs=2, hidden=2, **options):
    name, more = KINDS[kind]
    return getattr(rnn_ext, name)(inputs, hidden, dtype=torch.float64, **more, **options)


def random(*shape, **options):
    return torch.randn(*shape, dtype=torch.float64, **options)


def squares(results):
    return sum(part.square().sum() for part in tensors(results))


def parameters_of(module):
    return {name: value.detach() for name, value in module.named_parameters()}


def loss_of(module):
    return lambda parameters, *inputs: squares(functional_call(module, parameters, inputs))


def gradients_alone(module, *inputs):
    """{name: gradient} of the same loss, by torch.autograd."""
    found = torch.autograd.grad(squares(module(*inputs)), list(module.parameters()))
    return dict(zip((name for name, _ in module.named_parameters()), found))


@COMPOSED
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_gradients_of_layers(kind, backend):
    """Several layers, both directions, packed, with initial states."""
    layer = make(kind, num_layers=2, bidirectional=True)
    packed = pack_padded_sequence(random(3, 2, 2), [1, 3], enforce_sorted=False)
    hx = tensors(state(layer, 2, requires_grad=True))

    def run(data, *rest):
        states = rest[: len(hx)]
        results = layer(
            PackedSequence(data, *packed[1:]), tuple(states) if len(hx) > 1 else states[0]
        )
        return tuple(tensors(results))

    given = (packed.data.requires_grad_(), *hx, *layer.parameters())
    with use_backend(backend):
        assert torch.autograd.gradcheck(run, given, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, given, fast_mode=True)


@COMPOSED
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_gradients_on_every_instruction_set(isa, kind):
    layer = make(kind, hidden=3)
    given = (random(3, 2, 2, requires_grad=True), *layer.parameters())
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x)[0], given, fast_mode=True)


@COMPOSED
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("RNNCell", {}),
        ("RNNCell", {"nonlinearity": "sigmoid"}),
        ("LSTMCell", {}),
        ("GRUCell", {}),
        ("GRUCell", {"reset_after": False}),
    ],
    ids=str,
)
def test_gradients_of_gradients_of_cells(name, options):
    cell = getattr(rnn_ext, name)(2, 3, dtype=torch.float64, **options)
    hx = [random(2, 3, requires_grad=True) for _ in range(2 if name == "LSTMCell" else 1)]

    def run(x, *rest):
        states = tuple(rest[: len(hx)])
        return tuple(tensors(cell(x, states if len(states) > 1 else states[0])))

    given = (random(2, 2, requires_grad=True), *hx, *cell.parameters())
    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)
    each = vmap(grad(loss_of(cell)), (None, 0))(parameters_of(cell), random(3, 2, 2))
    assert each["weight_hh"].shape == (3, *cell.weight_hh.shape)


@COMPOSED
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_second_derivatives_agrees(kind):
    layer = make(kind, num_layers=2, bidirectional=True, dropout=0.5).eval()
    x, v = random(2, 1, 2), random(2, 1, 2)

    def loss(x):
        return squares(layer(x))

    expected = torch.autograd.functional.hessian(loss, x)
    ways = {
        "reverse over reverse": jacrev(jacrev(loss))(x),
        "forward over reverse": hessian(loss)(x),
        "reverse over forward": jacrev(jacfwd(loss))(x),
        "forward over forward": jacfwd(jacfwd(loss))(x),
        "vectorized": torch.autograd.functional.hessian(loss, x, vectorize=True),
    }
    for way, found in ways.items():
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10, msg=lambda m: way + m)  # noqa: B023
    product = torch.einsum("abcdef,def->abc", expected, v)
    products = [
        torch.autograd.functional.hvp(loss, x, v)[1],
        torch.autograd.functional.vhp(loss, x, v)[1],
        jvp(grad(loss), (x,), (v,))[1],
        vjp(grad(loss), x)[1](v)[0],
        grad(lambda x: (grad(loss)(x) * v).sum())(x),
    ]
    for found in products:
        assert_same(found, product)


@COMPOSED
def test_third_derivatives():
    layer, x = make("lstm"), random(2, 1, 2)

    def loss(x):
        return squares(layer(x)[0])

    y = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(y), y, create_graph=True)
    (g,) = torch.autograd.grad(g.square().sum(), y, create_graph=True)
    (expected,) = torch.autograd.grad(g.square().sum(), y)
    first = lambda x: grad(loss)(x).square().sum()  # noqa: E731
    assert_same(grad(lambda x: grad(first)(x).square().sum())(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_create_graph_alone_runs_the_kernels(kind):
    """Nothing is composed, nor warned of, until the gradient is differentiated."""
    layer = make(kind, num_layers=2, bidirectional=True)
    x = random(3, 2, 2, requires_grad=True)
    leaves = [x, *layer.parameters()]
    loss = squares(layer(x))
    expected = torch.autograd.grad(loss, leaves, retain_graph=True)
    found = torch.autograd.grad(loss, leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.warns(FallbackWarning, match="gradients of gradients have no kernel"):
        torch.autograd.grad(squares(found), leaves)


@COMPOSED
def test_frozen_and_shared_weights_in_gradients_of_gradients():
    layer = make("gru")
    layer.weight_ih_l0.requires_grad_(False)
    x = random(3, 2, 2, requires_grad=True)
    given = (x, layer.weight_hh_l0, layer.bias_hh_l0)
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x)[0], given)

    w, b = random(2, 2, requires_grad=True), random(2, requires_grad=True)

    def run(x, w, b):
        return functional.rnn(x, None, w, w, b, b)[0]

    assert torch.autograd.gradcheck(run, (x, w, b))
    assert torch.autograd.gradgradcheck(run, (x, w, b))
    assert_same(
        grad(lambda w: squares(run(x, w, b)))(w.detach()),
        torch.autograd.grad(squares(run(x, w, b)), w)[0],
    )


@COMPOSED
@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode(kind):
    layer = make(kind, num_layers=2, bidirectional=True)
    names = [name for name, _ in layer.named_parameters()]
    primals = (random(3, 2, 2), *(p.detach() for p in layer.parameters()))
    tangents = tuple(torch.randn_like(p) for p in primals)

    def run(x, *weights):
        return functional_call(layer, dict(zip(names, weights)), (x,))[0]

    output, forward = jvp(run, primals, tangents)
    assert_same(output, run(*primals))
    jacobians = jacrev(run, tuple(range(len(primals))))(*primals)
    along = [torch.tensordot(j, t, t.dim()) for j, t in zip(jacobians, tangents)]
    assert_same(forward, sum(along))
    assert_same(jacfwd(run)(*primals), jacobians[0])
    with forward_ad.dual_level():
        dual = run(*(forward_ad.make_dual(p, t) for p, t in zip(primals, tangents)))
        assert_same(forward_ad.unpack_dual(dual).tangent, forward)


def test_forward_mode_says_that_it_is_composed():
    layer, x = make("gru"), random(3, 2, 2)
    with pytest.warns(FallbackWarning, match="forward-mode derivatives have no kernel; composed"):
        jvp(lambda x: layer(x)[0], (x,), (x,))
    with use_backend("cpu"), pytest.raises(RuntimeError, match="'cpu' cannot run this: forward-m"):
        jvp(lambda x: layer(x)[0], (x,), (x,))


@COMPOSED
def test_a_backward_pass_under_forward_mode():
    """The forward pass ran before, outside of it."""
    layer, x, v = make("lstm"), random(3, 2, 2), random(3, 2, 2)
    output, back = vjp(lambda x: layer(x)[0], x)
    tangent = torch.randn_like(output)
    assert_same(jvp(back, (v,), (tangent,))[1], back(tangent))
    x.requires_grad_()
    output = layer(x)[0]
    with forward_ad.dual_level():
        (found,) = torch.autograd.grad(output, x, forward_ad.make_dual(v, tangent))
        assert_same(forward_ad.unpack_dual(found).tangent, back(tangent)[0])


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


@pytest.mark.parametrize("bidirectional", [False, True])
def test_batched_gradients_of_autograd(bidirectional):
    layer, x = make("lstm", bidirectional=bidirectional), random(2, 1, 2)
    run = lambda x: layer(x)[0]  # noqa: E731
    with pytest.warns(FallbackWarning, match="is_grads_batched=True"):
        found = torch.autograd.functional.jacobian(run, x, vectorize=True)
    assert_same(found, torch.autograd.functional.jacobian(run, x))
    assert_same(found, jacrev(run)(x))


@COMPOSED
@pytest.mark.parametrize("bidirectional", [False, True])
def test_checkpoints_and_saved_tensors_elsewhere(bidirectional):
    layer, x = make("lstm", bidirectional=bidirectional), random(3, 2, 2)
    run = lambda x: layer(x)[0]  # noqa: E731

    def second(run):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(squares(run(leaf)), leaf, create_graph=True)
        return first.detach(), torch.autograd.grad(squares(first), leaf)[0]

    expected = second(run)
    for reentrant in (False, True):
        leaf = x.clone().requires_grad_()
        squares(checkpoint(run, leaf, use_reentrant=reentrant)).backward()
        assert_same(leaf.grad, expected[0])
    assert_same(second(lambda x: checkpoint(run, x, use_reentrant=False)), expected)
    with torch.autograd.graph.save_on_cpu():
        assert_same(second(run), expected)


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
