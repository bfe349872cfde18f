"""Episodes that begin inside a sequence: no state and no gradient crosses a reset."""

import io
from itertools import pairwise

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from twins import LAYERS, assert_same, forget_warnings, gradients, state, tensors, twins

import rnn_ext
from rnn_ext import FallbackWarning, functional

OPTIONS = {
    "plain": {},
    "stack": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}
each_layer = pytest.mark.parametrize("name", LAYERS)
each_stack = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture(autouse=True)
def _fresh():
    forget_warnings()


def random_resets(module, x, chance=0.3):
    resets = torch.rand(x.shape[:2]) < chance
    resets[0, 0] = True
    return resets


def loop_over_cells(layer, x, hx, resets, initial):
    """What users write in its place: torch.nn's cell, and the state replaced where it must be."""
    kind = type(layer).__name__
    cell = getattr(torch.nn, f"{kind}Cell")(4, 3, dtype=x.dtype)
    weights = [getattr(layer, f"{name}_l0") for name, _ in cell.named_parameters()]
    named = dict(zip(dict(cell.named_parameters()), weights))
    lstm, outputs = kind == "LSTM", []
    hx, initial = ([s[0] for s in (group if lstm else (group,))] for group in (hx, initial))
    for t in range(x.size(0)):
        hx = [torch.where(resets[t, :, None], i, h) for i, h in zip(initial, hx)]
        hx = torch.func.functional_call(cell, named, (x[t], tuple(hx) if lstm else hx[0]))
        hx = hx if lstm else (hx,)
        outputs.append(hx[0])
    hx = [h[None] for h in hx]
    return torch.stack(outputs), tuple(hx) if lstm else hx[0]


@pytest.mark.parametrize("batch", ["each", "one"])
@each_layer
def test_a_loop_over_cells_does_the_same(name, batch):
    layer, _ = twins(name, 4, 3)
    x = torch.randn(7, 5, 4, dtype=torch.float64, requires_grad=True)
    hx = state(layer, 5, requires_grad=True)
    initial = state(layer, 5 if batch == "each" else 1, requires_grad=True)
    resets = random_resets(layer, x)
    ours = layer(x, hx, resets=resets, initial_state=initial)
    theirs = loop_over_cells(layer, x, hx, resets, initial)
    assert_same(ours, theirs)
    leaves = (x, *tensors([hx, initial]))
    assert_same(gradients(layer, ours, *leaves), gradients(layer, theirs, *leaves))


def by_episode(layer, x, resets, initial):
    """Output of each episode of each sequence run alone, [T, B, ...]."""
    columns = []
    for b in range(x.size(1)):
        one = slice(b, b + 1)
        hx = [s[:, one].contiguous() for s in tensors(initial)]
        hx = tuple(hx) if isinstance(initial, tuple) else hx[0]
        begins = sorted({0, *resets[:, b].nonzero().flatten().tolist(), x.size(0)})
        parts = [layer(x[begin:end, one], hx)[0] for begin, end in pairwise(begins)]
        columns.append(torch.cat(parts))
    return torch.cat(columns, 1)


@pytest.mark.parametrize("projected", [False, True])
@each_layer
def test_episodes_do_not_see_each_other(name, projected):
    """In no layer and in neither direction: as each of them alone."""
    if projected and name != "LSTM":
        return
    options = {"proj_size": 2} if projected else {}
    layer, _ = twins(name, 4, 3, 2, bidirectional=True, **options)
    x = torch.randn(9, 3, 4, dtype=torch.float64, requires_grad=True)
    initial, resets = state(layer, 3, requires_grad=True), random_resets(layer, x)
    whole = layer(x, initial, resets=resets, initial_state=initial)[0]
    parts = by_episode(layer, x, resets, initial)
    assert_same(whole, parts)
    leaves = (x, *tensors(initial))
    assert_same(gradients(layer, whole, *leaves), gradients(layer, parts, *leaves))


