"""What is wrong is refused: as by torch.nn where it does, else by a message naming the argument."""

import re
import warnings

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from twins import CELLS, LAYERS, state, torch_nn_warnings_ignored, twins

import rnn_ext
from rnn_ext import functional

CONSTRUCTIONS = [
    ((), {}),
    ((3,), {}),
    ((3, 4, 0), {}),
    ((3, 4, -1), {}),
    ((3, 4, 1.5), {}),
    ((3, 4, 2), {"dropout": 2}),
    ((3, 4, 2), {"dropout": True}),
    ((3, 4, 2), {"dropout": "x"}),
    ((3, 0), {}),
    ((0, 4), {}),
    ((3.0, 4), {}),
    ((3, 4.0), {}),
    ((3, 4), {"bias": 1}),
    ((3, 4), {"batch_first": 1}),
    ((3, 4), {"proj_size": 4}),
    ((3, 4), {"proj_size": -1}),
    ((3, 4), {"unheard_of": 2}),
    ((3, 4), {"hidden_size": 4}),
    ((3, 4, 1), {"num_layers": 2}),
    ((3, 4), {"mode": "LSTM"}),
    ((3, 4, 1, "tanh", "relu"), {}),
    ((3, 4), {"device": "nowhere"}),
    ((3, 4), {"dtype": torch.int64}),
]


def failure(call, *args, **kwargs):
    """(type, message) of what ``call`` raises."""
    with pytest.raises(Exception) as caught:
        call(*args, **kwargs)
    return caught.type, str(caught.value)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("args", "kwargs"), CONSTRUCTIONS, ids=str)
def test_constructors_fail_as_those_of_torch(name, args, kwargs):
    ours, theirs = (getattr(library, name) for library in (rnn_ext, torch.nn))
    assert failure(ours, *args, **kwargs) == failure(theirs, *args, **kwargs)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((3,), {}), ((3, 4), {"unheard_of": 1})])
def test_constructors_of_cells_fail_as_those_of_torch(name, args, kwargs):
    ours, theirs = (getattr(library, name) for library in (rnn_ext, torch.nn))
    assert failure(ours, *args, **kwargs) == failure(theirs, *args, **kwargs)


def test_dropout_without_a_second_layer_warns_as_torch_does():
    messages = []
    for library in (rnn_ext, torch.nn):
        with pytest.warns(UserWarning, match="dropout option adds dropout") as caught:
            library.GRU(3, 4, dropout=0.5)
        messages.append(str(caught[0].message))
    assert messages[0] == messages[1]


def test_constructors_of_ours_alone():
    with pytest.raises(ValueError, match=r"Unknown nonlinearity 'swish'\. Select from"):
        rnn_ext.RNN(3, 4, nonlinearity="swish")
    for cls in (rnn_ext.RNN, rnn_ext.LSTM, rnn_ext.GRU, rnn_ext.RNNCell, rnn_ext.GRUCell):
        with pytest.raises(ValueError, match=f"{cls.__name__}: recurrent_init must be None"):
            cls(3, 4, recurrent_init="zeros")
    for cls in (rnn_ext.LSTM, rnn_ext.LSTMCell):
        with pytest.raises(TypeError, match=f"{cls.__name__}: forget_bias must be a number"):
            cls(3, 4, forget_bias="1")
        with pytest.raises(ValueError, match=f"{cls.__name__}: forget_bias needs bias=True"):
            cls(3, 4, bias=False, forget_bias=1.0)
    for cls in (rnn_ext.GRU, rnn_ext.GRUCell):
        with pytest.raises(TypeError, match=f"{cls.__name__}: reset_after must be True or False"):
            cls(3, 4, reset_after=0)


def pack(*shape, dtype=torch.float32, in_order=True):
    lengths = [5, 3, 2] if in_order else [2, 5, 3]
    return pack_padded_sequence(torch.randn(*shape).to(dtype), lengths, enforce_sorted=in_order)


def pair_or_one(name, *shape, **kwargs):
    made = torch.zeros(*shape, **kwargs)
    return (made, made) if name.startswith("LSTM") else made


