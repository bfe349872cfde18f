"""Real-time recurrent learning: what it refuses, and what it reports with its step."""

import copy

import pytest
import torch
from kinds import make, random
from streams import assert_close, gradients_of, learn, stream

import rnn_ext
from rnn_ext.online import RTRL

each_mode = pytest.mark.parametrize("mode", ["exact", "chunked", "snap1"])


@each_mode
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_reported_with_its_step(mode, bad):
    module = make("lstm", 3, 5)
    x, d_h, _ = stream(8, 2, 3, 5)
    rtrl = RTRL(module, mode)
    learn(rtrl, x[:4], d_h[:4], flush=False)
    broken = x[4].clone()
    broken[1, 2] = bad
    with pytest.raises(FloatingPointError, match="x is not finite at step 4"):
        rtrl.step(broken)
    with pytest.raises(FloatingPointError, match="dL_dh is not finite at step 3"):
        rtrl.accumulate(d_h[0] * bad)
    learn(rtrl, x[4:], d_h[4:])  # as if nothing had been
    whole = copy.deepcopy(module)
    whole.zero_grad()
    learn(RTRL(whole, mode), x, d_h)
    assert_close(gradients_of(module), gradients_of(whole), 1e-12)


@each_mode
def test_a_state_that_overflows_is_reported_with_its_step(mode):
    module = make("rnn_relu", 1, 2)
    with torch.no_grad():
        for weight in module.parameters():
            weight.fill_(1e60)
    rtrl = RTRL(module, mode)
    x = random(1, 1).abs()
    with pytest.raises(FloatingPointError, match=r"the state is not finite at step [45]"):
        for _ in range(20):
            rtrl.step(x)


def test_an_influence_that_overflows_is_reported_with_its_step():
    module = make("rnn_relu", 1, 2)
    with torch.no_grad():
        for weight in module.parameters():
            weight.fill_(1e30)
        module.bias_ih_l0.fill_(1.0), module.bias_hh_l0.fill_(0.0), module.weight_ih_l0.fill_(0.0)
    rtrl = RTRL(module)
    for _ in range(10):
        rtrl.step(random(1, 1))
    with pytest.raises(FloatingPointError, match="dh/dtheta is not finite at step 9"):
        rtrl.accumulate(torch.full((1, 2), 1e300, dtype=torch.float64))
    assert module.weight_hh_l0.grad is None


@pytest.mark.parametrize(
    "module, error, message",
    [
        (lambda: make("lstm_projected", 3, 4), ValueError, "proj_size=1"),
        (lambda: make("gru", 3, 4, num_layers=2), ValueError, "2 layers; .* use one layer"),
        (lambda: make("gru", 3, 4, bidirectional=True), ValueError, "bidirectional; .* a stream"),
        (lambda: make("gru", 3, 4, grad_clip=1.0), ValueError, "clip those of the parameters"),
        (lambda: torch.nn.GRU(3, 4), TypeError, "accelerate"),
        (lambda: torch.nn.Linear(3, 4), TypeError, "RNN, LSTM or GRU, got Linear"),
        (lambda: rnn_ext.GRUCell(3, 4), TypeError, "RNN, LSTM or GRU, got GRUCell"),
        (lambda: rnn_ext.quantize_weights(rnn_ext.GRU(3, 4), "int8"), TypeError, "RNN, LSTM or"),
        (lambda: rnn_ext.GRU(3, 4, dtype=torch.bfloat16), TypeError, "use float32 or float64"),
        (lambda: rnn_ext.GRU(3, 4, device="meta"), TypeError, "use the CPU or CUDA"),
        (
            lambda: torch.nn.utils.parametrizations.weight_norm(make("gru", 3, 4), "weight_hh_l0"),
            ValueError,
            "weight_hh_l0 .* remove its parametrization",
        ),
    ],
)
def test_modules_that_are_refused(module, error, message):
    with pytest.raises(error, match=message):
        RTRL(module())


def test_options_that_are_refused():
    with pytest.raises(ValueError, match="reset_after=True"):
        RTRL(make("gru_reset_before", 3, 4), "snap1")
    with pytest.raises(ValueError, match="mode must be 'exact', 'snap1' or 'chunked', got 'uoro'"):
        RTRL(make("gru", 3, 4), "uoro")
    with pytest.raises(ValueError, match="chunk belongs to mode='chunked'"):
        RTRL(make("gru", 3, 4), chunk=3)
    with pytest.raises(ValueError, match="at least 1"):
        RTRL(make("gru", 3, 4), "chunked", chunk=0)
    with pytest.raises(TypeError, match="must be an int"):
        RTRL(make("gru", 3, 4), "chunked", chunk=2.0)


@each_mode
def test_arguments_that_do_not_fit(mode):
    rtrl = RTRL(make("gru", 3, 4), mode)
    with pytest.raises(RuntimeError, match="no step yet"):
        rtrl.accumulate(random(2, 4))
    with pytest.raises(RuntimeError, match="no step yet"):
        rtrl.reset(torch.tensor([True]))
    with pytest.raises(ValueError, match=r"x must be \[B, 3\], got \[2, 4\]"):
        rtrl.step(random(2, 4))
    with pytest.raises(ValueError, match=r"x must be \[B, 3\], got \[3\]"):
        rtrl.step(random(3))
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        rtrl.step([[1.0, 2.0, 3.0]])
    with pytest.raises(TypeError, match=r"x is torch\.float32, but the weights are torch\.float64"):
        rtrl.step(torch.randn(2, 3))
    with pytest.raises(ValueError, match="x is on meta"):
        rtrl.step(random(2, 3).to("meta"))
    for reset in (torch.tensor([True]), torch.tensor([1, 0]), [True, False]):
        with pytest.raises(ValueError, match=r"reset must be a bool tensor \[2\]"):
            rtrl.step(random(2, 3), reset)
    rtrl.step(random(2, 3))
    with pytest.raises(ValueError, match=r"dL_dh must be \[2, 4\], got \[1, 4\]"):
        rtrl.accumulate(random(1, 4))


@each_mode
def test_states_that_do_not_fit(mode):
    rtrl = RTRL(make("gru", 3, 4), mode)
    rtrl.step(random(2, 3))
    state = rtrl.state_dict()
    other = "snap1" if mode == "exact" else "exact"
    with pytest.raises(ValueError, match=f"is of mode '{mode}'"):
        RTRL(make("gru", 3, 4), other).load_state_dict(state)
    with pytest.raises(ValueError, match="cell 'gru', not"):
        RTRL(make("lstm", 3, 4), mode).load_state_dict(state)
    with pytest.raises(ValueError, match=r"must be torch.float64 \[2, 5\]"):
        RTRL(make("gru", 3, 5), mode).load_state_dict(state)
    with pytest.raises(ValueError, match="has no 'mode'"):
        rtrl.load_state_dict({})
    with pytest.raises(ValueError, match="expected the tensors"):
        rtrl.load_state_dict({k: v for k, v in state.items() if k != "influence"})
