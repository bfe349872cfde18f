"""How the examples train one model with two libraries, fairly, and say what came of it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, median

import distributed
import torch
from common import CtrlC, InputError

import rnn_ext

TURN = 10  # steps that one library trains before the other catches up
EARLY = 100  # steps over which two libraries must agree; later, training amplifies rounding errors
BAR = "{percentage:3.0f}% |{bar:16}| {n}/{total} [{elapsed}<{remaining}{postfix}]"


@dataclass(frozen=True)
class Score:
    """How a value that Learner.evaluate returned is written."""

    label: str  # "held-out accuracy"
    style: str = ".4f"
    of: Callable = float  # from what evaluate returned to what is written, math.exp for example

    def __call__(self, value):
        return format(self.of(value), self.style)


class Learner:
    """A model, its optimizer, the state carried between steps, and a record of the losses.

    An example adds train_step(step), which makes one step of the optimizer and returns its loss,
    and evaluate(), which returns what was reached on held-out data, a number that SCORES describe.
    Random numbers of a step (dropout) depend on the seed and the step alone, so that both libraries
    draw the same and a resumed training goes on as if it had never stopped.

    The learning rate of a step is rate(step), or args.lr throughout.
    """

    SCORES = (Score("held-out loss"),)  # the first one is the headline
    LOSS_UNIT = "nats"
    RECORD = ("state", "losses", "held_out", "seconds")  # what a checkpoint has beside weights

    def __init__(self, model, args, rate=None, optimizer=torch.optim.Adam):
        self.model, self.clip, self.state = model, args.clip, None
        self.optimizer, self.rate = optimizer(model.parameters(), args.lr), rate
        self.losses, self.held_out = [], []  # one loss a step; pairs of step and loss
        self.seconds = []  # time of each step

    def descend(self, loss):
        """One step of the optimizer down loss, with a gradient whose norm is at most --clip."""
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss.item()

    def train_steps(self, steps, seed):
        self.model.train()
        for step in steps:
            torch.manual_seed(1_000_003 * seed + step)
            if self.rate:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.rate(step)
            start = time.perf_counter()
            self.losses.append(self.train_step(step))
            self.seconds.append(time.perf_counter() - start)
            self.require_sane(self.losses[-1], step)

    @torch.no_grad()
    def evaluate_now(self):
        self.model.eval()
        self.held_out.append([len(self.losses), self.evaluate()])
        if not math.isfinite(self.held_out[-1][1]):
            self.require_sane(math.nan, len(self.losses) - 1)

    @property
    def score(self):
        """The headline of the last evaluation, as a number."""
        return self.SCORES[0].of(self.held_out[-1][1])

    def require_sane(self, loss, step):
        if not loss < 700:  # nan, infinite, or a perplexity too large for a float
            what = f"{loss:.3g} at step {step + 1:,}"
            raise InputError(f"the loss became {what}; lower --lr or --clip")

    def state_dict(self):
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return parts | {name: getattr(self, name) for name in self.RECORD}

    def load_state_dict(self, saved):
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for name in self.RECORD:
            setattr(self, name, saved[name])


def libraries(args):
    """The libraries to train with: rnn_ext and, unless args.no_compare, torch.nn."""
    return {"rnn_ext": rnn_ext} | ({} if args.no_compare else {"torch.nn": torch.nn})


def learners(args, build):
    """{library: build(its module, torch.nn or rnn_ext)}, all from the same initial weights."""
    made = {}
    for name, library in libraries(args).items():
        torch.manual_seed(args.seed)  # the two draw the same numbers
        made[name] = build(library)
    return made


def layer_class(library, args):
    """--cell lstm with torch.nn -> torch.nn.LSTM, and so on."""
    return getattr(library, args.cell.upper())


def number_of_steps(args, per_epoch):
    """What --steps or --epochs says; per_epoch: the steps of one pass over the data."""
    if args.epochs is None and args.steps is not None:
        return args.steps
    return max(1, round((args.epochs or args.default_epochs) * per_epoch))


def falling_rate(args):
    """The learning rate of a step: --lr, and over the second half of the training down to zero."""
    return lambda step: args.lr * min(1.0, 2 * (1 - step / args.steps))


def describe(args, model):
    """One line on the model and on what it is trained with."""
    size = sum(parameter.numel() for parameter in model.parameters())
    layers = f"{args.layers} layer{'s' * (args.layers > 1)} of {args.hidden} units"
    threads = torch.get_num_threads()
    place = f"{args.device}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"
    return f"{args.cell}, {layers}, {size:,} parameters, on {place}"


def train(learners, args, per_step, save, unit="token"):
    """Train all learners up to step args.steps or until Ctrl-C, evaluating and saving now and then.

    They take turns of TURN steps in this one process, each going first half of the time: what else
    the machine does meanwhile slows them alike, so that the ratio of their step times is fair.
    per_step is the number of units (tokens, images, ...) that one step learns from.
    """
    from tqdm import tqdm

    runs = list(learners.values())
    step, evaluate_every = len(runs[0].losses), -(-args.steps // 8)
    bar = tqdm(total=args.steps, initial=step, bar_format=BAR, disable=distributed.rank() > 0)
    with CtrlC() as ctrl_c, bar:
        done = step >= args.steps
        while not done:
            turn = range(step, min(step + TURN, args.steps))
            for run in runs:
                run.train_steps(turn, args.seed)
            runs.reverse()
            step = turn.stop
            bar.set_postfix_str(progress(learners, per_step, unit), refresh=False)
            bar.update(len(turn))
            done = step >= args.steps or distributed.anywhere(ctrl_c.pressed)
            if done or step // evaluate_every > turn.start // evaluate_every:
                for run in runs:
                    run.evaluate_now()
                save()
    print(f"\nstopped at step {step:,}; --resume goes on from there\n" if step < args.steps else "")


def progress(learners, per_step, unit):
    """One line on where the learners are: rnn_ext's loss, and the speed of the last steps."""
    speeds = [
        f"{name} {thousands(per_step / median(learner.seconds[-50:]))}"
        for name, learner in learners.items()
        if name in ("rnn_ext", "torch.nn")  # an example may train others beside them
    ]
    return f"loss {learners['rnn_ext'].losses[-1]:.3f}, {unit}s/s: {', '.join(speeds)}"


