"""Music: learns Irish tunes in ABC notation, then writes new ones, as text and as MIDI.

    python examples/music.py                              # under two minutes
    python examples/music.py --meter 6/8 --key Em --temperature 0.9
    python examples/music.py --resume --tunes 50          # more tunes from what was trained

The books are O'Neill's Music of Ireland and Ryan's Mammoth Collection, from the corpus of the
package music21. A symbol is a note with its length, a bar line, a repeat; "M:6/8", "L:1/8" and
"K:G" begin a tune, so the meter and the key of a new one can be chosen. The network (embedding,
LSTM, linear) is told nothing about bars: whether they come out as long as the meter says, is
counted. A tenth of the tunes is held out.
"""

import functools
import math
import random
import sys

import abc_notation as abc
import common
import corpora
import language
import plots
import training
from common import InputError, positive
from outputs import Checkpoint, write_atomically

KIND = "rnn_ext music 1"
QUICK = {"hidden": 64, "batch": 16, "window": 32, "steps": 120, "tunes": 4, "lr": 8e-3}
BOOKS = ("oneills1850", "ryansMammoth")


@functools.cache
def tunes():
    """All different tunes of the books that are well formed, in a fixed random order."""
    corpus = common.package_folder("music21") / "corpus"
    found = {}
    for path in sorted(path for book in BOOKS for path in (corpus / book).glob("*.abc")):
        for tune in abc.read(path.read_text(encoding="latin-1")):
            if not abc.check(tune)[1]:
                found[tuple(tune)] = tune
    if len(found) < 100:
        raise InputError("this music21 has no corpus of Irish tunes; install the whole package")
    found = list(found.values())
    random.Random(0).shuffle(found)
    return found


def parse(arguments):
    parser = common.Parser(__doc__, hidden=192, batch=32, epochs=5, lr=5e-3)
    add = parser.add_argument
    add("--window", type=positive(int), default=64, help="symbols in a window")
    add("--tunes", type=positive(int), default=20, help="tunes to write")
    add("--meter", default="6/8", help="of the new tunes: 6/8, 4/4, C|, ...")
    add("--key", default="G", help="of the new tunes: G, D, Em, Ador, ...")
    real = positive(float, or_zero=True)
    add("--temperature", type=real, default=0.5, help="of the tunes; 0: always the likeliest")
    return parser.parse(arguments, "music", QUICK)


def main(arguments):
    args = parse(arguments)
    common.require("music21")
    device = common.usable_device(args.device)
    books = tunes()
    cut = len(books) * 9 // 10
    vocabulary = corpora.Vocabulary(books[:cut], min_count=3)
    header = [f"M:{args.meter}", "L:1/8", f"K:{args.key}"]
    for option, symbol in (("meter", header[0]), ("key", header[2])):
        if symbol not in vocabulary.codes:
            known = [token[2:] for token in vocabulary.tokens if token[:2] == symbol[:2]]
            raise InputError(f"--{option} {symbol[2:]} is not in the books; {', '.join(known)} are")

    def windows(part, whole=False):
        streams = corpora.cut_into_streams(vocabulary.stream(part).to(device), args.batch)
        return corpora.Sequential(streams, args.window, whole)

    train, held_out = windows(books[:cut]), windows(books[cut:], whole=True)
    if len(train) == 0 or len(held_out) == 0:
        raise InputError("the books are too short for that; lower --batch and --window")
    args.steps = training.number_of_steps(args, len(train))

    def build(library):
        layer_class = training.layer_class(library, args)
        model = language.LanguageModel(layer_class, len(vocabulary), args.hidden, args.layers)
        options = {"unit": "symbol", "special": True, "rate": training.falling_rate(args)}
        return language.LanguageLearner(model.to(device), args, train, held_out, **options)

    learners = training.learners(args, build)
    settings = {"window": args.window, "vocabulary": " ".join(vocabulary.tokens)}
    checkpoint = Checkpoint(args, KIND, settings, learners)
    per_step = args.batch * args.window
    print(f"data     {len(books):,} tunes, {sum(map(len, books)):,} symbols, ", end="")
    print(f"a vocabulary of {len(vocabulary)}")
    print(f"model    {training.describe(args, learners['rnn_ext'].model)}")
    print(f"training {args.steps:,} steps of {args.batch} x {args.window} symbols\n")
    training.train(learners, args, per_step, checkpoint.save, unit="symbol")
    training.report(learners, per_step, "symbol")
    written = compose(learners["rnn_ext"].model, vocabulary, header, args)
    files = save(written, args)
    draw(args, learners, written)
    training.summary(learners, args, *files)


