"""Control: balance a pole whose velocities are hidden, so that the policy has to remember.

    python examples/control.py              # a return of 150 and more, in under two minutes
    python examples/control.py --long       # 400 and more of 500
    python examples/control.py --cell lstm --hidden 64 --seed 3

CartPole of gymnasium shows positions and velocities. Here the policy sees the two positions alone,
and its recurrent layer has to find out how fast they change. It learns by PPO (Schulman et al.
2017, in ppo.py): --batch carts run for --window steps, then the policy is improved on what they
did, by backpropagation through all steps of the window.

Poles fall at any time: a window of one cart holds ends and beginnings of episodes. With rnn_ext one
call runs all steps of all carts; resets= says where an episode begins, and no state and no gradient
crosses. With torch.nn it is a loop over a cell, with the state masked at every step.
"""

import sys
import time
from itertools import accumulate
from statistics import mean, median

import common
import plots
import ppo
import torch
import training
from cartpole import LONGEST, VISIBLE, Carts
from common import InputError, positive
from outputs import Checkpoint
from torch import nn
from training import Score, map_state

import rnn_ext

KIND = "rnn_ext control 1"
QUICK = {"window": 64, "steps": 30}
STEPS, LONG_STEPS = 80, 200


class LoopOverCells(nn.Module):
    """torch.nn's way: a cell, called step by step, its state masked where episodes begin."""

    def __init__(self, name, size):
        super().__init__()
        self.cell = getattr(nn, f"{name.upper()}Cell")(size, size)

    def forward(self, inputs, state, resets):  # as a layer of rnn_ext
        outputs, state = [], map_state(lambda s: s[0], state)
        for x, keep in zip(inputs, ~resets.unsqueeze(-1), strict=True):
            state = self.cell(x, map_state(lambda s, keep=keep: s * keep, state))
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs), map_state(lambda s: s.unsqueeze(0), state)


class Policy(nn.Module):
    """Observations, state -> logit of pushing right, and the value of being there."""

    def __init__(self, library, args):
        super().__init__()
        self.inputs = nn.Linear(len(VISIBLE), args.hidden)
        if library is rnn_ext:
            self.recurrent = training.layer_class(library, args)(args.hidden, args.hidden)
        else:
            self.recurrent = LoopOverCells(args.cell, args.hidden)
        self.outputs = nn.Linear(args.hidden, 2)

    def forward(self, seen, state, new):  # [T, B, 2], state, [T, B] -> [T, B], [T, B], state
        hidden, state = self.recurrent(self.inputs(seen).tanh(), state, resets=new)
        return *self.outputs(hidden).unbind(-1), state


class ControlLearner(training.Learner):
    """Carts, and a policy that learns from them. A resumed training begins with new episodes."""

    SCORES = (Score("return of the policy", ".1f"),)
    LOSS_UNIT = "share of 500 lost"
    RECORD = (*training.Learner.RECORD, "learning")

    def __init__(self, model, args):
        super().__init__(model, args)
        self.args, self.carts = args, Carts(args.batch, args.seed, args.device)
        self.begun = None  # the state of the layer where the window begins
        self.state, self.learning = [], []  # returns of the last episodes; seconds, without driving

    @torch.no_grad()
    def drive(self):
        """One window of what was seen, done, expected and got, [T, B] each; the value after it."""
        record, state, carts = [], self.begun, self.carts
        for _ in range(self.args.window):
            seen, new, valid = carts.seen, carts.new, ~carts.over
            logit, value, state = self.model(seen[None], state, new[None])
            right = torch.bernoulli(logit[0].sigmoid())
            record.append((seen, new, valid, right, logit[0], value[0], *carts.push(right)))
        _, last, _ = self.model(carts.seen[None], state, carts.new[None])
        return [torch.stack(parts) for parts in zip(*record, strict=True)], last, state

    def train_step(self, step):
        (seen, new, valid, right, logit, value, *results), last, state = self.drive()
        start = time.perf_counter()
        advantages = ppo.estimate_advantages(value, last, *results)
        data = right, ppo.log_probability(logit, right), value, advantages, valid
        for _ in range(ppo.PASSES):
            for part in torch.randperm(self.args.batch).chunk(ppo.PARTS):
                begun = map_state(lambda s, part=part: s[:, part], self.begun)
                *now, _ = self.model(seen[:, part], begun, new[:, part])  # logits and values
                loss = ppo.loss(*now, *(x[:, part] for x in data))
                self.require_sane(self.descend(loss), step)
        self.begun = state
        self.learning.append(time.perf_counter() - start)
        self.state = (self.state + self.carts.returns)[-100:]
        self.carts.returns.clear()
        return 1 - mean(self.state or [0]) / LONGEST

    def evaluate(self):
        """Mean return of 64 episodes, the same beginnings each time, the likelier action always."""
        carts, state = Carts(64, 10_000, self.args.device), None
        standing, total = torch.ones_like(carts.new), 0
        for _ in range(LONGEST):
            total += standing.sum().item()
            logit, _, state = self.model(carts.seen[None], state, carts.new[None])
            standing &= ~carts.push(logit[0] > 0)[2]
            if not standing.any():
                break
        return total / len(standing)


