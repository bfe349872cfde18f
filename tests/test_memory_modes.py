"""``checkpoint_every`` and ``save="states"``: less is kept for backward, and all else stays."""

import copy
import pickle

import pytest
import torch
from cases import CELLS, NAMES, make_case, run, run_ours, run_reference
from kinds import KINDS, make, random
from torch.nn.utils.rnn import pack_padded_sequence
from twins import assert_same, forget_warnings, gradients, state, tensors

import rnn_ext
from rnn_ext import FallbackWarning
from rnn_ext.control import Control

MODES = ({"checkpoint_every": 3}, {"save": "states"})
COMPOSED = pytest.mark.filterwarnings("ignore::rnn_ext.FallbackWarning")


@pytest.fixture(autouse=True)
def _each_warning_again():
    forget_warnings()


def pair(kind, *, dtype=torch.float32, mode, **options):
    """A plain layer and the same one in a mode."""
    plain = make(kind, **options).to(dtype)
    ours = make(kind, **options, **mode).to(dtype)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def results_and_gradients(layer, x, hx, **options):
    results = layer(x, hx, **options)
    return tensors(results), gradients(layer, results, x, *tensors(hx), retain_graph=False)


def distance(a, b):
    """In roundings of the largest entry."""
    return ((a - b).abs().max() / b.abs().max() / torch.finfo(b.dtype).eps).item()


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_keep_every_bit(kind, dtype, threads):
    """Several layers, both directions, whose steps do not divide by those between checkpoints."""
    every = 64 if dtype == torch.bfloat16 else 32
    options = {"inputs": 6, "hidden": 17, "num_layers": 2, "bidirectional": True}
    plain, ours = pair(kind, dtype=dtype, mode={"checkpoint_every": every}, **options)
    x = torch.randn(150, 8, 6, dtype=dtype, requires_grad=True)
    hx = state(plain, 8, dtype, requires_grad=True)
    expected = results_and_gradients(plain, x, hx)
    found = results_and_gradients(ours, x, hx)
    for ours, theirs in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert torch.equal(ours, theirs)


