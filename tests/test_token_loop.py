"""The loop that CUDA captures, its steps run one by one on the CPU: the tokens of the C++ loop."""

import pytest
import torch
from kinds import KINDS, make
from test_generation import CHOICES
from toy_language import language_model, prefixes

import rnn_ext
from rnn_ext import generate, language


@pytest.fixture
def in_steps(monkeypatch):
    """Calls a function as if the model were on CUDA."""

    def run(self, options, output, state, tokens):
        loop = self._token_loop(options, output, state, tokens)
        loop.run()
        return loop

    def call(function, *args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(language.Model, "run", run)
            return function(*args, **options)

    return call


def assert_same(found, expected):
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.lengths, expected.lengths)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-12, atol=1e-12)


EVERY = [(kind, "both") for kind in KINDS] + [
    ("lstm", choice) for choice in CHOICES if choice != "both"
]


@pytest.mark.parametrize("kind, choice", EVERY)
def test_tokens_are_those_of_the_other_loop(in_steps, kind, choice):
    model = language_model(make(kind, 5, 16, num_layers=2))
    arguments = *model, prefixes(4, 3), 15
    options = {"return_log_probs": True, "lengths": [3, 1, 2, 3], **CHOICES[choice]}
    expected = generate(*arguments, seed=3, **options)
    assert_same(in_steps(generate, *arguments, seed=3, **options), expected)
    generator = torch.Generator().manual_seed(3)
    found = [in_steps(generate, *arguments, seed=generator, **options) for _ in range(2)]
    assert_same(found[0], expected)
    same = torch.equal(*(result.tokens for result in found))  # the generator went on
    assert same == (choice == "greedy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(in_steps, dtype):
    model = [part.to(dtype) for part in language_model(rnn_ext.GRU(5, 16, batch_first=True))]
    expected = generate(*model, prefixes(3, 2), 20, 0)
    assert torch.equal(in_steps(generate, *model, expected[:, :2], 20, 0), expected)


@pytest.mark.parametrize("eos", [0, 7, 22])
@pytest.mark.parametrize("batch", [0, 1, 6])
def test_sequences_end_at_eos(in_steps, batch, eos):
    model = language_model(make("lstm", 5, 16), sharpness=1.0)
    arguments = *model, prefixes(batch, 2), 60
    options = {"eos": eos, "seed": 1, "pad": 99, "return_log_probs": True}
    expected = generate(*arguments, **options)
    assert_same(in_steps(generate, *arguments, **options), expected)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_decoding_and_no_batch(in_steps, name):
    layers = getattr(torch.nn, name)(5, 16, 2, dtype=torch.float64)
    model = language_model(layers)
    state = rnn_ext.encode(*model[:2], prefixes(3, 4))
    arguments = *model, state, 1, 12
    options = {"seed": 2, "top_k": 5}
    expected = rnn_ext.decode(*arguments, **options)
    assert torch.equal(in_steps(rnn_ext.decode, *arguments, **options), expected)
    before = [part.clone() for part in (state if name == "LSTM" else (state,))]
    alone = prefixes(1, 3)[0]
    expected = generate(*model, alone, 9, seed=4)
    assert torch.equal(in_steps(generate, *model, alone, 9, seed=4), expected)
    after = state if name == "LSTM" else (state,)
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_equal_tokens_are_taken_in_their_order(in_steps):
    model = language_model(make("gru", 5, 16))
    with torch.no_grad():
        model[2].weight.zero_(), model[2].bias.zero_()
    for options in ({"temperature": 0}, {"top_k": 1}, {"top_k": 3, "top_p": 0.5}, {"top_p": 1e-9}):
        arguments = *model, prefixes(3, 2), 8
        found = in_steps(generate, *arguments, seed=0, **options)
        assert torch.equal(found, generate(*arguments, seed=0, **options))
        assert found[:, 2:].max() <= 1


@pytest.mark.parametrize("value, message", [(torch.nan, "NaN or inf"), (-torch.inf, "all -inf")])
def test_logits_that_allow_no_token(in_steps, value, message):
    model = language_model(make("gru", 5, 16))
    arguments = *model, prefixes(3, 2), 8
    with torch.no_grad():
        model[2].bias.fill_(value)
    for call in (generate, lambda *args: in_steps(generate, *args)):
        with pytest.raises(ValueError, match=f"logits of token 0 of sequence 0 .*{message}"):
            call(*arguments)


def test_an_eos_that_no_token_has(in_steps):
    model = language_model(make("gru", 5, 16))
    with pytest.raises(ValueError, match="eos is 23, but the head gives logits for 23 tokens"):
        in_steps(generate, *model, prefixes(1, 2), 8, eos=23)
