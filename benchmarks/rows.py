"""What can be asked of a measured row, for tables, plots and comparisons alike."""

import math

from .peers import OPTIONS, OURS, TORCH

RESOLUTION = 1 << 20  # bytes; the peak of a process is not known more exactly


def key(row):
    """What names a row; the same in two records."""
    return row["group"], row["case"], row["cell"], row["mode"], row["dtype"], row["threads"]


def full_name(row):
    group, case, cell, mode, _, threads = key(row)
    dtype = special_dtype(row)
    return f"{group}/{case} {cell} {mode}{dtype and ' ' + dtype}, {count_threads(threads)}"


def special_dtype(row):
    """The dtype, if it is not what the name of the group makes one expect; else an empty text."""
    return "" if row["dtype"] in ("float32", row["group"]) else row["dtype"]


def count_threads(threads):
    return f"{threads} thread{'s' if threads != 1 else ''}"


def section(row):
    """Rows of one table."""
    return row["group"], row["mode"], row["dtype"], row["threads"]


def timed(row):
    return "times" in row


def rate(row, library=OURS):
    """Flops a second, at the median."""
    return row["flops"] / row["times"][library]["median"]


def share_of_limit(row, library=OURS):
    """How much of what the CPU can do at most, or None without a limit."""
    return row["limit"]["seconds"] / row["times"][library]["median"] if "limit" in row else None


def memory_ratio(row):
    """torch.nn's peak of a training step over ours; None where it is not known well enough."""
    ours, theirs = row["memory"][OURS]["peak"], row["memory"][TORCH]["peak"]
    if ours is None or theirs is None or min(ours, theirs) < 4 * RESOLUTION:
        return None
    return theirs / ours


def slowdown(row, library=OURS):
    """How many times as long a call takes beside the busy neighbours; None without any."""
    if library not in row.get("quiet", {}):
        return None
    return row["times"][library]["median"] / row["quiet"][library]["median"]


def remarks(row):
    """What else was measured of ours, a list of phrases."""
    found = []
    for name, variant in row.get("variants", {}).items():
        ratio = variant["ratio"]["median"]
        if name == "one direction":
            found.append(f"costs {1 / ratio:.2f}x one direction")
        elif name == "exact":
            found.append(f"{ratio:.2f}x as fast as exact")
        elif name == "without resets":
            found.append(f"costs {1 / ratio:.2f}x the layer without resets")
        elif name in OPTIONS:
            found.append(f"{name} costs {ratio:.2f}x")
        else:
            found.append(f"{name}: {1 / ratio:.2f}x as fast, error {variant['error']:.1g}")
    if (ours := slowdown(row)) is not None:
        others = [f"{n} {slowdown(row, n):.2f}x" for n in row["quiet"] if n != OURS]
        found.append(f"the neighbour slows us {ours:.2f}x" + "".join(f", {o}" for o in others))
    return found


def losses(row):
    """How the row loses, a list of phrases; empty where nobody beats rnn_ext."""
    if "memory" in row:
        ours, theirs = row["memory"][OURS], row["memory"][TORCH]
        saved = ours["saved"] / theirs["saved"] > 1.0 if theirs["saved"] else False
        peak = memory_ratio(row)
        found = ["saves MORE than torch.nn"] if saved else []
        over = peak is not None and ours["peak"] > theirs["peak"] + RESOLUTION
        return found + (["higher PEAK than torch.nn"] if over else [])
    found = []
    for peer, ratio in row.get("ratios", {}).items():
        if ratio["median"] < 1:
            doubt = " (within the spread)" if ratio["q3"] >= 1 else ""
            found.append(f"SLOWER than {peer}{doubt}")
    theirs = slowdown(row, TORCH)
    if theirs is not None and slowdown(row) > theirs:
        found.append("slowed MORE than torch.nn by the neighbour")
    return found


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values))


def means(rows):
    """{(group, mode, dtype, threads): {peer: {cell: (geometric mean of the ratios, how many)}}}."""
    collected = {}
    for row in filter(timed, rows):
        for peer, ratio in row["ratios"].items():
            cells = collected.setdefault(section(row), {}).setdefault(peer, {})
            cells.setdefault(row["cell"], []).append(ratio["median"])
    return {
        name: {
            peer: {cell: (geometric_mean(v), len(v)) for cell, v in cells.items()}
            for peer, cells in by_peer.items()
        }
        for name, by_peer in collected.items()
    }