def main(arguments):
    parser = common.Parser(__doc__, hidden=32, batch=16, epochs=None, cell="gru")
    parser.add_argument("--window", type=positive(int), default=128, help="steps of a window")
    parser.add_argument("--long", action="store_true", help=f"{LONG_STEPS} windows, not {STEPS}")
    args = parser.parse(arguments, "control", QUICK)
    common.require("gymnasium")
    if args.layers > 1 or args.epochs:
        raise InputError("there is one layer, and no epochs but --steps; leave those options out")
    if args.window < 16:
        raise InputError("--window takes 16 steps or more: advantages are compared within it")
    args.steps = args.steps or (LONG_STEPS if args.long else STEPS)
    device, per_step = common.usable_device(args.device), args.batch * args.window

    def build(library):
        return ControlLearner(Policy(library, args).to(device), args)

    learners = training.learners(args, build)
    checkpoint = Checkpoint(args, KIND, {"window": args.window}, learners)
    print(f"task     CartPole-v1 without velocities, {args.batch} carts side by side")
    print(f"model    {training.describe(args, learners['rnn_ext'].model)}")
    print(f"training {args.steps} windows of {args.window} steps of each cart\n", flush=True)
    training.train(learners, args, per_step, checkpoint.save, "step")
    training.report(learners, per_step, "step")
    for name, run in learners.items():
        print(f"{name:10} last 100 episodes of training: {LONGEST * (1 - run.losses[-1]):.1f}")
        print(f"{'':10} improving the policy: {1e3 * median(run.learning):.1f} ms a window")
    draw(args, learners, per_step / 1e3)
    training.summary(learners, args)


def draw(args, learners, per_step):
    title = f"CartPole without velocities: {args.cell.upper()}, {args.hidden} units, PPO"
    with plots.figure(args.plot, title, "ab;ac", width_ratios=[1.4, 1]) as axes:
        for name, run in learners.items():
            returns = [LONGEST * (1 - loss) for loss in run.losses]
            look = {"color": plots.COLORS[name], "linewidth": 2.5, "label": name}
            steps = [per_step * (n + 1) for n in range(len(returns))]
            axes["a"].plot(steps, returns, **look)
            axes["b"].plot(list(accumulate(run.seconds)), returns, **look)
        axes["a"].axhline(150, color=plots.MUTED, linestyle="--", linewidth=1, label="goal: 150")
        axes["a"].set(title="Return, mean of the last 100 episodes", ylabel="steps in balance")
        axes["a"].set_xlabel("steps of a cart, in thousands")
        axes["b"].set(title="The same over time", xlabel="seconds", ylabel="steps in balance")
        axes["a"].legend()
        plots.step_times(axes["c"], learners)


if __name__ == "__main__":
    sys.exit(common.exit_code(main, sys.argv[1:]))
