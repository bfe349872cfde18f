"""One row of the table: a case with one cell in one mode on so many threads."""

from dataclasses import asdict

import torch

import rnn_ext

from . import gate, peers, timing
from .cases import flops
from .problem import make_problem


def describe(case, cell, mode, threads):
    """The fields by which a row is found again, and its work."""
    shape = asdict(case)
    for field in ("group", "dtype", "cells", "modes"):
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
    results; plan: which kernel of ours ran. skipped: libraries that were not timed, and why. wrong:
    ours failed the gate, or something failed; then nothing was timed.

    ``names`` are the peers; ``limits`` has the `Limits` by the number of threads, or nothing.
    """
    try:
        return _time_row(case, cell, mode, threads, names, seconds, limits.get(threads))
    except Exception as error:  # the other rows are still worth having
        return describe(case, cell, mode, threads) | {"skipped": {}, "wrong": first_line(error)}


def first_line(error):
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"


def _time_row(case, cell, mode, threads, names, seconds, limits):
    row = describe(case, cell, mode, threads)
    training, dtype = mode == "training", getattr(torch, case.dtype)
    torch.set_num_threads(threads)
    problem = make_problem(case, cell)
    reference = peers.torch_nn(problem, training)
    truth = results_of(reference, training)
    floor = dict.fromkeys(truth, 0.0)
    if dtype != torch.float64:
        rough = truth
        truth = results_of(peers.torch_nn(problem.to(torch.float64), training), training)
        floor = gate.errors(rough, truth)

    row["skipped"], row["errors"], runners = {}, {}, {}
    try:
        ours = peers.ours(problem, training)
        found = gate.errors(results_of(ours, training), truth)
        row["errors"][peers.OURS] = gate.check_ours(found, floor, dtype)
    except (gate.Wrong, peers.Unavailable) as wrong:
        return row | {"wrong": str(wrong)}
    runners[peers.OURS] = ours
    for name in names:
        try:
            runner = reference
            if name != peers.TORCH:
                runner = peers.PEERS[name](problem, training)
            found = gate.errors(results_of(runner, training), truth)
            row["errors"][name] = gate.check_peer(found, dtype)
            runners[name] = runner
        except (gate.Wrong, peers.Unavailable) as reason:
            row["skipped"][name] = f"{reason}" if name in str(reason) else f"{name}: {reason}"
        except Exception as error:
            row["skipped"][name] = f"{name} fails: {first_line(error)}"

    with torch.inference_mode(not training):
        samples = timing.alternate({n: r.call for n, r in runners.items()}, seconds)
    row["times"] = {name: timing.summary(values) for name, values in samples.items()}
    mine = samples[peers.OURS]
    row["ratios"] = {n: timing.ratio(mine, v) for n, v in samples.items() if n != peers.OURS}
    row["plan"] = str(
        rnn_ext.explain(problem.module(rnn_ext), problem.input, problem.state).steps[0]
    )
    bound = limits.seconds(case, cell, mode) if limits is not None else None
    if bound is not None:
        row["limit"] = {"seconds": bound[0], "bound": bound[1]}
    return row


def memory_row(case, cell, threads, worker):
    """A dict for the table: bytes kept for the backward pass, and the peak of a training step."""
    row = describe(case, cell, "memory", threads)
    found = {n: worker.measure(n, case, cell, threads) for n in (peers.OURS, peers.TORCH)}
    lost = [f"{name}: {text}" for name, text in found.items() if isinstance(text, str)]
    if lost:
        return row | {"skipped": {peers.OURS: "; ".join(lost)}}
    return row | {"memory": found, "unit": case.unit(), "skipped": {}}