def test_steps_between_checkpoints_are_rounded_up_to_where_sums_are_cut():
    x = torch.zeros(0)
    every = Control(checkpoint_every=100).stretch
    assert every(512, 1000, 4, False, x.to(torch.float32)) == 128
    assert every(512, 1000, 4, False, x.to(torch.bfloat16)) == 128
    assert every(512, 1000, 128, False, x.to(torch.float64)) == 100
    assert every(512, 1000, 3, False, x.to(torch.float32)) == 100
    assert every(512, 1000, 4, True, x.to(torch.float32)) == 100
    assert every(512, 90, 4, False, x.to(torch.float32)) == 90
    assert Control(checkpoint_every=1).stretch(512, 8, 1, False, x) == 8


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_other_shapes_keep_the_results_and_all_but_the_last_digits(kind, ragged, mode):
    plain, ours = pair(kind, mode=mode, inputs=5, hidden=18, num_layers=2, bidirectional=True)
    x = torch.randn(20, 5, 5, requires_grad=True)
    hx = state(plain, 5, torch.float32, requires_grad=True)
    options = {"lengths": [7, 20, 1, 13, 20]} if ragged else {}
    expected, d_expected = results_and_gradients(plain, x, hx, **options)
    found, d_found = results_and_gradients(ours, x, hx, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert max(distance(a, b) for a, b in zip(d_found, d_expected, strict=True)) < 16
    if not ragged and "checkpoint_every" in mode:  # sums over time alone are cut elsewhere
        states = 2 if plain.mode == "LSTM" else 1
        for a, b in [*zip(d_found, d_expected, strict=True)][-1 - states :]:
            assert torch.equal(a, b)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_follow_the_reference(cell, ragged, reverse, mode):
    """Also those of every cell state, and of the last states."""
    case = make_case(cell, (7, 4, 3, 5), ragged=ragged, reverse=reverse)
    truth, d_truth = run_reference(case)
    found, d_found = run(Control(**mode).layer, case)
    for name, value in (truth | d_truth).items():
        assert_same((found | d_found)[name], value)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_and_every_instruction_set(isa, cell, mode):
    case = make_case(cell, (40, 3, 4, 20)).to(torch.bfloat16)
    expected, d_expected = run_ours(case)
    found, d_found = run(Control(**mode).layer, case)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(distance(d_found[name], d_expected[name]) <= 1 for name in d_expected)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm_projected", "gru"])
def test_only_the_gradients_that_are_asked_for(cell, mode):
    case = make_case(cell, (8, 2, 3, 4))
    _, expected = run_ours(case)
    for i, name in enumerate(NAMES):
        if case.tensors[i] is None:
            continue
        leaves = [None if t is None else t.clone() for t in case.tensors]
        leaves[i].requires_grad_()
        results = Control(**mode).layer(case.cell, *leaves)
        given = [(r, d) for r, d in zip(results, case.upstream) if d is not None]
        (found,) = torch.autograd.grad([r for r, _ in given], leaves[i], [d for _, d in given])
        assert_same(found, expected[name])


def saved_bytes(layer, x):
    """What a forward pass of our own layers keeps beside input, output and parameters."""
    held = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        rnn_ext.use_backend("cpu"),  # not the single call of C++, whose tensors no hook sees
    ):
        output, _ = layer(x)
    held.add(output.untyped_storage().data_ptr())
    return sum(count for where, count in seen.items() if where not in held)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_memory_grows_with_the_number_of_checkpoints(name):
    def kept(steps, **mode):
        layer = getattr(rnn_ext, name)(16, 32, **mode)
        return saved_bytes(layer, torch.randn(steps, 4, 16)) - small

    states = 2 if name == "LSTM" else 1
    small = row = 4 * 32 * 4  # the zeros that h_0 and c_0 are, and the states of a step
    assert kept(2560, checkpoint_every=64) == (2560 // 64 - 1) * row * states
    plain, gates = kept(2560), {"RNN": 0, "LSTM": 5, "GRU": 4}[name]
    assert plain == 2560 * row * gates
    assert kept(2560, save="states") == 2560 * row * (states - 1)
    if name != "RNN":  # the plain one keeps no more than its output
        assert kept(2560, checkpoint_every=100) <= 0.05 * plain


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm_projected", "gru"])
@COMPOSED
def test_gradients_of_gradients(kind, mode):
    layer = make(kind, **mode)
    x = random(5, 2, 2, requires_grad=True)

    def run(x, *_):
        return tuple(tensors(layer(x)))

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_second_backward_and_every_way_to_give_input(mode):
    plain, ours = pair("lstm", dtype=torch.float64, mode=mode, batch_first=True)
    x = random(3, 9, 2, requires_grad=True)
    results = ours(x)
    first = gradients(ours, results, x)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(ours, results, x), strict=True))
    assert_same(first, gradients(plain, plain(x), x))
    alone = ours(x[0])
    assert_same(gradients(ours, alone, x), gradients(plain, plain(x[0]), x))
    packed = pack_padded_sequence(x, [2, 9, 4], True, enforce_sorted=False)
    assert_same(gradients(ours, ours(packed), x), gradients(plain, plain(packed), x))
    cells = ours(x, return_cells=True)
    assert_same(gradients(ours, cells, x), gradients(plain, plain(x, return_cells=True), x))
    empty = ours(x[:0])
    empty[0].sum().backward()
    assert not ours.weight_hh_l0.grad.any()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_in_training_of_mixed_precision(mode):
    plain, ours = pair("gru", mode=mode, hidden=8)
    x = torch.randn(9, 2, 2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = plain(x), ours(x)
    assert_same(found, expected)
    assert_same(gradients(ours, found, x), gradients(plain, expected, x))


def test_dropout_between_layers_draws_the_same_masks():
    plain, ours = pair("gru", mode=MODES[0], num_layers=2, dropout=0.5, hidden=8)
    x = torch.randn(9, 2, 2)
    torch.manual_seed(1)
    expected = plain(x)
    torch.manual_seed(1)
    assert_same(ours(x), expected)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_modes_show_in_repr_and_survive_copies(mode):
    layer = rnn_ext.LSTM(2, 3, **mode)
    (text,) = (f"{key}={value!r}" for key, value in mode.items())
    assert str(layer) == f"LSTM(2, 3, {text})"
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert str(twin) == str(layer)
        assert twin.checkpoint_every == mode.get("checkpoint_every")
    assert layer.state_dict().keys() == torch.nn.LSTM(2, 3).state_dict().keys()
    assert str(rnn_ext.restore(layer)) == "LSTM(2, 3)"
    assert str(rnn_ext.accelerate(layer)) == "LSTM(2, 3)"
    assert layer.checkpoint_every is None


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_where_nothing_is_recorded_the_plain_layer_runs(mode):
    plain, ours = pair("lstm", mode=mode)
    x = torch.randn(9, 2, 2)
    with torch.no_grad():
        assert_same(ours(x), plain(x))
        assert_same(torch.compile(ours, backend="eager", fullgraph=True)(x), plain(x))
    ours.requires_grad_(False)
    assert not ours(x)[0].requires_grad
    assert_same(torch.export.export(ours, (x,)).module()(x), plain(x))


# torch's own, of the tensors it looks at where the graph goes on
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_torch_compile_leaves_training_out_of_its_graph():
    plain, ours = pair("lstm", mode=MODES[0])
    x = torch.randn(9, 2, 2)
    with pytest.raises(Exception, match="cannot take a layer that trains with check"):
        torch.compile(ours, backend="eager", fullgraph=True)(x)
    torch.compiler.reset()
    found = torch.compile(ours, backend="eager")(x)
    assert_same(gradients(ours, found), gradients(plain, plain(x)))


def test_transforms_of_torch_func_keep_everything_and_say_so():
    plain, ours = pair("gru", dtype=torch.float64, mode=MODES[0])
    parameters = dict(ours.named_parameters())
    x = random(9, 2, 2)

    def loss(parameters, layer):
        return torch.func.functional_call(layer, parameters, (x,))[0].square().sum()

    with pytest.warns(FallbackWarning, match="checkpoint_every=3 has no effect under the transf"):
        found = torch.func.grad(loss)(parameters, ours)
    assert_same(found, torch.func.grad(loss)(parameters, plain))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"checkpoint_every": 0}, "checkpoint_every must be a number of steps"),
        ({"checkpoint_every": 2.0}, "checkpoint_every must be a number of steps .* got 2.0"),
        ({"checkpoint_every": True}, "checkpoint_every must be a number of steps"),
        ({"save": "nothing"}, "save must be 'all' or 'states', got 'nothing'"),
        ({"save": "states", "checkpoint_every": 3}, "checkpoint_every and save='states' exclude"),
    ],
)
def test_wrong_arguments(name, options, text):
    with pytest.raises(ValueError, match=f"{name}: {text}"):
        getattr(rnn_ext, name)(2, 3, **options)
