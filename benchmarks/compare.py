"""What changed between two records: rnn_ext's own times, and how much of that the machine explains.

torch.nn is the same on both sides (the versions are compared too), so what changed in its times is
the machine. ``change`` divides that out: it compares the ratios to torch.nn.
"""

from .peers import OURS, TORCH
from .report import duration, megabytes, times
from .rows import geometric_mean, key, losses, timed

VISIBLE = 0.03  # a smaller change is not marked, whatever the spread says


def text(before, after, names=("before", "after")):
    """The comparison of two records of __main__.py as text."""
    found = [f"A  {names[0]}: {origin(before)}", f"B  {names[1]}: {origin(after)}"]
    found += differences(before, after)
    old = {key(row): row for row in before["rows"]}
    pairs = [(old[key(row)], row) for row in after["rows"] if key(row) in old]
    alone = len(before["rows"]) + len(after["rows"]) - 2 * len(pairs)
    found += ["", *time_lines([(a, b) for a, b in pairs if timed(a) and timed(b)])]
    found += memory_lines([(a, b) for a, b in pairs if "memory" in a and "memory" in b])
    for a, b in pairs:
        if ("wrong" in a) != ("wrong" in b):
            side = f"WRONG in {'A' if 'wrong' in a else 'B'} only: {(a | b)['wrong']}"
            found.append(f"{label(b)}  {side}")
    if alone:
        found.append(f"{alone} rows are in one of the two only.")
    return "\n".join(found)


def origin(record):
    machine = record["machine"]
    busy = ", NOT A QUIET MACHINE" if machine["busy"] else ""
    return f"commit {machine['commit']}, {record['date'][:16]}, {machine['cpu']}{busy}"


def differences(before, after):
    """Lines on what makes the two hard to compare."""
    found = []
    for what in ("cpu", "cpus", "isa"):
        a, b = before["machine"][what], after["machine"][what]
        if a != b:
            found.append(f"not the same {what}: {a} and {b}")
    a, b = before["machine"]["versions"], after["machine"]["versions"]
    for name in sorted(a.keys() | b.keys()):
        if a.get(name) != b.get(name) and name != "rnn_ext":
            found.append(f"not the same {name}: {a.get(name)} and {b.get(name)}")
    return found


def label(row):
    group, case, cell, mode, _, threads = key(row)
    return f"{group + '/' + case:<36} {cell:<4} {mode:<9} {threads:>2}"


def change(a, b):
    """(factor by which rnn_ext became faster beside torch.nn, whether that is beyond the spread);
    without torch.nn in both, by its times alone."""
    if TORCH in a["ratios"] and TORCH in b["ratios"]:
        old, new = a["ratios"][TORCH], b["ratios"][TORCH]
    else:
        old, new = ({q: 1 / row["times"][OURS][p] for q, p in SWAPPED.items()} for row in (a, b))
    factor = new["median"] / old["median"]
    apart = new["q3"] < old["q1"] or new["q1"] > old["q3"]
    return factor, apart and abs(factor - 1) > VISIBLE


SWAPPED = {"median": "median", "q1": "q3", "q3": "q1"}  # of 1 / x


def time_lines(pairs):
    if not pairs:
        return []
    found = [f"{'':<50} {'A':>9} {'B':>9} {'torch.nn A/B':>13} {'change':>7}"]
    changes, drifts = {}, []
    for a, b in pairs:
        factor, visible = change(a, b)
        changes.setdefault((b["mode"], b["cell"]), []).append(factor)
        drift = ""
        if TORCH in a["times"] and TORCH in b["times"]:
            drifts.append(a["times"][TORCH]["median"] / b["times"][TORCH]["median"])
            drift = times(drifts[-1])
        old, new = (duration(row["times"][OURS]["median"]) for row in (a, b))
        marks = [("faster" if factor > 1 else "SLOWER")] if visible else []
        marks += [f"now {loss}" for loss in losses(b) if loss not in losses(a)]
        line = f"{label(b)} {old:>9} {new:>9} {drift:>13} {times(factor):>7}"
        found.append(f"{line}  <- {'; '.join(marks)}" if marks else line)
    found += ["", "geometric mean of the change (above 1: B is faster)"]
    found += [f"  {m:<9} {c:<4} {times(geometric_mean(v))}" for (m, c), v in changes.items()]
    if drifts:
        found.append(f"  torch.nn itself: {times(geometric_mean(drifts))}, which is the machine")
    return found


def memory_lines(pairs):
    found = []
    for a, b in pairs:
        old, new = a["memory"][OURS], b["memory"][OURS]
        saved = f"saves {megabytes(old['saved'])} -> {megabytes(new['saved'])}"
        peak = f"peak {megabytes(old['peak'])} -> {megabytes(new['peak'])}"
        mark = "  <- MORE" if new["saved"] > old["saved"] else ""
        found.append(f"{label(b)} {saved}, {peak}{mark}")
    return ["", *found] if found else []
