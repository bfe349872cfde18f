"""`generate`: the tokens of the usual Python loop, in one call; what serves it, what ends it."""

import signal
import threading
import warnings

import pytest
import torch
from kinds import KINDS, make
from toy_language import (
    VOCABULARY,
    drawn,
    language_model,
    likeliest,
    log_probs_of,
    prefixes,
    usual_loop,
)

import rnn_ext
from rnn_ext import backend, generate

TORCH = {
    "RNN": torch.nn.RNN,
    "relu": lambda *args, **more: torch.nn.RNN(*args, nonlinearity="relu", **more),
    "GRU": torch.nn.GRU,
    "LSTM": torch.nn.LSTM,
    "projected": lambda *args, **more: torch.nn.LSTM(*args, proj_size=5, **more),
}
CHOICES = {
    "greedy": {"temperature": 0},
    "sampled": {},
    "cool": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_p": {"temperature": 1.5, "top_p": 0.8},
    "both": {"top_k": 9, "top_p": 0.6},
}


@pytest.fixture(autouse=True)
def _no_fallback(monkeypatch):
    """Every reason is warned of anew, and a warning that no test expects is an error."""
    monkeypatch.setattr(backend, "_warned", set())


def usual(choice, generator=None):
    return likeliest if choice.get("temperature") == 0 else drawn(**choice, generator=generator)


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", TORCH)
def test_tokens_are_those_of_the_usual_loop_over_torch_nn(name, layers, choice):
    model = language_model(TORCH[name](7, 19, layers, dtype=torch.float64))
    prefix = prefixes(3, 4)
    generator = torch.Generator().manual_seed(5)
    expected = usual_loop(*model, prefix, 40, usual(choice, generator))
    assert torch.equal(generate(*model, prefix, 40, seed=5, **choice), expected)
    assert torch.unique(expected[:, 4:]).numel() >= (4 if choice.get("temperature") != 0 else 1)

    torch.manual_seed(6)
    expected = usual_loop(*model, prefix, 12, usual(choice))
    torch.manual_seed(6)
    assert torch.equal(generate(*model, prefix, 12, **choice), expected)


@pytest.mark.parametrize("steps", [1, 3, 30])
@pytest.mark.parametrize("batch", [1, 2, 17])
@pytest.mark.parametrize("kind", KINDS)
def test_every_cell_on_every_instruction_set(isa, kind, batch, steps):
    model = language_model(make(kind, 5, 33, num_layers=2))
    prefix = prefixes(batch, 3)
    generator = torch.Generator().manual_seed(0)
    expected = usual_loop(*model, prefix, steps, drawn(generator=generator))
    assert torch.equal(generate(*model, prefix, steps, seed=0), expected)


@pytest.mark.parametrize("threads", [1, 2, 5], indirect=True)
@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm", "lstm_projected", "gru_reset_before"])
def test_tokens_do_not_depend_on_the_number_of_threads(kind, threads):
    options = {} if kind == "lstm_projected" else {"bias": False}
    model = language_model(make(kind, 20, 150, num_layers=2, **options), 120)
    prefix = prefixes(9, 2, 120)
    expected = usual_loop(*model, prefix, 15, likeliest)
    assert torch.equal(generate(*model, prefix, 15, temperature=0), expected)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "bf16", "int8"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_other_numbers(isa, name, kind):
    """Tokens are the likeliest up to rounding, by the model's own forward pass over all of them."""
    layers = getattr(rnn_ext, name)(12, 40, 2)
    if kind in ("bf16", "int8"):
        rnn_ext.quantize_weights(layers, kind)
    elif kind == "bfloat16":
        layers = layers.bfloat16()
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    embedding, head = torch.nn.Embedding(30, 12), torch.nn.Linear(40, 30, bias=False)
    model = embedding.to(dtype), layers, head.to(dtype)
    result = generate(*model, prefixes(3, 2, 30), 25, 0, return_log_probs=True)
    expected = log_probs_of(*model, result.tokens, 2).sum(1)
    tolerance = 0.3 if dtype == torch.bfloat16 else 1e-3
    torch.testing.assert_close(result.log_probs, expected, atol=tolerance, rtol=0)
    assert result.lengths.tolist() == [27, 27, 27]
    best = usual_loop(*model, result.tokens[:, :2], 1, likeliest)[:, 2:]
    gap = log_probs_of(*model, torch.cat((result.tokens[:, :2], best), 1), 2)
    gap -= log_probs_of(*model, result.tokens[:, :3], 2)
    assert gap.max() <= tolerance


