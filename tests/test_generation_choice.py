"""How `generate` chooses tokens: sampling and beam search beside the reference, and bad input."""

import itertools

import numpy as np
import pytest
import torch
from kinds import make
from toy_language import (
    VOCABULARY,
    language_model,
    log_probs_of,
    logits_after,
    prefixes,
)

from rnn_ext import _C, decode, generate, reference

FILTERS = [
    (1.0, 0, 1.0),
    (0.0, 0, 1.0),
    (0.5, 3, 1.0),
    (2.0, 0, 0.7),
    (1.0, 6, 0.3),
    (1.0, 99, 1.0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature, top_k, top_p", FILTERS)
def test_a_token_is_that_of_the_reference(temperature, top_k, top_p, dtype):
    rows, tokens = 300, 11
    logits = torch.randn(rows, tokens, dtype=dtype) * 3
    logits[:100] = logits[:100].round()  # many are equal
    logits[50:150, ::3] = -torch.inf
    generator = torch.Generator().manual_seed(4)
    choice = _C.TokenChoice(
        rows, tokens, 2, temperature, top_k, top_p, -1, False, 1, 0.0, generator
    )
    found, parents = choice.choose(logits)
    noise = torch.empty_like(logits).exponential_(generator=torch.Generator().manual_seed(4))
    assert parents is None
    for row in range(rows):
        expected = reference.sample(logits[row], noise[row], temperature, top_k or None, top_p)
        assert found[row] == expected, row


def test_frequencies_are_the_probabilities():
    rows, logits = 40_000, torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0], dtype=torch.float64)
    choice = _C.TokenChoice(rows, 5, 2, 1.5, 4, 0.9, -1, False, 1, 0.0, None)
    found, _ = choice.choose(logits.expand(rows, 5))
    p = torch.softmax(logits / 1.5, 0)
    kept = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    for token in (2, 4, 0, 3):  # likeliest first; 3 is where 90 % of the four are reached
        kept[token] = p[token]
    kept /= kept.sum()
    deviation = (found.bincount(minlength=5) / rows - kept).abs()
    assert (deviation <= 5 * (kept * (1 - kept) / rows).sqrt()).all()


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-9}])
def test_what_leaves_one_token_is_greedy(narrow):
    model = language_model(make("lstm", 6, 20))
    prefix = prefixes(3, 4)
    assert torch.equal(generate(*model, prefix, 30, **narrow), generate(*model, prefix, 30, 0))


def test_a_generator_goes_on_where_it_was():
    model = language_model(make("gru", 6, 20), sharpness=1.0)
    generator = torch.Generator().manual_seed(7)
    first, second = (generate(*model, [1], 20, seed=generator) for _ in range(2))
    assert torch.equal(first, generate(*model, [1], 20, seed=7))
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    generate(*model, [1], 20, seed=7)
    generate(*model, [1], 20, beams=3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.7])
@pytest.mark.parametrize("eos", [None, 0, 3])
@pytest.mark.parametrize("beams", [2, 3, 9])
@pytest.mark.parametrize("kind", ["lstm", "gru_reset_before"])
def test_beam_search_is_that_of_the_reference(kind, beams, eos, penalty):
    model = language_model(make(kind, 4, 9, num_layers=2), 5, sharpness=3.0)
    prefix = prefixes(4, 3, 5)
    result = generate(
        *model, prefix, 7, eos=eos, beams=beams, length_penalty=penalty, return_log_probs=True
    )
    for row in range(4):
        tokens, log_p = reference.beam_search(
            logits_after(*model, prefix[row]), beams, 7, eos, penalty
        )
        length = int(result.lengths[row])
        assert tuple(result.tokens[row, 3:length].tolist()) == tokens
        assert (result.tokens[row, length:] == (eos or 0)).all()
        np.testing.assert_allclose(result.log_probs[row], log_p, rtol=1e-9)


def test_enough_beams_find_the_best_of_all():
    model = language_model(make("lstm", 4, 9), 3)
    for row in prefixes(5, 2, 3):
        every = torch.tensor([[*row, *more] for more in itertools.product(range(3), repeat=4)])
        best = log_probs_of(*model, every, 2).sum(1)
        result = generate(*model, row, 4, beams=27, return_log_probs=True)
        torch.testing.assert_close(result.log_probs, best.max())
        assert torch.equal(result.tokens, every[best.argmax()])


def test_beams_are_likelier_than_the_greedy_tokens():
    """No law, but what they are for; and one beam that has nothing to end it is greedy."""
    model = language_model(make("gru", 6, 20), sharpness=2.0)
    prefix = prefixes(8, 3)
    greedy = generate(*model, prefix, 10, 0, return_log_probs=True)
    beams = generate(*model, prefix, 10, beams=6, return_log_probs=True)
    assert (beams.log_probs >= greedy.log_probs - 1e-12).all()
    assert (beams.log_probs > greedy.log_probs + 0.1).any()
    for row in range(8):
        one, _ = reference.beam_search(logits_after(*model, prefix[row]), 1, 10)
        assert tuple(greedy.tokens[row, 3:].tolist()) == one


