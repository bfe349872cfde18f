"""Our layers beside torch.nn's: parameters, results and gradients for every kind of input."""

import copy
import io
import pickle

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from twins import LAYERS, assert_same, gradients, state, tensors, torch_nn_warnings_ignored, twins

import rnn_ext

SHAPES = {
    "plain": {},
    "without bias": {"bias": False},
    "three layers": {"num_layers": 3},
    "bidirectional": {"bidirectional": True, "batch_first": True},
    "deep and bidirectional": {"num_layers": 2, "bidirectional": True, "bias": False},
}
CASES = [
    pytest.param(name, {**shape, **extra}, id=f"{name} {label}")
    for name in LAYERS
    for label, shape in SHAPES.items()
    for extra in ([{}, {"nonlinearity": "relu"}] if name == "RNN" and label == "plain" else [{}])
] + [
    pytest.param("LSTM", {"proj_size": 2, **shape}, id=f"LSTM projected {label}")
    for label, shape in SHAPES.items()
]
KINDS = ("padded", "packed", "packed unsorted", "unbatched")


@pytest.fixture(autouse=True)
def _torch_nn_may_warn():
    with torch_nn_warnings_ignored():
        yield


def sequence(kind, module, dtype=torch.float64):
    """(input of ``kind`` for ``module``, its leaf tensor, batch size or None)."""
    steps, batch = 5, 3
    if kind == "unbatched":
        leaf = torch.randn(steps, 4, dtype=dtype, requires_grad=True)
        return leaf, leaf, None
    size = (batch, steps) if module.batch_first else (steps, batch)
    leaf = torch.randn(*size, 4, dtype=dtype, requires_grad=True)
    if kind == "padded":
        return leaf, leaf, batch
    lengths = [5, 3, 2] if kind == "packed" else [2, 5, 3]
    in_order = kind == "packed"
    return pack_padded_sequence(leaf, lengths, module.batch_first, in_order), leaf, batch


