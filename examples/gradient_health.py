"""Gradient health: where the gradient of a loss vanishes and where it explodes, in one figure.

    python examples/gradient_health.py      # handwritten digits pixel by pixel, about a minute
    python examples/gradient_health.py --hidden 100 --gain 1.3 --grad-clip 0.1 --depth 12

The loss is computed after the 64th pixel; a layer learns from the first ones only if ||dL/dh_t||,
which rnn_ext.gradient_flow records during the backward pass, does not fade on its way back
(Bengio et al. 1994, Pascanu et al. 2013). Shown are a tanh RNN, an IRNN (relu, identity: Le et al.
2015), an LSTM and a GRU before training and after it; an IRNN whose recurrent weights are --gain
times the identity, with and without grad_clip=, which limits dL/dh_t at every step; and the way
down through --depth layers, with and without residual links.

torch.nn gives no such numbers: for them its cells are called step by step, each state kept. The
example does that too, compares the numbers, and says how long both take.
"""

import statistics
import sys

import common
import digits
import flows
import plots
import torch
import training
from common import InputError, positive
from outputs import Checkpoint
from torch import nn
from training import Score

KIND = "rnn_ext gradient_health 1"
QUICK = {"hidden": 32, "steps": 120}
KINDS = {"rnn": "tanh RNN", "irnn": "IRNN", "lstm": "LSTM", "gru": "GRU"}
STEP_NORM = r"$\|\partial L/\partial h_t\|$"
PROBE = 64  # test images that the gradients are looked at with


class Family(nn.Module):
    """A classifier of each kind, side by side."""

    def __init__(self, library, args):
        super().__init__()
        sizes = "pixels", "last", args.hidden, args.layers
        self.members = nn.ModuleDict({k: digits.Classifier(library, k, *sizes) for k in KINDS})

    def named(self):
        return {KINDS[key]: member for key, member in self.members.items()}

    def forward(self, pixels):  # -> logits [kinds, B, 10]
        return torch.stack([member(pixels) for member in self.members.values()])


class FamilyLearner(training.Learner):
    SCORES = (Score("mean test accuracy of the four", ".2%"),)

    def __init__(self, model, args, data):
        super().__init__(model, args, training.falling_rate(args))
        self.pixels, self.test_pixels, self.labels, self.test_labels = data
        self.batches = common.Batches(len(self.pixels), args.batch, args.seed)

    def train_step(self, step):
        chosen = self.batches(step).to(self.labels.device)
        logits, labels = self.model(self.pixels[chosen]), self.labels[chosen]
        losses = [nn.functional.cross_entropy(one, labels) for one in logits]
        self.optimizer.zero_grad()
        sum(losses).backward()
        for member in self.model.members.values():  # each by itself
            nn.utils.clip_grad_norm_(member.parameters(), self.clip)
        self.optimizer.step()
        return statistics.mean(loss.item() for loss in losses)

    def accuracies(self):
        right = (self.model(self.test_pixels).argmax(-1) == self.test_labels).double().mean(1)
        return dict(zip(KINDS.values(), right.tolist(), strict=True))

    def evaluate(self):
        return statistics.mean(self.accuracies().values())