@each_stack
@each_layer
def test_every_layout_of_a_batch(name, options):
    layer, _ = twins(name, 4, 3, **options)
    x = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)  # [B, T, I]
    lengths, resets = torch.tensor([4, 6, 2]), random_resets(layer, x)
    hx, initial = state(layer, 3, requires_grad=True), state(layer, 3, requires_grad=True)

    def only(state, b):
        return torch.utils._pytree.tree_map(lambda s: s[:, b], state)

    if not layer.batch_first:
        run_x, run_resets = x.transpose(0, 1), resets.t()
    else:
        run_x, run_resets = x, resets
    given = {"resets": run_resets, "initial_state": initial}
    padded = layer(run_x, hx, lengths=lengths, **given)
    output = padded[0] if layer.batch_first else padded[0].transpose(0, 1)
    leaves = (x, *tensors([hx, initial]))
    alone = []
    for b, length in enumerate(lengths.tolist()):
        rows = {"resets": resets[b, :length], "initial_state": only(initial, b)}
        alone.append(layer(x[b, :length], only(hx, b), **rows))
        assert_same(output[b, :length], alone[-1][0])
        assert not output[b, length:].any()
        assert_same(only(padded[1], b), alone[-1][1])

    def pack(t):
        return pack_padded_sequence(t, lengths, layer.batch_first, enforce_sorted=False)

    packed = layer(pack(run_x), hx, resets=pack(run_resets).data, initial_state=initial)
    assert isinstance(packed[0], PackedSequence)
    assert_same([packed[0].data, packed[1]], [pack(padded[0]).data, padded[1]])
    expected = gradients(layer, padded, *leaves)
    again = layer(run_x, hx, lengths=lengths.tolist(), **given)
    assert_same(gradients(layer, again, *leaves), expected)
    per_sequence = torch.nn.utils.rnn.pad_sequence([out for out, _ in alone], True)
    one, other = padded[0], per_sequence if layer.batch_first else per_sequence.transpose(0, 1)
    assert_same(gradients(layer, one, *leaves[:1]), gradients(layer, other, *leaves[:1]))


@each_layer
def test_resets_everywhere_and_nowhere(name):
    layer, _ = twins(name, 4, 3)
    x, hx = torch.randn(5, 2, 4, dtype=torch.float64), state(layer, 2)
    nowhere, everywhere = torch.zeros(5, 2, dtype=torch.bool), torch.ones(5, 2, dtype=torch.bool)
    plain = layer(x, hx)
    assert all(map(torch.equal, tensors(layer(x, hx, resets=nowhere)), tensors(plain)))
    assert_same(layer(x, hx, resets=everywhere)[0], layer(x.flatten(0, 1)[None])[0].view(5, 2, 3))
    assert layer(x[:, :0], resets=nowhere[:, :0])[0].shape == (5, 0, 3)


@each_stack
@pytest.mark.parametrize("cell", [*LAYERS, "GRU reset before", "LSTM projected"])
def test_nan_ends_with_the_episode(cell, options):
    """Zero times NaN is NaN: what is replaced must not be multiplied by zero."""
    name, _, extra = cell.partition(" ")
    kwargs = {"reset before": {"reset_after": False}, "projected": {"proj_size": 2}}.get(extra, {})
    torch.manual_seed(0)
    layer = getattr(rnn_ext, name)(4, 3, **options, **kwargs)
    x, resets = torch.randn(3, 7, 4), torch.zeros(3, 7, dtype=torch.bool)  # [B, T, I]
    x[1, 4], resets[1, [2, 5]] = torch.nan, True
    resets[:, 0] = True
    hx = torch.utils._pytree.tree_map(
        lambda s: s.detach().fill_(torch.nan).requires_grad_(), state(layer, 3, torch.float32)
    )
    layout = (lambda t: t) if layer.batch_first else (lambda t: t.transpose(0, 1))
    x.requires_grad_()
    with torch.no_grad():
        alone = layout(layer(layout(x), hx, resets=layout(resets))[0])
    output = layout(layer(layout(x), hx, resets=layout(resets))[0])
    reverse_starts_from_nan = layer.bidirectional
    if reverse_starts_from_nan:
        return assert_episode_is_nan(layer, layout, x.detach(), resets)
    assert torch.equal(output.isnan(), alone.isnan())
    episode = torch.zeros(3, 7, dtype=torch.bool)
    episode[1, 4] = True
    assert torch.equal(output.isnan().any(-1), episode)
    loss = output[~episode].sum()
    found = torch.autograd.grad(loss, (x, *tensors(hx)))
    assert not found[0][1, 5:].isnan().any() and not found[0][[0, 2]].isnan().any()
    for d_state in found[1:]:
        assert not d_state.any()


