"""Resets in layers that train with ``checkpoint_every``, ``save="states"`` or ``grad_clip``."""

import pytest
import torch
from kinds import KINDS, make
from torch.nn.utils.rnn import pack_padded_sequence
from twins import assert_same, forget_warnings, gradients, state, tensors

import rnn_ext

MODES = ({"checkpoint_every": 3}, {"checkpoint_every": 1}, {"save": "states"})
T, B, LENGTHS = 11, 4, [11, 3, 7, 1]


@pytest.fixture(autouse=True)
def _each_warning_again():
    forget_warnings()


def pair(kind, mode):
    options = {"inputs": 3, "hidden": 5, "num_layers": 2, "bidirectional": True}
    plain = make(kind, **options).double()
    ours = make(kind, **options, **mode).double()
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def inputs(layer, initial, packed):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(T, B, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    resets = torch.rand(T, B, generator=generator) < 0.3
    resets[3] = True  # where a part begins
    hx = state(layer, B, torch.float64, requires_grad=True)
    start = state(layer, B, torch.float64, requires_grad=True) if initial else None
    options = {"resets": resets, "initial_state": start}
    if packed:
        options["lengths"] = torch.tensor(LENGTHS)
    return x, hx, options


def run(layer, x, hx, options):
    results = layer(x, hx, **options)
    start = options["initial_state"]
    leaves = (x, *tensors(hx), *tensors(() if start is None else start))
    return tensors(results), gradients(layer, results, *leaves, retain_graph=False)


def assert_all_same(ours, theirs):
    for a, b in zip((*ours[0], *ours[1]), (*theirs[0], *theirs[1]), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "lengths"])
@pytest.mark.parametrize("initial", [False, True], ids=["zeros", "initial_state"])
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_less_is_kept_and_all_else_stays(kind, mode, initial, packed):
    plain, ours = pair(kind, mode)
    given = inputs(plain, initial, packed)
    assert_all_same(run(ours, *given), run(plain, *given))


@pytest.mark.parametrize("initial", [False, True], ids=["zeros", "initial_state"])
@pytest.mark.parametrize("clip", [0.05, ("norm", 0.1)], ids=str)
@pytest.mark.parametrize("mode", [{}, *MODES], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_clipped_as_in_torch_operations(kind, mode, clip, initial):
    _, ours = pair(kind, mode | {"grad_clip": clip})
    given = inputs(ours, initial, packed=True)
    found = run(ours, *given)
    with rnn_ext.use_backend("reference"):
        expected = run(ours, *given)
    assert_all_same(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_clipping_matters(kind):
    plain, ours = pair(kind, {"grad_clip": 0.05})
    given = inputs(plain, initial=True, packed=False)
    _, free = run(plain, *given)
    _, clipped = run(ours, *given)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(free, clipped))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_no_state_and_packed_input(mode):
    plain, ours = pair("lstm", mode)
    x, _, options = inputs(plain, False, False)
    resets = pack_padded_sequence(options["resets"], LENGTHS, enforce_sorted=False).data
    found, expected = [], []
    for layer, to in ((ours, found), (plain, expected)):
        packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
        output, _ = layer(packed, resets=resets)
        to += [output.data, *torch.autograd.grad(output.data.square().sum(), [x])]
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)


@pytest.mark.filterwarnings("ignore::rnn_ext.FallbackWarning")
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_gradients_of_gradients(mode):
    plain, ours = pair("gru", mode)
    x, hx, options = inputs(plain, True, False)
    found = []
    for layer in (ours, plain):
        output, _ = layer(x, hx, **options)
        (dx,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), layer.weight_hh_l0)[0])
    assert_same(*found)
