"""What this project promises of its speed on the CPU, and whether a record keeps it.

Ratios are times as fast as the other library, so that more is better; what is to be small says so.
Two threads, where a record has them, unless a text says one thread.
"""

from collections.abc import Callable
from dataclasses import dataclass

from . import cases
from .peers import OURS, TORCH
from .rows import (
    full_name,
    geometric_mean,
    memory_ratio,
    rate,
    share_of_limit,
    slowdown,
    timed,
)

ORT = "onnxruntime"
THIN = ("b128-t25-i512-h512", "b64-t50-i1024-h1024")
COMPUTING = ("b64-t50-i1024-h1024", "b64-t100-i256-h256")
LARGE = ("b32-t35-i256-h512", "b64-t100-i256-h256", *THIN)
TARGETS = {  # geometric means over the ten shapes against torch.nn
    "inference": {"rnn": 5.0, "gru": 4.5, "lstm": 1.45},
    "training": {"rnn": 5.5, "gru": 5.0, "lstm": 1.4},
}
UNITS_KEPT = {"rnn": 1, "gru": 5, "lstm": 6}


@dataclass(frozen=True)
class Result:
    """``value`` of ``rows`` rows of the ``needed`` ones; ``worst`` names the one that decides."""

    text: str
    target: float
    value: float
    rows: int
    needed: int
    worst: str = ""
    at_most: bool = False
    percent: bool = False

    @property
    def reached(self):
        return self.value <= self.target if self.at_most else self.value >= self.target

    @property
    def state(self):
        word = "reached" if self.reached else "NOT reached"
        return word if self.rows >= self.needed else f"{word} so far"

    def show(self, number):
        return f"{number:.0%}" if self.percent else f"{number:.2f}x"


class Rows:
    """The rows of a record, to pick from."""

    def __init__(self, record):
        self.all = record["rows"]
        counts = {row["threads"] for row in self.all}
        self.threads = 2 if 2 in counts else max(counts, default=1)
        self.peaks = {limit["threads"]: limit["flops"] for limit in record["limits"]}
        self.fast_blas = bool(record["blas"] and record["blas"].get("fast"))

    def pick(self, group, threads=None, dtype="float32", **fields):
        """Timed rows of a group; ``fields``: the value of a field, or a tuple of values."""
        fields |= {"group": group, "dtype": dtype, "threads": threads or self.threads}
        allowed = {k: v if isinstance(v, tuple) else (v,) for k, v in fields.items()}
        return [
            row for row in filter(timed, self.all) if all(row[k] in v for k, v in allowed.items())
        ]


def worst(text, target, rows, value: Callable, needed, at_most=False, **options):
    """The Result of the row with the worst value, or none if no row has one."""
    found = [(v, full_name(row)) for row in rows if (v := value(row)) is not None]
    if not found:
        return []
    number, name = max(found) if at_most else min(found)
    return [Result(text, target, number, len(found), needed, name, at_most, **options)]


def mean(text, target, rows, value, needed):
    found = [v for row in rows if (v := value(row)) is not None]
    return [Result(text, target, geometric_mean(found), len(found), needed)] if found else []


def against(peer):
    """The ratio to a peer, if it ran."""
    return lambda row: row["ratios"][peer]["median"] if peer in row["ratios"] else None


def results(record):
    """A list of Results: of the promises for which the record has at least one row."""
    rows = Rows(record)
    parts = (
        _means,
        _no_loss,
        _limits,
        _onnxruntime,
        _weights,
        _stream,
        _badly_served,
        _beyond,
        _generate,
        _memory,
        _online,
    )
    return [result for part in (*parts, _neighbours) for result in part(rows)]


def _means(rows):
    found = []
    for mode, targets in TARGETS.items():
        for cell, target in targets.items():
            chosen = rows.pick("core", mode=mode, cell=cell)
            text = f"{mode} {cell.upper()} against torch.nn, mean of the ten shapes"
            if mode == "training" and cell != "lstm" and rows.fast_blas:
                found += _where_blas_is_fast(cell, chosen)
            else:
                found += mean(text, target, chosen, against(TORCH), 10)
    chosen = rows.pick("core", mode="training", cell="lstm", case=THIN)
    text = "training LSTM against torch.nn, the two thin shapes"
    return found + worst(text, 1.1, chosen, against(TORCH), 2)