BAD_CALLS = {
    "no tensor": lambda name: (None,),
    "list": lambda name: ([1.0],),
    "array": lambda name: (torch.randn(5, 2, 3).numpy(),),
    "1-D": lambda name: (torch.randn(3),),
    "4-D": lambda name: (torch.randn(5, 2, 3, 1),),
    "features": lambda name: (torch.randn(5, 2, 4),),
    "features unbatched": lambda name: (torch.randn(5, 4),),
    "dtype": lambda name: (torch.randn(5, 2, 3).double(),),
    "integers": lambda name: (torch.ones(5, 2, 3, dtype=torch.int64),),
    "device": lambda name: (torch.randn(5, 2, 3, device="meta"),),
    "no steps": lambda name: (torch.randn(0, 2, 3),),
    "no steps, no batch": lambda name: (torch.randn(0, 3),),
    "state batch": lambda name: (torch.randn(5, 2, 3), pair_or_one(name, 1, 3, 4)),
    "state size": lambda name: (torch.randn(5, 2, 3), pair_or_one(name, 1, 2, 5)),
    "state layers": lambda name: (torch.randn(5, 2, 3), pair_or_one(name, 2, 2, 4)),
    "state rank": lambda name: (torch.randn(5, 2, 3), pair_or_one(name, 2, 4)),
    "state with a batch": lambda name: (torch.randn(5, 3), pair_or_one(name, 1, 1, 4)),
    "state dtype": lambda name: (
        (torch.randn(5, 2, 3), pair_or_one(name, 1, 2, 4).double())
        if name != "LSTM"
        else (torch.randn(5, 2, 3), (torch.zeros(1, 2, 4).double(), torch.zeros(1, 2, 4).double()))
    ),
    "state device": lambda name: (
        torch.randn(5, 2, 3),
        pair_or_one(name, 1, 2, 4, device="meta"),
    ),
    "state one for pair": lambda name: (
        torch.randn(5, 2, 3),
        torch.zeros(1, 2, 4) if name == "LSTM" else (torch.zeros(1, 2, 4),) * 2,
    ),
    "state stacked": lambda name: (torch.randn(5, 2, 3), torch.zeros(2, 1, 2, 4)),
    "state triple": lambda name: (torch.randn(5, 2, 3), [torch.zeros(1, 2, 4)] * 3),
    "state of numbers": lambda name: (torch.randn(5, 2, 3), (0.0, 0.0)),
    "packed features": lambda name: (pack(5, 3, 4),),
    "packed dtype": lambda name: (pack(5, 3, 3, dtype=torch.float64),),
    "packed state batch": lambda name: (pack(5, 3, 3), pair_or_one(name, 1, 2, 4)),
    "packed unsorted state batch": lambda name: (
        pack(5, 3, 3, in_order=False),
        pair_or_one(name, 1, 2, 4),
    ),
    "packed state rank": lambda name: (pack(5, 3, 3), pair_or_one(name, 3, 4)),
    "packed state size": lambda name: (pack(5, 3, 3), pair_or_one(name, 1, 3, 5)),
    "packed state layers": lambda name: (pack(5, 3, 3), pair_or_one(name, 2, 3, 4)),
}


@pytest.mark.parametrize("call", BAD_CALLS)
@pytest.mark.parametrize("name", LAYERS)
def test_calls_fail_as_those_of_torch(name, call):
    ours, theirs = twins(name, 3, 4, dtype=torch.float32)
    args = BAD_CALLS[call](name)
    kind, message = failure(ours, *args)
    assert (kind, message.replace(f"rnn_ext.{name}", name)) == failure(theirs, *args)


@pytest.mark.parametrize("call", BAD_CALLS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: rnn_ext.RNN(3, 4, nonlinearity="sigmoid"),
        lambda: rnn_ext.GRU(3, 4, reset_after=False),
    ],
    ids=["sigmoid", "reset before"],
)
def test_cells_that_torch_has_not_fail_like_those_it_has(make, call):
    layer = make()
    twin = layer._twin(3, 4)
    args = BAD_CALLS[call](layer._get_name())
    assert failure(layer, *args)[0] is failure(twin, *args)[0]


