"""Derivatives of every order, in either mode, and what of them is composed.

The kernels themselves are held to the reference in test_layer.py; here what torch makes of them.
"""

import warnings

import pytest
import torch
from kinds import KINDS, loss_of, make, parameters_of, random, squares
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    vjp,
    vmap,
)
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from twins import assert_same, forget_warnings, state, tensors

import rnn_ext
from rnn_ext import FallbackWarning, functional, use_backend

COMPOSED = pytest.mark.filterwarnings("ignore::rnn_ext.FallbackWarning")


@pytest.fixture(autouse=True)
def _each_warning_again():
    forget_warnings()
    with warnings.catch_warnings():
        # torch's own: it scripts the decompositions that forward mode uses.
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        yield


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
