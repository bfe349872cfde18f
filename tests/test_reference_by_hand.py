"""The NumPy reference where the answer is known by hand, its interface, and its documents."""

import doctest
import re
import subprocess
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from reference_cases import (
    BATCH,
    HIDDEN,
    INPUT,
    LENGTHS,
    PROJECTION,
    STEPS,
    check_gradients,
    each_cell,
    each_direction,
    largest_difference,
    random_arguments,
    random_cotangents,
    random_weights,
    results,
)

from rnn_ext import reference

# By hand


def test_a_relu_unit_counts():
    """w = u = 1, positive input: h_t is the running sum, and with L = h_T each delta_t is 1."""
    x = np.array([3.0, 1.0, 4.0, 1.0]).reshape(4, 1, 1)
    weights = reference.Weights([[1.0]], [[1.0]], [0.0], [0.0])
    result = reference.forward("rnn_relu", x, [[2.0]], None, weights)
    assert result.output.ravel().tolist() == [5.0, 6.0, 10.0, 11.0]
    gradients = reference.backward(result, d_h_n=[[1.0]])
    assert gradients.x.ravel().tolist() == [1.0, 1.0, 1.0, 1.0]
    assert gradients.w_ih.item() == 3 + 1 + 4 + 1
    assert gradients.w_hh.item() == 2 + 5 + 6 + 10
    assert gradients.b_ih.item() == gradients.b_hh.item() == 4
    assert gradients.h0.item() == 1


@pytest.mark.parametrize("u", [0.5, 1.0, 2.0])
def test_gradients_vanish_or_explode_with_the_power_of_u(u):
    weights = reference.Weights([[1.0]], [[u]])
    result = reference.forward("rnn_relu", np.ones((20, 1, 1)), None, None, weights)
    assert reference.backward(result, d_h_n=[[1.0]]).h0.item() == u**20


def test_an_lstm_of_zeros_halves_its_cell():
    """All gates are 1/2 and g = 0, so c_t = c_0 / 2^t and h_t = tanh(c_t) / 2."""
    weights = reference.Weights(np.zeros((4, 1)), np.zeros((4, 1)))
    result = reference.forward("lstm", np.ones((3, 1, 1)), None, [[8.0]], weights)
    assert result.cells.ravel().tolist() == [4.0, 2.0, 1.0]
    assert result.c_n.item() == 1.0
    assert abs(result.h_n.item() - np.tanh(1.0) / 2) <= 1e-15
    d_c0 = reference.backward(result, d_h_n=[[1.0]]).c0.item()
    assert abs(d_c0 - (1 - np.tanh(1.0) ** 2) / 2 / 2**3) <= 1e-15


def test_open_forget_gates_carry_the_error_unchanged():
    """f = 1 and i = 0: the constant error carousel, for any number of steps."""
    bias = np.array([-100.0, 100.0, 0.0, 0.0])  # i, f, g, o
    weights = reference.Weights(np.ones((4, 1)), np.ones((4, 1)), bias, np.zeros(4))
    result = reference.forward("lstm", np.ones((50, 1, 1)), None, [[0.7]], weights)
    assert result.c_n.item() == 0.7
    assert reference.backward(result, d_c_n=[[1.0]]).c0.item() == 1.0


@pytest.mark.parametrize("cell", ["gru", "gru_reset_before"])
def test_z_of_one_keeps_the_state_of_a_gru(cell):
    bias = np.array([0.0, 100.0, 0.0])  # r, z, n
    weights = reference.Weights(np.ones((3, 1)), np.ones((3, 1)), bias, np.zeros(3))
    result = reference.forward(cell, np.ones((50, 1, 1)), [[0.7]], None, weights)
    assert result.h_n.item() == 0.7
    assert reference.backward(result, d_h_n=[[1.0]]).h0.item() == 1.0


def test_where_the_reset_gate_stands_does_not_matter_to_a_diagonal_u():
    """r * (U_n h) = U_n (r * h) for a diagonal U_n without recurrent bias, and for no other."""
    arguments, _ = random_arguments("gru", 0, "padded")
    after = reference.forward("gru", **arguments).output
    assert (
        largest_difference(reference.forward("gru_reset_before", **arguments).output, after) > 0.1
    )
    weights = arguments["weights"]
    weights.w_hh[2 * HIDDEN :] *= np.eye(HIDDEN)
    weights.b_hh[2 * HIDDEN :] = 0.0
    after = reference.forward("gru", **arguments).output
    before = reference.forward("gru_reset_before", **arguments).output
    assert largest_difference(before, after) <= 1e-14


