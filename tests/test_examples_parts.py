"""What the examples compute with: batches, tokens, the Reber grammar, ABC, MIDI, labels."""

import importlib
import itertools
import math
import runpy
import struct
from fractions import Fraction

import pytest
import torch

pytestmark = pytest.mark.usefixtures("examples")


def part(name):
    return importlib.import_module(name)


def test_batches_cover_the_data_once_a_pass_in_another_order_each_time():
    batches, again = part("common").Batches(10, 3, seed=5), part("common").Batches(10, 3, seed=5)
    passes = [torch.cat([batches(step) for step in range(3 * n, 3 * n + 3)]) for n in range(2)]
    assert all(len(set(order.tolist())) == 9 for order in passes)
    assert not torch.equal(*passes)
    assert torch.equal(again(4), batches(4))  # after a resume, say
    assert not torch.equal(part("common").Batches(10, 3, seed=6)(4), batches(4))
    assert len(part("common").Batches(2, 5, seed=0)(7)) == 2


def test_the_vocabulary_keeps_what_is_frequent():
    corpora = part("corpora")
    vocabulary = corpora.Vocabulary([list("aababc"), list("ab")], min_count=2)
    assert vocabulary.tokens == ["<pad>", "<unk>", "<bos>", "<eos>", "a", "b"]
    stream = vocabulary.stream([list("ab"), list("c")]).tolist()
    assert stream == [corpora.BOS, 4, 5, corpora.EOS, corpora.BOS, corpora.UNK, corpora.EOS]
    assert vocabulary.decode(stream) == "ab<unk>"
    assert corpora.Vocabulary([list("aababc")], size=1).tokens[4:] == ["a"]


@pytest.mark.parametrize("text", ["", "One, two;  three.\n\n  f(x) = 'é'", " a b ", "x\ty"])
def test_words_joined_are_the_text(text):
    assert "".join(part("corpora").words(text)) == text


def test_windows_are_the_text():
    corpora = part("corpora")
    streams = corpora.cut_into_streams(torch.arange(23), 2)
    assert streams.tolist() == [[n, n + 11] for n in range(11)]
    windows = corpora.Sequential(streams, 4)
    assert len(windows) == 2
    inputs, targets, fresh = windows(0)
    assert fresh and torch.equal(inputs, streams[:4]) and torch.equal(targets, streams[1:5])
    inputs, targets, fresh = windows(3)  # the second of the second pass
    assert not fresh and torch.equal(targets, inputs + 1) and inputs[0, 0] == 4
    whole = corpora.Sequential(streams, 4, whole=True)
    seen = torch.cat([whole(step)[1] for step in range(len(whole))])
    assert torch.equal(seen, streams[1:])

    windows = corpora.Random(torch.arange(50), batch=3, window=8, seed=1)
    (inputs, targets, fresh), (others, _, _) = windows(0), windows(1)
    assert fresh and inputs.shape == (8, 3) and not torch.equal(inputs, others)
    assert torch.equal(targets, inputs + 1)

    batches = part("common").Batches(3, 3, seed=0)
    inputs, targets, fresh = corpora.Padded([[2, 9, 3], [2, 3], [2, 8, 8, 3]], batches, "cpu")(0)
    assert fresh and inputs.shape == targets.shape == (3, 3)
    columns = sorted(targets.t().tolist())
    assert columns == [[3, 0, 0], [8, 8, 3], [9, 3, 0]]


def test_a_model_that_knows_the_grammar_reaches_its_perplexity():
    """Every string up to a length, weighed by its probability: the formula's sums, added up."""
    reber = part("reber")
    tokens = choices = total = 0.0
    states = [(0, 0, 1.0)]  # state, symbols of the inner string, probability
    for _ in range(150):
        following = []
        for state, length, probability in states:
            for _, target in reber.GRAMMAR[state]:
                if target is None:
                    total += probability / 2
                    choices += probability / 2 * (length + 2)
                    tokens += probability / 2 * (length + 1 + 7)
                else:
                    following.append((target, length + 1, probability / 2))
        merged = {}
        for state, length, probability in following:
            merged[state, length] = merged.get((state, length), 0) + probability
        states = [(*key, probability) for key, probability in merged.items()]
    assert total == pytest.approx(1, abs=1e-9)
    assert reber.perplexity() == pytest.approx(2 ** (choices / tokens), rel=1e-8)
    strings, drawn = reber.corpus(4000, seed=3)
    assert drawn == pytest.approx(reber.perplexity(), rel=0.01)
    assert all(map(reber.grammatical, strings))
    broken = [s[:1] + ("P" if s[1] == "T" else "T") + s[2:] for s in strings[:20]]
    assert not any(map(reber.grammatical, [*broken, "", "BTE", strings[0][:-1]]))


