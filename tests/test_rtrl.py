"""Real-time recurrent learning: the gradients of BPTT, SnAp-1 by its definition, and a good API."""

import copy
import gc
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from kinds import KINDS, make, random
from streams import assert_close, bptt, gradients_of, learn, stream

import rnn_ext
from rnn_ext import reference
from rnn_ext.online import RTRL

CELLS = [cell for cell in KINDS if cell != "lstm_projected"]
DIAGONAL = [cell for cell in CELLS if cell != "gru_reset_before"]
PROCESS = Path("/proc/self/statm")
each_cell = pytest.mark.parametrize("cell", CELLS)
each_mode = pytest.mark.parametrize("mode", ["exact", "chunked", "snap1"])


def as_reference(module, x, d_h, resets, mode):
    weights = reference.Weights(*(w.detach().double().numpy() for w in module.parameters()))
    resets = None if resets is None else resets.numpy()
    arrays = x.double().numpy(), weights, d_h.double().numpy()
    result = reference.rtrl(module._cell, *arrays, resets=resets, mode=mode)
    names = [name for name, _ in module.named_parameters()]
    return result, {n: torch.from_numpy(g) for n, g in zip(names, result.gradients)}


# The gradients


@pytest.mark.parametrize("resets", [False, True], ids=["no_resets", "resets"])
@pytest.mark.parametrize("mode", ["exact", "chunked"])
@each_cell
def test_gradients_are_those_of_bptt(cell, mode, resets):
    module = make(cell, 3, 11)
    x, d_h, resets = stream(70, 10, 3, 11, resets)
    output = learn(RTRL(module, mode), x, d_h, resets)
    expected, gradients = bptt(module, x, d_h, resets)
    assert (output - expected).abs().max() <= 1e-12
    assert_close(gradients_of(module), gradients, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "mode, cell", [("exact", c) for c in CELLS] + [("snap1", c) for c in DIAGONAL]
)
def test_kernels_compute_the_reference(isa, cell, mode, dtype):
    """Odd sizes: units that fill no register, columns that fill no panel."""
    module = make(cell, 4, 21).to(dtype)
    x, d_h, resets = stream(6, 3, 4, 21, dtype=dtype)
    rtrl = RTRL(module, mode)
    first = learn(rtrl, x[:4], d_h[:4], resets[:4])
    rtrl.state_dict()  # lets the influence catch up
    output = torch.cat((first, learn(rtrl, x[4:], d_h[4:], resets[4:])))
    result, gradients = as_reference(module, x, d_h, resets, mode)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert np.abs(output.numpy() - result.output).max() <= tolerance
    assert_close(gradients_of(module), gradients, tolerance)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 17), (1, 40, 33)])
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru", "gru_reset_before"])
def test_sizes_and_threads(cell, threads, shape, bias):
    batch, inputs, hidden = shape
    module = make(cell, inputs, hidden, bias=bias)
    x, d_h, _ = stream(36, batch, inputs, hidden)  # the influence catches up once
    learn(RTRL(module), x, d_h)
    assert_close(gradients_of(module), bptt(module, x, d_h)[1], 1e-11)


