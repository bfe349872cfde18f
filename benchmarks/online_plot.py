"""The picture of the group "online": beside torch operations, and where chunks overtake."""

from .peers import OURS, TORCH
from .rows import timed

COLORS = {"rnn": "#d1495b", "gru": "#edae49", "lstm": "#00798c"}


def online(rows):
    """A figure, or None without rows of that group."""
    rows = [row for row in rows if timed(row) and row["group"] == "online"]
    if not rows:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for panel, mode in ((left, "exact"), (middle, "snap1")):
        ratios(panel, [row for row in rows if row["mode"] == mode], mode)
    crossing(right, [row for row in rows if row["mode"] == "chunked"])
    figure.suptitle("Real-time recurrent learning", x=0.01, ha="left", weight="bold")
    return figure


def ratios(panel, rows, mode):
    """How many times as fast as torch operations, over H; one line for each cell and batch."""
    for cell, color in COLORS.items():
        for batch in sorted({row["shape"]["batch"] for row in rows}):
            points = sorted(
                (row["shape"]["hidden"], row["ratios"][TORCH]["median"])
                for row in rows
                if (row["cell"], row["shape"]["batch"]) == (cell, batch)
            )
            if points:
                look = {"color": color, "label": f"{cell}, B = {batch}"}
                look |= {"marker": "o", "ms": 5, "ls": "-" if batch == 1 else "--"}
                panel.plot(*zip(*points), **look)
    panel.axhline(1, color="#444444", lw=1)
    over_hidden(panel, rows)
    panel.set_ylim(bottom=0)
    panel.set(title=f'"{mode}" beside torch operations', ylabel="times as fast")
    if rows:
        panel.legend(fontsize=7)


def crossing(panel, rows):
    """The time of a step of exact and of chunked RTRL."""
    for cell, color in COLORS.items():
        mine = sorted((r["shape"]["hidden"], r) for r in rows if r["cell"] == cell)
        if not mine:
            continue
        hidden, found = zip(*mine)
        chunked = [1e6 * row["times"][OURS]["median"] / row["shape"]["steps"] for row in found]
        gains = [row["variants"]["exact"]["ratio"]["median"] for row in found]
        exact = [time * gain for time, gain in zip(chunked, gains)]
        panel.plot(hidden, exact, color=color, marker="o", ms=5, label=f"{cell}, exact")
        look = {"color": color, "marker": "s", "ms": 5, "ls": "--"}
        panel.plot(hidden, chunked, **look, label=f"{cell}, chunked")
    panel.set_yscale("log")
    over_hidden(panel, rows)
    panel.set(title="chunks overtake, B = 1", ylabel="microseconds a step")
    if rows:
        panel.legend(fontsize=7)


def over_hidden(panel, rows):
    from matplotlib.ticker import NullFormatter

    sizes = sorted({row["shape"]["hidden"] for row in rows})
    panel.set_xscale("log")
    panel.set_xticks(sizes, [str(size) for size in sizes])
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("hidden units H")
