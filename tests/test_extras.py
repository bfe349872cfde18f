"""What our layers do beyond torch.nn's: other cells, lengths, every cell state, initializations."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from twins import LAYERS, assert_same, gradients, state, tensors, twins

import rnn_ext
from rnn_ext import reference

EXTRA = {
    "sigmoid": lambda *args, **kwargs: rnn_ext.RNN(*args, nonlinearity="sigmoid", **kwargs),
    "reset before": lambda *args, **kwargs: rnn_ext.GRU(*args, reset_after=False, **kwargs),
}
CELL = {"sigmoid": "rnn_sigmoid", "reset before": "gru_reset_before"}


def expected_output(cell, module, x):
    """``module``'s output by the reference, layer by layer and direction by direction."""
    for names in np.reshape(module._all_weights, (module.num_layers, -1, 4)):
        directions = []
        for reverse, group in enumerate(names):
            weights = reference.Weights(*(getattr(module, name).detach().numpy() for name in group))
            h0 = np.zeros((x.shape[1], module.hidden_size))
            result = reference.forward(cell, x, h0, None, weights, reverse=bool(reverse))
            directions.append(result.output)
        x = np.concatenate(directions, -1)
    return torch.from_numpy(x)


@pytest.mark.parametrize("extra", EXTRA)
def test_other_cells_follow_the_reference(extra):
    layer = EXTRA[extra](4, 3, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    output, h_n = layer(x)
    assert_same(output, expected_output(CELL[extra], layer, x.numpy()))
    assert_same(h_n[2:], torch.stack([output[-1, :, :3], output[0, :, 3:]]))


@pytest.mark.parametrize("extra", EXTRA)
def test_other_cells_are_differentiable_and_take_every_input(extra):
    layer = EXTRA[extra](2, 3, dtype=torch.float64)
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    hx = state(layer, 2, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, hx, *_: layer(x, hx), (x, hx, *layer.parameters()))
    assert_same(layer(x[:, 0], hx[:, 0]), [part[:, 0] for part in layer(x, hx)])
    packed = pack_padded_sequence(x, [2, 4], enforce_sorted=False)
    _, h_n = layer(packed, hx)
    assert_same(h_n[:, 0], layer(x[:2, 0], hx[:, 0])[1])
    assert_same(h_n[:, 1], layer(x[:, 1], hx[:, 1])[1])
    assert layer(x[:, :0])[0].shape == (4, 0, 3)


@pytest.mark.parametrize("extra", EXTRA)
def test_cells_agree_with_their_layers(extra):
    layer = EXTRA[extra](4, 3, dtype=torch.float64)
    options = {"nonlinearity": "sigmoid"} if extra == "sigmoid" else {"reset_after": False}
    cell = getattr(rnn_ext, f"{type(layer).__name__}Cell")(4, 3, dtype=torch.float64, **options)
    for name, parameter in cell.named_parameters():
        parameter.data = getattr(layer, f"{name}_l0").data
    x = torch.randn(2, 4, dtype=torch.float64)
    assert_same(cell(x), layer(x[None])[1][0])
    assert str(cell) in ("RNNCell(4, 3, nonlinearity=sigmoid)", "GRUCell(4, 3, reset_after=False)")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (EXTRA["sigmoid"], "RNN(4, 3, nonlinearity='sigmoid')"),
        (EXTRA["reset before"], "GRU(4, 3, reset_after=False)"),
        (lambda *a: rnn_ext.LSTM(*a, forget_bias=1), "LSTM(4, 3, forget_bias=1.0)"),
        (
            lambda *a: rnn_ext.RNN(*a, nonlinearity="relu", recurrent_init="identity"),
            "RNN(4, 3, recurrent_init='identity')",
        ),
        (
            lambda *a: rnn_ext.GRUCell(*a, recurrent_init="orthogonal"),
            "GRUCell(4, 3, recurrent_init='orthogonal')",
        ),
        (lambda *a: rnn_ext.LSTMCell(*a, forget_bias=0.5), "LSTMCell(4, 3, forget_bias=0.5)"),
    ],
)
def test_extras_show_in_repr_and_survive_copies(make, text):
    module = make(4, 3)
    assert str(module) == text
    x = torch.randn(5, 2, 4) if isinstance(module, torch.nn.RNNBase) else torch.randn(2, 4)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert str(twin) == text
        assert_same(twin(x), module(x))
        before = copy.deepcopy(twin.state_dict())
        twin.reset_parameters()
        kept = [name for name, old in before.items() if torch.equal(twin.state_dict()[name], old)]
        assert kept == (["weight_hh_l0"] if "identity" in text else [])


