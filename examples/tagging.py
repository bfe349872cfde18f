"""Tagging: every character of a Python program gets the class of its token, from both directions.

    python examples/tagging.py                           # under two minutes
    python examples/tagging.py --color my_program.py     # then shows a file of yours in colors
    python examples/tagging.py --resume --color my_program.py      # at once, without training

The programs are the standard library's, the labels come from its module `tokenize`: blank, keyword,
name, number, string, comment, operator. A network that reads in both directions sees no rules, only
characters. Windows begin at a line outside of strings, and a tenth of the files is held out. F1 is
the harmonic mean of precision and recall, macro-F1 its mean over the classes.
"""

import sys
from pathlib import Path

import common
import plots
import torch
import training
from common import InputError, positive
from outputs import Checkpoint
from python_source import CLASSES, CODES, COLORS, Windows, colored, encode, excerpt, programs
from torch import nn
from training import Score

KIND = "rnn_ext tagging 1"
QUICK = {"hidden": 48, "batch": 16, "window": 96, "steps": 120, "files": 12}


class Tagger(nn.Module):
    def __init__(self, layer_class, hidden, layers):
        super().__init__()
        self.embedding = nn.Embedding(CODES, hidden // 2)
        self.recurrent = layer_class(hidden // 2, hidden, layers, bidirectional=True)
        self.readout = nn.Linear(2 * hidden, len(CLASSES))

    def forward(self, codes):  # [T, B] -> [T, B, classes]
        return self.readout(self.recurrent(self.embedding(codes))[0])


class TagLearner(training.Learner):
    SCORES = (Score("held-out macro-F1"),)

    def __init__(self, model, args, windows, held_out):
        super().__init__(model, args, training.falling_rate(args))
        self.windows, self.held_out_windows = windows, held_out
        self.batches = common.Batches(len(windows.starts), args.batch, args.seed)

    def train_step(self, step):
        codes, tags = self.windows(self.batches(step))
        loss = nn.functional.cross_entropy(self.model(codes).flatten(0, 1), tags.flatten())
        return self.descend(loss)

    @torch.no_grad()
    def f1(self):
        """[classes]: on windows spread evenly over the held-out files."""
        confusion = torch.zeros(len(CLASSES), len(CLASSES))
        many = torch.arange(0, len(self.held_out_windows.starts), 40)
        for chosen in many.split(64):
            codes, tags = self.held_out_windows(chosen)
            pairs = tags * len(CLASSES) + self.model(codes).argmax(-1)
            confusion += (
                pairs.flatten().bincount(minlength=confusion.numel()).view_as(confusion).cpu()
            )
        both = confusion.sum(0) + confusion.sum(1)
        return 2 * confusion.diag() / both.clamp(min=1)

    def evaluate(self):
        return self.f1().mean().item()


@torch.no_grad()
def tagged(model, source, device):
    """The class of every character that the model finds."""
    model.eval()
    return model(encode(source).to(device).unsqueeze(1)).argmax(-1).flatten().tolist()


def parse(arguments):
    parser = common.Parser(__doc__, hidden=96, batch=32, epochs=1, lr=6e-3)
    parser.add_argument("--window", type=positive(int), default=160, help="characters of one")
    parser.add_argument("--files", type=positive(int), default=80, help="programs to read")
    parser.add_argument("--color", type=Path, help="a file to show in colors at the end")
    args = parser.parse(arguments, "tagging", QUICK)
    if args.hidden < 2 or args.files < 10:
        raise InputError("--hidden takes 2 units or more, --files 10 programs or more")
    return args


def main(arguments):
    args = parse(arguments)
    device = common.usable_device(args.device)
    mine = common.read_text(args.color)[0] if args.color else None
    texts = programs(args.files)
    cut = len(texts) * 9 // 10
    windows = Windows(texts[:cut], args.window, device)
    held_out = Windows(texts[cut:], 2 * args.window, device)
    if not (windows.starts.numel() and held_out.starts.numel()):
        raise InputError("no program is as long as two windows; lower --window")
    args.steps = training.number_of_steps(args, 300)

    def build(library):
        model = Tagger(training.layer_class(library, args), args.hidden, args.layers)
        return TagLearner(model.to(device), args, windows, held_out)

    learners = training.learners(args, build)
    settings = {"window": args.window, "files": args.files}
    checkpoint = Checkpoint(args, KIND, settings, learners)
    ours = learners["rnn_ext"]
    print(f"data     {len(texts)} programs, {len(windows.text):,} characters to train on")
    print(f"model    {training.describe(args, ours.model)}, both directions")
    print(f"training {args.steps:,} steps of {args.batch} x {args.window} characters\n")
    training.train(learners, args, args.batch * args.window, checkpoint.save, unit="character")
    training.report(learners, args.batch * args.window, "character")
    print("\nF1 per class  " + "".join(f"{name:>10}" for name in CLASSES))
    for name, learner in learners.items():
        print(f"{name:14}" + "".join(f"{value:10.4f}" for value in learner.f1().tolist()))
    source, truth, part = excerpt(texts[cut:])
    sample = mine or source[part]
    print("\n" + colored(sample, tagged(ours.model, sample, device)))
    found = tagged(ours.model, source, device)
    draw(args, learners, list(zip(source, found, truth, strict=True))[part])
    training.summary(learners, args)


def draw(args, learners, program):
    title = "Tagging the characters of Python programs, reading in both directions"
    with plots.figure(args.plot, title, "lb;pp", (12, 8), height_ratios=[1, 1.25]) as axes:
        plots.losses(axes["l"], learners, "cross-entropy (nats per character)", log=True)
        draw_f1(axes["b"], learners)
        draw_program(axes["p"], program)


def draw_f1(axes, learners):
    for index, (name, learner) in enumerate(learners.items()):
        places = [place + 0.4 * index for place in range(len(CLASSES))]
        values = [100 * (1 - f1) for f1 in learner.f1().tolist()]
        bars = axes.bar(places, values, width=0.38, color=plots.COLORS[name], label=name)
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize="x-small")
    axes.set_xticks([place + 0.2 for place in range(len(CLASSES))], CLASSES)
    axes.set(title="What F1 lacks on held-out programs", ylabel="1 \N{MINUS SIGN} F1 (percent)")
    axes.legend()


def draw_program(axes, program):
    """Lines of a held-out program in the colors of the classes found; wrong ones are underlined."""
    row = column = 0
    for character, tag, right in program:
        if character == "\n":
            row, column = row + 1, 0
            continue
        look = {"family": "monospace", "fontsize": 11, "ha": "center", "va": "baseline"}
        axes.text(column, -row, character, color=COLORS[tag], **look)
        if tag != right:
            axes.plot([column - 0.5, column + 0.5], [-row - 0.25] * 2, color="red", linewidth=2)
        column += 1
    for tag, name in enumerate(CLASSES[1:], 1):
        axes.plot([], [], "s", color=COLORS[tag], label=name)
    axes.plot([], [], color="red", linewidth=2, label="wrong")
    axes.set(xlim=(-1, 112), ylim=(-row, 1.2), title="What the network sees in a program")
    axes.legend(loc="upper right")
    axes.axis("off")


if __name__ == "__main__":
    sys.exit(common.exit_code(main, sys.argv[1:]))