TUNE = """X: 1
T: made up for this test
M: 2/4
L: 1/8
K: D
|: "G"{g}~F>A (AF/G/) | (3ABA ^Gf' | c4- :| % a comment
[1 c2 z2 |] c2 \\
d,2 ||
"""


def test_a_tune_is_read_as_it_sounds():
    abc = part("abc_notation")
    [tune] = abc.read(TUNE)
    assert tune[:3] == ["M:2/4", "L:1/8", "K:D"]
    assert tune[3:10] == ["|:", "F", ">", "A", "A", "F/", "G/"]
    score = abc.Player(tune).score
    eighth = Fraction(1, 8)
    assert score.notes[:2] == [(0, eighth * 3 / 2, 66), (eighth * 3 / 2, eighth / 2, 69)]
    assert [height for _, _, height in score.notes[5:10]] == [69, 71, 69, 68, 90]
    assert score.notes[5][1] == eighth * 2 / 3
    tied = next(note for note in score.notes if note[0] == 1)
    assert tied == (1, 6 * eighth, 73)
    assert [long for _, long, _ in score.bars] == [Fraction(1, 2)] * 5
    assert score.problems == [] and abc.check(tune) == (score, [])
    [again] = abc.read(abc.write(tune, 1, "written"))
    assert again == tune


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("A4 | A4 | A3 | A4 | A4 |", "1 of 5 bars have another length"),
        ("A4 | A4 | A4 | A4 | A4", "does not end with a bar line"),
        ("|: A4 | A4 | A4 |: A4 | A4 :|", "a repeat is never closed"),
        ("A4 | A4 | > A4 | A4 | A4 |", "a broken rhythm follows no note"),
        ("A4 | A4 | A3A> | A4 | A4 |", "crosses a bar line"),
        ("A4 |", "too short"),
    ],
)
def test_what_is_wrong_with_a_tune_is_found(body, problem):
    abc = part("abc_notation")
    symbols = ["M:4/8", "L:1/8", "K:Em", *abc.SYMBOLS.findall(body)]
    _, problems = abc.check(symbols)
    assert any(problem in found for found in problems), problems
    assert abc.check(symbols[1:])[1] == ["the field M is missing"]


@pytest.mark.parametrize(
    ("key", "signs"),
    [
        ("C", ""),
        ("D", "F+C+"),
        ("Em", "F+"),
        ("Gm", "B-E-"),
        ("Ador", "F+"),
        ("Dmix", "F+"),
        ("F#m", "F+C+G+"),
        ("Aphr", "B-"),
    ],
)
def test_keys(key, signs):
    expected = {signs[n]: 1 if signs[n + 1] == "+" else -1 for n in range(0, len(signs), 2)}
    assert part("abc_notation").accidentals(key) == expected


def events_of_midi(data):
    """[(tick, status, key)] of the notes in a file of one track, read by the specification."""
    magic, size, kind, tracks, ticks = struct.unpack(">4sIHHH", data[:14])
    assert (magic, size, kind, tracks) == (b"MThd", 6, 0, 1)
    magic, size = struct.unpack(">4sI", data[14:22])
    assert magic == b"MTrk" and len(data) == 22 + size
    place, now, events = 22, 0, []
    while True:
        delta = 0
        while True:
            byte, place = data[place], place + 1
            delta = delta << 7 | byte & 127
            if byte < 128:
                break
        now, status = now + delta, data[place]
        if status == 0xFF:
            if data[place + 1] == 0x2F:
                assert place + 3 == len(data)
                return ticks, events
            place += 3 + data[place + 2]
        elif status == 0xC0:
            place += 2
        else:
            events.append((now, status, data[place + 1]))
            place += 3


def test_midi_has_the_notes():
    abc = part("abc_notation")
    [tune] = abc.read(TUNE)
    score = abc.Player(tune).score
    ticks, events = events_of_midi(abc.midi([score, score], pause=Fraction(2)))
    begun = [(time, key) for time, status, key in events if status == 0x90]
    end = max(start + long for start, long, _ in score.notes) + 2
    expected = [
        (round(4 * ticks * (start + shift)), height)
        for shift in (0, end)
        for start, _, height in score.notes
    ]
    assert begun == expected
    assert sum(status == 0x80 for _, status, _ in events) == len(begun)


