"""Learning online and generating on a GPU: gradients of the CPU, tokens of the usual loop."""

import copy

import pytest
import torch
from card import (
    DEVICE,
    ON_GPU,
    no_tf32,  # noqa: F401, a fixture of every test
    require_device,
)
from kinds import KINDS, make
from streams import assert_close, gradients_of, learn, stream
from toy_language import drawn, language_model, likeliest, prefixes, usual_loop

import rnn_ext
from rnn_ext.online import RTRL

require_device()
on_gpu_only = pytest.mark.skipif(not ON_GPU, reason="is about CUDA")
CELLS = [cell for cell in KINDS if cell != "lstm_projected"]
MODES = [(mode, cell) for mode in ("exact", "chunked") for cell in CELLS]
MODES += [("snap1", cell) for cell in CELLS if cell != "gru_reset_before"]
CHOICES = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.8},
    "top_k": {"top_k": 4},
    "top_p": {"temperature": 1.5, "top_p": 0.8},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("mode, cell", MODES)
def test_gradients_are_those_of_the_cpu(mode, cell, dtype):
    there = make(cell, 5, 17).to(dtype)
    here = copy.deepcopy(there).to(DEVICE)
    parts = stream(40, 3, 5, 17, dtype=dtype)
    expected = learn(RTRL(there, mode), *parts)
    found = learn(RTRL(here, mode), *(part.to(DEVICE) for part in parts))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    assert found.device.type == DEVICE.type
    assert (found.cpu() - expected).abs().max() <= tolerance
    gradients = {name: gradient.cpu() for name, gradient in gradients_of(here).items()}
    assert_close(gradients, gradients_of(there), tolerance)


@on_gpu_only
def test_a_stream_that_changes_place_is_refused():
    rtrl = RTRL(rnn_ext.GRU(3, 4, device=DEVICE))
    rtrl.step(torch.randn(2, 3, device=DEVICE))
    rtrl.module.cpu()
    with pytest.raises(ValueError, match=r"moved to cpu, .* call reset\(\)"):
        rtrl.step(torch.randn(2, 3))
    rtrl.reset()
    rtrl.step(torch.randn(2, 3))
    rtrl.module.to(DEVICE)
    with pytest.raises(RuntimeError, match=r"on cuda:0, but this stream .* call reset\(\)"):
        rtrl.step(torch.randn(2, 3, device=DEVICE))


def on_device(model):
    return [part.to(DEVICE) for part in model]


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_usual_loop(kind, choice):
    model = on_device(language_model(make(kind, 5, 16, num_layers=2)))
    prefix = prefixes(3, 4).to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(5)
    choose = likeliest if choice.get("temperature") == 0 else drawn(**choice, generator=generator)
    expected = usual_loop(*model, prefix, 40, choose)
    assert torch.equal(rnn_ext.generate(*model, prefix, 40, seed=5, **choice), expected)


def test_torchs_own_generator_and_a_second_call():
    model = on_device(language_model(torch.nn.LSTM(5, 16, dtype=torch.float64)))
    prefix = prefixes(2, 3).to(DEVICE)
    torch.manual_seed(3)
    expected = [usual_loop(*model, prefix, 20, drawn()) for _ in range(2)]
    torch.manual_seed(3)
    for tokens in expected:
        assert torch.equal(rnn_ext.generate(*model, prefix, 20), tokens)
    assert not torch.equal(*expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_the_end_of_sequences(name, dtype):
    model = on_device(language_model(getattr(rnn_ext, name)(5, 32, batch_first=True)))
    model = [part.to(dtype) for part in model]
    prefix = prefixes(7, 2).to(DEVICE)
    result = rnn_ext.generate(*model, prefix, 90, eos=4, seed=0, pad=99, return_log_probs=True)
    assert result.tokens.device.type == DEVICE.type and result.tokens.size(1) <= 92
    for row, length in zip(result.tokens.tolist(), result.lengths.tolist()):
        assert 4 not in row[2 : length - 1] and set(row[length:]) <= {99}
        assert row[length - 1] == 4 or length == 92
    assert (result.log_probs < 0).all()


def test_logits_that_allow_no_token():
    model = on_device(language_model(make("gru", 5, 16)))
    with torch.no_grad():
        model[2].bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"logits of token 0 of sequence 0 .*NaN"):
        rnn_ext.generate(*model, prefixes(3, 2).to(DEVICE), 30)


@on_gpu_only
def test_what_still_runs_in_python_says_so():
    model = on_device(language_model(make("gru", 5, 16)))
    prefix = prefixes(3, 2).to(DEVICE)
    with pytest.warns(rnn_ext.FallbackWarning, match="beam search runs on the host"):
        rnn_ext.generate(*model, prefix, 5, beams=2)
    with pytest.warns(rnn_ext.FallbackWarning, match="seed is a generator on the CPU"):
        rnn_ext.generate(*model, prefix, 5, seed=torch.Generator())
