"""How the examples train one model with two libraries, fairly, and show what came of it."""

import math
import statistics
import time
from statistics import mean

import torch
from common import CtrlC, InputError, write_atomically
from tqdm import tqdm

import rnn_ext

TURN = 10  # steps that one library trains before the other catches up
EARLY = 100  # steps over which two libraries must agree; later, training amplifies rounding errors


class Learner:
    """What is trained: a model, its optimizer, and the record of both. Examples add to it

    train_step(step) -> loss (nats), one step of the optimizer;
    evaluate() -> mean loss on held-out data (nats).
    """

    def __init__(self, model, optimizer):
        self.model, self.optimizer, self.state = model, optimizer, None
        self.losses, self.held_out = [], []  # one loss a step; pairs of step and loss
        self.seconds = []  # time of each step of this process

    def train_steps(self, steps):
        self.model.train()
        for step in steps:
            start = time.perf_counter()
            self.losses.append(self.train_step(step))
            self.seconds.append(time.perf_counter() - start)
            if not math.isfinite(self.losses[-1]):
                raise InputError(
                    f"the loss is {self.losses[-1]} at step {step}; lower --lr or --clip"
                )

    @torch.no_grad()
    def evaluate_now(self):
        self.model.eval()
        self.held_out.append([len(self.losses), self.evaluate()])

    def state_dict(self):
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return parts | {"state": self.state, "losses": self.losses, "held_out": self.held_out}

    def load_state_dict(self, saved):
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.state, self.losses, self.held_out = saved["state"], saved["losses"], saved["held_out"]


def libraries(args):
    """The libraries to train with: rnn_ext and, unless args.no_compare, torch.nn."""
    return {"rnn_ext": rnn_ext} | ({} if args.no_compare else {"torch.nn": torch.nn})


