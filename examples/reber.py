"""The embedded Reber grammar, whose entropy is known (Reber 1967; Hochreiter and Schmidhuber 1997).

A string is B, T or P, a string of the inner grammar between B and E, the same T or P again, E: what
follows the inner string can be known from the second symbol alone, however long ago that was.
"""

import math
import random
import re

import torch
from corpora import BOS, EOS
from language import sample

# From a state, two symbols with equal probability, and the states that they lead to.
GRAMMAR = {
    0: (("T", 1), ("P", 2)),
    1: (("S", 1), ("X", 3)),
    2: (("T", 2), ("V", 4)),
    3: (("X", 2), ("S", None)),
    4: (("P", 3), ("V", None)),
}


def string(random):
    """(symbols, choices): a string of the embedded grammar, and how many coins it took."""
    side, state, choices = random.choice("TP"), 0, 1
    inner = "B"
    while state is not None:
        symbol, state = random.choice(GRAMMAR[state])
        inner, choices = inner + symbol, choices + 1
    return f"B{side}{inner}E{side}E", choices


def grammatical(text):
    """Whether text is a string of the embedded grammar."""
    match = re.fullmatch(r"B([TP])B(\w+)E([TP])E", text)
    state = 0
    for symbol in match[2] if match else "":
        if state is None or symbol not in dict(GRAMMAR[state]):
            return False
        state = dict(GRAMMAR[state])[symbol]
    return bool(match) and state is None and match[1] == match[3]


def perplexity():
    """The perplexity per symbol of the embedded grammar, <eos> included: no model can do better.

    With v(s) the expected number of visits to state s, a string takes sum v(s) + 1 choices of ln 2
    each and has sum v(s) + 6 symbols, and v = start + transitions^T v.
    """
    transitions = torch.zeros(len(GRAMMAR), len(GRAMMAR), dtype=torch.float64)
    for state, choices in GRAMMAR.items():
        for _, target in choices:
            if target is not None:
                transitions[state, target] += 0.5
    start = torch.zeros(len(GRAMMAR), dtype=torch.float64)
    start[0] = 1
    visits = torch.linalg.solve(torch.eye(len(start)) - transitions.t(), start).sum().item()
    return math.exp((visits + 1) * math.log(2) / (visits + 7))


def corpus(count, seed):
    """(strings, perplexity per symbol, <eos> included, of these strings under the grammar)."""
    drawn = [string(generator) for generator in [random.Random(seed)] for _ in range(count)]
    symbols = sum(len(string) + 1 for string, _ in drawn)
    coins = sum(choices for _, choices in drawn)
    return [string for string, _ in drawn], math.exp(coins * math.log(2) / symbols)


@torch.no_grad()
def recall(model, vocabulary, windows):
    """How often the model prefers, as the last symbol but one, the T or P of the beginning."""
    right = total = 0
    model.eval()
    for step in range(len(windows)):
        inputs, targets, _ = windows(step)
        logits, columns = model(inputs)[0], torch.arange(targets.shape[1])
        last = (targets == EOS).int().argmax(0) - 2
        sides = torch.tensor(vocabulary.encode("TP"), device=logits.device)
        guess = logits[last, columns][:, sides].argmax(1)
        right += (sides[guess] == targets[last, columns]).sum().item()
        total += len(last)
    return right / total


def report(model, corpus):
    """Print the perplexity that no model can beat, and whether this one remembers the beginning."""
    known = f"{perplexity():.4f} on the grammar, {corpus.floor:.4f} on these held-out strings"
    print(f"\nexact      no model can do better than {known}")
    recalled = recall(model, corpus.vocabulary, corpus.held_out)
    print(f"recall     T or P at the end as at the beginning: {recalled:.1%}")
    drawn = sample(model, [BOS], 100, 1.0, count=100, stop=EOS)
    right = sum(grammatical(corpus.vocabulary.decode(codes)) for codes in drawn)
    print(f"grammar    {right} of 100 sampled strings belong to it")
