"""A character language model, trained with rnn_ext and with torch.nn side by side.

    python examples/char_lm.py              # an LSTM on the Python language help, about two minutes
    python examples/char_lm.py --cell gru --text my_book.txt --epochs 10
    python examples/char_lm.py --resume --steps 2000 --temperature 0.4 --prefix "The value of"
    torchrun --nproc-per-node 2 examples/char_lm.py      # each process reads half of the streams

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
import corpora
import distributed
import language
import plots
import training
from common import InputError, positive
from outputs import Checkpoint

import rnn_ext

KIND = "rnn_ext char_lm 1"  # marks the checkpoints of this example
QUICK = {"hidden": 64, "batch": 16, "window": 32, "steps": 200, "length": 150}


def parse(arguments):
    parser = common.Parser(__doc__, hidden=256, batch=32, epochs=5)
    add, real = parser.add_argument, positive(float, or_zero=True)
    add("--window", type=positive(int), default=64, help="characters in a step")
    add("--text", type=Path, help="a UTF-8 file; default: Python's language help")
    add("--prefix", help="what the sample continues")
    add("--length", type=positive(int), default=500, help="characters to sample")
    add("--temperature", type=real, default=0.6, help="of the sample; 0: always the likeliest")
    return parser.parse(arguments, "char_lm", QUICK)


def main(arguments):
    args = parse(arguments)
    with distributed.joined(common.usable_device(args.device)) as device:
        run(args, device)


def run(args, device):
    text, source = common.read_text(args.text)
    if args.batch % distributed.count():
        raise InputError(f"--batch {args.batch} is no multiple of {distributed.count()} processes")
    needed = max(20, math.ceil(args.batch * (args.window + 1) / 0.9))
    if len(text) < needed:
        sizes = f"--batch {args.batch} and --window {args.window} take {needed:,}"
        raise InputError(f"{source} has {len(text):,} characters, but {sizes}; lower them")
    vocabulary, codes = common.encode(text, device)
    prefix = args.prefix or ("The " if set("The ") <= set(vocabulary) else text[0])
    if unknown := set(prefix) - set(vocabulary):
        raise InputError(f"--prefix has {min(unknown)!r}, which is not in the text; leave it out")

    cut = len(codes) * 9 // 10
    streams = corpora.cut_into_streams(codes[:cut], args.batch)
    windows = corpora.Sequential(streams, args.window)
    held_out = corpora.cut_into_streams(codes[cut:], min(args.batch, (len(codes) - cut) // 2))
    held_out_windows = corpora.Sequential(held_out, args.window, whole=True)
    args.steps = training.number_of_steps(args, len(windows))

    def build(library):
        layer_class = training.layer_class(library, args)
        model = language.LanguageModel(layer_class, len(vocabulary), args.hidden, args.layers)
        data = windows, held_out_windows
        return language.LanguageLearner(model.to(device), args, *data, unit="character")

    learners = training.learners(args, build)
    digest = hashlib.sha256(text.encode()).hexdigest()
    settings = {"window": args.window, "text": digest, "vocabulary": vocabulary}
    checkpoint = Checkpoint(args, KIND, settings, learners)

    ours = learners["rnn_ext"].model
    print(f"text     {source}: {len(text):,} characters, {len(vocabulary)} different")
    print(f"model    {training.describe(args, ours)}")
    print(f"training {args.steps:,} steps of {args.batch} x {args.window} characters ", end="")
    passes = f"({args.steps / len(windows):.1f} passes)"
    print(f"{passes}, Adam, rate {args.lr:g}; the last tenth is held out")
    example = ours.embedding(streams[: args.window])
    print(f"kernel   {rnn_ext.explain(ours.recurrent, example)}\n", flush=True)

    training.train(learners, args, args.batch * args.window, checkpoint.save)
    training.report(learners, args.batch * args.window, "character")
    print(f"\nsample, temperature {args.temperature:g}, continuing {prefix!r}:\n")
    codes = [vocabulary.index(character) for character in prefix]
    [drawn] = language.sample(ours, codes, args.length, args.temperature)
    print(prefix + "".join(vocabulary[code] for code in drawn))
    title = f"Character language model: {args.cell.upper()}, {args.layers} x {args.hidden} units"
    label = "cross-entropy (bits per character)"
    plots.training_figure(args.plot, title, learners, label, 1 / math.log(2))
    training.summary(learners, args)


if __name__ == "__main__":
    sys.exit(common.exit_code(main, sys.argv[1:]))
