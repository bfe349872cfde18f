"""Sequence to class: handwritten digits, read by a recurrent network row by row or pixel by pixel.

    python examples/digits.py                        # all variants, under two minutes
    python examples/digits.py --no-variants --cell gru --order pixels --pooling last
    python examples/digits.py --resume --epochs 60   # goes on from the checkpoint

scikit-learn's 1,797 images of 8 x 8 pixels: 8 steps of 8 numbers, or 64 of one. The classifier
sees the state after the last step, or the mean of all states. The main model (--cell, --order,
--pooling) is trained with rnn_ext and with torch.nn; eight variants beside it with rnn_ext alone:
LSTM and IRNN (Le, Jaitly and Hinton 2015: relu, identity at the start), rows and pixels, last state
and mean. A quarter of the images is for testing.
"""

import gzip
import itertools
import sys

import common
import plots
import torch
import training
from outputs import Checkpoint
from torch import nn
from training import Score

import rnn_ext

KIND = "rnn_ext digits 1"
QUICK = {"hidden": 32, "steps": 120, "variants": False, "order": "rows"}
ORDERS, POOLINGS = ("rows", "pixels"), ("last", "mean")
VARIANTS = list(itertools.product(("lstm", "irnn"), ORDERS, POOLINGS))


def images(device):
    """(train images [N, 8, 8] in 0..1, their digits, test images, their digits)."""

    def read(path):
        with gzip.open(path, "rt") as file:  # importing all of scikit-learn would take seconds
            return [[float(cell) for cell in line.split(",")] for line in file]

    table = torch.tensor(common.package_data("sklearn", "datasets/data/digits.csv.gz", read))
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    pixels, digits = table[:, :-1].view(-1, 8, 8) / 16, table[:, -1].long()
    cut = len(table) * 3 // 4
    return [part.to(device) for x in (pixels, digits) for part in (x[:cut], x[cut:])]


class Classifier(nn.Module):
    """Images [B, 8, 8] in, logits [B, 10] out."""

    def __init__(self, library, cell, order, pooling, hidden, layers):
        super().__init__()
        self.step, self.pooling = 8 if order == "rows" else 1, pooling
        if cell == "irnn":
            self.recurrent = library.RNN(self.step, hidden, layers, nonlinearity="relu")
            for name, parameter in self.recurrent.named_parameters():
                if name.startswith("weight_hh"):
                    nn.init.eye_(parameter)
                elif name.startswith("bias"):
                    nn.init.zeros_(parameter)
        else:
            self.recurrent = getattr(library, cell.upper())(self.step, hidden, layers)
        self.readout = nn.Linear(hidden, 10)

    def forward(self, pixels):
        steps = pixels.reshape(len(pixels), -1, self.step).transpose(0, 1)  # [T, B, numbers]
        states, _ = self.recurrent(steps)
        return self.readout(states[-1] if self.pooling == "last" else states.mean(0))


class DigitLearner(training.Learner):
    SCORES = (Score("test accuracy", ".2%"),)

    def __init__(self, model, args, data, batches):
        super().__init__(model, args, training.falling_rate(args))
        self.pixels, self.test_pixels, self.digits, self.test_digits = data
        self.batches = batches

    def train_step(self, step):
        chosen = self.batches(step).to(self.digits.device)
        logits = self.model(self.pixels[chosen])
        return self.descend(nn.functional.cross_entropy(logits, self.digits[chosen]))

    def read(self):
        return self.model(self.test_pixels).argmax(1)

    def evaluate(self):
        return (self.read() == self.test_digits).double().mean().item()


def parse(arguments):
    cells = *common.CELLS, "irnn"
    parser = common.Parser(__doc__, hidden=96, batch=64, epochs=40, lr=4e-3, cells=cells)
    add, alone = parser.add_argument, "train the main model only"
    add("--order", choices=ORDERS, default="rows", help="8 steps of a row, or 64 of a pixel")
    add("--pooling", choices=POOLINGS, default="last", help="the state that is classified")
    add("--no-variants", dest="variants", action="store_false", help=alone)
    return parser.parse(arguments, "digits", QUICK, lambda args: f"-{args.order}-{args.pooling}")