def test_forget_bias_in_every_layer_and_direction():
    torch.manual_seed(0)
    layer = rnn_ext.LSTM(4, 3, 2, bidirectional=True, proj_size=2, forget_bias=2)
    torch.manual_seed(0)
    plain = rnn_ext.LSTM(4, 3, 2, bidirectional=True, proj_size=2)
    for name, value in layer.named_parameters():
        expected = getattr(plain, name).detach().clone()
        if name.startswith("bias"):
            expected[3:6] = 2.0 if name.startswith("bias_ih") else 0.0
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recurrent_init(dtype):
    for layer, gates in [
        (rnn_ext.RNN(4, 3, 2, recurrent_init="orthogonal", dtype=dtype), 1),
        (rnn_ext.GRU(4, 3, 2, bidirectional=True, recurrent_init="orthogonal", dtype=dtype), 3),
        (rnn_ext.LSTM(4, 3, proj_size=2, recurrent_init="orthogonal", dtype=dtype), 4),
    ]:
        for name, weight in layer.named_parameters():
            if name.startswith("weight_hh"):
                for block in weight.float().chunk(gates):
                    identity = torch.eye(block.size(1))
                    torch.testing.assert_close(block.T @ block, identity, rtol=0, atol=2e-2)
    for cell in (
        rnn_ext.LSTM(4, 3, recurrent_init="identity"),
        rnn_ext.LSTMCell(4, 3, recurrent_init="identity"),
    ):
        weight = next(value for name, value in cell.named_parameters() if "hh" in name)
        assert torch.equal(weight, torch.eye(3).repeat(4, 1))
    assert rnn_ext.GRU(4, 3, recurrent_init="orthogonal", device="meta").weight_hh_l0.is_meta


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_lengths_are_packing_and_padding(name, batch_first):
    ours, theirs = twins(name, 4, 3, 2, bidirectional=True, batch_first=batch_first)
    x = torch.randn(4, 6, 4, dtype=torch.float64, requires_grad=True)
    lengths = [3, 1, 5, 2] if batch_first else [2, 4, 1, 3, 1, 4]
    hx = state(ours, len(lengths))
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
    output, h_n = theirs(packed, hx)
    padded, _ = pad_packed_sequence(output, batch_first, total_length=6 if batch_first else 4)
    expected = padded, h_n
    for given in (lengths, torch.tensor(lengths), torch.tensor(lengths, dtype=torch.int32)):
        assert_same(ours(x, hx, lengths=given), expected)
    assert_same(gradients(ours, ours(x, hx, lengths=lengths), x), gradients(theirs, expected, x))


def test_lengths_at_the_edges():
    layer = rnn_ext.GRU(4, 3, dtype=torch.float64)
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    assert_same(layer(x, lengths=[5, 5]), layer(x))
    assert layer(x[:, :0], lengths=torch.zeros(0, dtype=torch.long))[0].shape == (5, 0, 3)
    x[3:, 1] = float("nan")  # what lies past a length is not read
    output, h_n = layer(x, lengths=[5, 3])
    assert output.isfinite().all() and not output[3:, 1].any()
    assert_same(h_n[0, 1], output[2, 1])


def test_every_cell_state():
    ours = rnn_ext.LSTM(4, 3, bidirectional=True, dtype=torch.float64)
    cell = torch.nn.LSTMCell(4, 3, dtype=torch.float64)
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    output, (h_n, c_n), cells = ours(x, return_cells=True)
    for direction, suffix in enumerate(("", "_reverse")):
        for name, parameter in cell.named_parameters():
            parameter.data = getattr(ours, f"{name}_l0{suffix}").data
        hx = (torch.zeros(2, 3, dtype=torch.float64),) * 2
        part = slice(3 * direction, 3 * direction + 3)
        for t in range(5) if direction == 0 else range(4, -1, -1):
            hx = cell(x[t], hx)
            assert_same(cells[t, :, part], hx[1])
        assert_same(c_n[direction], hx[1])
    assert_same(ours(x), (output, (h_n, c_n)))


def test_every_cell_state_in_the_layout_of_the_input():
    for options in ({}, {"num_layers": 2, "proj_size": 2, "bidirectional": True}):
        layer = rnn_ext.LSTM(4, 3, batch_first=True, dtype=torch.float64, **options)
        x = torch.randn(2, 5, 4, dtype=torch.float64)
        *_, cells = layer(x, return_cells=True)
        assert cells.shape == (2, 5, 6 if options else 3)
        *_, alone = layer(x[0], return_cells=True)
        assert_same(alone, cells[0])
        *_, ragged = layer(x, lengths=[3, 5], return_cells=True)
        assert not ragged[0, 3:].any()
        packed = pack_padded_sequence(x, [3, 5], True, enforce_sorted=False)
        packed_output, _, packed_cells = layer(packed, return_cells=True)
        assert isinstance(packed_cells, PackedSequence)
        assert torch.equal(packed_cells.batch_sizes, packed_output.batch_sizes)
        assert_same(pad_packed_sequence(packed_cells, True)[0], ragged)
        empty = layer(x[:0], return_cells=True)[2]
        assert empty.shape == (0, *cells.shape[1:])


def test_gradients_through_the_cell_states():
    layer = rnn_ext.LSTM(2, 3, proj_size=2, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(x, *_):
        return tuple(tensors(layer(x, return_cells=True)))

    with_projection = run(x)
    assert len(with_projection) == 4
    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))
    assert torch.autograd.gradcheck(lambda x: run(x)[3], (x,))