def main(arguments):
    parser = common.Parser(__doc__, hidden=64, batch=32, epochs=25, cell="all", cells=("all",))
    parser.add_argument("--gain", type=positive(float), default=1.2, help="1: a plain IRNN")
    parser.add_argument("--grad-clip", type=positive(float), default=1.0, help="norm of dL/dh_t")
    parser.add_argument("--depth", type=positive(int), default=8, help="layers")
    args = parser.parse(arguments, "gradient_health", QUICK)
    common.require(sklearn="scikit-learn")
    if args.layers > 1:
        raise InputError("one layer is looked at, and --depth of them; leave out --layers")
    if args.depth < 2:
        raise InputError("--depth takes 2 layers or more: between them lie the links")
    device = common.usable_device(args.device)
    data = digits.images(device)
    args.steps = training.number_of_steps(args, len(data[0]) / args.batch)

    steps = data[1][:PROBE].reshape(-1, 64, 1).transpose(0, 1)
    labels = data[3][:PROBE]

    def build(library):
        return FamilyLearner(Family(library, args).to(device), args, data)

    before = flows.compare(training.learners(args, build)["rnn_ext"].model.named(), steps, labels)
    learners = training.learners(args, build)
    checkpoint = Checkpoint(args, KIND, {}, learners)
    print(f"data     {len(data[0]):,} images of 64 pixels to train on, {len(data[1])} to test")
    print(f"model    {training.describe(args, learners['rnn_ext'].model)}\n", flush=True)
    training.train(learners, args, args.batch, checkpoint.save, "image")
    training.report(learners, args.batch, "image")

    ours = learners["rnn_ext"]
    after = flows.compare(ours.model.eval().named(), steps, labels)
    with torch.no_grad():
        accuracies = ours.accuracies()
    clips = {None: "free", ("norm", args.grad_clip): f"grad_clip={args.grad_clip:g}"}
    exploding = {n: flows.exploding_flow(args, steps, labels, c) for c, n in clips.items()}
    links = {True: "residual links", False: "no links"}
    depth = {n: flows.flow_through_depth(args, steps, labels, on) for on, n in links.items()}
    print("\n||dL/dh_1|| / ||dL/dh_64||      before       after training    test accuracy")
    for kind, accuracy in accuracies.items():
        first, last = (found[kind][0][0] / found[kind][0][-1] for found in (before, after))
        print(f"{kind:22}{first:16.1e}{last:16.1e}{accuracy:21.2%}")
    for name, norms in exploding.items():
        print(f"{'IRNN x ' + format(args.gain, 'g') + ', ' + name:32}{norms[0] / norms[-1]:.1e}")
    for name, norms in depth.items():
        print(f"first over last of {args.depth} layers, {name}: {norms[0] / norms[-1]:.1e}")
    every = [*before.values(), *after.values()]
    largest, ratio = max(one[1] for one in every), statistics.median(t / o for *_, o, t in every)
    print(f"\nagreement  gradient_flow and a loop over torch.nn's cells: {largest:.0e}")
    print(f"speed      that loop takes {ratio:.1f} times as long as gradient_flow")
    draw(args, before, after, exploding, depth, learners)
    training.summary(learners, args)


def draw(args, before, after, exploding, depth, learners):
    title = "Gradient health: how much of the loss reaches the first steps and the first layers"
    with plots.figure(args.plot, title, "abc;def", (13, 7)) as axes:
        panels = {"a": ("Before training", before), "b": ("After training", after)}
        for place, (name, found) in panels.items():
            for kind, (norms, *_) in found.items():
                axes[place].semilogy(range(1, 65), norms.clamp(min=1e-20), label=kind)
            axes[place].set(title=name, xlabel="step t (pixel)", ylabel=STEP_NORM)
        axes["b"].set_ylim(bottom=axes["a"].get_ylim()[0])  # what was so small is no longer
        for number, (name, norms) in enumerate(exploding.items()):
            axes["c"].semilogy(range(1, 65), norms, label=name, color=plots.CYCLE[4 - 4 * number])
        axes["c"].set(title=f"Exploding: IRNN with {args.gain:g} times the identity")
        axes["c"].set(xlabel="step t (pixel)", ylabel=STEP_NORM)
        for (name, norms), color in zip(depth.items(), plots.CYCLE[2:]):
            look = {"marker": "o", "color": color, "label": name}
            axes["d"].semilogy(range(1, args.depth + 1), norms, **look)
        axes["d"].set(title=f"Through {args.depth} layers (tanh RNN)", xlabel="layer")
        axes["d"].set(ylabel=rf"{STEP_NORM}, over all $t$")
        plots.losses(axes["e"], learners, "nats, mean of the four")
        names = {"rnn_ext": "rnn_ext.gradient_flow", "torch.nn": "loop over torch.nn's cells"}
        for number, (name, label) in enumerate(names.items()):
            times = [1e3 * found[2 + number] for found in after.values()]
            places = [n + 0.4 * number for n in range(len(times))]
            axes["f"].bar(places, times, 0.4, color=plots.COLORS[name], label=label)
        axes["f"].set_xticks([n + 0.2 for n in range(len(after))], list(after))
        axes["f"].set(title="Time to look at 64 steps of 64 images", ylabel="milliseconds")
        axes["f"].set_ylim(0, 1.25 * axes["f"].get_ylim()[1])  # room for the legend
        for place in "abcdf":
            axes[place].legend(fontsize="small")


if __name__ == "__main__":
    sys.exit(common.exit_code(main, sys.argv[1:]))
