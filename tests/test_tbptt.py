"""Truncated BPTT: windows of a stream, the state carried on, the graph cut between them."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
from kinds import KINDS, make, random
from streams import assert_close, gradients_of
from twins import tensors

import rnn_ext
from rnn_ext.online import Window, tbptt


def whole(module, x, d_output, hx=None, **options):
    """Output, state and gradients of full BPTT."""
    module = copy.deepcopy(module)
    output, state = module(x, hx, **options)
    (output * d_output).sum().backward()
    return output.detach(), state, gradients_of(module)


def in_windows(module, x, d_output, k, **options):
    outputs, dim = [], 1 if module.batch_first else 0
    for window in tbptt(module, x, k, targets=d_output, **options):
        (window.output * window.targets).sum().backward()
        outputs.append(window.output.detach())
    return torch.cat(outputs, dim), window.state, gradients_of(module)


@pytest.mark.parametrize("k", [13, 50])
@pytest.mark.parametrize("kind", KINDS)
def test_one_window_is_full_bptt(kind, k):
    module = make(kind, 3, 5, num_layers=2)
    x = random(13, 4, 3)
    d_output = random(13, 4, module.proj_size or 5)
    hx = module(x)[1]
    hx = tuple(part.detach() for part in hx) if kind.startswith("lstm") else hx.detach()
    expected = whole(module, x, d_output, hx)
    found = in_windows(module, x, d_output, k, hx=hx)
    assert torch.equal(found[0], expected[0])
    assert all(map(torch.equal, tensors(found[1]), tensors(expected[1])))
    assert all(torch.equal(found[2][name], g) for name, g in expected[2].items())


@pytest.mark.parametrize("library", [rnn_ext, torch.nn], ids=["rnn_ext", "torch.nn"])
@pytest.mark.parametrize("layout", ["time_first", "batch_first", "unbatched"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_windows_are_bptt_from_a_detached_state(name, layout, library):
    module = getattr(library, name)(3, 5, batch_first=layout == "batch_first", dtype=torch.double)
    shape = {"time_first": (11, 2), "batch_first": (2, 11), "unbatched": (11,)}[layout]
    x, d_output, dim = random(*shape, 3), random(*shape, 5), int(layout == "batch_first")
    other, hx, outputs = copy.deepcopy(module), None, []
    for start in (0, 4, 8):
        part = [t.narrow(dim, start, min(4, 11 - start)) for t in (x, d_output)]
        output, hx = other(part[0], hx)
        (output * part[1]).sum().backward()
        hx = tuple(s.detach() for s in hx) if name == "LSTM" else hx.detach()
        outputs.append(output)
    output, _, gradients = in_windows(module, x, d_output, 4)
    assert (output - torch.cat(outputs, dim)).abs().max() <= 1e-14
    assert_close(gradients, gradients_of(other), 1e-13)


def test_short_windows_forget():
    module = make("rnn_tanh", 3, 5)
    x, d_output = random(12, 2, 3), random(12, 2, 5)
    expected, _, full = whole(module, x, d_output)
    output, _, cut = in_windows(module, x, d_output, 1)
    assert (output - expected).abs().max() <= 1e-14
    assert (cut["weight_hh_l0"] - full["weight_hh_l0"]).abs().max() > 1e-2


def test_what_a_window_has():
    module = make("lstm", 3, 5)
    windows = list(tbptt(module, random(7, 2, 3), 3))
    assert [w.steps for w in windows] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert all(w.targets is None and w.loss is None for w in windows)
    for window in windows:
        output, (h, c) = window
        assert output is window.output and output.requires_grad and h.requires_grad
        assert torch.equal(output[-1], h[0]) and c.shape == (1, 2, 5)


def test_a_loss_runs_the_backward_pass():
    module, head = make("gru", 3, 5), torch.nn.Linear(5, 2, dtype=torch.double)
    x, y = random(10, 2, 3), random(10, 2, 2)

    def loss(output, targets):
        return (head(output) - targets).square().sum()

    total = sum(window.loss for window in tbptt(module, x, 10, loss, targets=y))
    found = {**gradients_of(module), **{f"head {n}": p.grad for n, p in head.named_parameters()}}
    parameters = [*module.parameters(), *head.parameters()]
    expected = loss(module(x)[0], y)
    assert total == expected and not total.requires_grad
    gradients = torch.autograd.grad(expected, parameters)
    assert all(map(torch.equal, found.values(), gradients))


def test_an_optimizer_learns():
    """To repeat the input of two steps before, while the stream goes on."""
    rnn, head = rnn_ext.LSTM(1, 12), torch.nn.Linear(12, 1)
    optimizer = torch.optim.Adam([*rnn.parameters(), *head.parameters()], 2e-2)
    x = torch.randint(2, (2000, 8, 1)).float()
    y = x.roll(2, 0)
    losses = []
    for window in tbptt(rnn, x, 10, lambda h, y: (head(h) - y).square().mean(), targets=y):
        optimizer.step()
        optimizer.zero_grad()
        losses.append(window.loss.item())
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm", "gru_reset_before"])
def test_resets_reach_the_layer(kind, batch_first):
    module = make(kind, 3, 5, batch_first=batch_first)
    shape = (4, 9) if batch_first else (9, 4)
    x, d_output, resets = random(*shape, 3), random(*shape, 5), torch.rand(shape) < 0.3
    expected = whole(module, x, d_output, resets=resets)
    assert torch.equal(in_windows(module, x, d_output, 9, resets=resets)[0], expected[0])
    module.zero_grad()
    found = in_windows(module, x, d_output, 2, resets=resets)
    assert (found[0] - expected[0]).abs().max() <= 1e-14
    module.zero_grad()  # and where every step is an episode there is nothing to cut off
    resets = torch.ones(shape, dtype=torch.bool)
    expected = whole(module, x, d_output, resets=resets)
    found = in_windows(module, x, d_output, 2, resets=resets)[2]
    for name, gradient in expected[2].items():
        assert (found[name] - gradient).abs().max() <= 1e-12


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_stream_that_gives_steps(batch_first, width):
    module = make("gru", 3, 5, batch_first=batch_first)
    dim = int(batch_first)
    each = random(8, 2, 3), random(8, 2, 5), torch.rand(8, 2) < 0.3
    x, y, resets = (t.transpose(0, dim) for t in each)
    given = {"targets": y, "resets": resets} if width == 3 else {"targets": y} if width == 2 else {}
    expected = list(tbptt(module, x, 3, **given))
    steps = (s[:width] if width > 1 else s[0] for s in zip(*each))
    found = list(tbptt(module, steps, 3))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.output, b.output) and a.steps == b.steps
        assert width == 1 or torch.equal(a.targets, b.targets)


def test_a_stream_without_end_is_read_window_by_window():
    count = itertools.count()
    module = make("gru", 3, 5)
    windows = tbptt(module, (random(3) + 0 * next(count) for _ in itertools.count()), 4)
    for _ in range(5):
        assert next(windows).output.shape == (4, 5)
    assert next(count) == 20


class CharModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.rnn = torch.nn.Embedding(7, 4), rnn_ext.LSTM(4, 6, batch_first=True)
        self.head = torch.nn.Linear(6, 7)

    def forward(self, codes, state=None):
        h, state = self.rnn(self.embedding(codes), None if state is None else state["rnn"])
        return self.head(h), {"rnn": state}


def test_models_of_the_same_form():
    model, codes = CharModel(), torch.randint(7, (3, 11))

    def loss(logits, targets):
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    windows = list(tbptt(model, codes, 4, loss, targets=codes, batch_first=True))
    assert [w.output.shape for w in windows] == [(3, 4, 7), (3, 4, 7), (3, 3, 7)]
    expected = model(codes)[0]
    assert (torch.cat([w.output for w in windows], 1) - expected).abs().max() <= 1e-6
    assert model.embedding.weight.grad.abs().sum() > 0


def test_what_stands_in_the_window_is_carried_on():
    module, x = make("gru", 3, 5), random(6, 2, 3)
    outputs = []
    for window in tbptt(module, x, 2):
        outputs.append(window.output)
        window.state = torch.zeros_like(window.state)
    expected = [module(x[t : t + 2])[0] for t in (0, 2, 4)]
    assert all(map(torch.equal, outputs, expected))


def test_evaluation_without_gradients():
    module, x = make("lstm", 3, 5), random(6, 2, 3)
    with torch.no_grad():
        outputs = [window.output for window in tbptt(module, x, 4)]
    assert not outputs[0].requires_grad
    assert (torch.cat(outputs) - module(x)[0]).abs().max() <= 1e-14


def test_a_window_keeps_nothing_of_those_before():
    module, alive = make("gru", 3, 5), []
    for window in tbptt(module, random(12, 2, 3), 3, lambda output: output.sum()):
        alive.append(weakref.ref(window.output))
        gc.collect()
        assert [node() is not None for node in alive] == [False] * (len(alive) - 1) + [True]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m, x: tbptt(m, x, 0), ValueError, "k must be at least 1, got 0"),
        (lambda m, x: tbptt(m, x, 2.5), TypeError, "k must be an int, got 2.5"),
        (lambda m, x: tbptt(m, x, True), TypeError, "k must be an int, got True"),
        (lambda m, x: tbptt(m, x[:0], 2), ValueError, "the stream has no steps"),
        (lambda m, x: tbptt(m, 3, 2), TypeError, "a tensor or give steps, got int"),
        (lambda m, x: tbptt(m, x, 2, "mse"), TypeError, "loss must be a function, got str"),
        (lambda m, x: tbptt("gru", x, 2), TypeError, "a layer or a model, got str"),
        (lambda m, x: tbptt(rnn_ext.GRUCell(3, 5), x, 2), TypeError, "one step .* layer GRU"),
        (
            lambda m, x: tbptt(rnn_ext.GRU(3, 5, bidirectional=True), x, 2),
            ValueError,
            "bidirectional; its backward direction",
        ),
        (
            lambda m, x: tbptt(m, torch.nn.utils.rnn.pack_padded_sequence(x, [6, 4]), 2),
            TypeError,
            "PackedSequence .* pad it",
        ),
        (
            lambda m, x: tbptt(m, x, 2, targets=x[:5]),
            ValueError,
            r"targets must be laid out like stream, \[6, 2, 3\], got \[5, 2, 3\]",
        ),
        (lambda m, x: tbptt(m, x, 2, resets=[True]), TypeError, "resets must be a tensor"),
        (
            lambda m, x: tbptt(torch.nn.GRU(3, 5), x, 2, resets=x[..., 0] > 0),
            TypeError,
            r"torch.nn.GRU knows no resets; call rnn_ext.accelerate\(module\) first",
        ),
        (
            lambda m, x: tbptt(CharModel(), x, 2, resets=x[..., 0] > 0),
            TypeError,
            "CharModel takes no resets=; add it to its forward",
        ),
        (lambda m, x: tbptt(m, list(x), 2, targets=x), TypeError, "gives .* in tuples"),
        (lambda m, x: next(tbptt(m, [x[0], 1.0], 2)), TypeError, "not so at step 1"),
        (lambda m, x: next(tbptt(m, [x[0], (x[1], x[1])], 2)), TypeError, "not so at step 1"),
        (
            lambda m, x: next(tbptt(torch.nn.Linear(3, 5).double(), x, 2)),
            TypeError,
            r"Linear must return \(output, state\), got Tensor",
        ),
        (
            lambda m, x: next(tbptt(m, x, 2, lambda h: h)),
            TypeError,
            r"loss must return a scalar tensor, got \[2, 2, 5\]",
        ),
    ],
)
def test_errors_say_what_to_do(call, error, message):
    with pytest.raises(error, match=f"tbptt: .*{message}"):
        call(make("gru", 3, 5), random(6, 2, 3))


def test_windows_are_made_by_hand_too():
    output, state = Window(1, 2, slice(0, 1))
    assert (output, state) == (1, 2)
