"""Small problems for the tests of the reference: every cell, every layout of a batch."""

from dataclasses import asdict

import numpy as np
import pytest

from rnn_ext import reference

STEPS, BATCH, INPUT, HIDDEN, PROJECTION = 5, 3, 2, 4, 3
GATES = {name: cell.gates for name, cell in reference.CELLS.items()}
CASES = [(name, 0) for name in reference.CELLS] + [("lstm", PROJECTION)]
LAYOUTS = ["padded", "lengths", "packed"]
LENGTHS = [3, 1, 5]  # of the rows of a padded batch, in no order
BATCH_SIZES = [3, 2, 2, 1, 1]  # of a packed batch
TOLERANCE = 1e-10

each_cell = pytest.mark.parametrize("cell, projection", CASES)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_direction = pytest.mark.parametrize("reverse", [False, True])


def largest_difference(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    return np.abs(actual - expected).max(initial=0.0)


def random_weights(cell, projection, random, bias=True):
    rows, output = GATES[cell] * HIDDEN, projection or HIDDEN
    return reference.Weights(
        w_ih=random.normal(size=(rows, INPUT)) * 0.7,
        w_hh=random.normal(size=(rows, output)) * 0.7,
        b_ih=random.normal(size=rows) * 0.5 if bias else None,
        b_hh=random.normal(size=rows) * 0.5 if bias else None,
        w_hr=random.normal(size=(projection, HIDDEN)) if projection else None,
    )


def random_arguments(cell, projection, layout, seed=0, bias=True):
    """Arguments of reference.forward, and how the batch is laid out."""
    random = np.random.default_rng(seed)
    packed = layout == "packed"
    arguments = {
        "x": random.normal(size=(sum(BATCH_SIZES), INPUT) if packed else (STEPS, BATCH, INPUT)),
        "h0": random.normal(size=(BATCH, projection or HIDDEN)),
        "c0": random.normal(size=(BATCH, HIDDEN)) if cell == "lstm" else None,
        "weights": random_weights(cell, projection, random, bias),
    }
    batch = {"batch_sizes": BATCH_SIZES} if packed else {}
    return arguments, {"lengths": LENGTHS} if layout == "lengths" else batch


def results(result):
    return {
        name: getattr(result, name)
        for name in ("output", "h_n", "c_n", "cells")
        if getattr(result, name) is not None
    }


def random_cotangents(result, seed=1):
    random = np.random.default_rng(seed)
    return {f"d_{name}": random.normal(size=r.shape) for name, r in results(result).items()}


def check_gradients(gradients, expected, tolerance=TOLERANCE):
    """Every gradient that one side has, the other must have, and equal."""
    gradients = {name: g for name, g in asdict(gradients).items() if g is not None}
    assert gradients.keys() == expected.keys(), f"{gradients.keys()}, not {expected.keys()}"
    for name, gradient in gradients.items():
        error = largest_difference(gradient, expected[name])
        assert error <= tolerance, f"{name} is off by {error}"