def assert_episode_is_nan(layer, layout, x, resets):
    output = layout(layer(layout(x), resets=layout(resets))[0])
    expected = torch.zeros(3, 7, dtype=torch.bool)
    expected[1, 2:5] = True  # the whole episode: the reverse direction carries it back
    assert torch.equal(output.isnan().any(-1), expected)


@each_stack
@each_layer
def test_compiles_without_a_graph_break(name, options):
    layer, _ = twins(name, 4, 3, **options)
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    batch = 5 if layer.batch_first else 3
    initial, lengths = state(layer, batch, requires_grad=True), torch.full((batch,), 2)
    resets = random_resets(layer, x)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, resets, initial, lengths=None):
        return layer(x, None, resets=resets, initial_state=initial, lengths=lengths)

    calls = ((initial, None), (None, lengths)), ((None, None), (initial, lengths))
    for start, ends in calls[layer.bidirectional]:
        results = compiled(x, resets, start, ends)
        expected = layer(x, resets=resets, initial_state=start, lengths=ends)
        assert_same(results, expected)
        leaves = (x, *tensors(start))
        found = gradients(layer, results, *leaves, retain_graph=False)
        assert_same(found, gradients(layer, expected, *leaves))
        with torch.no_grad():
            assert_same(compiled(x, resets, start, ends), expected)


@each_stack
@each_layer
def test_under_vmap(name, options):
    layer, _ = twins(name, 4, 3, **options)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    resets = torch.rand(2, 5, 3) < 0.3
    shared = torch.func.vmap(lambda x: layer(x, resets=resets[0])[0])(x)
    assert_same(shared, torch.stack([layer(x[k], resets=resets[0])[0] for k in range(2)]))
    with pytest.warns(FallbackWarning, match="resets that differ between the entries of torch.fu"):
        each = torch.func.vmap(lambda x, resets: layer(x, resets=resets)[0])(x, resets)
    assert_same(each, torch.stack([layer(x[k], resets=resets[k])[0] for k in range(2)]))


@pytest.mark.filterwarnings("ignore:rnn_ext. gradients of gradients have no kernel")
@pytest.mark.filterwarnings("ignore:rnn_ext. forward-mode derivatives have no kernel")
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_under_grad_and_jvp():
    layer, _ = twins("LSTM", 4, 3, 2, bidirectional=True)
    x, resets = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.rand(2, 5, 3) < 0.3

    def loss(x, resets):
        return layer(x, resets=resets)[0].square().sum()

    def by_autograd(k):
        leaf = x[k].clone().requires_grad_()
        return torch.autograd.grad(loss(leaf, resets[k]), leaf)[0]

    expected = torch.stack([by_autograd(k) for k in range(2)])
    assert_same(torch.func.grad(loss)(x[0], resets[0]), expected[0])
    assert_same(
        torch.func.jvp(lambda x: loss(x, resets[0]), (x[0],), (x[1],))[1],
        (expected[0] * x[1]).sum(),
    )
    with pytest.warns(FallbackWarning, match="resets that differ between the entries"):
        assert_same(torch.func.vmap(torch.func.grad(loss))(x, resets), expected)


