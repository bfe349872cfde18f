"""Programs that know only torch.nn compute the same numbers with our layers.

A training in float32 carries every rounding on, so equal means: about as far from the run with
torch.nn as another run with torch.nn whose recurrent weights were changed by one rounding each. A
factor of ten allows for our roundings being many, and the last term for results that such a change
does not reach.
"""

import pytest
import torch
from programs import PROGRAMS

import rnn_ext

NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
OURS = tuple(getattr(rnn_ext, name) for name in NAMES)
THEIRS = tuple(getattr(torch.nn, name) for name in NAMES)


def recurrent(model, classes):
    return [module for module in model.modules() if type(module) in classes]


def unchanged(model):
    assert recurrent(model, THEIRS)


def nudged(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in recurrent(model, THEIRS):
            for parameter in module.parameters():
                signs = torch.rand(parameter.shape, generator=generator).round() * 2 - 1
                parameter.mul_(1 + signs * torch.finfo(parameter.dtype).eps)


def accelerated(model):
    count = len(recurrent(model, THEIRS))
    rnn_ext.accelerate(model)
    assert len(recurrent(model, OURS)) == count > 0 and not recurrent(model, THEIRS)


def swapped(model):
    assert recurrent(model, OURS) and not recurrent(model, THEIRS)


def distance(results, expected):
    """The largest difference, relative to the largest entry of the same tensor."""
    assert len(results) == len(expected)
    largest = 0.0
    for one, other in zip(results, expected, strict=True):
        assert one.shape == other.shape and one.isfinite().all()
        if other.numel():
            scale = other.abs().max().item() or 1.0
            largest = max(largest, (one - other).abs().max().item() / scale)
    return largest


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_same_numbers(program, monkeypatch, capsys):
    program(unchanged)  # what is slow the first time
    expected, their_seconds = program(unchanged)
    floor = distance(program(nudged)[0], expected)
    results, our_seconds = program(accelerated)
    with monkeypatch.context() as patch:
        for name, ours in zip(NAMES, OURS):
            patch.setattr(torch.nn, name, ours)
        again, _ = program(swapped)
    with capsys.disabled():
        print(
            f"\n{program.__name__}: {their_seconds / our_seconds:.2f} times as fast with rnn_ext "
            f"({their_seconds:.3f} s, {our_seconds:.3f} s); largest relative difference "
            f"{distance(results, expected):.1e}, by one rounding in the weights {floor:.1e}"
        )
    tolerance = 10 * floor + 1e-6
    assert distance(results, expected) <= tolerance
    assert distance(again, expected) <= tolerance
