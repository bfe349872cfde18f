"""The one style of the examples' figures, and the panels that most of them have."""

import contextlib
import math
from statistics import median

import distributed
import torch
from outputs import write_atomically
from training import time_ratio

COLORS = {"rnn_ext": "#0b5d66", "torch.nn": "#f4a340"}
ACCENT, MUTED = "#7a2e5d", "#8a8a8a"
CYCLE = ["#0b5d66", "#f4a340", "#7a2e5d", "#5b8c5a", "#c8553d", "#4a6fa5", "#8a8a8a"]
LINE_WIDTHS = {"rnn_ext": 1.4, "torch.nn": 5}  # a thin line on top of a broad one
MINUS = "\N{MINUS SIGN}"
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "legend.frameon": False,
}


@contextlib.contextmanager
def figure(path, title, mosaic, size=(11, 5), width_ratios=None, height_ratios=None):
    """with figure("a.png", "Title", "ab;ac") as axes: axes["a"].plot(...); then writes the PNG.

    mosaic places the panels, a letter each, rows parted by ";" (matplotlib's subplot_mosaic).
    """
    import matplotlib

    matplotlib.use("Agg")  # draws to files, no display needed
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE | {"axes.prop_cycle": matplotlib.cycler(color=CYCLE)}):
        figure = plt.figure(figsize=size, layout="constrained", dpi=130)
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        yield figure.subplot_mosaic(mosaic, width_ratios=width_ratios, height_ratios=height_ratios)
        if distributed.rank() == 0:
            write_atomically(path, lambda file: figure.savefig(file, format="png"))
        plt.close(figure)


def training_figure(path, title, learners, label, factor=1.0, held_out=True):
    """The figure of an example that has no panels of its own: losses, rounding, times."""
    with figure(path, title, "ld;lt", width_ratios=[1.6, 1]) as axes:
        losses(axes["l"], learners, label, factor, held_out)
        differences(axes["d"], learners)
        step_times(axes["t"], learners)


def running_mean(values, width=None):
    """(positions, means) of the last width values (default: a twentieth of all, 20 at most)."""
    width = width or max(1, min(20, len(values) // 20))
    means = torch.tensor(values, dtype=torch.float64).unfold(0, width, 1).mean(-1)
    return torch.arange(len(means)) + (width + 1) / 2, means, width


def losses(axes, learners, label, factor=1.0, held_out=False, log=False):
    """Training losses times factor; held_out: evaluate() returned losses too, drawn as marks.

    log: the axis is logarithmic, for losses above zero that fall by orders of magnitude.
    """
    lowest, highest = math.inf, -math.inf
    for name in reversed(list(learners)):
        learner = learners[name]
        look = {"color": COLORS[name], "linewidth": LINE_WIDTHS[name]}
        positions, means, width = running_mean([factor * loss for loss in learner.losses])
        axes.plot(positions, means, **look, label=f"{name}, training (mean of {width} steps)")
        lowest, highest = min(lowest, means.min().item()), max(highest, means[0].item())
        if held_out:
            steps, values = zip(*learner.held_out, strict=True)
            values = [factor * value for value in values]
            mark(axes, name, steps, values, f"{name}, held out")
            lowest = min(lowest, *values)
    room = 0.05 * (highest - lowest)
    axes.set(title="Loss", xlabel="training step", ylabel=label)
    axes.set(xlim=(0, 1.02 * len(learner.losses)))
    if log:
        axes.set_yscale("log")
    elif room > 0:
        axes.set_ylim(lowest - 2 * room, highest + room)
    axes.legend()


def mark(axes, name, steps, values, label):
    look = {"marker": "D", "markersize": 6 + LINE_WIDTHS[name], "markeredgecolor": "white"}
    axes.plot(steps, values, color=COLORS[name], linewidth=0, label=label, **look)


def scores(axes, learners, ylabel, **marks):
    """The headline score of every evaluation; marks: {label: value} as dashed lines to compare."""
    for name in reversed(list(learners)):
        learner = learners[name]
        steps, values = zip(*learner.held_out, strict=True)
        values = [learner.SCORES[0].of(value) for value in values]
        look = {"color": COLORS[name], "linewidth": LINE_WIDTHS[name], "marker": "o"}
        axes.plot(steps, values, **look, label=name)
    for number, (label, value) in enumerate(marks.items()):
        color = [ACCENT, MUTED, CYCLE[3]][number % 3]
        axes.axhline(value, color=color, linestyle="--", linewidth=1.2, label=label)
    axes.set(title=learner.SCORES[0].label.capitalize(), xlabel="training step", ylabel=ylabel)
    axes.legend()


def differences(axes, learners):
    """How far the losses of two libraries are apart, step by step; hidden with one library."""
    if len(learners) < 2:
        axes.set_visible(False)
        return
    ours, theirs = learners
    pairs = zip(learners[ours].losses, learners[theirs].losses, strict=True)
    gaps = [max(abs(a - b), 1e-8) for a, b in pairs]  # a logarithmic axis has no zero
    axes.semilogy(range(1, len(gaps) + 1), gaps, ".", color=ACCENT, markersize=3)
    axes.set(title=f"Rounding: |{ours} {MINUS} {theirs}| as training amplifies it")
    axes.set(xlabel="training step (1e-8: equal losses)", ylabel="difference of losses")


def step_times(axes, learners):
    """Histograms of the times of a training step."""
    times = {name: [1e3 * s for s in learner.seconds] for name, learner in learners.items()}
    shortest = min(map(min, times.values()))
    longest = 1.5 * max(map(median, times.values()))
    bins = torch.linspace(0.95 * shortest, longest, 60).tolist()
    for name, values in times.items():
        label = f"{name}, median {median(values):.1f} ms"
        axes.hist(values, bins, color=COLORS[name], alpha=0.8, label=label)
    ratio = time_ratio(learners)
    compared = f": {ratio:.2f} times as fast" if ratio else ""
    axes.set(title=f"Time of a training step{compared}", ylabel="steps")
    axes.set_xlabel("milliseconds (without the slowest)")
    axes.set_ylim(0, 1.4 * axes.get_ylim()[1])  # room for the legend
    axes.legend(loc="upper right")
