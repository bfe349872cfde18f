"""A character language model, trained with rnn_ext and with torch.nn side by side.

    python examples/char_lm.py              # an LSTM on the Python language help, about two minutes
    python examples/char_lm.py --cell gru --text my_book.txt --epochs 10
    python examples/char_lm.py --resume --steps 2000 --temperature 0.4 --prefix "The value of"

Truncated backpropagation through time: the text is cut into --batch streams of equal length, read
side by side, --window characters a step. The hidden state is carried from window to window, but
detached, so that gradients reach back one window at most. The last tenth of the text is held out.

Two models that differ in nothing but the recurrent layer start from the same weights and take turns
on the same data (training.train), so that whatever else the machine does slows both alike. Ctrl-C
stops early, then evaluates and saves.
"""

import hashlib
import math
import sys
from pathlib import Path

import common
import plots
import torch
import training
from common import InputError, positive
from torch import nn
from training import Score

import rnn_ext

KIND = "rnn_ext char_lm 1"  # marks the checkpoints of this example
QUICK = {"hidden": 64, "batch": 16, "window": 32, "steps": 200, "length": 150}


class CharLM(nn.Module):
    """Characters in, logits of the next character out. layer_class: rnn_ext.LSTM, nn.LSTM, ..."""

    def __init__(self, layer_class, symbols, hidden, layers):
        super().__init__()
        self.embedding = nn.Embedding(symbols, hidden)
        self.recurrent = layer_class(hidden, hidden, layers)
        self.readout = nn.Linear(hidden, symbols)

    def forward(self, codes, state=None):  # codes [T, B] -> logits [T, B, symbols]
        hidden, state = self.recurrent(self.embedding(codes), state)
        return self.readout(hidden), state


def cut_into_streams(codes, batch):  # [N] -> [N // batch, batch], each column a stretch of text
    length = len(codes) // batch
    return codes[: length * batch].view(batch, length).t().contiguous()


def detach(state):
    return tuple(map(detach, state)) if isinstance(state, tuple) else state.detach()


def cross_entropy(logits, targets, **options):
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), **options)


def perplexity(loss):
    return math.exp(min(loss, 700))


class CharLearner(training.Learner):
    """The model with its optimizer and the state that it carries from window to window."""

    SCORES = (
        Score("held-out perplexity", ".4f", perplexity),
        Score("held-out bits per character", ".4f", lambda loss: loss / math.log(2)),
    )

    def __init__(self, model, args, streams, held_out_streams):
        super().__init__(model, torch.optim.Adam(model.parameters(), args.lr))
        self.window, self.clip = args.window, args.clip
        self.streams, self.held_out_streams = streams, held_out_streams

    def train_step(self, step):
        windows = (len(self.streams) - 1) // self.window  # in one pass over the text
        start = step % windows * self.window
        if start == 0:
            self.state = None
        logits, state = self.model(self.streams[start : start + self.window], self.state)
        loss = cross_entropy(logits, self.streams[start + 1 : start + 1 + self.window])
        self.state = detach(state)
        return self.descend(loss, self.clip)

    def evaluate(self):
        """Mean loss over the held-out text, read from end to end with the state carried on."""
        total, state = 0.0, None
        for start in range(0, len(self.held_out_streams) - 1, self.window):
            targets = self.held_out_streams[start + 1 : start + 1 + self.window]
            inputs = self.held_out_streams[start : start + len(targets)]
            logits, state = self.model(inputs, state)
            total += cross_entropy(logits, targets, reduction="sum").item()
        return total / self.held_out_streams[1:].numel()


@torch.no_grad()
def sample(model, vocabulary, prefix, length, temperature, device):
    """Continue prefix by length characters drawn from softmax(logits / temperature)."""
    model.eval()
    codes, state, text = [vocabulary.index(character) for character in prefix], None, prefix
    for _ in range(length):
        logits, state = model(torch.tensor(codes, device=device).unsqueeze(1), state)
        logits = logits[-1, 0].double().cpu()
        if temperature == 0:
            codes = [logits.argmax().item()]
        else:
            codes = torch.softmax(logits / temperature, dim=0).multinomial(1).tolist()
        text += vocabulary[codes[0]]
    return text


def parse(arguments):
    parser = common.Parser(__doc__, hidden=256, batch=32)
    parser.add_argument("--window", type=positive(int), default=64, help="characters in a step")
    parser.add_argument("--text", type=Path, help="a UTF-8 file; default: Python's language help")
    parser.add_argument("--prefix", help="what the sample continues")
    parser.add_argument("--length", type=positive(int), default=500, help="characters to sample")
    parser.add_argument("--temperature", type=positive(float, or_zero=True), default=0.6)
    return parser.parse(arguments, "char_lm", QUICK)


def main(arguments):
    args = parse(arguments)
    device = common.usable_device(args.device)
    text, source = common.read_text(args.text)
    needed = max(20, math.ceil(args.batch * (args.window + 1) / 0.9))
    if len(text) < needed:
        sizes = f"--batch {args.batch} and --window {args.window} take {needed:,}"
        raise InputError(f"{source} has {len(text):,} characters, but {sizes}; lower them")
    vocabulary, codes = common.encode(text, device)
    prefix = args.prefix or ("The " if set("The ") <= set(vocabulary) else text[0])
    if unknown := set(prefix) - set(vocabulary):
        raise InputError(f"--prefix has {min(unknown)!r}, which is not in the text; leave it out")

    cut = len(codes) * 9 // 10
    streams = cut_into_streams(codes[:cut], args.batch)
    held_out_streams = cut_into_streams(codes[cut:], min(args.batch, (len(codes) - cut) // 2))
    windows = (len(streams) - 1) // args.window
    args.steps = training.number_of_steps(args, windows, default_epochs=5)

    def build(library):
        layer_class = training.layer_class(library, args)
        model = CharLM(layer_class, len(vocabulary), args.hidden, args.layers).to(device)
        return CharLearner(model, args, streams, held_out_streams)

    learners = training.learners(args, build)
    digest = hashlib.sha256(text.encode()).hexdigest()
    settings = {"window": args.window, "text": digest, "vocabulary": vocabulary}
    checkpoint = common.Checkpoint(args, KIND, settings, learners)

    ours = learners["rnn_ext"].model
    print(f"text     {source}: {len(text):,} characters, {len(vocabulary)} different")
    print(f"model    {training.describe(args, ours)}")
    print(f"training {args.steps:,} steps of {args.batch} x {args.window} characters ", end="")
    print(
        f"({args.steps / windows:.1f} passes), Adam, rate {args.lr:g}; the last tenth is held out"
    )
    example = ours.embedding(streams[: args.window])
    print(f"kernel   {rnn_ext.explain(ours.recurrent, example)}\n", flush=True)

    training.train(learners, args, args.batch * args.window, checkpoint.save)
    training.report(learners, args.batch * args.window, "character")
    print(f"\nsample, temperature {args.temperature:g}, continuing {prefix!r}:\n")
    print(sample(ours, vocabulary, prefix, args.length, args.temperature, device))
    title = f"Character language model: {args.cell}, {args.layers} x {args.hidden} units"
    plots.training_figure(
        args.plot, title, learners, "cross-entropy (bits per character)", 1 / math.log(2)
    )
    training.summary(learners, args)


if __name__ == "__main__":
    sys.exit(common.exit_code(main, sys.argv[1:]))
