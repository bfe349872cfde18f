"""The copy task, longer whenever it is mastered: how far does each way of learning get?

    python examples/copy_task.py
    python examples/copy_task.py --hidden 48 --steps 20000

L random bits come in, then a sign, then the same L bits are asked for, one a step. L starts at 1
and grows by one as soon as less than 0.15 bits are missing of each (a curriculum, as of Menick et
al. 2021, arXiv:2006.07232). Each bit has to be kept for L + 1 steps.

Every learner has the same GRU and sees batches of its own L:

    full BPTT      backpropagation through the whole episode
    windows        truncated backpropagation, the state carried from window to window
    RTRL, chunked  exact gradients forward in time, in memory that does not depend on the length
    RTRL, snap1    each unit's influence on itself alone, as cheap as the forward pass
"""

import math
import sys

import common
import plots
import streaming
import torch
from common import positive
from outputs import prepare_output
from torch import nn

import rnn_ext
from rnn_ext.online import RTRL, tbptt

MASTERED = 0.15  # bits missing of each bit
QUICK = {"steps": 3000, "hidden": 16, "batch": 8}


def episode(length, batch, generator):
    """Input [2L + 1, B, 3] (two bits, one hot, and the sign), and the bits asked for [L, B]."""
    bits = torch.randint(2, (length, batch), generator=generator)
    x = torch.zeros(2 * length + 1, batch, 3)
    x[:length, :, :2] = nn.functional.one_hot(bits, 2).float()
    x[length, :, 2] = 1
    return x, bits.float()


class Learner:
    """A network at its length of the task; `history` has (steps seen, length) of every change."""

    def __init__(self, args):
        torch.manual_seed(args.seed)
        self.rnn, self.head = rnn_ext.GRU(3, args.hidden), nn.Linear(args.hidden, 1)
        parameters = [*self.rnn.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.Adam(parameters, args.lr)
        self.generator = torch.Generator().manual_seed(args.seed)
        self.batch, self.length, self.seen, self.missing = args.batch, 1, 0, 1.0
        self.history = [(0, 1)]

    def loss(self, h, bits):
        """Summed over steps, in bits, the mean over the batch; bits below zero are not asked."""
        asked = bits >= 0
        losses = nn.functional.binary_cross_entropy_with_logits(
            self.head(h)[..., 0], bits.clamp_min(0), reduction="none"
        )
        return (losses * asked).sum() / (self.batch * math.log(2) * self.length)

    def run(self, steps, name):
        with streaming.bar(steps, name) as bar:
            while self.seen < steps:
                x, bits = episode(self.length, self.batch, self.generator)
                silent = -torch.ones(self.length + 1, self.batch)
                missing = self.learn(x, torch.cat((silent, bits)))
                nn.utils.clip_grad_norm_(self.rnn.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.seen += len(x)
                self.missing += 0.1 * (missing - self.missing)
                if self.missing < MASTERED:
                    self.length, self.missing = self.length + 1, 1.0
                    self.history.append((self.seen, self.length))
                bar.update(len(x))
                bar.set_postfix_str(f", length {self.length}", refresh=False)


class Windows(Learner):
    def __init__(self, args, window=None):
        super().__init__(args)
        self.window = window

    def learn(self, x, bits):
        window = self.window or len(x)
        parts = tbptt(self.rnn, x, window, self.loss, targets=bits)
        return sum(part.loss.item() for part in parts)


class ForwardInTime(Learner):
    def __init__(self, args, mode):
        super().__init__(args)
        self.rtrl = RTRL(self.rnn, mode)

    def learn(self, x, bits):
        begins, total = torch.ones(self.batch, dtype=torch.bool), 0.0
        for t in range(len(x)):
            h = self.rtrl.step(x[t], begins if t == 0 else None)
            if t > self.length:
                h.requires_grad_()
                loss = self.loss(h, bits[t])
                loss.backward()
                self.rtrl.accumulate(h.grad)
                total += loss.item()
        self.rtrl.flush()
        return total


def draw(args, learners):
    with plots.figure(args.plot, f"Copy task: GRU, {args.hidden} units", "a", (9, 5)) as axes:
        for (name, learner), color in zip(learners.items(), streaming.COLORS):
            seen, lengths = zip(*learner.history, (args.steps, learner.length))
            look = {"color": color, "where": "post", "lw": 5 if "BPTT" in name else 2}
            axes["a"].step([value / 1000 for value in seen], lengths, **look, label=name)
        axes["a"].set(xlabel="steps seen (thousands)", ylabel="bits that it learns to copy")
        axes["a"].legend()


def main(arguments):
    parser = streaming.Parser(__doc__, steps=40000)
    add, whole = parser.add_argument, positive(int)
    add("--hidden", type=whole, default=32, help="units")
    add("--batch", type=whole, default=16, help="episodes side by side")
    add("--window", type=whole, default=3, help="steps of truncated backpropagation")
    add("--lr", type=positive(float), default=5e-3, help="learning rate")
    args = parser.parse(arguments, "copy_task", QUICK)
    prepare_output(args.plot)
    learners = {
        "full BPTT": Windows(args),
        "RTRL, chunked": ForwardInTime(args, "chunked"),
        "RTRL, snap1": ForwardInTime(args, "snap1"),
        f"windows of {args.window}": Windows(args, args.window),
    }
    for name, learner in learners.items():
        learner.run(args.steps, name)
    print(f"\n{'':24}{'bits copied':>12}{'missing of the next length':>30}")
    for name, learner in learners.items():
        print(f"{name:24}{learner.length - 1:12}{learner.missing:24.3f} bits")
    draw(args, learners)
    reached = ", ".join(f"{name}: {learner.length - 1}" for name, learner in learners.items())
    print(f"\nsummary  copy_task: bits copied after {args.steps:,} steps: {reached}; ", end="")
    print(f"wrote {args.plot}")


if __name__ == "__main__":
    sys.exit(common.exit_code(main, sys.argv[1:]))