def _where_blas_is_fast(cell, chosen):
    """torch.nn's RNN and GRU are made of BLAS products: without that handicap we promise less."""
    found = []
    for kind, target in (("large", 1.2), ("small", 3.0)):
        part = [row for row in chosen if (row["case"] in LARGE) == (kind == "large")]
        needed = len(LARGE) if kind == "large" else 10 - len(LARGE)
        text = f"training {cell.upper()} against torch.nn with a fast BLAS, {kind} shapes"
        found += worst(text, target, part, against(TORCH), needed)
    return found


def _no_loss(rows):
    found = []
    for threads in sorted({1, rows.threads}):
        text = f"every core shape, cell and mode against torch.nn, {threads} thread"
        chosen = rows.pick("core", threads)
        found += worst(text + "s" * (threads > 1), 1.0, chosen, against(TORCH), 60)
    return found


def _limits(rows):
    def share(row):
        return rate(row) / rows.peaks[rows.threads]["float32"]

    found = []
    for mode, target in (("inference", 0.92), ("training", 0.85)):
        if rows.threads not in rows.peaks:
            break
        chosen = rows.pick("core", mode=mode, case=COMPUTING)
        text = f"{mode}, share of the FMA peak, the shapes that compute most"
        found += worst(text, target, chosen, share, 6, percent=True)
    return found


def _onnxruntime(rows):
    chosen = rows.pick("core", mode="inference")
    return worst(
        "inference against onnxruntime, every core shape and cell", 1.0, chosen, against(ORT), 30
    ) + mean("inference against onnxruntime, mean", 1.5, chosen, against(ORT), 30)


def _weights(rows):
    found = []
    for kind, target in (("bf16", 1.8), ("int8", 3.0)):

        def gain(row, name=f"{kind} weights"):
            variant = row.get("variants", {}).get(name)
            return variant and 1 / variant["ratio"]["median"]

        chosen = rows.pick("core", mode="inference", case="b1-t200-i64-h1024")
        text = f"{kind} weights against our float32, batch 1, H 1024"
        found += worst(text, target, chosen, gain, 3)
    return found


def _stream(rows):
    found = []
    for cell, target in (("lstm", 8.0), ("gru", 3.0), ("rnn", 2.5)):
        chosen = rows.pick("stream", 1, mode="inference", case="b1-t1-i256-h256", cell=cell)
        step = f"one step, B 1, H 256, {cell.upper()}, one thread"
        found += worst(f"{step}, against torch.nn", target, chosen, against(TORCH), 1)
        found += worst(f"{step}, against onnxruntime", 1.0, chosen, against(ORT), 1)
    return found


def _badly_served(rows):
    def cost(row):
        alone = row.get("variants", {}).get("one direction")
        return alone and 1 / alone["ratio"]["median"]

    def cases_of(group, cell="lstm"):
        return sum(cell in case.cells for case in cases.all_cases() if case.group == group)

    ragged = rows.pick("ragged", cell="lstm")
    doubles = rows.pick("float64", dtype="float64", cell="lstm")
    both = [row for row in rows.pick("bidirectional") if row["shape"]["batch"] <= 4]
    torch_nn = against(TORCH)
    return [
        *worst("packed LSTM against torch.nn", 3.5, ragged, torch_nn, 2 * cases_of("ragged")),
        *worst("two directions cost, one is 1.0, B <= 4", 1.3, both, cost, 12, at_most=True),
        *worst("float64 LSTM against torch.nn", 2.5, doubles, torch_nn, 2 * cases_of("float64")),
    ]