@pytest.mark.parametrize("name", LAYERS)
def test_weights_that_do_not_fit(name):
    for attribute, shape in [
        ("weight_hh_l0", (5, 5)),
        ("weight_ih_l0", (16, 2)),
        ("bias_hh_l0", (3,)),
    ]:
        ours, _ = twins(name, 3, 4, dtype=torch.float32)
        setattr(ours, attribute, torch.nn.Parameter(torch.randn(*shape)))
        for hx in (None, state(ours, 2, torch.float32)):
            with pytest.raises(RuntimeError):
                ours(torch.randn(5, 2, 3), hx)
    mixed, theirs = twins(name, 3, 4, dtype=torch.float32)
    for module in (mixed, theirs):
        module.bias_hh_l0.data = module.bias_hh_l0.data.double()
    assert failure(mixed, torch.randn(5, 2, 3)) == failure(theirs, torch.randn(5, 2, 3))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([5, 0], "lengths must be between 1 and the 5 steps of input, got 0..5"),
        ([5, -2], "lengths must be between 1 and the 5 steps of input, got -2..5"),
        ([6, 2], "lengths must be between 1 and the 5 steps of input, got 2..6"),
        ([6, 6], "lengths must be between 1 and the 5 steps of input, got 6..6"),
        ([5], "lengths must have shape [2], got [1]"),
        (3, "lengths must have shape [2], got []"),
        ([[5, 3]], "lengths must have shape [2], got [1, 2]"),
        ([5.0, 3.0], "lengths must be integers, got torch.float32"),
        (torch.tensor([True, True]), "lengths must be integers, got torch.bool"),
    ],
)
@pytest.mark.parametrize("name", LAYERS)
def test_lengths_out_of_range(name, lengths, message):
    layer = getattr(rnn_ext, name)(3, 4)
    with pytest.raises(ValueError, match=re.escape(f"{name}: {message}")):
        layer(torch.randn(5, 2, 3), lengths=lengths)


@pytest.mark.parametrize("name", LAYERS)
def test_lengths_with_input_that_has_none(name):
    layer, theirs = twins(name, 3, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match=f"{name}: lengths cannot be given for a PackedSequence"):
        layer(pack(5, 3, 3), lengths=[5, 3, 2])
    with pytest.raises(ValueError, match=f"{name}: lengths needs batched 3-D input"):
        layer(torch.randn(5, 3), lengths=[5])
    for wrong in (torch.randn(5, 2, 4), torch.randn(5, 2, 3, 1), torch.randn(5, 2, 3).double()):
        assert failure(layer, wrong, lengths=[5, 3]) == failure(theirs, wrong)


BAD_STEPS = {
    "no tensor": lambda name: (None,),
    "0-D": lambda name: (torch.tensor(1.0),),
    "3-D": lambda name: (torch.randn(1, 2, 3),),
    "features": lambda name: (torch.randn(2, 4),),
    "features unbatched": lambda name: (torch.randn(4),),
    "dtype": lambda name: (torch.randn(2, 3).double(),),
    "integers": lambda name: (torch.ones(2, 3, dtype=torch.int64),),
    "device": lambda name: (torch.randn(2, 3, device="meta"),),
    "state batch": lambda name: (torch.randn(2, 3), pair_or_one(name, 3, 4)),
    "state size": lambda name: (torch.randn(2, 3), pair_or_one(name, 2, 5)),
    "state 3-D": lambda name: (torch.randn(2, 3), pair_or_one(name, 1, 2, 4)),
    "state 1-D": lambda name: (torch.randn(2, 3), pair_or_one(name, 4)),
    "state 2-D": lambda name: (torch.randn(3), pair_or_one(name, 1, 4)),
    "state dtype": lambda name: (torch.randn(2, 3), pair_or_one(name, 2, 4, dtype=torch.float64)),
    "state one for pair": lambda name: (
        torch.randn(2, 3),
        torch.zeros(2, 4) if name == "LSTMCell" else (torch.zeros(2, 4),) * 2,
    ),
}


@pytest.mark.parametrize("call", BAD_STEPS)
@pytest.mark.parametrize("name", CELLS)
def test_cells_fail_as_those_of_torch(name, call):
    ours, theirs = twins(name, 3, 4, dtype=torch.float32)
    args = BAD_STEPS[call](name)
    assert failure(ours, *args) == failure(theirs, *args)


@pytest.mark.parametrize("call", BAD_STEPS)
def test_sigmoid_cell_fails_as_the_tanh_cell(call):
    args = BAD_STEPS[call]("RNNCell")
    ours = failure(rnn_ext.RNNCell(3, 4, nonlinearity="sigmoid"), *args)
    assert ours[0] is failure(torch.nn.RNNCell(3, 4), *args)[0]
    assert "Unknown nonlinearity" not in ours[1]


def test_cell_with_an_unknown_nonlinearity_fails_when_called():
    cell = rnn_ext.RNNCell(3, 4, nonlinearity="swish")
    with pytest.raises(RuntimeError, match="Unknown nonlinearity: swish"):
        cell(torch.randn(2, 3))