def main(arguments):
    args = parse(arguments)
    common.require(sklearn="scikit-learn")
    device = common.usable_device(args.device)
    data = images(device)
    batches = common.Batches(len(data[0]), args.batch, args.seed)
    args.steps = training.number_of_steps(args, batches.per_epoch)

    def build(library, cell, order, pooling):
        torch.manual_seed(args.seed)
        model = Classifier(library, cell, order, pooling, args.hidden, args.layers)
        return DigitLearner(model.to(device), args, data, batches)

    main_variant = args.cell, args.order, args.pooling
    pair = training.learners(args, lambda library: build(library, *main_variant))
    variants = {variant: build(rnn_ext, *variant) for variant in VARIANTS if args.variants}
    learners = pair | {" ".join(variant): learner for variant, learner in variants.items()}
    settings = {"order": args.order, "pooling": args.pooling, "variants": args.variants}
    checkpoint = Checkpoint(args, KIND, settings, learners)

    model = pair["rnn_ext"].model
    print(f"data     {len(data[0]):,} images of digits to train on, {len(data[1])} to test")
    print(f"model    {training.describe(args, model)}")
    print(f"         reads {args.order}, classifies by the {args.pooling} of its states")
    print(f"training {args.steps:,} steps of {batches.batch} images, Adam, rate {args.lr:g}\n")
    training.train(learners, args, batches.batch, checkpoint.save, unit="image")
    training.report(pair, batches.batch, "image")
    if variants:
        print("\ntest accuracy, rnn_ext       last state  mean of states")
        for cell, order in itertools.product(("lstm", "irnn"), ORDERS):
            row = [f"{variants[cell, order, pooling].score:.2%}" for pooling in POOLINGS]
            print(f"{cell.upper():5} {order:20} {row[0]:>12} {row[1]:>15}")
    draw(args, pair, variants, data)
    training.summary(pair, args)


def draw(args, pair, variants, data):
    title = "Handwritten digits, read by recurrent networks"
    mosaic = "cb;cm" if variants else "ct;cm"
    with plots.figure(args.plot, title, mosaic, (13, 6), [1.3, 1], [1.2, 1]) as axes:
        if variants:
            draw_curves(axes["c"], variants)
            draw_bars(axes["b"], variants)
        else:
            plots.scores(axes["c"], pair, "share of test images")
            plots.step_times(axes["t"], pair)
        draw_mistakes(axes["m"], pair["rnn_ext"], data)


def draw_curves(axes, variants):
    for (cell, order, pooling), learner in variants.items():
        steps, scores = zip(*learner.held_out, strict=True)
        color = plots.CYCLE[("lstm", "irnn").index(cell) + 2 * ORDERS.index(order)]
        style = "-" if pooling == "last" else ":"
        label = f"{cell.upper()}, {order}, {pooling}"
        axes.plot(steps, [100 * s for s in scores], style, color=color, marker="o", label=label)
    axes.set(title="Test accuracy while training", xlabel="training step", ylabel="percent right")
    narrow = {"fontsize": "small", "columnspacing": 1.2}
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.1), **narrow)


def draw_bars(axes, variants):
    for index, pooling in enumerate(POOLINGS):
        chosen = [(v, learner) for v, learner in variants.items() if v[2] == pooling]
        values = [100 * learner.score for _, learner in chosen]
        places = [place + 0.38 * index for place in range(len(chosen))]
        label = "last state" if pooling == "last" else "mean of states"
        bars = axes.barh(places, values, height=0.36, color=plots.CYCLE[index], label=label)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize="small")
    names = [f"{v[0].upper()}, {v[1]}" for v, _ in chosen]
    axes.set_yticks([place + 0.19 for place in range(len(names))], names)
    axes.set(title="Test accuracy at the end", xlabel="percent right", xlim=(0, 112))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    axes.invert_yaxis()


@torch.no_grad()
def draw_mistakes(axes, learner, data, columns=7, rows=2):
    """Test images that the main model misreads."""
    guesses, pixels, digits = learner.read(), data[1], data[3]
    wrong = (guesses != digits).nonzero().flatten().tolist()
    for place, index in enumerate(wrong[: columns * rows]):
        left, low = 12 * (place % columns), -12 * (place // columns)
        box = (left, left + 8, low, low + 8)
        axes.imshow(pixels[index].tolist(), cmap="gray_r", extent=box, vmin=0, vmax=1)
        text = f"{digits[index]} as {guesses[index]}"
        axes.text(left + 4, low - 0.5, text, ha="center", va="top", fontsize="small")
    axes.set(xlim=(-2, 12 * columns - 2), ylim=(6 - 12 * rows, 9), aspect="equal")
    axes.set_title(f"Misread: {len(wrong)} of {len(digits)} test images")
    axes.axis("off")


if __name__ == "__main__":
    sys.exit(common.exit_code(main, sys.argv[1:]))