MODEL = (
    torch.nn.Embedding(VOCABULARY, 4),
    torch.nn.LSTM(4, 6),
    torch.nn.Linear(6, VOCABULARY),
)
SMALL = torch.nn.Embedding(9, 4), torch.nn.Embedding(VOCABULARY, 5), torch.nn.Linear(7, VOCABULARY)
BOTH = torch.nn.LSTM(4, 3, bidirectional=True)


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (ValueError, "at least one token", {"prefix": []}),
        (ValueError, "at least one token", {"prefix": torch.zeros(2, 0, dtype=torch.int64)}),
        (ValueError, "at least one token", {"prefix": torch.zeros(1, 2, 3, dtype=torch.int64)}),
        (ValueError, "must hold integers, got torch.float32", {"prefix": [1.0]}),
        (ValueError, "must hold integers, got torch.bool", {"prefix": [True]}),
        (ValueError, "pad shorter rows and give lengths", {"prefix": [[1, 2], [3]]}),
        (ValueError, "prefix has token 23, but embedding has tokens 0 to 22", {"prefix": [1, 23]}),
        (ValueError, "prefix has token -1", {"prefix": [-1]}),
        (ValueError, "lengths must be 1 integers", {"lengths": [1, 1]}),
        (ValueError, "lengths must be 1 integers", {"lengths": [1.0]}),
        (ValueError, "lengths must be between 1 and 2", {"lengths": [3]}),
        (ValueError, "steps must be at least 1, got 0", {"steps": 0}),
        (TypeError, "steps must be an int, got 2.0", {"steps": 2.0}),
        (ValueError, "temperature must be 0 or more", {"temperature": -0.1}),
        (ValueError, "temperature must be 0 or more", {"temperature": float("nan")}),
        (TypeError, "temperature must be a number", {"temperature": "1"}),
        (ValueError, "top_k must be at least 1", {"top_k": 0}),
        (ValueError, "top_p must be above 0 and at most 1", {"top_p": 0.0}),
        (ValueError, "top_p must be above 0 and at most 1", {"top_p": 1.1}),
        (ValueError, "eos is 23, but the head gives logits for 23", {"eos": VOCABULARY}),
        (ValueError, "eos must be at least 0", {"eos": -1}),
        (TypeError, "seed must be an int", {"seed": "now"}),
        (ValueError, "beams must be at least 1", {"beams": 0}),
        (ValueError, "beam search draws nothing", {"beams": 2, "top_k": 3}),
        (ValueError, "beam search draws nothing", {"beams": 2, "temperature": 0.5}),
        (ValueError, "length_penalty must be finite", {"length_penalty": float("inf")}),
        (TypeError, "pad must be an int", {"pad": 1.5}),
        (TypeError, "head must be a module", {"head": None}),
        (ValueError, "embedding gives 5 features, but rnn takes 4", {"embedding": SMALL[1]}),
        (ValueError, "rnn gives 6 features, but head takes 7", {"head": SMALL[2]}),
        (ValueError, "head chooses among 23 tokens, but embedding has 9", {"embedding": SMALL[0]}),
        (ValueError, "two directions", {"rnn": BOTH}),
    ],
)
def test_bad_input(error, message, arguments):
    embedding, rnn, head = MODEL
    given = {"embedding": embedding, "rnn": rnn, "head": head, "prefix": [[1, 2]], "steps": 3}
    with pytest.raises(error, match=f"^generate: .*{message}"):
        generate(**(given | arguments))


@pytest.mark.parametrize(
    "error, message, state, bos",
    [
        (ValueError, "bos has token 23", None, 23),
        (ValueError, r"bos must be a token or \[2\] tokens, got \[3\]", None, [1, 1, 1]),
        (ValueError, "bos must hold integers", None, 1.0),
        (TypeError, "state must be what rnn takes, got NoneType", (None, None), 1),
        (TypeError, r"the state of LSTM is a pair \(h, c\)", torch.zeros(1, 2, 6), 1),
        (RuntimeError, "h must have shape", (torch.zeros(2, 2, 6),) * 2, 1),
        (RuntimeError, "must have shape", (torch.zeros(1, 2, 5),) * 2, 1),
    ],
)
def test_bad_input_of_decode(error, message, state, bos):
    state = (torch.zeros(1, 2, 6),) * 2 if state is None else state
    with pytest.raises(error, match=message):
        decode(*MODEL, state, bos, 3)


@pytest.mark.parametrize("beams", [1, 3])
def test_logits_that_are_not_numbers_are_reported_with_their_step(beams):
    """A relu network that doubles its state overflows after a while."""
    embedding, rnn, head = language_model(make("rnn_relu", 2, 2), 3)
    with torch.no_grad():
        for weight in (*embedding.parameters(), *rnn.parameters(), *head.parameters()):
            weight.fill_(1e20)
        head.weight.copy_(torch.tensor([[1.0, -1.0], [1.0, 1.0], [0.0, 0.0]]))
        head.bias.zero_()
    with pytest.raises(ValueError, match=r"logits of token \d+ of sequence 0 have NaN or inf"):
        generate(embedding, rnn, head, [[0], [1]], 40, beams=beams)
    head = torch.nn.Linear(2, 3, dtype=torch.float64)
    with torch.no_grad():
        head.bias.fill_(-torch.inf)
        rnn.weight_ih_l0.zero_(), rnn.weight_hh_l0.zero_()
    with pytest.raises(ValueError, match="token 0 of sequence 0 are all -inf"):
        generate(embedding, rnn, head, [[0]], 3, beams=beams)
