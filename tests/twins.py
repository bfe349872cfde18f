"""Pairs of a layer of ours and torch.nn's with the same weights, and how they are compared."""

import contextlib
import warnings

import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_map

import rnn_ext

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")


def twins(name, *args, dtype=torch.float64, **kwargs):
    """(ours, torch.nn's) of class ``name``, made from the same seed."""
    made = []
    for library in (rnn_ext, torch.nn):
        torch.manual_seed(0)
        made.append(getattr(library, name)(*args, dtype=dtype, **kwargs))
    return made


def state(module, batch, dtype=torch.float64, requires_grad=False):
    """A random initial state for ``module``; ``batch`` None leaves the batch out."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    lead = (rows,) if batch is None else (rows, batch)
    widths = [module.proj_size or module.hidden_size]
    if module.mode == "LSTM":
        widths.append(module.hidden_size)
    made = [torch.randn(*lead, width, dtype=dtype, requires_grad=requires_grad) for width in widths]
    return tuple(made) if module.mode == "LSTM" else made[0]


def tensors(results):
    """The tensors in nested results, with the data of packed sequences."""
    flat = tree_flatten(
        tree_map(
            lambda x: x.data if isinstance(x, PackedSequence) else x,
            results,
            is_leaf=lambda x: isinstance(x, PackedSequence),
        )
    )[0]
    return [x for x in flat if isinstance(x, torch.Tensor)]


def gradients(module, results, *inputs, retain_graph=True):
    """Gradients of a fixed function of ``results`` for the module's parameters and ``inputs``."""
    outputs = [r for r in tensors(results) if r.requires_grad]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in outputs]
    leaves = [*module.parameters(), *inputs]
    return torch.autograd.grad(outputs, leaves, upstream, retain_graph, allow_unused=True)


def assert_same(ours, theirs):
    """Same dtypes and, but for rounding, values: to 1e-10 in float64, else to torch's default."""
    ours, theirs = tensors(ours), tensors(theirs)
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert torch.isfinite(their).all()
        tight = {"rtol": 1e-10, "atol": 1e-10} if their.dtype == torch.float64 else {}
        torch.testing.assert_close(our, their, **tight)


@contextlib.contextmanager
def torch_nn_warnings_ignored():
    """torch.nn says once that its own projected LSTM does not use oneDNN."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="LSTM with projections is not supported with oneDNN"
        )
        yield


def forget_warnings():
    """Lets every `FallbackWarning` be raised again."""
    rnn_ext.backend._warned.clear()


def pair(name):
    """(ours, torch.nn's, input): two layers, or a cell."""
    cell = name in CELLS
    ours, theirs = twins(name, 4, 3) if cell else twins(name, 4, 3, 2, bidirectional=True)
    return ours, theirs, torch.randn(*((2, 4) if cell else (5, 2, 4)), dtype=torch.float64)


def run(module, x):
    """Runs a cell from a state that is not zero."""
    own = getattr(module, "module", module)
    if not isinstance(own, torch.nn.RNNCellBase):
        return module(x)
    h, c = torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 2, 3)
    return module(x, (h, c) if isinstance(own, torch.nn.LSTMCell) else h)


def assert_twins(ours, theirs, x):
    """Same results with and without gradients, same gradients for every leaf that has one; then the
    same once more after the leaves have changed in place."""
    for step in range(2):
        our_results, their_results = run(ours, x), run(theirs, x)
        assert_same(our_results, their_results)
        leaves = [
            [p for p in module.parameters() if p.requires_grad and p.is_floating_point()]
            for module in (ours, theirs)
        ]
        grads = [
            torch.autograd.grad(sum((r**2).sum() for r in tensors(results)), list(own))
            for results, own in zip((our_results, their_results), leaves)
        ]
        assert grads[0] and any(g.any() for g in grads[0])
        assert_same(*grads)
        with torch.no_grad():
            assert_same(run(ours, x), run(theirs, x))
            for module in (ours, theirs):
                for parameter in module.parameters():
                    parameter.mul_(0.9 if step else 0.8)
    with torch.no_grad():
        changed = run(ours, x)
        assert_same(changed, run(theirs, x))
    assert not any(
        torch.equal(a, b) for a, b in zip(tensors(changed), tensors(our_results), strict=True)
    )