def compose(model, vocabulary, header, args):
    """[(tune, score)] of sampled tunes that are well formed, those of about 16 bars first."""
    prefix, written, full, bars = [corpora.BOS, *vocabulary.encode(header)], [], 0, 0
    for codes in language.sample(
        model, prefix, 600, args.temperature, args.tunes, stop=corpora.EOS
    ):
        tune = header + [vocabulary.tokens[code] for code in codes]
        score, problems = abc.check(tune)
        if score:
            right, inside = abc.full_bars(score, tune)
            full, bars = full + right, bars + inside
        if not problems:
            written.append((tune, score))
    print(f"\nsampled tunes      {len(written)} of {args.tunes} are well formed in every respect")
    print(f"their bars         {full / max(1, bars):.1%} are as long as the meter says")
    return sorted(written, key=lambda pair: abs(len(pair[1].bars) - 16))


def save(written, args):
    """Write the tunes as .abc and .mid beside the plot; print the first one."""
    files = [args.plot.with_suffix(suffix) for suffix in (".abc", ".mid")]
    texts = ["%abc-2.1\n"]
    texts += [abc.write(tune, n, f"Tune {n}") for n, (tune, _) in enumerate(written, 1)]
    scores = [score for _, score in written]
    write_atomically(files[0], lambda file: file.write("\n".join(texts).encode()))
    write_atomically(files[1], lambda file: file.write(abc.midi(scores)))
    print("\n" + (texts[1] if written else "No tune was well formed: train longer."))
    return files


def draw(args, learners, written):
    title = f"Irish tunes: {args.cell.upper()}, {args.layers} x {args.hidden} units"
    ratios = [1, 1] if written else [1, 0.01]
    with plots.figure(args.plot, title, "lt;rr", (12, 7), [1.6, 1], ratios) as axes:
        label = "cross-entropy (bits per symbol)"
        plots.losses(axes["l"], learners, label, 1 / math.log(2), held_out=True)
        plots.step_times(axes["t"], learners)
        if written:
            draw_tune(axes["r"], *written[0])
        else:
            axes["r"].set_visible(False)


def draw_tune(axes, tune, score):
    """A piano roll: time to the right, pitch upwards, a line at every bar."""
    bar = abc.meter(tune)
    for start, long, height in score.notes:
        place = (float(start / bar), float(0.92 * long / bar))
        axes.broken_barh([place], (height - 0.4, 0.8), color=plots.CYCLE[0])
    for start, _, _ in score.bars:
        axes.axvline(float(start / bar), color=plots.MUTED, linewidth=0.6)
    names = "C C# D Eb E F F# G G# A Bb B".split()
    heights = sorted({height for _, _, height in score.notes})
    labels = [f"{names[height % 12]}{height // 12 - 1}" for height in heights]
    axes.set_yticks(heights, labels, fontsize="x-small")
    starts = [float(start / bar) for start, long, _ in score.bars if 2 * long > bar]
    axes.set_xticks(starts, range(1, len(starts) + 1))
    axes.set(xlabel="bars", ylabel="pitch", title=f"A sampled tune: {', '.join(tune[:3])}")
    axes.set_xlim(0, max(float((start + long) / bar) for start, long, _ in score.notes))
    axes.grid(False, axis="x")


if __name__ == "__main__":
    sys.exit(common.exit_code(main, sys.argv[1:]))