def test_sums_longer_than_a_piece():
    module = make("rnn_tanh", 1, 260, bias=False)
    x, d_h, _ = stream(2, 1, 1, 260)
    rtrl = RTRL(module)
    rtrl.step(x[0])
    rtrl.state_dict()
    rtrl.accumulate(d_h[0])
    learn(rtrl, x[1:], d_h[1:])
    assert_close(gradients_of(module), bptt(module, x, d_h)[1], 1e-11)


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru"])
def test_snap1_is_exact_for_units_that_do_not_act_on_each_other(cell):
    module = make(cell, 3, 9)
    with torch.no_grad():
        for block in module.weight_hh_l0.split(9):
            block.mul_(torch.eye(9))
    x, d_h, resets = stream(20, 4, 3, 9)
    learn(RTRL(module, "snap1"), x, d_h, resets)
    exact = bptt(module, x, d_h, resets)[1]
    kept = torch.eye(9, dtype=torch.bool).repeat(len(exact["weight_hh_l0"]) // 9, 1)
    found = gradients_of(module)
    for gradients in (found, exact):
        gradients["weight_hh_l0"] = gradients["weight_hh_l0"][kept]
    assert_close(found, exact, 1e-10)


def test_reference_is_bptt_in_numpy():
    for cell in CELLS:
        module = make(cell, 2, 4)
        x, d_h, _ = stream(9, 3, 2, 4)
        result, gradients = as_reference(module, x, d_h, None, "exact")
        weights = [w.detach().numpy() for w in module.parameters()]
        forward = reference.forward(cell, x.numpy(), None, None, [*weights, None])
        expected = reference.backward(forward, d_h.numpy())
        for name, short in zip(gradients, ("w_ih", "w_hh", "b_ih", "b_hh")):
            assert np.abs(gradients[name].numpy() - getattr(expected, short)).max() <= 1e-12
        assert np.abs(result.output - forward.output).max() <= 1e-15


@each_cell
def test_what_a_parameter_touches(cell):
    """Its own unit; gate o of the LSTM not the cell; r before the product every unit."""
    weights = reference.Weights(*(w.detach().numpy() for w in make(cell, 2, 3).parameters()))
    touched = reference.touched(cell, weights)
    of_unit = np.eye(3, dtype=bool)
    expected = {
        "lstm": np.block([[of_unit] * 4, [of_unit] * 3 + [np.zeros((3, 3), bool)]]),
        "gru_reset_before": np.block([[np.ones((3, 3), bool), of_unit, of_unit]]),
        "gru": np.block([[of_unit] * 3]),
    }.get(cell, of_unit)
    assert np.array_equal(touched[:, -expected.shape[1] :], expected)  # of b_hh


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_resets_while_the_influence_lags_behind(cell):
    """Of one sequence early and late, of one at every step, of one never; two pauses between."""
    module = make(cell, 3, 9)
    x, d_h, resets = stream(80, 3, 3, 9)
    resets[:] = False
    resets[[1, 30, 32, 33, 64], 0] = True
    resets[:, 1] = True
    output = learn(RTRL(module), x, d_h, resets)
    expected, gradients = bptt(module, x, d_h, resets)
    assert (output - expected).abs().max() <= 1e-12
    assert_close(gradients_of(module), gradients, 1e-11)


@pytest.mark.parametrize("steps", [2, 31, 32, 33, 64])
def test_a_gradient_every_so_often(steps):
    """Losses at the last step alone, and what is carried is read and written in between."""
    module = make("lstm", 3, 9)
    x, d_h, _ = stream(steps, 2, 3, 9)
    rtrl = RTRL(module)
    d_h[:-1] = 0.0
    for t in range(steps):
        rtrl.step(x[t])
        if t == steps // 2:
            rtrl.load_state_dict(rtrl.state_dict())
    rtrl.accumulate(d_h[-1])
    assert_close(gradients_of(module), bptt(module, x, d_h)[1], 1e-11)


# Chunks


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_chunks_of_any_length(chunk):
    module = make("lstm", 3, 5)
    x, d_h, resets = stream(21, 3, 3, 5)
    learn(RTRL(module, "chunked", chunk=chunk), x, d_h, resets)
    assert_close(gradients_of(module), bptt(module, x, d_h, resets)[1], 1e-11)


def test_gradients_of_a_chunk_arrive_at_its_end():
    module = make("gru", 3, 4)
    rtrl = RTRL(module, "chunked", chunk=5)
    x, d_h, _ = stream(6, 2, 3, 4)
    learn(rtrl, x[:5], d_h[:5], flush=False)
    assert module.weight_hh_l0.grad is None
    rtrl.step(x[5])
    assert_close(gradients_of(module), bptt(module, x[:5], d_h[:5])[1], 1e-11)
    rtrl.flush()
    rtrl.accumulate(d_h[5])  # after the end of its chunk
    assert_close(gradients_of(module), bptt(module, x, d_h)[1], 1e-11)


def test_chunked_many_sequences_in_blocks():
    module = make("lstm", 2, 70)  # 140 rows a sequence: more than one block
    x, d_h, resets = stream(5, 5, 2, 70)
    learn(RTRL(module, "chunked", chunk=2), x, d_h, resets)
    assert_close(gradients_of(module), bptt(module, x, d_h, resets)[1], 1e-11)


# In use


@pytest.mark.parametrize("cell", ["rnn_relu", "lstm", "gru"])
def test_chunked_learns_as_exact_does_while_weights_change(cell):
    modules = [make(cell, 3, 6)]
    modules.append(copy.deepcopy(modules[0]))
    x, d_h, resets = stream(15, 2, 3, 6)
    for module, mode in zip(modules, ("exact", "chunked")):
        rtrl = RTRL(module, mode)
        optimizer = torch.optim.Adam(module.parameters(), 1e-2)
        for t in range(0, 15, 3):
            optimizer.zero_grad()
            part = slice(t, t + 3)
            learn(rtrl, x[part], d_h[part], resets[part])
            optimizer.step()
    expected = dict(modules[0].named_parameters())
    assert_close(dict(modules[1].named_parameters()), expected, 1e-10)


def test_a_change_of_weights_ends_a_chunk():
    modules = [make("gru", 3, 6)]
    modules.append(copy.deepcopy(modules[0]))
    x, d_h, _ = stream(8, 2, 3, 6)
    for module, mode in zip(modules, ("exact", "chunked")):
        rtrl = RTRL(module, mode)
        for t in range(8):
            rtrl.step(x[t])
            rtrl.accumulate(d_h[t])
            with torch.no_grad():
                module.weight_hh_l0.mul_(0.9)
        rtrl.flush()
    assert_close(gradients_of(modules[1]), gradients_of(modules[0]), 1e-10)


@pytest.mark.parametrize("mode", ["exact", "chunked"])
def test_with_a_loss_and_an_optimizer(mode):
    """An online learner that repeats the input of three steps before gets to know it."""
    rnn, head = rnn_ext.RNN(1, 12), torch.nn.Linear(12, 1)
    optimizer = torch.optim.Adam([*rnn.parameters(), *head.parameters()], 1e-2)
    rtrl = RTRL(rnn, mode, **({"chunk": 6} if mode == "chunked" else {}))
    x = torch.randint(2, (900, 8, 1)).float()
    losses = []
    for t in range(3, 900):
        h = rtrl.step(x[t]).requires_grad_()
        loss = (head(h) - x[t - 3]).square().mean()
        loss.backward()
        rtrl.accumulate(h.grad)
        losses.append(loss.item())
        if t % 6 == 2:
            rtrl.flush()
            optimizer.step()
            optimizer.zero_grad()
    assert sum(losses[-50:]) < 0.5 * sum(losses[:50])


@each_mode
def test_a_frozen_parameter_gets_no_gradient_and_gradients_add_up(mode):
    module = make("gru", 3, 5)
    module.bias_hh_l0.requires_grad_(False)
    x, d_h, _ = stream(6, 2, 3, 5)
    learn(RTRL(module, mode), x, d_h)
    once = {name: g for name, g in gradients_of(module).items() if g is not None}
    assert sorted(once) == ["bias_ih_l0", "weight_hh_l0", "weight_ih_l0"]
    once = {name: g.clone() for name, g in once.items()}
    learn(RTRL(module, mode), x, d_h)
    for name, value in once.items():
        assert (getattr(module, name).grad - 2 * value).abs().max() <= 1e-12


@each_mode
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm"])
def test_state_dict_goes_on_where_it_was(mode, cell):
    module = make(cell, 3, 5)
    x, d_h, resets = stream(11, 2, 3, 5)
    rtrl = RTRL(module, mode)
    learn(rtrl, x[:7], d_h[:7], resets[:7], flush=False)
    file = io.BytesIO()
    torch.save(rtrl.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(module)
    resumed = RTRL(other, mode)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.steps == 7
    module.zero_grad()
    outputs = [learn(r, x[7:], d_h[7:], resets[7:]) for r in (rtrl, resumed)]
    assert torch.equal(*outputs)
    assert_close(gradients_of(other), gradients_of(module), 1e-14)


@each_mode
def test_reset_between_steps_is_reset_in_a_step(mode):
    x, d_h, _ = stream(6, 3, 3, 5)
    mask = torch.tensor([True, False, True])
    modules = [make("lstm", 3, 5)]
    modules.append(copy.deepcopy(modules[0]))
    for module, between in zip(modules, (True, False)):
        rtrl = RTRL(module, mode)
        for t in range(6):
            if t == 4 and between:
                rtrl.reset(mask)
            rtrl.step(x[t], mask if t == 4 and not between else None)
            rtrl.accumulate(d_h[t])
        rtrl.flush()
    assert_close(gradients_of(modules[1]), gradients_of(modules[0]), 1e-12)


def test_reset_of_all_takes_another_number_of_streams():
    module = make("gru", 3, 5)
    rtrl = RTRL(module)
    rtrl.step(random(2, 3))
    with pytest.raises(ValueError, match=r"there are 2 streams, but x has 4 rows; call reset\(\)"):
        rtrl.step(random(4, 3))
    rtrl.reset()
    assert rtrl.steps == 0 and rtrl.memory() == 0
    x, d_h, _ = stream(5, 4, 3, 5)
    learn(rtrl, x, d_h)
    assert_close(gradients_of(module), bptt(module, x, d_h)[1], 1e-11)


@each_mode
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_memory_does_not_grow_with_the_stream(cell, mode):
    rtrl = RTRL(make(cell, 1, 2), mode, chunk=40 if mode == "chunked" else None)
    x = random(1, 1)
    sizes = []
    for steps in (1000, 9000):  # after 1,000 and 10,000
        for _ in range(steps):
            rtrl.step(x)
        state = rtrl.state_dict().values()
        tensors = [value for value in state if isinstance(value, torch.Tensor)]
        sizes.append((rtrl.memory(), sum(t.numel() for t in tensors)))
    assert sizes[0][0] > 0 and sizes[0] == sizes[1]


@each_mode
def test_a_hundred_thousand_steps_take_the_memory_of_a_thousand(mode):
    """Of the process: a tensor kept at each step would be tens of megabytes."""
    if not PROCESS.exists():
        pytest.skip("the system does not say how much memory a process has")
    rtrl = RTRL(make("gru", 1, 2), mode, chunk=100 if mode == "chunked" else None)
    x, d_h = random(1, 1), random(1, 2)
    resident = []
    for steps in (1000, 99000):
        for _ in range(steps):
            rtrl.step(x)
        rtrl.accumulate(d_h)
        gc.collect()
        resident.append(int(PROCESS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert rtrl.steps == 100_000
    assert resident[1] - resident[0] < 4e6


@each_mode
def test_output_is_the_callers(mode):
    """What is done to a returned h does not reach the stream."""
    module = make("gru", 3, 5)
    x = random(4, 2, 3)
    quiet, loud = RTRL(module, mode), RTRL(module, mode)
    for t in range(4):
        expected, h = quiet.step(x[t]), loud.step(x[t].requires_grad_())
        assert torch.equal(h, expected) and not h.requires_grad
        h.fill_(7.0)
