"""What CUDA's RTRL is made of, torch operations, here on the CPU: as exact as the kernels."""

import copy

import pytest
import torch
from kinds import KINDS, make
from streams import assert_close, bptt, gradients_of, learn, stream

from rnn_ext.online import RTRL
from rnn_ext.online._composed import Composed

CELLS = [cell for cell in KINDS if cell != "lstm_projected"]
DIAGONAL = [cell for cell in CELLS if cell != "gru_reset_before"]
KINDS_OF = [("exact", c) for c in CELLS] + [("snap1", c) for c in DIAGONAL]


class OfTorch(RTRL):
    def _make(self, batch):
        return Composed(self._layer, batch, diagonal=self.mode == "snap1")


@pytest.mark.parametrize("bias", [True, False, "single"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_are_those_of_bptt(cell, bias):
    module = make(cell, 3, 7, bias=bias)
    x, d_h, resets = stream(30, 4, 3, 7)
    output = learn(OfTorch(module), x, d_h, resets)
    expected, gradients = bptt(module, x, d_h, resets)
    assert (output - expected).abs().max() <= 1e-12
    assert_close(gradients_of(module), gradients, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mode, cell", KINDS_OF)
def test_kernels_agree_while_weights_change(mode, cell, dtype):
    """The kernels let the influence lag behind; here it takes every step at once."""
    modules = [make(cell, 3, 5).to(dtype)]
    modules.append(copy.deepcopy(modules[0]))
    x, d_h, resets = stream(40, 3, 3, 5, dtype=dtype)
    for module, kind in zip(modules, (RTRL, OfTorch)):
        rtrl = kind(module, mode)
        optimizer = torch.optim.SGD(module.parameters(), 1e-3)
        for t in range(40):
            learn(rtrl, x[t : t + 1], d_h[t : t + 1], resets[t : t + 1])
            optimizer.step()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert_close(gradients_of(modules[1]), gradients_of(modules[0]), tolerance)


@pytest.mark.parametrize("mode, cell", [("exact", "lstm"), ("snap1", "lstm"), ("exact", "gru")])
def test_a_stream_goes_on_where_it_was(mode, cell):
    module = make(cell, 3, 5)
    module.bias_hh_l0.requires_grad_(False)
    x, d_h, _ = stream(9, 2, 3, 5)
    rtrl, resumed = OfTorch(module, mode), OfTorch(copy.deepcopy(module), mode)
    learn(rtrl, x[:5], d_h[:5])
    module.zero_grad()
    resumed.load_state_dict(rtrl.state_dict())
    assert resumed.memory() == rtrl.memory() > 0
    mask = torch.tensor([True, False])
    for each in (rtrl, resumed):
        each.reset(mask)
    outputs = [learn(each, x[5:], d_h[5:]) for each in (rtrl, resumed)]
    assert torch.equal(*outputs) and module.bias_hh_l0.grad is None
    for name in ("weight_ih_l0", "weight_hh_l0"):
        found = getattr(resumed.module, name).grad
        assert torch.equal(found, getattr(module, name).grad)


@pytest.mark.parametrize("mode", ["exact", "snap1"])
def test_what_is_not_finite_is_reported_and_changes_nothing(mode):
    module = make("gru", 3, 5)
    whole = copy.deepcopy(module)
    x, d_h, _ = stream(6, 2, 3, 5)
    rtrl = OfTorch(module, mode)
    learn(rtrl, x[:3], d_h[:3])
    broken = x[3].clone()
    broken[1, 2] = torch.nan
    with pytest.raises(FloatingPointError, match="x is not finite at step 3"):
        rtrl.step(broken)
    with torch.no_grad():
        module.bias_ih_l0[0] = torch.inf
        with pytest.raises(FloatingPointError, match="the state is not finite at step 3"):
            module.bias_hh_l0[0] = -torch.inf
            rtrl.step(x[3])
        module.load_state_dict(whole.state_dict())
    learn(rtrl, x[3:], d_h[3:])
    with pytest.raises(FloatingPointError, match="dL_dh is not finite at step 5"):
        rtrl.accumulate(d_h[5] * torch.inf)
    learn(OfTorch(whole, mode), x, d_h)
    assert_close(gradients_of(module), gradients_of(whole), 1e-14)
    rtrl._carried.influence.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="dh/dtheta is not finite at step 5"):
        rtrl.accumulate(d_h[5])
    rtrl.step(x[0], torch.tensor([True, True]))  # a stream that starts anew forgets it
    rtrl.accumulate(d_h[0])
    assert all(torch.isfinite(g).all() for g in gradients_of(module).values())