@each_layer
def test_what_no_kernel_takes_is_composed(name):
    layer, _ = twins(name, 4, 3, bidirectional=True)
    x, resets = torch.randn(5, 2, 4, dtype=torch.float64), torch.rand(5, 2) < 0.4
    expected = layer(x, resets=resets)
    with rnn_ext.use_backend("reference"):
        assert_same(layer(x, resets=resets), expected)
    half = layer.half()
    with pytest.warns(FallbackWarning, match=f"{name} with resets: float16 has no CPU kernel"):
        output, _ = half(x.half(), resets=resets)
    torch.testing.assert_close(output.double(), expected[0], rtol=0.01, atol=0.01)


@each_layer
def test_autocast_and_return_cells(name):
    layer, _ = twins(name, 4, 3, 2, dtype=torch.float32)
    x, resets, initial = (
        torch.randn(5, 2, 4),
        torch.rand(5, 2) < 0.4,
        state(layer, 2, torch.float32),
    )
    options = {"resets": resets, "initial_state": initial}
    expected = layer(x, **options)
    with torch.autocast("cpu"):
        output, _ = layer(x, **options)
    torch.testing.assert_close(output.float(), expected[0], rtol=0.1, atol=0.1)
    if name == "LSTM":
        output, (_, c_n), cells = layer(x, **options, return_cells=True)
        assert torch.equal(output, expected[0]) and torch.equal(cells[-1], c_n[-1])


@each_layer
def test_functional(name):
    layer, _ = twins(name, 4, 3)
    x, resets = torch.randn(6, 5, 4, dtype=torch.float64), torch.rand(6, 5) < 0.4
    hx, initial = state(layer, 5), state(layer, 1)
    first = torch.utils._pytree.tree_map(lambda s: s[0], (hx, initial))
    run = getattr(functional, name.lower())
    weights = list(layer.parameters())
    output, h_n = run(x, first[0], *weights, resets=resets, initial_state=first[1])
    expected = layer(x, hx, resets=resets, initial_state=initial)
    assert_same([output, h_n], [expected[0], *[s[0] for s in tensors(expected[1])]])
    turned = run(x.transpose(0, 1), None, *weights, resets=resets.t(), batch_first=True)[0]
    assert_same(turned.transpose(0, 1), layer(x, resets=resets)[0])
    with pytest.raises(ValueError, match=r"resets must have shape \[6, 5\]"):
        run(x, None, *weights, resets=resets.t())
    with pytest.raises(ValueError, match="initial_state is what resets restore"):
        run(x, None, *weights, initial_state=first[1])
    wide = torch.utils._pytree.tree_map(lambda s: s.repeat(1, 2), first[1])
    with pytest.raises(RuntimeError, match=r"initial_state(\[0\])? must have shape \[5 or 1, 3\]"):
        run(x, None, *weights, resets=resets, initial_state=wide)


