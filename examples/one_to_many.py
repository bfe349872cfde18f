"""One to many: a language in, a family name of that language out, letter by letter.

    python examples/one_to_many.py          # the names in the package faker, about a minute
    python examples/one_to_many.py --cell gru --temperature 0.5
    python examples/one_to_many.py --names names.txt   # lines "category, tab, name" of your own

One vector, the language's, becomes the initial state of the layer and is all that it is told; what
follows it writes alone, each letter an input of the next step, until it writes the end. Trained on
the likelihood of real names, it can read as well: the language that makes a name most likely is its
guess (Bayes), and how often that is right, for names held out, says how much of the one vector
reaches the many letters.
"""

import math
import sys
from pathlib import Path

import common
import plots
import torch
import training
from common import positive
from names import LONGEST, read_names
from outputs import Checkpoint
from torch import nn
from training import Score

import rnn_ext

KIND = "rnn_ext one_to_many 1"
QUICK = {"hidden": 48, "steps": 200}
END, NOTHING = 0, -100  # the number that begins and ends a name; what is no target


class Namer(nn.Module):
    """A category -> the letters of a name."""

    def __init__(self, layer_class, args, categories, symbols):
        super().__init__()
        self.shape = (2 if args.cell == "lstm" else 1, args.layers, args.hidden)
        self.categories = nn.Embedding(categories, math.prod(self.shape))
        self.letters = nn.Embedding(symbols, args.hidden)
        self.recurrent = layer_class(args.hidden, args.hidden, args.layers)
        self.readout = nn.Linear(args.hidden, symbols)

    def begin(self, categories):  # [B] -> the state that a category begins with
        state = self.categories(categories).tanh().unflatten(-1, self.shape)
        state = tuple(part.contiguous() for part in state.permute(1, 2, 0, 3))
        return state if len(state) == 2 else state[0]

    def forward(self, letters, state):  # [T, B] -> logits of the next letters [T, B, symbols]
        hidden, state = self.recurrent(self.letters(letters), state)
        return self.readout(hidden), state

    def losses(self, categories, targets):
        """-log p(letter | those before, category) in nats, [T, B], zero after the end."""
        inputs = torch.cat([torch.zeros_like(targets[:1]), targets[:-1].clamp(min=END)])
        logits, _ = self(inputs, self.begin(categories))
        return nn.functional.cross_entropy(
            logits.transpose(1, 2), targets, ignore_index=NOTHING, reduction="none"
        )

    @torch.no_grad()
    def log_likelihoods(self, targets):  # [T, B] -> log p(name | category) [categories, B]
        every = range(self.categories.num_embeddings)
        told = (torch.full_like(targets[0], category) for category in every)
        return torch.stack([-self.losses(category, targets).sum(0) for category in told])

    @torch.no_grad()
    def sample(self, categories, temperature):  # [B] -> letters [B, up to LONGEST]
        modules, state = (self.letters, self.recurrent, self.readout), self.begin(categories)
        return rnn_ext.decode(*modules, state, END, LONGEST, eos=END, temperature=temperature)


class NamerLearner(training.Learner):
    SCORES = (
        Score("held-out perplexity per letter", ".3f", math.exp),
        Score("held-out bits per letter", ".3f", lambda loss: loss / math.log(2)),
    )

    def __init__(self, model, args, train, test):
        super().__init__(model, args)
        self.data, self.test = train, test
        self.batches = common.Batches(len(train[0]), args.batch, args.seed)

    def train_step(self, step):
        batch = self.batches(step)
        categories, targets = self.data[0][batch], self.data[1][:, batch]
        targets = targets[: (targets != NOTHING).any(1).sum()]
        letters = (targets != NOTHING).sum()
        return self.descend(self.model.losses(categories, targets).sum() / letters)

    def evaluate(self):
        targets = self.test[1]
        return (self.model.losses(*self.test).sum() / (targets != NOTHING).sum()).item()


def numbers(found, vocabulary, device):
    """{category: names} -> (categories [N], targets [LONGEST, N])."""
    place = {letter: number for number, letter in enumerate(vocabulary)}
    targets, categories = [], []
    for number, names in enumerate(found.values()):
        for name in names:
            row = [place[letter] for letter in name] + [END]
            targets.append(row + [NOTHING] * (LONGEST - len(row)))
            categories.append(number)
    targets = torch.tensor(targets, device=device).t().contiguous()
    return torch.tensor(categories, device=device), targets


