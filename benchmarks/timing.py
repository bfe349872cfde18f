"""Alternating blocks: every library runs in turn, in one process, on the same numbers.

What else the machine does drifts over seconds. A block lasts milliseconds, and a ratio compares two
blocks of the same round, so that a disturbance hits both sides or shows in the spread.
"""

import contextlib
import gc
import math
import statistics
import time

BLOCK = 0.01  # seconds at least, so that a call of microseconds is averaged over thousands
SETTLE = 0.003  # pause before a block: the other libraries' threads spin on for a while
WARM = 0.02  # a call shorter than this is preceded by an untimed one
LEAST_ROUNDS, MOST_ROUNDS = 5, 200
HURRIED_ROUNDS = 3  # at least, where less than a second is asked for
PATIENCE = 6  # seconds more than asked for; then two rounds must do


def block(call, count):
    """Seconds of one call, averaged over ``count``."""
    rounds = range(count)
    start = time.perf_counter()
    for _ in rounds:
        call()
    return (time.perf_counter() - start) / count


def calls_in_a_block(call):
    """How many calls a block takes; also warms up."""
    count = 1
    block(call, 1)
    while (taken := block(call, count) * count) < BLOCK:
        count *= min(8, max(2, math.ceil(BLOCK / taken)))
    return count


@contextlib.contextmanager
def no_garbage_collection():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def alternate(calls, seconds):
    """Times ``calls`` (by name) for about ``seconds``, but at least LEAST_ROUNDS rounds unless they
    take more than PATIENCE.

    Returns the seconds of a call in each round, a list by name.
    """
    least = LEAST_ROUNDS if seconds >= 1 else HURRIED_ROUNDS
    with no_garbage_collection():
        counts = {name: calls_in_a_block(call) for name, call in calls.items()}
        samples = {name: [] for name in calls}
        names, start = list(calls), time.perf_counter()
        for rounds in range(MOST_ROUNDS):
            taken = time.perf_counter() - start
            if rounds >= least and taken > seconds:
                break
            if rounds >= 2 and taken > seconds + PATIENCE:
                break
            first = rounds % len(names)
            for name in names[first:] + names[:first]:
                time.sleep(SETTLE)
                if counts[name] > 1 or (samples[name] and samples[name][-1] < WARM):
                    calls[name]()
                samples[name].append(block(calls[name], counts[name]))
    return samples


def spread(values):
    """Median and quartiles, a dict."""
    q1, middle, q3 = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {"median": middle, "q1": q1, "q3": q3}


def summary(samples):
    """What a table needs of the samples of one library."""
    return spread(samples) | {"best": min(samples), "blocks": len(samples)}


def ratio(ours, theirs):
    """How many times as fast ours is, round by round."""
    return spread([b / a for a, b in zip(ours, theirs, strict=True)])
