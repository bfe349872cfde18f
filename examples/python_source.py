"""Python programs and the classes of their characters, for the tagging example."""

import functools
import io
import itertools
import keyword
import random
import sysconfig
import tokenize
from pathlib import Path

import torch
from common import InputError

CLASSES = ["blank", "keyword", "name", "number", "string", "comment", "operator"]
COLORS = ["#000000", "#a2437d", "#1f1f1f", "#4a7fc0", "#4f9450", "#8a8a8a", "#c8553d"]
CODES = 128  # of the alphabet: ASCII; 127 stands for all other characters


def labels(source):
    """(class of each character, positions of lines that begin outside of a token).

    Raises what tokenize raises on text that is no Python.
    """
    starts = [0]
    for line in io.StringIO(source):
        starts.append(starts[-1] + len(line))
    found, inside = [0] * len(source), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (first, column), (last, end) = token.start, token.end
        name = tokenize.tok_name[token.type]
        if name == "NAME":
            kind = 1 if keyword.iskeyword(token.string) else 2
        elif "STRING" in name:  # FSTRING_START, ... since Python 3.12
            kind = 4
        else:
            kind = {"NUMBER": 3, "COMMENT": 5, "OP": 6}.get(name, 0)
        if kind:
            start, stop = starts[first - 1] + column, starts[last - 1] + end
            found[start:stop] = [kind] * (stop - start)
        if last > first:
            inside.update(starts[first:last])
    return found, [start for start in starts[:-1] if start not in inside]


def encode(source):
    return torch.tensor([min(ord(character), CODES - 1) for character in source])


@functools.cache
def programs(count):
    """[(source, labels, line starts)] of files of the standard library, in a fixed random order."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(paths)
    read = []
    for path in paths:
        try:
            source = path.read_text(encoding="utf-8")
            if len(source) > 2000 and len(read) < count:
                read.append((source, *labels(source)))
        except (UnicodeDecodeError, SyntaxError, tokenize.TokenError):
            continue
    if len(read) < 10:
        raise InputError("this Python has no sources of its standard library to learn from")
    return read


class Windows:
    """Characters and labels [window, batch]; a column begins with a line, outside of strings."""

    def __init__(self, texts, window, device):
        text, tags, self.starts = [], [], []
        for source, found, lines in texts:
            offset = sum(map(len, text))
            last = len(source) - window
            self.starts += [offset + line for line in lines if line <= last]
            text.append(encode(source))
            tags.append(torch.tensor(found))
        self.text, self.tags = torch.cat(text).to(device), torch.cat(tags).to(device)
        self.window, self.starts = window, torch.tensor(self.starts)

    def __call__(self, chosen):
        places = self.starts[chosen] + torch.arange(self.window).unsqueeze(1)
        places = places.to(self.text.device)
        return self.text[places], self.tags[places]


def colored(source, tags):
    """source with the escape sequences of a terminal."""
    text, before = "", 0
    for character, tag in zip(source, tags, strict=True):
        if tag != before and character.strip():
            red, green, blue = bytes.fromhex(COLORS[tag][1:])
            text += "\x1b[0m" if tag == 2 else f"\x1b[38;2;{red};{green};{blue}m"
            before = tag
        text += character
    return text + "\x1b[0m"


def excerpt(texts, lines=16, width=88):
    """(source, its labels, slice of both): lines that show a bit of each class, and much code."""
    found = []
    for number, (source, tags, _) in enumerate(texts):
        text = list(io.StringIO(source))
        starts = [0, *itertools.accumulate(map(len, text))]
        for first in range(max(1, len(text) - lines + 1)):
            if max(map(len, text[first : first + lines])) <= width:
                begin, end = starts[first], starts[min(first + lines, len(text))]
                counts = [tags[begin:end].count(tag) for tag in range(len(CLASSES))]
                rarest, code = min(3, *counts[1:]), sum(counts[1:]) - counts[4] - counts[5]
                found.append((rarest, code, number, begin, end))
    if not found:
        return *texts[0][:2], slice(0, lines * width)
    *_, number, begin, end = max(found)
    return *texts[number][:2], slice(begin, end)
