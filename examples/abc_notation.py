"""Tunes in ABC notation: symbols, notes, the length of bars, whether all is well formed, MIDI.

A tune is a list of symbols: "M:6/8", "L:1/8", "K:G", then notes ("^c2"), rests, bar lines, tuplets
("(3"), broken rhythm (">"), ties ("-"). Slurs, ornaments and grace notes are left out, and parts
are played once. The standard: https://abcnotation.com/wiki/abc:standard:v2.1
"""

import re
import struct
from dataclasses import dataclass, field
from fractions import Fraction

NOTE = r"(?:[\^_=]{0,2}[A-Ga-g][,']*|z)\d*/*\d*"
BAR = r"\|:|:\|\d?|::|\|\]|\|\||\|\d|\||\[\d"
SYMBOLS = re.compile(rf"{BAR}|\(\d|[<>]+|-|{NOTE}")
FIELDS = {"M": r"(C\|?|\d+/\d+)", "L": r"1/\d+", "K": r"[A-G][b#]?(m|mix|dor|phr|lyd)?"}
MODES = {"": 0, "m": -3, "mix": -1, "dor": -2, "phr": -4, "lyd": 1}
FIFTHS = "FCGDAEB"
SEMITONES = dict(zip("CDEFGAB", (0, 2, 4, 5, 7, 9, 11)))
TUPLETS = {2: 3, 3: 2, 4: 3, 5: 2, 6: 2, 7: 2, 8: 3, 9: 2}  # so many notes in the time of
TICKS = 480  # of MIDI in a quarter note


def read(text):
    """The tunes of an ABC file that this notation covers, each a list of symbols."""
    tunes = (symbols(part) for part in re.split(r"(?m)^(?=X:)", text))
    return [tune for tune in tunes if tune]


def symbols(text):
    """One tune -> its symbols, or None: several voices, changes of key and what else is missing."""
    fields = re.findall(r"(?m)^([MLK]):\s*(.*?)\s*$", text)
    header = dict(fields)
    header["K"] = re.sub(r"(?i)(mix|dor|phr|lyd)", lambda m: m[0].lower(), header.get("K", ""))
    right = all(re.fullmatch(FIELDS[name], header.get(name, "")) for name in FIELDS)
    if not right or len(fields) != 3:
        return None
    body = text.split("\nK:", 1)[1].partition("\n")[2]
    body = re.sub(r'(?m)^[A-Za-z]:.*$|%.*$|"[^"]*"|\{[^}]*\}|![^!]*!|\\\n', "", body)
    body = re.sub(r"[~HJLMOPRSTuv.)\\\s]|\((?!\d)", "", body)
    found = SYMBOLS.findall(body)
    if not found or "".join(found) != body:
        return None
    return [f"{name}:{header[name]}" for name in FIELDS] + found


def meter(tune):
    """The length of a bar, in whole notes."""
    name = tune[0][2:]
    return Fraction(1) if name.startswith("C") else Fraction(name)


def accidentals(key):
    """{"F": 1, "C": 1} for D."""
    tonic, sign, mode = re.fullmatch(r"([A-G])([b#]?)(.*)", key).groups()
    sharps = FIFTHS.index(tonic) - 1 + {"": 0, "#": 7, "b": -7}[sign] + MODES[mode]
    if sharps >= 0:
        return dict.fromkeys(FIFTHS[:sharps], 1)
    return dict.fromkeys(FIFTHS[sharps:], -1)


@dataclass
class Score:
    """What a tune says: notes (start, length, MIDI pitch), bars (start, length), in whole notes."""

    notes: list = field(default_factory=list)
    bars: list = field(default_factory=list)  # (start, length, whole: no part begins or ends here)
    problems: list = field(default_factory=list)


def length(note):
    """A3/2 -> 3/2, A/ -> 1/2, A// -> 1/4."""
    digits, slashes, divisor = re.search(r"(\d*)(/*)(\d*)$", note).groups()
    below = int(divisor) if divisor else 2 ** len(slashes)
    return Fraction(int(digits or 1), below or 1)


def pitch(note, key, bar):
    """MIDI number; accidentals of key and of the bar so far count, and the bar's are updated."""
    sign, letter, octave = re.match(r"([\^_=]*)([A-Ga-g])([,']*)", note).groups()
    place = letter + octave
    if sign:
        bar[place] = sign.count("^") - sign.count("_")
    shift = bar.get(place, key.get(letter.upper(), 0))
    high = letter.islower() + octave.count("'") - octave.count(",")
    return 60 + SEMITONES[letter.upper()] + 12 * high + shift