def test_more_tokens_than_are_kept_of_the_first_projection():
    """Each step has 64 tokens of 1200; the kernel keeps what 16 MiB hold and begins anew."""
    model = language_model(make("lstm", 4, 640), 1200, sharpness=0.1)
    prefix = prefixes(64, 1, 1200)
    generator = torch.Generator().manual_seed(2)
    expected = usual_loop(*model, prefix, 24, drawn(generator=generator))
    assert torch.unique(expected).numel() > 16 * 2**20 / (4 * 640 * 8)
    assert torch.equal(generate(*model, prefix, 24, seed=2), expected)


def test_prefixes_of_many_lengths():
    model = language_model(make("gru", 6, 20, num_layers=2, batch_first=True))
    prefix, lengths = prefixes(4, 7), [3, 7, 1, 5]
    prefix[0, 3:] = -100
    result = generate(*model, prefix, 9, 0, lengths=lengths, pad=77, return_log_probs=True)
    assert result.tokens.shape == (4, 16) and result.lengths.tolist() == [12, 16, 10, 14]
    for row, length in enumerate(lengths):
        alone = generate(*model, prefix[row, :length], 9, 0)
        assert torch.equal(result.tokens[row, : length + 9], alone)
        assert (result.tokens[row, length + 9 :] == 77).all()


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_no_batch_lists_and_a_state_before(name):
    model = language_model(TORCH[name](6, 20, 2, dtype=torch.float64))
    whole = prefixes(1, 9)
    expected = generate(*model, whole, 9, 0)
    _, hx = model[1](model[0](whole[:, :4].t()))
    assert torch.equal(generate(*model, whole[0].tolist(), 9, 0), expected[0])
    later = generate(*model, whole[:, 4:].int(), 9, 0, hx=hx)
    assert torch.equal(later, expected[:, 4:])
    hx = tuple(part.squeeze(1) for part in hx) if name == "LSTM" else hx.squeeze(1)
    assert torch.equal(generate(*model, whole[0, 4:], 9, 0, hx=hx), expected[0, 4:])
    assert generate(*model, whole[:0], 9).shape == (0, 9)


def test_a_sequence_ends_at_eos():
    model = language_model(make("lstm", 6, 20), sharpness=2.0)
    prefix = prefixes(6, 2)
    generator = torch.Generator().manual_seed(8)
    free = usual_loop(*model, prefix, 60, drawn(generator=generator))
    eos = int(free[:, 2:].flatten().mode().values)
    result = generate(*model, prefix, 60, eos=eos, pad=99, seed=8, return_log_probs=True)
    ends = [row[2:].tolist().index(eos) + 3 if eos in row[2:] else 62 for row in free]
    assert result.lengths.tolist() == ends and min(ends) < max(ends)
    assert result.tokens.shape[1] == max(ends)
    log_p = log_probs_of(*model, free, 2)
    for row, end in enumerate(ends):
        assert torch.equal(result.tokens[row, :end], free[row, :end])
        assert (result.tokens[row, end:] == 99).all()
        torch.testing.assert_close(result.log_probs[row], log_p[row, : end - 2].sum())
    padded = generate(*model, prefix, 60, eos=eos, seed=8)
    assert torch.equal(padded, result.tokens.masked_fill(result.tokens == 99, eos))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_encoder_and_decoder(name):
    of_source = language_model(TORCH[name](6, 20, 2, dtype=torch.float64))
    model = language_model(TORCH[name](5, 20, 2, dtype=torch.float64), 11)
    source, lengths = prefixes(4, 8), torch.tensor([8, 3, 5, 1])
    state = rnn_ext.encode(*of_source[:2], source, lengths=lengths)
    result = rnn_ext.decode(*model, state, 1, 12, temperature=0)
    assert result.shape == (4, 12)
    for row in range(4):
        _, own = of_source[1](of_source[0](source[row : row + 1, : lengths[row]].t()))
        expected = usual_loop(*model, torch.tensor([[1]]), 12, likeliest, own)[:, 1:]
        assert torch.equal(result[row : row + 1], expected)
        own = rnn_ext.encode(*of_source[:2], source[row, : lengths[row]])
        assert torch.equal(rnn_ext.decode(*model, own, 1, 12, temperature=0), expected[0])
    eos = int(result[0, 4])
    ended = rnn_ext.decode(*model, state, [1, 1, 1, 1], 12, eos, 0, pad=50)
    first = result[0].tolist().index(eos) + 1
    assert torch.equal(ended[0, :first], result[0, :first]) and (ended[0, first:] == 50).all()