def _beyond(rows):
    def cost(row):
        alone = row.get("variants", {}).get("without resets")
        return alone and 1 / alone["ratio"]["median"]

    def option(name):
        def cost(row):
            found = row.get("variants", {}).get(name)
            return found and found["ratio"]["median"]

        return cost

    found = []
    for batch, target in ((128, 2.5), (4, 8.0)):
        chosen = rows.pick("beyond", cell="lstm", case=f"b{batch}-t64-i256-h256-resets")
        text = f"training LSTM with resets against a loop over torch.nn's cell, batch {batch}"
        found += worst(text, target, chosen, against(TORCH), 1)
    for batch, target in ((32, 4.0), (1, 8.0)):
        chosen = rows.pick("beyond", cell="lstm", case=f"b{batch}-t64-i256-h256-layer-norm")
        text = f"training LSTM with layer normalisation against a scripted loop, batch {batch}"
        found += worst(text, target, chosen, against(TORCH), 1)
    text = "resets in 1 % of the steps cost the LSTM, 1.0 is none"
    chosen = rows.pick("beyond", cell="lstm")
    found += worst(text, 1.05, chosen, cost, 2, at_most=True)
    for name, limit, needed in (
        ("zoneout", 1.15, 6),
        ("weight dropout", 1.15, 6),
        ("reset before the product", 1 / 0.85, 2),
    ):
        text = f"training with {name} takes, 1.0 is without"
        found += worst(text, limit, rows.pick("beyond"), option(name), needed, at_most=True)
    return found


def _generate(rows):
    found = []
    for threads in sorted({1, rows.threads}):
        cases = tuple(f"b1-t100-i256-h256{layers}-v100" for layers in ("", "-l2"))
        chosen = rows.pick("generate", threads, cell="lstm", case=cases)
        text = f"tokens of an LSTM against a loop over torch.nn's, {threads} thread"
        found += worst(text + "s" * (threads > 1), 10.0, chosen, against(TORCH), 2)
    return found


def _memory(rows):
    chosen = [row for row in rows.all if "memory" in row and row["group"] == "core"]

    def kept(row):
        """Beyond the promised units, which leave out the states before the first step."""
        shape = row["shape"]
        state = row["unit"] * shape["batch"] / row["tokens"]
        return (row["memory"][OURS]["saved"] - 4 * state) / row["unit"] / UNITS_KEPT[row["cell"]]

    text = "kept for the backward pass, 1.0 is 1, 5, 6 TBH for RNN, GRU, LSTM"
    return [
        *worst("peak of a training step, torch.nn's over ours", 1.0, chosen, memory_ratio, 30),
        *worst(text, 1.0, chosen, kept, 30, at_most=True),
    ]


def _online(rows):
    def pick(mode, **fields):
        return rows.pick("online", 1, mode=mode, **fields)

    def gain(row):
        return row["variants"]["exact"]["ratio"]["median"]

    torch_nn, large = against(TORCH), "b16-t1-i128-h128"
    text = "exact RTRL against torch operations, one thread, "
    small = pick("exact", case="b1-t1-i32-h32")
    found = worst(text + "H 32, B 1", 10.0, small, torch_nn, 3)
    for cell, target in (("rnn", 3.0), ("gru", 4.0), ("lstm", 8.0)):
        chosen = pick("exact", case=large, cell=cell)
        found += worst(f"{text}H 128, B 16, {cell.upper()}", target, chosen, torch_nn, 1)
    text = "exact RTRL, share of what arithmetic and memory allow, one thread, H 128, B 16"
    found += worst(text, 0.7, pick("exact", case=large), share_of_limit, 3, percent=True)
    text = "SnAp-1 against torch operations, one thread"
    found += worst(text, 5.0, pick("snap1"), torch_nn, 18)
    text = "chunked RTRL against exact, H 64 and 128, B 1"
    cases_of = ("b1-t64-i64-h64", "b1-t128-i128-h128")
    return found + worst(text, 1.0, pick("chunked", case=cases_of), gain, 6)


def _neighbours(rows):
    def kept(row):
        theirs = slowdown(row, TORCH)
        return theirs and theirs / slowdown(row)

    chosen = [row for row in filter(timed, rows.all) if row["group"] == "busy"]
    text = "slowed by a busy neighbour, torch.nn over us"
    needed = sum(
        len(case.cells) * len(case.modes) * len(case.threads)
        for case in cases.all_cases()
        if case.group == "busy"
    )
    return worst(text, 1.0, chosen, kept, needed)