def test_sigmoid_is_accurate_and_silent_in_both_tails():
    a = np.array([-np.inf, -1000.0, -700.0, -40.0, 0.0, 40.0, 1000.0, np.inf])
    expected = np.array([0.0, 0.0, np.exp(-700.0), np.exp(-40.0), 0.5, 1.0, 1.0, 1.0])
    with np.errstate(all="raise", under="ignore"):
        np.testing.assert_allclose(reference.sigmoid(a), expected, rtol=1e-15, atol=0)
    assert np.isnan(reference.sigmoid(np.nan))


# Ragged batches


@each_direction
@each_cell
def test_a_ragged_batch_is_its_rows_one_by_one(cell, projection, reverse):
    arguments, batch = random_arguments(cell, projection, "lengths")
    result = reference.forward(cell, **arguments, **batch, reverse=reverse)
    cotangents = random_cotangents(result)
    gradients = reference.backward(result, **cotangents)
    d_w_hh = 0.0
    for row, length in enumerate(LENGTHS):
        alone = {k: v for k, v in arguments.items() if k != "x"}
        for name in ("h0", "c0"):
            alone[name] = None if alone[name] is None else alone[name][row : row + 1]
        one = reference.forward(
            cell, arguments["x"][:length, row : row + 1], **alone, reverse=reverse
        )
        for name, value in results(one).items():
            over_time = name in ("output", "cells")
            mine = getattr(result, name)[:length, row] if over_time else getattr(result, name)[row]
            expected = value[:, 0] if over_time else value[0]
            assert largest_difference(mine, expected) <= 1e-14, name
        d_one = {
            k: d[:length, row : row + 1] if d.ndim == 3 else d[row : row + 1]
            for k, d in cotangents.items()
        }
        of_one = reference.backward(one, **d_one)
        d_w_hh = d_w_hh + of_one.w_hh
        assert largest_difference(gradients.x[:length, row], of_one.x[:, 0]) <= 1e-13
        assert largest_difference(gradients.h0[row], of_one.h0[0]) <= 1e-13
        assert not result.output[length:, row].any() and not gradients.x[length:, row].any()
    assert largest_difference(gradients.w_hh, d_w_hh) <= 1e-13


@each_cell
def test_padding_is_never_read(cell, projection):
    arguments, batch = random_arguments(cell, projection, "lengths")
    clean = reference.forward(cell, **arguments, **batch)
    arguments["x"][np.arange(STEPS)[:, None] >= LENGTHS] = np.nan
    soiled = reference.forward(cell, **arguments, **batch)
    cotangents = random_cotangents(clean)
    expected = asdict(reference.backward(clean, **cotangents))
    expected = {name: g for name, g in expected.items() if g is not None}
    assert largest_difference(soiled.output, clean.output) <= 0.0
    check_gradients(reference.backward(soiled, **cotangents), expected, tolerance=0.0)


@each_direction
def test_a_row_of_no_steps_hands_its_state_through(reverse):
    arguments, _ = random_arguments("lstm", 0, "padded")
    result = reference.forward("lstm", **arguments, lengths=[0, 5, 2], reverse=reverse)
    assert (result.h_n[0] == arguments["h0"][0]).all()
    assert (result.c_n[0] == arguments["c0"][0]).all()
    d = np.ones_like(result.h_n)
    assert (reference.backward(result, d_h_n=d).h0[0] == 1.0).all()


@each_cell
def test_empty_batch_and_empty_sequence(cell, projection):
    weights = random_weights(cell, projection, np.random.default_rng(0))
    for steps, batch in product((0, 2), (0, 2)):
        if steps and batch:
            continue
        result = reference.forward(cell, np.zeros((steps, batch, INPUT)), None, None, weights)
        assert result.output.shape == (steps, batch, projection or HIDDEN)
        gradients = reference.backward(result, **random_cotangents(result))
        assert gradients.x.shape == (steps, batch, INPUT)
        assert not gradients.w_hh.any()


# The interface


def test_arguments_are_left_alone_and_backward_can_be_repeated():
    arguments, batch = random_arguments("lstm", PROJECTION, "lengths")
    result = reference.forward("lstm", **arguments, **batch)
    cotangents = random_cotangents(result)
    untouched, _ = random_arguments("lstm", PROJECTION, "lengths")
    kept = {name: d.copy() for name, d in cotangents.items()}
    first = asdict(reference.backward(result, **cotangents))
    first = {name: gradient for name, gradient in first.items() if gradient is not None}
    for name in ("x", "h0", "c0"):
        assert (arguments[name] == untouched[name]).all()
    for mine, same in zip(arguments["weights"], untouched["weights"], strict=True):
        assert (mine == same).all()
        mine[:] = np.nan  # nor does a later change of the caller's arrays reach the tape
    arguments["x"][:] = np.nan
    check_gradients(reference.backward(result, **kept), first, tolerance=0.0)