@pytest.mark.parametrize("with_state", [False, True], ids=["zero state", "given state"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_results_and_gradients_are_those_of_torch(name, options, kind, with_state):
    ours, theirs = twins(name, 4, 3, **options)
    input, leaf, batch = sequence(kind, ours)
    hx = state(ours, batch, requires_grad=True) if with_state else None
    leaves = [leaf, *(() if hx is None else hx if isinstance(hx, tuple) else (hx,))]
    our_results, their_results = ours(input, hx), theirs(input, hx)
    assert_same(our_results, their_results)
    assert_same(gradients(ours, our_results, *leaves), gradients(theirs, their_results, *leaves))
    if kind.startswith("packed"):
        assert isinstance(our_results[0], PackedSequence)
        assert_same(list(our_results[0]), list(their_results[0]))


@pytest.mark.parametrize("name", LAYERS)
def test_other_dtypes(name):
    ours, theirs = twins(name, 4, 8, num_layers=2, dtype=torch.float32)
    input = torch.randn(6, 3, 4)
    results = ours(input)
    assert_same(results, theirs(input))
    # torch.nn rounds more often within a bfloat16 step, so both are held against float32.
    for module in (ours.bfloat16(), theirs.bfloat16()):
        for rounded, exact in zip(tensors(module(input.bfloat16())), tensors(results), strict=True):
            assert rounded.dtype == torch.bfloat16
            torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=2e-2)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_parameters_state_dict_and_repr_are_those_of_torch(name, options):
    ours, theirs = twins(name, 4, 3, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same(dict(ours.named_parameters()), dict(theirs.named_parameters()))
    assert str(ours) == str(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert len(ours._flat_weights) == len(theirs._flat_weights)
    for mine, names in zip(ours.all_weights, theirs._all_weights, strict=True):
        assert all(weight is getattr(ours, key) for weight, key in zip(mine, names, strict=True))
    assert isinstance(ours, torch.nn.RNNBase)


def test_positional_arguments_are_those_of_torch():
    for name, args in [
        ("RNN", (4, 3, 2, "relu", False, True, 0.5, True)),
        ("LSTM", (4, 3, 2, False, True, 0.5, True, 2)),
        ("GRU", (4, 3, 2, False, True, 0.5, True)),
    ]:
        ours, theirs = getattr(rnn_ext, name)(*args), getattr(torch.nn, name)(*args)
        assert str(ours) == str(theirs)
    lstm = rnn_ext.LSTM(4, 3, 1, True, False, 0.0, False, 0, "cpu", torch.float64)
    assert lstm.weight_hh_l0.dtype == torch.float64


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_dropout_draws_the_masks_of_torch(name, batch_first):
    ours, theirs = twins(name, 4, 3, 3, batch_first=batch_first, dropout=0.4, bidirectional=True)
    input = torch.randn(5, 6, 4, dtype=torch.float64)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(7)
        results.append(module(input))
    assert_same(*results)
    assert not torch.equal(ours(input)[0], results[0][0])
    assert_same(ours.eval()(input), theirs.eval()(input))
    assert torch.equal(ours(input)[0], ours(input)[0])


def test_dropout_leaves_out_the_given_share_and_keeps_the_mean():
    module = rnn_ext.RNN(1, 2000, 2, nonlinearity="relu", dropout=0.25)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.bias_ih_l0.fill_(1.0)  # layer 0 puts out ones, layer 1 what dropout makes of them
        module.weight_ih_l1.copy_(torch.eye(2000))
    seen = module(torch.zeros(4, 5, 1))[0]
    assert seen.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert abs((seen == 0).double().mean().item() - 0.25) < 0.01


@pytest.mark.parametrize("name", LAYERS)
def test_views_in_memory(name):
    ours, theirs = twins(name, 4, 3, 2)
    base = torch.randn(3, 8, 5, dtype=torch.float64)
    for input in (
        base.permute(2, 0, 1)[..., ::2],
        torch.randn(1, 1, 4, dtype=torch.float64).expand(5, 3, 4),
        torch.randn(10, 3, 4, dtype=torch.float64)[::2],
    ):
        hx = state(ours, 1)
        hx = tuple(h.expand(-1, 3, -1) for h in hx) if name == "LSTM" else hx.expand(-1, 3, -1)
        assert_same(ours(input, hx), theirs(input, hx))
        grads = []
        for module in (ours, theirs):
            leaf = input.detach().requires_grad_()
            output = module(leaf, hx)[0]
            # sum() sends back an expanded gradient, the product with `weight` a strided one.
            weight = torch.arange(45.0, dtype=torch.float64).view(3, 3, 5).permute(2, 1, 0)
            loss = output.sum() + (output * weight).sum()
            grads.append(torch.autograd.grad(loss, [leaf, *module.parameters()]))
        assert_same(*grads)


@pytest.mark.parametrize("name", LAYERS)
def test_batch_first_gives_the_strides_of_torch(name):
    ours, theirs = twins(name, 4, 3, batch_first=True)
    input = torch.randn(2, 5, 4, dtype=torch.float64)
    assert ours(input)[0].stride() == theirs(input)[0].stride()


@pytest.mark.parametrize("name", LAYERS)
def test_empty_batches(name):
    ours, theirs = twins(name, 4, 3, 2, bidirectional=True)
    for shape in ((5, 0, 4), (1, 0, 4)):
        leaf = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        our_results, their_results = ours(leaf), theirs(leaf)
        assert_same(our_results, their_results)
        grads = gradients(ours, our_results, leaf)
        assert all(g is None or not g.any() for g in grads)
    for shape in ((0, 2, 4), (0, 0, 4), (0, 4)):
        with pytest.raises(
            RuntimeError, match="Expected sequence length to be larger than 0 in RNN"
        ):
            ours(torch.randn(*shape, dtype=torch.float64))


@pytest.mark.parametrize("name", LAYERS)
def test_copies(name):
    ours, _ = twins(name, 4, 3, 2, bidirectional=True)
    input = torch.randn(5, 2, 4, dtype=torch.float64)
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    for twin in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(saved, weights_only=False),
    ):
        assert type(twin) is type(ours)
        assert_same(twin(input), ours(input))
        assert twin.weight_hh_l0 is not ours.weight_hh_l0
        assert all(
            a is getattr(twin, n) for a, n in zip(twin._flat_weights, twin._flat_weights_names)
        )


def test_setstate_of_old_checkpoints():
    """Modules pickled by torch < 1.8 have no proj_size and keep parameters in all_weights."""
    ours, _ = twins("LSTM", 4, 3, 2)
    old = ours.__getstate__()
    del old["proj_size"]
    old["all_weights"] = [list(group) for group in ours.all_weights]
    revived = rnn_ext.LSTM.__new__(rnn_ext.LSTM)
    revived.__setstate__(old)
    input = torch.randn(5, 2, 4, dtype=torch.float64)
    assert_same(revived(input), ours(input))


@pytest.mark.parametrize("name", LAYERS)
def test_conversions_and_factories(name):
    ours, theirs = twins(name, 4, 3, 2, dtype=torch.float32)
    ours.flatten_parameters()
    ours.double().to("cpu")
    theirs.double()
    assert all(a is getattr(ours, n) for a, n in zip(ours._flat_weights, ours._flat_weights_names))
    input = torch.randn(5, 2, 4, dtype=torch.float64)
    assert_same(ours(input), theirs(input))
    cls = getattr(rnn_ext, name)
    empty = cls(4, 3, 2, device="meta", dtype=torch.float64).to_empty(device="cpu")
    empty.load_state_dict(theirs.state_dict())
    assert_same(empty(input), theirs(input))


@pytest.mark.parametrize("name", LAYERS)
def test_subclasses_hooks_and_frozen_weights(name):
    class Louder(getattr(rnn_ext, name)):
        def forward(self, input, hx=None):
            output, hidden = super().forward(input, hx)
            return 2 * output, hidden

    layer = Louder(4, 3)
    seen = []
    layer.register_forward_hook(lambda module, args, result: seen.append(result[0]))
    layer.weight_hh_l0.requires_grad_(False)
    output = layer(torch.randn(5, 2, 4))[0]
    output.sum().backward()
    assert seen[0] is output
    assert layer.weight_hh_l0.grad is None and layer.weight_ih_l0.grad is not None


def test_no_gradients_where_none_are_wanted():
    layer = rnn_ext.LSTM(4, 3)
    with torch.no_grad():
        assert not layer(torch.randn(5, 2, 4))[0].requires_grad
    assert not layer.requires_grad_(False)(torch.randn(5, 2, 4))[0].requires_grad
    with torch.inference_mode():
        assert layer(torch.randn(5, 2, 4))[0].is_inference()