def weights(gates, **changed):
    made = {
        "w_ih": torch.randn(gates * 4, 3),
        "w_hh": torch.randn(gates * 4, 4),
        "b_ih": torch.randn(gates * 4),
        "b_hh": torch.randn(gates * 4),
    }
    return {**made, **changed}


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"input": [1.0]}, TypeError, "input must be a tensor, got list"),
        ({"input": torch.randn(5, 3)}, RuntimeError, "input must have 3 dimensions [T, B, I]"),
        ({"input": torch.randn(0, 2, 3)}, RuntimeError, "input must have at least one time step"),
        (
            {"input": torch.randn(5, 2, 9)},
            RuntimeError,
            "w_ih must have shape [12, 9], got [12, 3]",
        ),
        (
            {"input": torch.ones(5, 2, 3).long()},
            ValueError,
            "w_ih has dtype torch.float32 but input",
        ),
        ({"hx": torch.zeros(3, 4)}, RuntimeError, "hx must have shape [2, 4], got [3, 4]"),
        ({"hx": torch.zeros(2, 4).double()}, ValueError, "hx has dtype torch.float64 but input"),
        ({"hx": torch.zeros(2, 4, device="meta")}, RuntimeError, "hx is on meta but input on cpu"),
        (
            {"w_hh": torch.zeros(5, 4)},
            RuntimeError,
            "w_hh must be [3 * hidden, hidden], got [5, 4]",
        ),
        ({"w_hh": torch.zeros(12, 5)}, RuntimeError, "w_hh must have shape [12, 4], got [12, 5]"),
        ({"w_hh": None}, TypeError, "w_hh must be a tensor, got NoneType"),
        ({"b_hh": None}, RuntimeError, "give both b_ih and b_hh, or neither"),
        ({"b_ih": torch.zeros(4)}, RuntimeError, "b_ih must have shape [12], got [4]"),
        (
            {"batch_sizes": torch.tensor([2, 1])},
            RuntimeError,
            "input must have 2 dimensions [N, I] with batch_sizes",
        ),
    ],
)
def test_functional_names_what_is_wrong(changed, kind, message):
    arguments = {"input": torch.randn(5, 2, 3), "hx": torch.zeros(2, 4), **weights(3), **changed}
    with pytest.raises(kind, match=re.escape(f"gru: {message}")):
        functional.gru(**arguments)


@pytest.mark.parametrize(
    "sizes",
    [[2, 2], [1, 2, 2], [3, 2, 0], [], [6, -1], torch.tensor([3.0, 2.0]), "ab", [[5]]],
    ids=str,
)
def test_functional_checks_batch_sizes(sizes):
    sizes = torch.tensor(sizes, dtype=torch.long) if isinstance(sizes, list) else sizes
    with pytest.raises(ValueError, match="rnn: batch_sizes must be"):
        functional.rnn(torch.randn(5, 3), None, **weights(1), batch_sizes=sizes)
    with pytest.raises(ValueError, match="rnn: batch_first has no meaning for packed input"):
        functional.rnn(torch.randn(5, 3), None, **weights(1), batch_sizes=sizes, batch_first=True)


def test_functional_lstm_and_choices():
    x = torch.randn(5, 2, 3)
    for hx in (torch.zeros(2, 4), (torch.zeros(2, 4),), (torch.zeros(2, 4),) * 3):
        with pytest.raises(TypeError, match="lstm: hx must be a pair"):
            functional.lstm(x, hx, **weights(4))
    with pytest.raises(
        RuntimeError, match=re.escape("lstm: hx[1] must have shape [2, 4], got [1, 4]")
    ):
        functional.lstm(x, (torch.zeros(2, 4), torch.zeros(1, 4)), **weights(4))
    with pytest.raises(RuntimeError, match=re.escape("lstm: w_hh must have shape [16, 2]")):
        functional.lstm(x, None, **weights(4), w_hr=torch.randn(2, 4))
    with pytest.raises(ValueError, match="rnn: nonlinearity must be"):
        functional.rnn(x, None, **weights(1), nonlinearity="swish")
    with pytest.raises(ValueError, match="rnn: input must have a floating-point dtype"):
        integers = {name: weight.long() for name, weight in weights(1).items()}
        functional.rnn(x.long(), None, **integers)


def test_errors_come_without_a_warning():
    """A fallback is reported only once it has served."""
    with warnings.catch_warnings(), torch_nn_warnings_ignored():
        warnings.simplefilter("error")
        with pytest.raises(ValueError):
            rnn_ext.LSTM(3, 4)(torch.randn(5, 2, 3).half())