def test_layers_do_not_drop_out_and_stay_as_they_are():
    for layers in (
        torch.nn.LSTM(6, 20, 2, dropout=0.9, dtype=torch.float64),
        make("lstm", 6, 20, num_layers=2, dropout=0.9),
    ):
        model = language_model(layers)
        prefix = prefixes(2, 5)
        kind, parameters = type(layers), list(layers.parameters())
        training = generate(*model, prefix, 20, 0)
        assert layers.training and type(layers) is kind
        assert all(a is b for a, b in zip(layers.parameters(), parameters, strict=True))
        layers.eval()
        assert torch.equal(training, generate(*model, prefix, 20, 0))
        assert not training.requires_grad


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_options_without_effect_on_a_step(kind):
    options = {"weight_dropout": 0.5, "variational_dropout": 0.5, "learn_initial_state": True}
    layers = make(kind, 6, 20, num_layers=2, **options)
    with torch.no_grad():
        for name, parameter in layers.named_parameters():
            if "weight" not in name and "bias" not in name:
                parameter.fill_(0.7)
    model = language_model(layers)
    prefix = prefixes(2, 3)
    found = generate(*model, prefix, 20, 0)
    assert torch.equal(
        found, usual_loop(*model[:1], layers.eval(), model[2], prefix, 20, likeliest)
    )


def test_tied_and_parametrized_weights():
    layers = torch.nn.utils.parametrizations.weight_norm(
        torch.nn.GRU(8, 8, dtype=torch.float64), "weight_hh_l0"
    )
    embedding, _, head = language_model(layers, sharpness=20.0)
    head.weight = embedding.weight
    prefix = prefixes(2, 3)
    expected = usual_loop(embedding, layers, head, prefix, 20, likeliest)
    assert torch.equal(generate(embedding, layers, head, prefix, 20, 0), expected)


class Doubling(torch.nn.LSTM):
    def forward(self, input, hx=None):
        output, state = super().forward(input, hx)
        return 2 * output, state


def hooked(module):
    module.register_forward_hook(lambda module, args, output: output)
    return module


def fallbacks():
    double = {"dtype": torch.float64}

    def one(reason, embedding=None, rnn=None, head=None):
        embedding = embedding or torch.nn.Embedding(VOCABULARY, 6, **double)
        rnn = rnn or torch.nn.LSTM(6, 20, 2, **double)
        return reason, embedding, rnn, head or torch.nn.Linear(20, VOCABULARY, **double)

    yield one("embedding is a Sequential", torch.nn.Sequential(one("")[1]))
    yield one("has a max_norm", torch.nn.Embedding(VOCABULARY, 6, max_norm=1.0, **double))
    yield one("rnn is a Doubling", rnn=Doubling(6, 20, 2, **double))
    yield one("rnn has forward hooks", rnn=hooked(torch.nn.GRU(6, 20, **double)))
    wide = {"embedding": torch.nn.Embedding(VOCABULARY, 20, **double)}
    yield one("rnn has residual", **wide, rnn=make("lstm", 20, 20, num_layers=2, residual=True))
    yield one("rnn has zoneout", rnn=make("gru", 6, 20, zoneout=0.2).eval())
    yield one("rnn has layer_norm", rnn=make("gru", 6, 20, layer_norm=True))
    yield one("rnn has peephole", rnn=make("lstm", 6, 20, peephole=True))
    yield one("rnn has hidden_size", rnn=rnn_ext.LSTM(6, [8, 20], **double))
    yield one("head is a Sequential", head=torch.nn.Sequential(one("")[3], torch.nn.Tanh()))
    yield one("head has forward hooks", head=hooked(one("")[3]), rnn=make("rnn_sigmoid", 6, 20))