def test_one_step_functions_are_the_steps_of_forward():
    def matches(cell, projection, step, *state):
        arguments, _ = random_arguments(cell, projection, "padded")
        weights = arguments["weights"]
        result = reference.forward(cell, **arguments)
        state = [arguments[name] for name in ("h0", "c0") if arguments[name] is not None]
        for x, h in zip(arguments["x"], result.output, strict=True):
            record = step(x, *state, weights)
            assert (record.h == h).all()
            state = record.state

    matches("rnn_tanh", 0, reference.elman_step)
    matches("rnn_relu", 0, lambda x, h, w: reference.elman_step(x, h, w, "relu"))
    matches("lstm", 0, reference.lstm_step)
    matches("lstm", PROJECTION, reference.lstm_step)
    matches("gru", 0, reference.gru_step)
    matches("gru_reset_before", 0, reference.gru_reset_before_step)


WRONG = {
    "unknown cell 'rnn'": {"cell": "rnn"},
    "x must be": {"x": np.zeros((STEPS, INPUT))},
    "h0 must be": {"h0": np.zeros((1, HIDDEN))},  # would broadcast
    "has no cell state": {"c0": np.zeros((BATCH, HIDDEN))},
    "needs b_hh": {"weights": [np.zeros((12, 2)), np.zeros((12, 4)), np.zeros(12), np.zeros(1)]},
    "needs w_ih": {"weights": [np.zeros((12, 3)), np.zeros((12, 4))]},
    "needs w_hh": {"weights": [np.zeros((12, 2)), np.zeros((12, 5))]},
    "takes no projection": {
        "weights": [np.zeros((12, 2)), np.zeros((12, 4)), None, None, np.eye(4)]
    },
    "lengths must be": {"lengths": [1, 2, 6]},
    "each from 0": {"lengths": [1, 2, -1]},
    "not both": {"x": np.zeros((6, INPUT)), "batch_sizes": [3, 3], "lengths": [2, 2, 2]},
    "non-increasing": {"x": np.zeros((6, INPUT)), "batch_sizes": [2, 3, 1]},
    "sum to N": {"x": np.zeros((6, INPUT)), "batch_sizes": [3, 2]},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    arguments, _ = random_arguments("gru", 0, "padded")
    with pytest.raises(ValueError, match=f"reference: .*{message}"):
        reference.forward(**({"cell": "gru"} | arguments | WRONG[message]))


def test_wrong_cotangents_are_named():
    arguments, _ = random_arguments("gru", 0, "padded")
    result = reference.forward("gru", **arguments)
    with pytest.raises(ValueError, match="d_output must be"):
        reference.backward(result, d_output=np.ones((STEPS, 1, HIDDEN)))
    with pytest.raises(ValueError, match="d_c_n must be None"):
        reference.backward(result, d_c_n=np.ones((BATCH, HIDDEN)))


def test_needs_numpy_alone():
    folder = Path(reference.__file__).parent
    program = f"""
import importlib.util, sys
sys.modules["torch"] = None
spec = importlib.util.spec_from_file_location(
    "reference", {str(folder / "__init__.py")!r}, submodule_search_locations=[{str(folder)!r}]
)
module = sys.modules["reference"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(len(module.CELLS))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == str(len(reference.CELLS)), done.stderr


# The documentation

MATH = (Path(__file__).parents[1] / "docs" / "math.md").read_text(encoding="utf-8")


def run_examples(text, name):
    """Run the >>> examples of a text; fences would read as expected output, so they go first."""
    text = re.sub(r"^```.*$", "", text, flags=re.MULTILINE)
    examples = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    assert examples.examples
    report = []
    assert doctest.DocTestRunner().run(examples, out=report.append).failed == 0, "".join(report)


def test_examples_of_the_docstring_run():
    run_examples(reference.__doc__, "rnn_ext.reference")


def test_examples_of_the_math_run():
    run_examples(MATH, "math.md")


def test_the_worked_example_of_the_math_is_right():
    """Its table, row by row: t, x_t, a_t, h_t, dL/dh_t, delta_t."""
    table = re.findall(r"^\| ([123]) \|(.*)\|$", MATH, flags=re.MULTILINE)
    columns = np.array([[float(v) for v in row.split("|")] for _, row in table]).T
    x, a, h, d_h, delta = columns
    w, u = 1.0, 0.5
    result = reference.forward("rnn_tanh", x.reshape(3, 1, 1), None, None, [[[w]], [[u]]])
    gradients = reference.backward(result, d_h_n=[[1.0]])
    true_h, true_delta = result.output.ravel(), gradients.x.ravel() / w
    true_d_h = np.append(u * true_delta[1:], 1.0)
    for printed, true in [
        (a, w * x + u * np.append(0.0, true_h[:-1])),
        (h, true_h),
        (d_h, true_d_h),
        (delta, true_delta),
    ]:
        assert largest_difference(printed, true) <= 0.5e-4
