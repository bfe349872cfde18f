"""How the examples train one model with two libraries, fairly, and show what came of it."""

import math
import time
from statistics import mean, median

import torch
from common import CtrlC, InputError, write_atomically
from tqdm import tqdm

import rnn_ext

TURN = 10  # steps that one library trains before the other catches up
EARLY = 100  # steps over which two libraries must agree; later, training amplifies rounding errors
BAR = "{percentage:3.0f}% |{bar:16}| {n}/{total} [{elapsed}<{remaining}{postfix}]"
COLORS = {"rnn_ext": "#0b5d66", "torch.nn": "#f4a340"}
LINE_WIDTHS = {"rnn_ext": 1.4, "torch.nn": 5}
FIGURE_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "legend.frameon": False,
}


class Learner:
    """A model, its optimizer, the state carried between steps, and a record of the losses.

    An example adds train_step(step), which makes one step of the optimizer and returns its loss,
    and evaluate(), which returns the mean loss on held-out data. Losses are in nats.
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
            self.require_sane(self.losses[-1])

    @torch.no_grad()
    def evaluate_now(self):
        self.model.eval()
        self.held_out.append([len(self.losses), self.evaluate()])
        self.require_sane(self.held_out[-1][1])

    def require_sane(self, loss):
        if not loss < 700:  # nan, infinite, or a perplexity too large for a float
            step = f"{loss:.3g} at step {len(self.losses):,}"
            raise InputError(f"the loss became {step}; lower --lr or --clip")

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


def number_of_steps(args, per_epoch, default_epochs):
    if args.epochs is None and args.steps is not None:
        return args.steps
    return max(1, round((args.epochs or default_epochs) * per_epoch))


def describe(args, model):
    """One line on the model and on what it is trained with."""
    size = sum(parameter.numel() for parameter in model.parameters())
    layers = f"{args.layers} layer{'s' * (args.layers > 1)} of {args.hidden} units"
    place = f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return f"{args.cell}, {layers}, {size:,} parameters, on {place}"


def train(learners, args, per_step, save):
    """Train all learners up to step args.steps or until Ctrl-C, evaluating and saving now and then.

    They take turns of TURN steps in this one process, each going first half of the time: what else
    the machine does meanwhile slows them alike, so that the ratio of their step times is fair.
    per_step is the number of tokens that one step learns from.
    """
    runs = list(learners.values())
    step, evaluate_every = len(runs[0].losses), max(1, args.steps // 8)
    with CtrlC() as ctrl_c, tqdm(total=args.steps, initial=step, bar_format=BAR) as bar:
        done = step >= args.steps
        while not done:
            turn = range(step, min(step + TURN, args.steps))
            for run in runs:
                run.train_steps(turn)
            runs.reverse()
            step = turn.stop
            bar.set_postfix_str(progress(learners, per_step), refresh=False)
            bar.update(len(turn))
            done = step >= args.steps or ctrl_c.pressed
            if done or step // evaluate_every > turn.start // evaluate_every:
                for run in runs:
                    run.evaluate_now()
                save()
    print(f"\nstopped at step {step:,}; --resume goes on from there\n" if step < args.steps else "")


def progress(learners, per_step):
    """One line on where the learners are: rnn_ext's loss, and the speed of the last steps."""
    speeds = [
        f"{name} {per_step / median(learner.seconds[-50:]) / 1e3:.1f}k"
        for name, learner in learners.items()
    ]
    return f"loss {learners['rnn_ext'].losses[-1]:.3f}, tokens/s: {', '.join(speeds)}"