def thousands(value):
    return f"{value / 1e3:.1f}k" if value >= 1e3 else f"{value:.0f}"


def time_ratio(learners):
    """torch.nn's median time of a step over ours; None when there is nothing to compare."""
    if len(learners) < 2:
        return None
    ours, theirs = (median(run.seconds) for run in learners.values())
    return theirs / ours


def report(learners, per_step, unit):
    """Print what each learner reached, and how the two compare."""
    runs = list(learners.values())
    last = min(20, len(runs[0].losses))

    def row(label, values):
        print(f"{label:42}" + "".join(f"{value:>12}" for value in values))

    row("", learners)
    losses = [f"{mean(run.losses[-last:]):.4f}" for run in runs]
    row(f"training loss, last {last} steps ({runs[0].LOSS_UNIT})", losses)
    for score in runs[0].SCORES:
        row(score.label, [score(run.held_out[-1][1]) for run in runs])
    medians = [median(run.seconds) for run in runs]
    steps = f"median of {len(runs[0].seconds):,}"
    row(f"time of a step, {steps} (ms)", [f"{1e3 * m:.2f}" for m in medians])
    row(f"{unit}s per second", [f"{per_step / m:,.0f}" for m in medians])
    if len(runs) == 2:
        report_agreement(learners)


def report_agreement(learners):
    ours, theirs = learners
    runs = list(learners.values())
    gaps = [abs(a - b) for a, b in zip(runs[0].losses, runs[1].losses, strict=True)]
    early = gaps[:EARLY]
    print(
        f"\nagreement  training losses differ by at most {max(early):.1e} in the first "
        f"{len(early)} steps,\n           {max(gaps):.1e} in all {len(gaps):,}; ",
        end="",
    )
    scores = [run.score for run in runs]
    largest = max(map(abs, scores)) or 1
    print(f"{runs[0].SCORES[0].label} by {abs(scores[0] - scores[1]) / largest:.2%}")
    print(f"speed      {ours} trains {time_ratio(learners):.2f} times as fast as {theirs}")
    print("           (ratio of the median step times; the two took turns in one process)")


def summary(learners, args, *written):
    """The last line of an example: its name, headline, torch.nn's, ratio of times, files."""
    runs, score = list(learners.values()), next(iter(learners.values())).SCORES[0]
    parts = [f"{args.example}: {score.label} {score(runs[0].held_out[-1][1])}"]
    if len(runs) == 2:
        parts[0] += f" (torch.nn {score(runs[1].held_out[-1][1])})"
    if ratio := time_ratio(learners):
        parts.append(f"{ratio:.2f} times as fast as torch.nn")
    files = ", ".join(map(str, [args.checkpoint, args.plot, *written]))
    print(f"\nsummary  {'; '.join(parts)}; wrote {files}")


def map_state(function, state):
    """function of a layer's state, or of each part of an LSTM's; None, the zero state, stays."""
    if isinstance(state, tuple):
        return tuple(map(function, state))
    return None if state is None else function(state)
