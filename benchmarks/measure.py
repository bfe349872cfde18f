"""One row of the table: a case with one cell in one mode on so many threads."""

from contextlib import nullcontext
from dataclasses import asdict

import torch

import rnn_ext

from . import gate, neighbours, peers, timing
from .cases import flops
from .problem import make_problem


def describe(case, cell, mode, threads):
    """The fields by which a row is found again, and its work."""
    shape = asdict(case)
    for field in ("group", "dtype", "cells", "modes", "threads"):
        del shape[field]
    return {
        "group": case.group,
        "case": case.name,
        "cell": cell,
        "mode": mode,
        "dtype": case.dtype,
        "threads": threads,
        "shape": shape,
        "tokens": case.tokens(),
        "flops": flops(case, cell, mode),
    }


def results_of(runner, training):
    with torch.inference_mode(not training):
        return runner.results(runner.call())


def time_row(case, cell, mode, threads, names, seconds, limits):
    """A dict for the table: `describe`'s and

    times, ratios: quartiles, by library; limit: seconds that no library can beat; errors: of the
    results; plan: which kernel of ours ran. skipped: libraries that were not timed, and why.
    variants: other ways to call ours, with their ratio and error. quiet: the times without the
    busy neighbours of a case that has some. wrong: ours failed the gate, or something failed; then
    nothing was timed.

    ``names`` are the peers; ``limits`` has the `Limits` by the number of threads, or nothing.
    """
    try:
        return _time_row(case, cell, mode, threads, names, seconds, limits.get(threads))
    except Exception as error:  # the other rows are still worth having
        return describe(case, cell, mode, threads) | {"skipped": {}, "wrong": first_line(error)}


def first_line(error):
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"


def truth_of(problem, reference, training):
    """(results in float64, the errors of torch.nn in the dtype of the problem against them)."""
    truth = results_of(reference, training)
    if problem.upstream.dtype == torch.float64:
        return truth, dict.fromkeys(truth, 0.0)
    rough = truth
    truth = results_of(peers.torch_nn(problem.to(torch.float64), training), training)
    return truth, gate.errors(rough, truth)


def checked_ours(problem, training, truth, floor):
    """(our Runner, its largest error). Raises Wrong or Unavailable."""
    runner = peers.ours(problem, training)
    found = gate.errors(results_of(runner, training), truth)
    return runner, gate.check_ours(found, floor, problem.upstream.dtype)


def checked_option(problem, name):
    """As `checked_ours`; the truth is the same in torch operations, with masks of the same seed."""
    found = []
    for which, backend in ((problem, "auto"), (problem.to(torch.float64), "reference")):
        runner = peers.with_option(which, name)
        with torch.random.fork_rng(devices=[]), rnn_ext.use_backend(backend):
            torch.manual_seed(0)
            found.append((runner, results_of(runner, training=True)))
    (runner, results), (_, truth) = found
    return runner, gate.check_peer(gate.errors(results, truth), problem.upstream.dtype)


def variants(problem, training, truth):
    """{name: (Runner, largest error)} of other ways to call ours that tell more about a case."""
    case, found = problem.case, {}
    if case.bidirectional and case.layers == 1 and not case.ragged:
        alone = peers.one_direction(problem)
        reference = peers.torch_nn(alone, training)
        found["one direction"] = checked_ours(
            alone, training, *truth_of(alone, reference, training)
        )
    if case.resets:
        plain = peers.without_resets(problem)
        reference = peers.torch_nn(plain, training)
        found["without resets"] = checked_ours(
            plain, training, *truth_of(plain, reference, training)
        )
    for name in peers.options_of(case, problem.cell):
        found[name] = checked_option(problem, name)
    for kind in peers.quantizable(case, training):
        runner = peers.quantized(problem, kind)
        errors = gate.errors(results_of(runner, training), truth)
        found[f"{kind} weights"] = runner, gate.check_peer(errors, problem.upstream.dtype, kind)
    return found


def _time_row(case, cell, mode, threads, names, seconds, limits):
    row = describe(case, cell, mode, threads)
    training, dtype = mode == "training", getattr(torch, case.dtype)
    torch.set_num_threads(threads)
    problem = make_problem(case, cell)
    reference = peers.torch_nn(problem, training)
    truth, floor = truth_of(problem, reference, training)

    row["skipped"], row["errors"], runners, others = {}, {}, {}, {}
    try:
        runners[peers.OURS], row["errors"][peers.OURS] = checked_ours(
            problem, training, truth, floor
        )
        others = variants(problem, training, truth)
    except (gate.Wrong, peers.Unavailable) as wrong:
        return row | {"wrong": str(wrong)}
    for name in names:
        try:
            runner = reference
            if name != peers.TORCH:
                runner = peers.prepare(name, problem, training)
            found = gate.errors(results_of(runner, training), truth)
            row["errors"][name] = gate.check_peer(found, dtype)
            runners[name] = runner
        except (gate.Wrong, peers.Unavailable) as reason:
            row["skipped"][name] = f"{reason}" if name in str(reason) else f"{name}: {reason}"
        except Exception as error:
            row["skipped"][name] = f"{name} fails: {first_line(error)}"

    with torch.inference_mode(not training):
        own = {name: runner for name, (runner, _) in others.items()}
        samples, quiet = in_turn(runners | own, case.neighbours, seconds)
    mine = samples[peers.OURS]
    row["times"] = {name: timing.summary(samples[name]) for name in runners}
    row["ratios"] = {n: timing.ratio(mine, samples[n]) for n in runners if n != peers.OURS}
    if quiet:
        row["quiet"] = {name: timing.summary(quiet[name]) for name in runners}
    if others:
        row["variants"] = {
            name: {"ratio": timing.ratio(mine, samples[name]), "error": error}
            for name, (_, error) in others.items()
        }
    row["plan"] = str(
        rnn_ext.explain(problem.module(rnn_ext), problem.input, problem.state).steps[0]
    )
    # What W x is of a token is kept: the products are not the least that is to be done.
    known = limits is not None and not case.vocabulary
    bound = limits.seconds(case, cell, mode) if known else None
    if bound is not None:
        row["limit"] = {"seconds": bound[0], "bound": bound[1]}
    return row


def in_turn(runners, processes, seconds):
    """(samples, samples without the busy ``processes``, empty if there are none), by name."""
    calls = {name: runner.call for name, runner in runners.items()}
    samples, quiet = {name: [] for name in calls}, {name: [] for name in calls}
    if not processes:
        return timing.alternate(calls, seconds), {}
    for _ in range(2):  # in turn as well, against drift
        for found, company in ((quiet, nullcontext()), (samples, neighbours.busy(processes))):
            with company:
                for name, values in timing.alternate(calls, seconds / 4).items():
                    found[name] += values
    return samples, quiet


def memory_row(case, cell, threads, worker):
    """A dict for the table: bytes kept for the backward pass, and the peak of a training step."""
    row = describe(case, cell, "memory", threads)
    found = {n: worker.measure(n, case, cell, threads) for n in (peers.OURS, peers.TORCH)}
    lost = [f"{name}: {text}" for name, text in found.items() if isinstance(text, str)]
    if lost:
        return row | {"skipped": {peers.OURS: "; ".join(lost)}}
    return row | {"memory": found, "unit": case.unit(), "skipped": {}}