def parse(arguments):
    parser = common.Parser(__doc__, hidden=128, batch=64, epochs=10)
    add = parser.add_argument
    add("--names", type=Path, help='lines "category, tab, name"; default: faker')
    add("--temperature", type=positive(float), default=0.7, help="of the names that it writes")
    return parser.parse(arguments, "one_to_many", QUICK)


def main(arguments):
    args = parse(arguments)
    device = common.usable_device(args.device)
    found = read_names(args.names)
    vocabulary = "\n" + "".join(sorted({x for names in found.values() for n in names for x in n}))
    held_out = {category: names[: len(names) // 8] for category, names in found.items()}
    known = {category: names[len(names) // 8 :] for category, names in found.items()}
    train, test = (numbers(part, vocabulary, device) for part in (known, held_out))
    args.steps = training.number_of_steps(args, len(train[0]) / args.batch)

    def build(library):
        layer_class = training.layer_class(library, args)
        model = Namer(layer_class, args, len(found), len(vocabulary)).to(device)
        return NamerLearner(model, args, train, test)

    learners = training.learners(args, build)
    settings = {"categories": " ".join(found), "vocabulary": vocabulary}
    checkpoint = Checkpoint(args, KIND, settings, learners)
    ours = learners["rnn_ext"].model
    sizes = f"{len(train[0]):,} names to train, {len(test[0]):,} to test"
    print(f"data     {len(found)} categories, {sizes}, {len(vocabulary)} different letters")
    print(f"model    {training.describe(args, ours)}\n", flush=True)
    training.train(learners, args, args.batch, checkpoint.save, "name")
    training.report(learners, args.batch, "name")

    guesses = ours.log_likelihoods(test[1]).argmax(0)
    share = torch.zeros(len(found), len(found))  # of a category's names, what each is taken for
    share.index_put_((test[0].cpu(), guesses.cpu()), torch.ones(len(guesses)), accumulate=True)
    right = share.diag().sum().item() / len(guesses)
    share /= share.sum(1, keepdim=True)
    label = "held-out names whose category it guesses"
    print(f"{label:42}{right:>12.1%}  (chance: {1 / len(found):.1%})")
    print(f"\nsamples, temperature {args.temperature:g} (* is a name that it was trained on):\n")
    for category, names in sample_names(ours, found, vocabulary, args).items():
        starred = [name + "*" * (name in known[category]) for name in names]
        print(f"  {category:10} {', '.join(starred)}")
    draw(args, learners, list(found), share)
    training.summary(learners, args)


def sample_names(model, found, vocabulary, args, number=6):
    """{category: [name, ...]}, written by the model."""
    torch.manual_seed(args.seed)
    device = next(model.parameters()).device
    categories = torch.arange(len(found), device=device).repeat_interleave(number)
    rows = model.sample(categories, args.temperature).tolist()
    names = ["".join(vocabulary[n] for n in row).split(vocabulary[END])[0] for row in rows]
    return {c: names[number * i : number * (i + 1)] for i, c in enumerate(found)}


def draw(args, learners, categories, share):
    title = f"One to many: {args.cell.upper()}, {args.layers} x {args.hidden} units"
    with plots.figure(args.plot, title, "ab;ac", (11, 5.4), [1.25, 1]) as axes:
        image = axes["a"].imshow((100 * share).tolist(), cmap="PuBuGn", vmin=0, vmax=100)
        for row, column in (share >= 0.1).nonzero().tolist():
            value = share[row, column].item()
            look = {"color": "white" if value > 0.5 else "black", "fontsize": "x-small"}
            axes["a"].text(column, row, f"{100 * value:.0f}", ha="center", va="center", **look)
        axes["a"].set(xlabel="what the model takes them for", ylabel="held-out names")
        axes["a"].set(title="Which category makes a held-out name likeliest?")
        places = range(len(categories))
        axes["a"].set_xticks(places, categories, rotation=60, ha="right", rotation_mode="anchor")
        axes["a"].set_yticks(places, categories)
        axes["a"].grid(False)
        axes["a"].figure.colorbar(image, ax=axes["a"], label="% of the names in a row", shrink=0.8)
        plots.scores(axes["b"], learners, "perplexity")
        plots.step_times(axes["c"], learners)


if __name__ == "__main__":
    sys.exit(common.exit_code(main, sys.argv[1:]))
