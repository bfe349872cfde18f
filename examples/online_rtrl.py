"""Online learning of a stream whose rule changes while it goes on.

    python examples/online_rtrl.py
    python examples/online_rtrl.py --cell lstm --delays 2 6 12

The stream is of random bits; what is asked for is the bit of --delays steps before. Now and then
the delay changes, nobody says when, and the network has to find out from its mistakes. Everything
is learned while the stream runs: each learner is asked first, then told.

Four learners of the same network from the same start, each with Adam: real-time recurrent learning,
exact and SnAp-1, which change the weights after every step, and truncated backpropagation through
windows of a few and of more steps, which change them at the end of a window. A delay longer than a
window is out of its reach, but for what the state happens to keep.
"""

import sys
from itertools import pairwise

import common
import plots
import streaming
import torch
from common import InputError, positive
from outputs import prepare_output
from torch import nn

import rnn_ext

QUICK = {"steps": 2000, "delays": [2, 4]}


class Learner:
    """A network with its optimizer; the share of bits that it had right, step by step."""

    def __init__(self, args):
        torch.manual_seed(args.seed)
        self.rnn = getattr(rnn_ext, args.cell.upper())(1, args.hidden)
        self.head = nn.Linear(args.hidden, 1)
        parameters = [*self.rnn.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.Adam(parameters, args.lr)
        self.right = []

    def loss(self, h, y):
        """Cross-entropy, with one bit of target for every row of h; notes what was right."""
        logits = self.head(h)
        self.right += ((logits > 0) == (y > 0.5)).float().mean((-2, -1)).flatten().tolist()
        return nn.functional.binary_cross_entropy_with_logits(logits, y)

    def learn(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


class ForwardInTime(Learner):
    def __init__(self, args, mode):
        super().__init__(args)
        self.rtrl = rnn_ext.online.RTRL(self.rnn, mode)

    def run(self, x, y, name):
        for t in streaming.bar(len(x), name):
            h = self.rtrl.step(x[t]).requires_grad_()
            self.loss(h, y[t]).backward()
            self.rtrl.accumulate(h.grad)
            self.learn()


class Truncated(Learner):
    def __init__(self, args, window):
        super().__init__(args)
        self.window = window

    def run(self, x, y, name):
        with streaming.bar(len(x), name) as bar:
            parts = rnn_ext.online.tbptt(self.rnn, x, self.window, self.loss, targets=y)
            for part in parts:
                self.learn()
                bar.update(part.steps.stop - part.steps.start)


def make_stream(args):
    """Bits [T, B, 1], what is asked for, and the delay that holds at each step."""
    generator = torch.Generator().manual_seed(args.seed)
    x = torch.randint(2, (args.steps, args.batch, 1), generator=generator).float()
    phase = -(-args.steps // len(args.delays))
    delays = torch.tensor([args.delays[t // phase] for t in range(args.steps)])
    return x, x[(torch.arange(args.steps) - delays).clamp_min(0)], delays


def draw(args, learners, delays):
    width = max(1, args.steps // 60)
    title = f"Online learning: the bit of some steps ago ({args.cell.upper()}, {args.hidden} units)"
    with plots.figure(args.plot, title, "a", size=(11, 4.6)) as axes:
        axes = axes["a"]
        changes = [0, *(delays.diff().nonzero().flatten() + 1).tolist(), args.steps]
        for number, (start, stop) in enumerate(pairwise(changes)):
            axes.axvspan(start, stop, color="#0b5d66", alpha=0.03 + 0.05 * (number % 2), lw=0)
            place = {"x": (start + stop) / 2, "y": 1.02, "ha": "center", "color": plots.MUTED}
            axes.text(s=f"delay {delays[start].item()}", **place)
        for (name, learner), color in zip(learners.items(), streaming.COLORS):
            positions, means, _ = plots.running_mean(learner.right, width)
            axes.plot(positions, means, color=color, lw=2.4 if "exact" in name else 1.4, label=name)
        axes.axhline(0.5, color=plots.MUTED, linestyle="--", linewidth=1)
        axes.set(xlabel="step of the stream", ylabel=f"bits right (mean of {width} steps)")
        axes.set(xlim=(0, args.steps), ylim=(0.36, 1.08))
        axes.legend(loc="lower right", ncols=2)


def main(arguments):
    parser = streaming.Parser(__doc__, steps=12000)
    add, whole = parser.add_argument, positive(int)
    add("--cell", choices=common.CELLS, default="gru", help="of the recurrent layer")
    add("--hidden", type=whole, default=32, help="units")
    add("--batch", type=whole, default=4, help="streams side by side")
    add("--delays", type=whole, nargs="+", default=[2, 8, 5], help="one after the other")
    add("--windows", type=whole, nargs=2, default=[4, 16], help="of truncated backpropagation")
    add("--lr", type=positive(float), default=3e-3, help="learning rate")
    args = parser.parse(arguments, "online_rtrl", QUICK)
    if len(set(args.windows)) < 2:
        raise InputError("--windows takes two lengths that differ")
    prepare_output(args.plot)
    x, y, delays = make_stream(args)
    learners = {f"RTRL, {mode}": ForwardInTime(args, mode) for mode in ("exact", "snap1")}
    learners |= {f"truncated, {k} steps": Truncated(args, k) for k in sorted(args.windows)}
    for name, learner in learners.items():
        learner.run(x, y, name)

    ends = [*(delays.diff().nonzero().flatten() + 1).tolist(), args.steps]
    last = max(1, args.steps // 20)
    print("\nbits right at the end of each delay" + " " * 5, end="")
    print("".join(f"{f'delay {delays[end - 1].item()}':>10}" for end in ends) + f"{'all':>10}")
    for name, learner in learners.items():
        shares = [sum(learner.right[end - last : end]) / last for end in ends]
        shares.append(sum(learner.right) / len(learner.right))
        print(f"{name:40}" + "".join(f"{share:10.1%}" for share in shares))
    draw(args, learners, delays)
    exact, *_, short, long = (sum(run.right) / args.steps for run in learners.values())
    print(
        f"\nsummary  online_rtrl: exact RTRL had {exact:.1%} of all bits right, windows of "
        f"{min(args.windows)} {short:.1%} and of {max(args.windows)} {long:.1%}; wrote {args.plot}"
    )


if __name__ == "__main__":
    sys.exit(common.exit_code(main, sys.argv[1:]))