@pytest.mark.parametrize("case", list(fallbacks()), ids=lambda case: case[0])
def test_what_the_kernels_do_not_serve_runs_in_python(case):
    reason, *model = case
    torch.manual_seed(3)
    prefix = prefixes(3, 4)
    generator = torch.Generator().manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rnn_ext.FallbackWarning)  # of the layers themselves
        expected = usual_loop(*model, prefix, 15, drawn(0.7, 9, generator=generator))
    with pytest.warns(rnn_ext.FallbackWarning, match=f"loop in Python .*: .*{reason}"):
        found = generate(*model, prefix, 15, 0.7, 9, seed=1)
    assert torch.equal(found, expected)
    if not isinstance(model[1], Doubling):
        ragged = generate(*model, prefix, 5, 0, lengths=[2, 4, 1])
        assert torch.equal(ragged[0, :7], generate(*model, prefix[0, :2], 5, 0))


def test_both_loops_give_the_same():
    model = language_model(make("lstm", 6, 20, num_layers=2), sharpness=2.0)
    prefix = prefixes(3, 4)
    for options in ({"seed": 3, "top_p": 0.9, "eos": 2}, {"beams": 4, "eos": 2}):
        result = generate(*model, prefix, 12, return_log_probs=True, **options)
        with rnn_ext.use_backend("reference"):
            other = generate(*model, prefix, 12, return_log_probs=True, **options)
        assert torch.equal(result.tokens, other.tokens)
        assert torch.equal(result.lengths, other.lengths)
        torch.testing.assert_close(result.log_probs, other.log_probs)
        with rnn_ext.use_backend("cpu"):
            assert torch.equal(generate(*model, prefix, 12, **options), result.tokens)


def test_float16_and_mixed_dtypes_run_in_python():
    half = {"dtype": torch.float16}
    model = torch.nn.Embedding(9, 4, **half), torch.nn.GRU(4, 6, **half), torch.nn.Linear(6, 9)
    with pytest.warns(rnn_ext.FallbackWarning) as told:
        tokens = generate(*model[:2], model[2].half(), [[1, 2]], 5, 0)
        generate(model[0].float(), model[1].float(), _Widened(model[2].double()), [[1, 2]], 5, 0)
    assert tokens.shape == (1, 7)
    texts = [str(warning.message) for warning in told]
    assert any("float16 has no CPU kernel" in text for text in texts)
    assert any("head is a _Widened" in text for text in texts)


class _Widened(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head(x.double())


def test_many_at_once_and_other_threads_run():
    model = language_model(make("gru", 6, 30))
    prefix = prefixes(2, 3)
    expected = [generate(*model, prefix, 200, seed=k) for k in range(4)]
    found, ticks, stop = {}, [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(1)

    def run(k):
        found[k] = generate(*model, prefix, 200, seed=k)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    counter = threading.Thread(target=tick)
    for thread in (counter, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    counter.join()
    assert ticks and all(torch.equal(found[k], expected[k]) for k in range(4))


def test_a_signal_ends_it():
    class Enough(Exception):
        pass

    def ring(*_):
        raise Enough

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(Enough):
            generate(*language_model(make("gru", 6, 30)), [1], 10**12, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