def train(learners, args, per_step, unit, save):
    """Train all learners up to step args.steps or until Ctrl-C, evaluating and saving now and then.

    They take turns of TURN steps in this one process, each going first half of the time: what else
    the machine does meanwhile slows them alike, so that the ratio of their step times is fair.
    per_step is the number of units ("character", say) that one step learns from.
    """
    runs = list(learners.values())
    step, evaluate_every = len(runs[0].losses), max(1, args.steps // 8)
    with CtrlC() as ctrl_c, tqdm(total=args.steps, initial=step, unit="step") as bar:
        done = step >= args.steps
        while not done:
            turn = range(step, min(step + TURN, args.steps))
            for run in runs:
                run.train_steps(turn)
            runs.reverse()
            step = turn.stop
            bar.set_postfix_str(progress(learners, per_step, unit))
            bar.update(len(turn))
            done = step >= args.steps or ctrl_c.pressed
            if done or step // evaluate_every > turn.start // evaluate_every:
                for run in runs:
                    run.evaluate_now()
                save()
    if step < args.steps:
        print(f"\nstopped at step {step:,}; --resume goes on from there")


def progress(learners, per_step, unit):
    """One line on where each learner is: the last loss, and the speed of its last 50 steps."""
    parts = []
    for name, learner in learners.items():
        speed = per_step / statistics.median(learner.seconds[-50:])
        parts.append(f"{name} loss {learner.losses[-1]:.3f}, {speed / 1e3:.1f}k {unit}s/s")
    return " | ".join(parts)


def report(learners, per_step, unit):
    """Print what each learner reached, and how two of them compare; per_step units are predicted in a step."""
    runs = list(learners.values())
    last = min(20, len(runs[0].losses))
    rows = {
        f"training loss, mean of the last {last} steps (nats)": [
            mean(run.losses[-last:]) for run in runs
        ]
    }
    rows["held-out perplexity"] = [math.exp(run.held_out[-1][1]) for run in runs]
    rows[f"held-out bits per {unit}"] = [run.held_out[-1][1] / math.log(2) for run in runs]
    lines = [(label, [f"{value:.4f}" for value in values]) for label, values in rows.items()]
    timed = all(run.seconds for run in runs)  # false when a finished training is only looked at
    if timed:
        medians = [statistics.median(run.seconds) for run in runs]
        count = len(runs[0].seconds)
        lines.append(
            (
                f"one training step, median of {count:,} (ms)",
                [f"{1e3 * value:.2f}" for value in medians],
            )
        )
        lines.append((f"{unit}s per second", [f"{per_step / value:,.0f}" for value in medians]))
    print(f"{'':48}" + "".join(f"{name:>12}" for name in learners))
    for label, values in lines:
        print(f"{label:48}" + "".join(f"{value:>12}" for value in values))
    if len(runs) < 2:
        return
    ours, theirs = learners
    gaps = [abs(a - b) for a, b in zip(runs[0].losses, runs[1].losses, strict=True)]
    held_out = abs(math.expm1(runs[0].held_out[-1][1] - runs[1].held_out[-1][1]))
    early = min(EARLY, len(gaps))
    print(
        f"\nagreement  the losses differ by at most {max(gaps[:early]):.1e} in the first {early} steps,"
    )
    print(
        f"           {max(gaps):.1e} in all {len(gaps):,}, the held-out perplexities by {held_out:.2%}"
    )
    if timed:
        print(f"speed      {ours} trains {medians[1] / medians[0]:.2f} times as fast as {theirs}")
        print("           (ratio of the median step times; the two took turns in one process)")


def running_mean(values, width):
    """Mean of every width neighboring values, and the position of each mean's middle."""
    means = torch.tensor(values, dtype=torch.float64).unfold(0, width, 1).mean(-1)
    return [i + (width + 1) / 2 for i in range(len(means))], means.tolist()


def plot_training(path, title, learners, unit):
    """Draw loss curves, and for two libraries their difference and their step times, as a PNG.

    learners maps a name to an object with losses (nats, one a step), held_out (pairs of step and nats) and
    seconds (one a step that this process trained). The first is drawn on top of the second. unit says what
    one prediction is, "character" say.
    """
    import matplotlib

    matplotlib.use("Agg")  # draws to files, no display needed
    import matplotlib.pyplot as plt

    runs = list(learners.items())
    looks = [dict(color="#0b5d66", linewidth=1.4), dict(color="#f4a340", linewidth=5)]
    steps = len(runs[0][1].losses)
    width = max(1, min(20, steps // 20))
    style = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
    }
    style |= {"axes.titlelocation": "left", "axes.titlesize": "medium", "legend.frameon": False}
    with plt.rc_context(style):
        figure = plt.figure(figsize=(11, 5), layout="constrained", dpi=130)
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        grid = figure.add_gridspec(2, 2, width_ratios=[1.6, 1])

        axes = figure.add_subplot(grid[:, 0])
        for (name, run), look in reversed(list(zip(runs, looks, strict=False))):
            positions, means = running_mean([loss / math.log(2) for loss in run.losses], width)
            axes.plot(positions, means, **look, label=f"{name}, training (mean of {width} steps)")
            held_out = [(step, loss / math.log(2)) for step, loss in run.held_out]
            size = 5 + look["linewidth"]
            points = dict(color=look["color"], marker="D", markersize=size, markeredgecolor="white")
            axes.plot(
                *zip(*held_out, strict=True), **points, linestyle=":", label=f"{name}, held out"
            )
        lowest = min(min(means), min(bits for _, bits in held_out))
        axes.set(title="Loss", xlabel="training step", ylabel=f"cross-entropy (bits per {unit})")
        axes.set(xlim=(0, steps * 1.02), ylim=(lowest * 0.9, means[0] * 1.02))
        axes.legend()

        if len(runs) == 2:
            axes = figure.add_subplot(grid[0, 1])
            pairs = zip(runs[0][1].losses, runs[1][1].losses, strict=True)
            gaps = [max(abs(ours - theirs), 1e-8) for ours, theirs in pairs]
            axes.semilogy(range(1, steps + 1), gaps, color="#7a2e5d", linewidth=0.8)
            axes.set(
                title=f"|{runs[0][0]} \u2212 {runs[1][0]}|: rounding errors that training amplifies"
            )
            axes.set(
                xlabel="training step", ylabel="loss difference (nats)", xlim=(0, steps * 1.02)
            )

        if all(run.seconds for _, run in runs):
            axes = figure.add_subplot(grid[1, 1] if len(runs) == 2 else grid[:, 1])
            times = [[1e3 * second for second in run.seconds] for _, run in runs]
            right = max(sorted(values)[int(0.97 * len(values))] for values in times)
            bins = [right * i / 120 for i in range(121)]
            for (name, _), look, values in zip(runs, looks, times, strict=False):
                label = f"{name}, median {statistics.median(values):.1f} ms"
                axes.hist(values, bins, color=look["color"], alpha=0.85, label=label)
            axes.set(title="Time of one training step", xlabel="milliseconds", ylabel="steps")
            axes.set(xlim=(0.9 * min(map(min, times)), right))
            axes.legend()
        write_atomically(path, lambda file: figure.savefig(file, format="png"))
        plt.close(figure)