def report(learners, per_step, unit):
    """Print what each learner reached, and how the two compare."""
    runs = list(learners.values())
    last = min(20, len(runs[0].losses))
    held_out = [run.held_out[-1][1] for run in runs]

    def row(label, values, style):
        print(f"{label:42}" + "".join(f"{format(value, style):>12}" for value in values))

    row("", learners, "")
    row(
        f"training loss, last {last} steps (nats)",
        [mean(run.losses[-last:]) for run in runs],
        ".4f",
    )
    row("held-out perplexity", [math.exp(loss) for loss in held_out], ".4f")
    row(f"held-out bits per {unit}", [loss / math.log(2) for loss in held_out], ".4f")
    timed = all(run.seconds for run in runs)  # false when a finished training is only looked at
    if timed:
        medians = [median(run.seconds) for run in runs]
        row(
            f"time of a step, median of {len(runs[0].seconds):,} (ms)",
            [1e3 * m for m in medians],
            ".2f",
        )
        row(f"{unit}s per second", [per_step / m for m in medians], ",.0f")
    if len(runs) == 2:
        ours, theirs = learners
        gaps = [abs(a - b) for a, b in zip(runs[0].losses, runs[1].losses, strict=True)]
        early = gaps[:EARLY]
        print(
            f"\nagreement  training losses differ by at most {max(early):.1e} in the first ", end=""
        )
        print(f"{len(early)} steps,\n           {max(gaps):.1e} in all {len(gaps):,}; ", end="")
        print(f"held-out perplexities by {abs(math.expm1(held_out[0] - held_out[1])):.2%}")
    if len(runs) == 2 and timed:
        print(f"speed      {ours} trains {medians[1] / medians[0]:.2f} times as fast as {theirs}")
        print("           (ratio of the median step times; the two took turns in one process)")


def plot_training(path, title, learners, unit):
    """Draw a PNG: loss curves, how far two libraries are apart, and the times of their steps."""
    import matplotlib

    matplotlib.use("Agg")  # draws to files, no display needed
    import matplotlib.pyplot as plt

    with plt.rc_context(FIGURE_STYLE):
        figure = plt.figure(figsize=(11, 5), layout="constrained", dpi=130)
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        grid = figure.add_gridspec(2, 2, width_ratios=[1.6, 1])
        draw_losses(figure.add_subplot(grid[:, 0]), learners, unit)
        if len(learners) == 2:
            draw_differences(figure.add_subplot(grid[0, 1]), learners)
        if all(learner.seconds for learner in learners.values()):
            draw_times(figure.add_subplot(grid[1, 1]), learners)
        write_atomically(path, lambda file: figure.savefig(file, format="png"))
        plt.close(figure)


def draw_losses(axes, learners, unit):
    width = max(1, min(20, len(learners["rnn_ext"].losses) // 20))
    for name in reversed(list(learners)):  # rnn_ext as a thin line on top of a broad one
        look = {"color": COLORS[name], "linewidth": LINE_WIDTHS[name]}
        bits = torch.tensor(learners[name].losses, dtype=torch.float64) / math.log(2)
        means = bits.unfold(0, width, 1).mean(-1)
        middles = torch.arange(len(means)) + (width + 1) / 2
        axes.plot(middles, means, **look, label=f"{name}, training (mean of {width} steps)")
        steps, losses = zip(*learners[name].held_out, strict=True)
        held_out = torch.tensor(losses) / math.log(2)
        look |= {"marker": "D", "markersize": 6 + LINE_WIDTHS[name], "markeredgecolor": "white"}
        axes.plot(steps, held_out, **look | {"linewidth": 0}, label=f"{name}, held out")
    lowest, highest = min(means.min(), held_out.min()).item(), means[0].item()
    axes.set(title="Loss", xlabel="training step", ylabel=f"cross-entropy (bits per {unit})")
    axes.set(xlim=(0, 1.02 * len(bits)), ylim=(0.9 * lowest, 1.02 * highest))
    axes.legend()


def draw_differences(axes, learners):
    ours, theirs = learners
    pairs = zip(learners[ours].losses, learners[theirs].losses, strict=True)
    gaps = [max(abs(a - b), 1e-8) for a, b in pairs]  # a logarithmic axis has no zero
    axes.semilogy(range(1, len(gaps) + 1), gaps, ".", color="#7a2e5d", markersize=3)
    axes.set(title=f"Rounding: |{ours} \N{MINUS SIGN} {theirs}| as training amplifies it")
    axes.set(xlabel="training step (1e-8: equal losses)", ylabel="difference of losses (nats)")


def draw_times(axes, learners):
    times = {name: [1e3 * s for s in learner.seconds] for name, learner in learners.items()}
    shortest = min(map(min, times.values()))
    longest = 1.5 * max(map(median, times.values()))
    bins = torch.linspace(0.95 * shortest, longest, 60).tolist()
    for name, values in times.items():
        label = f"{name}, median {median(values):.1f} ms"
        axes.hist(values, bins, color=COLORS[name], alpha=0.8, label=label)
    axes.set(
        title="Time of a training step",
        xlabel="milliseconds (without the slowest)",
        ylabel="steps",
    )
    axes.legend()