def test_a_state_that_begins_with_zeros_learns():
    """A learnable initial state gets the gradient of all the episodes that begin with it."""
    layer = rnn_ext.GRU(2, 3, dtype=torch.float64)
    initial = torch.nn.Parameter(torch.zeros(1, 1, 3, dtype=torch.float64))
    resets = torch.zeros(4, 2, dtype=torch.bool)
    resets[0], resets[2, 1] = True, True
    x = torch.zeros(4, 2, 2, dtype=torch.float64)
    layer(x, resets=resets, initial_state=initial)[0].sum().backward()
    once = [torch.zeros(1, 1, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    for start, steps in zip(once, (4, 2, 2)):
        layer(x[:steps, :1], start)[0].sum().backward()
    assert_same(initial.grad, once[0].grad + once[1].grad + once[2].grad)


def test_a_buffer_that_changes_before_the_backward_pass_is_noticed():
    for options in ({}, {"return_cells": True}):
        layer, x = rnn_ext.LSTM(2, 3), torch.randn(4, 2, 2)
        resets = torch.zeros(4, 2, dtype=torch.bool)
        output = layer(x, resets=resets, **options)[0]
        resets[1] = True
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


RESETS = torch.zeros(5, 2, dtype=torch.bool)
BAD = {
    "int": ({"resets": RESETS.int()}, ValueError, r"resets must have dtype torch.bool.*\.bool\(\)"),
    "list": ({"resets": RESETS.tolist()}, TypeError, "resets must be a bool tensor, got list"),
    "shape": ({"resets": RESETS.t()}, ValueError, r"resets must have shape \[5, 2\]"),
    "alone": ({"initial_state": torch.zeros(1, 2, 3)}, ValueError, "initial_state is what resets"),
    "form": ({"resets": RESETS, "initial_state": [1]}, TypeError, "initial_state must be"),
    "batch": (
        {"resets": RESETS, "initial_state": torch.zeros(1, 3, 3)},
        ValueError,
        r"initial_state must have shape \[1, 2 or 1, 3\], got \[1, 3, 3\]",
    ),
    "dtype": (
        {"resets": RESETS, "initial_state": torch.zeros(1, 2, 3, dtype=torch.float64)},
        ValueError,
        "initial_state has dtype torch.float64 but input torch.float32",
    ),
    "lengths": (
        {"resets": RESETS[:3], "lengths": [5, 3]},
        ValueError,
        r"resets must have shape \[5, 2\]",
    ),
}


@pytest.mark.parametrize("bad", BAD)
@each_layer
def test_bad_arguments_are_named(name, bad):
    layer, x = getattr(rnn_ext, name)(4, 3), torch.randn(5, 2, 4)
    given, error, text = BAD[bad]
    given = dict(given)
    if name == "LSTM" and isinstance(given.get("initial_state"), torch.Tensor):
        given["initial_state"] = (given["initial_state"],) * 2
    with pytest.raises(error, match=f"^{name}: {text}"):
        layer(x, **given)


def test_packed_input_takes_resets_of_its_rows():
    layer, packed = rnn_ext.GRU(4, 3), pack_padded_sequence(torch.randn(5, 2, 4), [5, 3])
    with pytest.raises(ValueError, match=r"GRU: resets must have shape \[8\]"):
        layer(packed, resets=RESETS)


def test_who_else_refuses_resets():
    layer, x = rnn_ext.LSTM(4, 3), torch.randn(5, 2, 4)
    quantized = rnn_ext.quantize_weights(layer, "int8")
    for name, value in (("resets", RESETS), ("initial_state", (x, x))):
        with pytest.raises(ValueError, match=f"QuantizedLSTM: {name} needs the float32 layer"):
            quantized(x, **{name: value})


class Policy(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.layer = getattr(rnn_ext, name)(4, 3, bidirectional=True)

    def forward(self, x, resets):
        return self.layer(x, resets=resets)[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@each_layer
def test_graphs_of_other_kinds(name):
    """torch.fx and torch.jit.trace keep resets as an input; ONNX has no node for them."""
    policy, x, resets = Policy(name), torch.randn(5, 2, 4), torch.rand(5, 2) < 0.5
    expected = policy(x, resets)
    assert torch.equal(torch.fx.symbolic_trace(policy)(x, resets), expected)
    with pytest.warns(FallbackWarning, match=f"{name} with resets: torch.jit.trace records only"):
        traced = torch.jit.trace(policy, (x, RESETS))
    torch.testing.assert_close(traced(x, resets), expected)
    with pytest.raises(RuntimeError, match=f"{name}: ONNX's layers know no resets"):
        torch.onnx.export(policy, (x, resets), io.BytesIO(), dynamo=False)
