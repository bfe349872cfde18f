"""A parameter that helps at first and harms in the long run: who sees through it?

    python examples/influence_balancing.py

The task of Tallec and Ollivier (2017, arXiv:1702.05043). Units stand in a row, each
hands half of its activity to the one before it, and one parameter drives them all:

    s_i <- s_i / 2 + s_{i+1} / 2 + theta * sign_i      sign: 10 times +1, then 13 times -1

The loss wants s_1 = 1. At once, raising theta raises s_1. But what the far units hand down arrives
tens of steps later and outweighs it: in the long run raising theta lowers s_1, and theta = -1/6 is
right. Truncated backpropagation sees the first part alone and drives theta the wrong way, without
bound, even with windows several times as long as the row. Real-time recurrent learning cuts nothing
off. SnAp-1, which follows each unit's influence on itself alone, sees less than any window.

The network is a layer of relu units, h = s + 1000, whose activity never comes near zero, so that it
is linear; theta is read into its input weights, and its gradient is theirs, summed with the signs.
"""

import sys

import common
import plots
import streaming
import torch
from common import positive
from outputs import prepare_output

import rnn_ext

POSITIVE, NEGATIVE, SHIFT = 10, 13, 1000.0
LOST = 20.0  # theta beyond this does not come back
QUICK = {"steps": 8000, "windows": [10, 100], "rate": 1e-4}


class Row:
    """The units, and theta, which `learn` moves by the gradient that the layer has got."""

    def __init__(self, rate):
        units = POSITIVE + NEGATIVE
        self.signs = torch.ones(units, 1, dtype=torch.float64)
        self.signs[POSITIVE:] = -1
        self.rnn = rnn_ext.RNN(1, units, nonlinearity="relu", dtype=torch.float64)
        half = 0.5 * torch.eye(units, dtype=torch.float64)
        mixing = half + half.roll(1, 1).triu()
        with torch.no_grad():
            self.rnn.weight_hh_l0.copy_(mixing)
            self.rnn.bias_hh_l0.copy_(SHIFT - SHIFT * mixing.sum(1))
            self.rnn.bias_ih_l0.zero_(), self.rnn.weight_ih_l0.zero_()
        for name, parameter in self.rnn.named_parameters():
            parameter.requires_grad_(name == "weight_ih_l0")
        self.theta, self.rate = 0.0, rate

    def learn(self):
        weight = self.rnn.weight_ih_l0
        self.theta -= self.rate * (self.signs * weight.grad).sum().item()
        weight.grad = None
        with torch.no_grad():
            weight.copy_(self.theta * self.signs)
        return abs(self.theta) < LOST


def forward_in_time(mode, args):
    """(theta, loss) after every step, until theta is lost."""
    row, history = Row(args.rate), []
    rtrl = rnn_ext.online.RTRL(row.rnn, mode)
    one, d_h = torch.ones(1, 1, dtype=torch.float64), row.signs.new_zeros(1, len(row.signs))
    for _ in range(400):  # from zero to rest
        rtrl.step(one)
    for _ in streaming.bar(args.steps, f"RTRL, {mode}"):
        miss = rtrl.step(one)[0, 0].item() - SHIFT - 1
        d_h[0, 0] = miss  # dL/dh of L = (s_1 - 1)^2 / 2
        rtrl.accumulate(d_h)
        known = row.learn()
        history.append((row.theta, miss * miss / 2))
        if not known:
            break
    return history


def truncated(window, args):
    """The same by windows of backpropagation, with one update at the end of each."""
    row, history = Row(args.rate), []

    def loss(output):
        return (output[:, 0, 0] - SHIFT - 1).square().sum() / 2

    ones = torch.ones(args.steps, 1, 1, dtype=torch.float64)
    with torch.no_grad():
        rest = row.rnn(ones[:1].expand(400, 1, 1))[1]
    parts = rnn_ext.online.tbptt(row.rnn, ones, window, loss, hx=rest)
    bar = streaming.bar(args.steps, f"windows of {window}")
    for part in parts:
        known = row.learn()
        steps = part.steps.stop - part.steps.start
        history += [(row.theta, part.loss.item() / steps)] * steps
        bar.update(steps)
        if not known:
            break
    bar.close()
    return history


def draw(args, histories):
    right = -0.5 / (NEGATIVE - POSITIVE)
    with plots.figure(args.plot, "Influence balancing", "tl") as axes:
        for (name, history), color in zip(histories.items(), streaming.COLORS * 2):
            look = {"color": color, "linewidth": 3 if "exact" in name else 1.4, "label": name}
            theta, loss = zip(*history)
            axes["t"].plot(theta, **look)
            axes["l"].semilogy([max(value, 1e-12) for value in loss], **look)
            if abs(theta[-1]) >= LOST:
                axes["t"].plot(len(theta), theta[-1], "x", color=color, markersize=9, mew=2)
        axes["t"].axhline(right, color=plots.MUTED, linestyle="--", label="right: theta = -1/6")
        axes["t"].set_yscale("symlog", linthresh=0.5)
        axes["t"].set(title="The parameter (x: given up)", xlabel="step", ylabel="theta")
        axes["l"].set(title="How far $s_1$ is from 1", xlabel="step", ylabel="loss")
        axes["t"].set_ylim(-20, 1.3 * LOST)
        axes["t"].legend(loc="lower right", ncols=2)


def main(arguments):
    parser = streaming.Parser(__doc__, steps=30000)
    add, windows = parser.add_argument, [1, 10, 100, 400]
    add("--rate", type=positive(float), default=3e-5, help="of gradient descent")
    add("--windows", type=positive(int), nargs="+", default=windows, help="lengths, in steps")
    args = parser.parse(arguments, "influence_balancing", QUICK)
    prepare_output(args.plot)
    torch.manual_seed(args.seed)  # nothing is random here
    histories = {f"RTRL, {mode}": forward_in_time(mode, args) for mode in ("exact", "snap1")}
    for window in args.windows:
        histories[f"truncated, {window} step{'s' * (window > 1)}"] = truncated(window, args)
    print(f"\n{'':24}{'theta':>10}{'loss':>12}")
    for name, history in histories.items():
        theta, loss = history[-1]
        lost = f"   lost after {len(history):,} steps" if abs(theta) >= LOST else ""
        print(f"{name:24}{theta:10.4f}{loss:12.2e}{lost}")
    draw(args, histories)
    (theta, loss), right = histories["RTRL, exact"][-1], -0.5 / (NEGATIVE - POSITIVE)
    wrong = sum(history[-1][0] > 0 for history in histories.values())
    print(
        f"\nsummary  influence_balancing: exact RTRL at {theta:.4f} (right {right:.4f}), "
        f"loss {loss:.1e}; {wrong} of {len(histories)} went the wrong way; wrote {args.plot}"
    )


if __name__ == "__main__":
    sys.exit(common.exit_code(main, sys.argv[1:]))
