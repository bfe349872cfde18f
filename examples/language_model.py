"""Language models of characters, of words, and of a grammar whose entropy is known.

    python examples/language_model.py                       # characters of Python's language help
    python examples/language_model.py --tokens word --dropout 0.2 --dropout-kind locked
    python examples/language_model.py --reber               # how close to the exact entropy?
    python examples/language_model.py --text book.txt --sampling random --optimizer sgd
    python examples/language_model.py --resume --prefix "The value" --temperature 0.7 --top-k 20

Tokens rarer than --min-count become <unk>; the text, or every string of the grammar, lies between
<bos> and <eos>, and strings of a batch are filled up with <pad>. Windows of --window tokens are
read one after the other, the state carried on (--sampling sequential), or begin anywhere (random).
The rate falls to zero over the second half. The last tenth is held out. About two minutes.

--reber: the entropy of the embedded Reber grammar can be computed, so there is a perplexity that no
model can beat; and the last symbol but one can only be known from the second.
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
import reber
import torch
import training
from common import InputError, positive
from outputs import Checkpoint

import rnn_ext

KIND = "rnn_ext language_model 1"
QUICK = {"hidden": 64, "batch": 16, "window": 32, "steps": 150, "length": 100}
OWN = "tokens min_count vocabulary sampling window untied dropout dropout_kind optimizer".split()
RATES = {"adam": 4e-3, "sgd": 4.0}


def variant(args):
    return "-reber" if args.reber else "-word" if args.tokens == "word" else ""


def parse(arguments):
    parser = common.Parser(__doc__, hidden=256, batch=32, epochs=4, lr=None)
    add, whole, real = parser.add_argument, positive(int), positive(float, or_zero=True)
    add("--tokens", choices=["char", "word"], default="char", help="that the text is cut into")
    add("--reber", action="store_true", help="read strings of the embedded Reber grammar")
    add("--text", type=Path, help="a UTF-8 file; default: Python's language help")
    add("--min-count", type=whole, default=2, help="rarer tokens become <unk>")
    add("--vocabulary", type=whole, help="keep the most frequent tokens only, this many")
    kinds = ["sequential", "random"]
    add("--sampling", choices=kinds, default=kinds[0], help="windows in order, or anywhere")
    add("--window", type=whole, default=64, help="tokens in a window")
    add("--untied", action="store_true", help="the readout has weights of its own")
    add("--dropout", type=real, default=0.0, help="share of the units that a step leaves out")
    kinds = ["element", "locked", "token"]
    help = "any units, the same at all steps of a window, or whole tokens"
    add("--dropout-kind", choices=kinds, default="locked", help=help)
    add("--optimizer", choices=list(RATES), default="adam", help="with --lr 4e-3, or 4")
    add("--prefix", help="what the sample continues")
    add("--length", type=whole, default=400, help="tokens to sample, at most")
    add("--temperature", type=real, default=0.7, help="of the samples; 0: always the likeliest")
    add("--top-k", type=whole, help="sample among the likeliest k tokens only")
    args = parser.parse(arguments, "language_model", QUICK, variant)
    args.lr = args.lr or RATES[args.optimizer]
    if args.dropout >= 1:
        raise InputError("--dropout is a probability below 1")
    if args.reber and args.text:
        raise InputError("--reber reads no text; leave --text out")
    return args


class Corpus:
    """Vocabulary, windows to train on, windows held out; what they are, in words."""

    def __init__(self, args, device):
        (self.strings if args.reber else self.text)(args, device)
        if len(self.windows) == 0 or len(self.held_out) == 0:
            raise InputError(f"{self.source} is too short; lower --batch and --window")

    def strings(self, args, device):
        strings, _ = reber.corpus(5000, seed=2 * args.seed + 1)
        held_out, self.floor = reber.corpus(1000, seed=2 * args.seed + 2)
        self.vocabulary, self.unit, self.split = corpora.Vocabulary(strings), "symbol", list
        self.windows, self.held_out = (
            corpora.Padded(
                [[corpora.BOS, *self.vocabulary.encode(s), corpora.EOS] for s in part],
                common.Batches(len(part), batch, args.seed),
                device,
            )
            for part, batch in ((strings, args.batch), (held_out, 100))
        )
        self.source, self.digest = "embedded Reber grammar, 5,000 strings", "reber"
        self.per_step = args.batch * sum(map(len, strings)) // len(strings)

    def text(self, args, device):
        text, self.source = common.read_text(args.text)
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        self.split = corpora.words if args.tokens == "word" else list
        self.unit = "word" if args.tokens == "word" else "character"
        tokens = self.split(text)
        cut = len(tokens) * 9 // 10
        self.vocabulary = corpora.Vocabulary([tokens[:cut]], args.min_count, args.vocabulary)
        codes = [self.vocabulary.stream([part]) for part in (tokens[:cut], tokens[cut:])]
        if len(tokens) < 2 * args.batch * (args.window + 1):
            raise InputError(f"{self.source} is too short; lower --batch and --window")
        if args.sampling == "random":
            streams = codes[0].to(device)
            self.windows = corpora.Random(streams, args.batch, args.window, args.seed)
        else:
            streams = corpora.cut_into_streams(codes[0].to(device), args.batch)
            self.windows = corpora.Sequential(streams, args.window)
        streams = corpora.cut_into_streams(codes[1].to(device), args.batch)
        self.held_out = corpora.Sequential(streams, args.window, whole=True)
        unknown = (codes[1] == corpora.UNK).double().mean()
        self.source += f": {len(tokens):,} {self.unit}s, {unknown:.1%} of the held-out are <unk>"
        self.per_step = args.batch * args.window


def build(library, args, corpus, device):
    model = language.LanguageModel(
        training.layer_class(library, args),
        len(corpus.vocabulary),
        args.hidden,
        args.layers,
        tied=not args.untied,
        dropout=args.dropout,
        kind=args.dropout_kind,
    ).to(device)
    return language.LanguageLearner(
        model,
        args,
        corpus.windows,
        corpus.held_out,
        corpus.unit,
        special=True,
        rate=training.falling_rate(args),
        optimizer={"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[args.optimizer],
    )


def show_samples(model, corpus, args):
    prefix = "The" if args.prefix is None and not args.reber else args.prefix or ""
    prefix = corpus.vocabulary.encode(corpus.split(prefix))
    options = args.length, args.temperature, 5 if args.reber else 1, args.top_k, corpora.EOS
    print(f"\nsamples, temperature {args.temperature:g}:\n")
    for drawn in language.sample(model, [corpora.BOS, *prefix], *options):
        print(corpus.vocabulary.decode([*prefix, *drawn]))


def main(arguments):
    args = parse(arguments)
    with distributed.joined(common.usable_device(args.device)) as device:
        run(args, device)


def run(args, device):
    if args.batch % distributed.count():
        raise InputError(f"--batch {args.batch} is no multiple of {distributed.count()} processes")
    corpus = Corpus(args, device)
    args.steps = training.number_of_steps(args, len(corpus.windows))
    learners = training.learners(args, lambda library: build(library, args, corpus, device))
    settings = {name: getattr(args, name) for name in OWN} | {"text": corpus.digest}
    checkpoint = Checkpoint(args, KIND, settings, learners)

    ours = learners["rnn_ext"].model
    print(f"text     {corpus.source}; a vocabulary of {len(corpus.vocabulary):,}")
    print(f"model    {training.describe(args, ours)}")
    passes = f"{args.steps / len(corpus.windows):.1f} passes"
    print(f"training {args.steps:,} steps ({passes}), {args.optimizer}, rate {args.lr:g}")
    example = ours.embedding(corpus.windows(0)[0])
    print(f"kernel   {rnn_ext.explain(ours.recurrent, example)}\n", flush=True)

    training.train(learners, args, corpus.per_step, checkpoint.save)
    training.report(learners, corpus.per_step, corpus.unit)
    if args.reber:
        reber.report(ours, corpus)
    show_samples(ours, corpus, args)
    draw(args, corpus, learners)
    training.summary(learners, args)


def draw(args, corpus, learners):
    about = "the embedded Reber grammar" if args.reber else f"{corpus.unit}s"
    title = f"Language model of {about}: {args.cell.upper()}, {args.layers} x {args.hidden} units"
    exact = {"exact (grammar)": corpus.floor} if args.reber else {}
    with plots.figure(args.plot, title, "ls;lt", width_ratios=[1.6, 1]) as axes:
        label = f"cross-entropy (bits per {corpus.unit})"
        plots.losses(axes["l"], learners, label, 1 / math.log(2), held_out=True)
        plots.scores(axes["s"], learners, f"perplexity per {corpus.unit}", **exact)
        plots.step_times(axes["t"], learners)


if __name__ == "__main__":
    sys.exit(common.exit_code(main, sys.argv[1:]))