def test_characters_get_the_class_of_their_token():
    source = 'def f(a):  # ok\n    """two\n    lines"""\n    return a + 1.5\n'
    python_source = part("python_source")
    found, starts = python_source.labels(source)
    names = [python_source.CLASSES[tag] for tag in found]
    runs = [
        (k, "".join(source[i] for i, _ in g))
        for k, g in itertools.groupby(enumerate(names), key=lambda pair: pair[1])
    ]
    assert runs == [
        ("keyword", "def"),
        ("blank", " "),
        ("name", "f"),
        ("operator", "("),
        ("name", "a"),
        ("operator", "):"),
        ("blank", "  "),
        ("comment", "# ok"),
        ("blank", "\n    "),
        ("string", '"""two\n    lines"""'),
        ("blank", "\n    "),
        ("keyword", "return"),
        ("blank", " "),
        ("name", "a"),
        ("blank", " "),
        ("operator", "+"),
        ("blank", " "),
        ("number", "1.5"),
        ("blank", "\n"),
    ]
    assert [source[start:].split("\n")[0] for start in starts] == [
        "def f(a):  # ok",
        '    """two',
        "    return a + 1.5",
    ]
    text = python_source.colored(source, found)
    assert text.count("\x1b[") > 5
    plain = text
    while "\x1b" in plain:
        head, _, tail = plain.partition("\x1b")
        plain = head + tail[tail.index("m") + 1 :]
    assert plain == source


@pytest.mark.parametrize("source", ['f"{x!r:>{width}} {y}"\n', "x = f'''a\n{b}\nc'''\n"])
def test_formatted_strings_are_strings(source):
    found, _ = part("python_source").labels(source)
    classes = part("python_source").CLASSES
    assert {classes[tag] for tag in found} <= {"string", "name", "operator", "blank"}
    assert classes[found[source.index("f")]] == "string"


def test_the_mean_of_losses_and_the_rate():
    training, plots = part("training"), part("plots")
    positions, means, width = plots.running_mean([1.0, 2.0, 3.0, 4.0], width=2)
    assert positions.tolist() == [1.5, 2.5, 3.5] and means.tolist() == [1.5, 2.5, 3.5]
    assert width == 2

    class Args:
        lr, steps = 0.4, 100

    rate = training.falling_rate(Args)
    assert rate(0) == rate(50) == 0.4 and rate(75) == pytest.approx(0.2)
    assert 0 < rate(99) < 0.01
    score = training.Score("perplexity", ".2f", math.exp)
    assert score(0.0) == "1.00"


def test_a_table_row_of_several_seeds(examples):
    tool = runpy.run_path(str(examples.parent / "tools/example_seeds.py"))
    line = "summary  digits: test accuracy {:.2%} (torch.nn {:.2%}); 1.06 times as fast; wrote a.pt"
    printed = [line.format(*pair) for pair in ((0.97, 0.96), (0.99, 0.97))]
    row = tool["table_row"]("digits", list(map(tool["headline"], printed)))
    cells = "98.00 % (97.00 to 99.00) | 96.50 % (96.00 to 97.00)"
    assert row == f"| digits | test accuracy | {cells} | yes |"
    assert tool["headline"]("summary  copy_task: bits copied: full BPTT 8; wrote a.png") is None


def test_an_excerpt_shows_every_class_that_a_program_has():
    python_source = part("python_source")
    plain = "".join(f"name{n} = name{n + 1}\n" for n in range(30))
    rich = '# what\ndef function(a):\n    return a + 1000 * "text"\n'
    wide = f"x = {list(range(100))}  # what\n"
    source = plain + rich + wide + plain
    texts = [(text, *python_source.labels(text)) for text in (plain, source, wide, "a = 1\n")]
    chosen, tags, place = python_source.excerpt(texts, lines=4)
    assert rich in chosen[place] and chosen[place].count("\n") == 4
    assert (chosen, tags) == texts[1][:2]
    assert python_source.excerpt(texts[3:]) == (*texts[3][:2], slice(0, 6))
    assert python_source.excerpt(texts[2:3])[2].start == 0  # nothing is narrow enough