class Player:
    """Reads a tune symbol by symbol; score is what it has found."""

    def __init__(self, tune):
        self.score, self.unit, self.key = Score(), Fraction(tune[1][2:]), accidentals(tune[2][2:])
        self.now = self.bar_start = Fraction(0)
        self.signs = {}  # accidentals of this bar
        self.tuplet, self.left = Fraction(1), 0  # notes of a tuplet are so long; so many to come
        self.swing = Fraction(1)  # of the next note, after ">" or "<"
        self.long = None  # of the symbol before, if it was a note or a rest
        self.tied, self.repeating, self.at_edge = False, False, True
        for symbol in tune[3:]:
            if re.fullmatch(BAR, symbol):
                self.bar(symbol)
            elif symbol[0] == "(":
                self.left = int(symbol[1])
                self.tuplet = Fraction(TUPLETS.get(self.left, 2), max(1, self.left))
            elif symbol[0] in "<>":
                self.broken_rhythm(symbol)
            elif symbol == "-":
                self.tied = True
            else:
                self.note(symbol)
        if not re.fullmatch(BAR, tune[-1]):
            self.score.problems.append("it does not end with a bar line")
        if self.repeating:
            self.score.problems.append("a repeat is never closed")

    def bar(self, symbol):
        if self.left or self.swing != 1:
            self.score.problems.append("a tuplet or a broken rhythm crosses a bar line")
        if symbol == "|:" and self.repeating:
            self.score.problems.append("a repeat is never closed")
        self.repeating = symbol in ("|:", "::") or (self.repeating and symbol[:2] != ":|")
        edge = symbol != "|"  # where a part ends or begins, a bar may be a part of one
        if self.now > self.bar_start:
            inside = not (edge or self.at_edge)
            self.score.bars.append((self.bar_start, self.now - self.bar_start, inside))
            self.at_edge = False
        self.at_edge = self.at_edge or edge
        self.bar_start, self.signs = self.now, {}
        self.left, self.swing, self.long = 0, Fraction(1), None

    def broken_rhythm(self, symbol):
        """The note before lasts longer and the next one shorter, or the other way round."""
        if self.long is None:
            self.score.problems.append("a broken rhythm follows no note")
            return
        short = Fraction(1, 2 ** len(symbol))
        before, self.swing = (2 - short, short) if symbol[0] == ">" else (short, 2 - short)
        if self.score.notes and sum(self.score.notes[-1][:2]) == self.now:  # it was no rest
            start, long, height = self.score.notes[-1]
            self.score.notes[-1] = (start, long + (before - 1) * self.long, height)
        self.now += (before - 1) * self.long
        self.long = None

    def note(self, symbol):
        self.long = length(symbol) * self.unit * self.swing * (self.tuplet if self.left else 1)
        self.left, self.swing = max(0, self.left - 1), Fraction(1)
        if symbol[0] != "z":
            height, notes = pitch(symbol, self.key, self.signs), self.score.notes
            if self.tied and notes and notes[-1][2] == height:
                notes[-1] = (notes[-1][0], notes[-1][1] + self.long, height)
            else:
                notes.append((self.now, self.long, height))
        self.tied = False
        self.now += self.long


def check(tune):
    """(score or None, problems): whether symbols are a tune, its bars as long as the meter says."""
    for name, symbol in zip(FIELDS, [*tune[:3], "", "", ""]):
        if not re.fullmatch(f"{name}:{FIELDS[name]}", symbol):
            return None, [f"the field {name} is missing"]
    if not all(SYMBOLS.fullmatch(symbol) for symbol in tune[3:]) or len(tune) < 10:
        return None, ["it is too short, or has fields amid the notes"]
    score = Player(tune).score
    wrong = sum(whole and long != meter(tune) for _, long, whole in score.bars)
    bars = [f"{wrong} of {len(score.bars)} bars have another length than the meter"] * (wrong > 0)
    return score, score.problems + bars


def full_bars(score, tune):
    """(bars inside of parts that are as long as the meter says, all bars inside of parts)."""
    inside = [long for _, long, whole in score.bars if whole]
    return sum(long == meter(tune) for long in inside), len(inside)


def write(tune, number, title):
    """ABC text of a tune, four bars a line."""
    text, bars = "", 0
    for symbol in tune[3:]:
        text += symbol
        if re.fullmatch(BAR, symbol):
            bars += 1
            text += "\n" if bars % 4 == 0 else " "
    head = "\n".join([f"X:{number}", f"T:{title}", *tune[:3]])
    return f"{head}\n{text.strip()}\n"


def midi(scores, pause=Fraction(1), quarter_ms=400, program=110):
    """A MIDI file, as bytes, of scores one after the other. Program 110: the fiddle."""
    events, begin = [], Fraction(0)
    for score in scores:
        for start, long, height in score.notes:
            events.append((begin + start, bytes([0x90, height, 90])))
            events.append((begin + start + long, bytes([0x80, height, 0])))
        begin += max((start + long for start, long, _ in score.notes), default=0) + pause
    events.sort(key=lambda event: (event[0], event[1][0]))  # a note ends before the next begins
    track = b"\x00\xff\x51\x03" + (1000 * quarter_ms).to_bytes(3, "big") + bytes([0, 0xC0, program])
    now = 0
    for time, message in events:
        tick = round(time * 4 * TICKS)
        track += variable(tick - now) + message
        now = tick
    track += b"\x00\xff\x2f\x00"
    header = struct.pack(">4sIHHH", b"MThd", 6, 0, 1, TICKS)
    return header + struct.pack(">4sI", b"MTrk", len(track)) + track


def variable(number):
    """MIDI's numbers of variable length: seven bits a byte, the highest bit says: more follow."""
    parts = [number & 127]
    while number := number >> 7:
        parts.append(number & 127 | 128)
    return bytes(reversed(parts))
