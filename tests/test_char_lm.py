"""examples/char_lm.py from the outside: what it prints and writes, resuming, Ctrl-C, bad input."""

import importlib
import io
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = ["--hidden", "12", "--batch", "4", "--window", "16", "--steps", "40", "--length", "30"]


@pytest.fixture
def example(examples):
    """The modules char_lm and outputs."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    return importlib.import_module("char_lm"), importlib.import_module("outputs")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog.\n" * 100, encoding="utf-8")
    return path


@pytest.fixture
def run(run_example, text):
    """Run the example in this process, in tmp_path, on text; return (exit code, stdout, stderr)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda *options: run_example("char_lm", *TINY, "--text", text, *options)
    torch.set_num_threads(threads)


def load(path):
    return torch.load(path, weights_only=True)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_equal(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    else:
        assert a == b


def test_quick_run_as_a_user_starts_it(tmp_path):
    command = [sys.executable, "-W", "error", EXAMPLES / "char_lm.py", "--quick", "--steps", "60"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, err
    assert "tokens/s: rnn_ext" in err and "loss" in err
    assert "kernel   LSTM(64, 64)" in out
    assert float(re.search(r"held-out perplexity +([\d.]+)", out)[1]) < 30  # of 103 characters
    assert float(re.search(r"losses differ by at most (\S+) in", out)[1]) < 1e-4
    assert re.search(r"rnn_ext trains \d+\.\d\d times as fast as torch.nn", out)
    png = (tmp_path / "runs/char_lm/lstm-quick.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 20_000
    assert (tmp_path / "runs/char_lm/lstm-quick.pt").is_file()


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_both_libraries_learn_the_same(run, cell):
    code, out, err = run(
        "--cell", cell, "--layers", 2, "--lr", 0.02, "--checkpoint", "out/model.pt"
    )
    assert code == 0, err
    learners = load("out/model.pt")["learners"]
    ours, theirs = learners["rnn_ext"]["losses"], learners["torch.nn"]["losses"]
    assert len(ours) == len(theirs) == 40
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 1e-4
    assert sum(ours[-5:]) < 0.9 * sum(ours[:5])
    assert f"{cell}, 2 layers of 12 units" in out


def test_held_out_loss_is_that_of_the_whole_held_out_text(example):
    corpora, language = example[0].corpora, example[0].language
    torch.manual_seed(0)
    model = language.LanguageModel(torch.nn.GRU, 7, 5, 1)
    streams = torch.randint(7, (34, 3))
    windows = corpora.Sequential(streams, 10, whole=True)
    args = SimpleNamespace(lr=0.1, clip=1.0)
    learner = language.LanguageLearner(model, args, None, windows, "token")
    with torch.no_grad():
        whole = language.cross_entropy(model(streams[:-1])[0], streams[1:]).item()
        assert abs(learner.evaluate() - whole) <= 1e-5


def table_in(out):
    return re.search(r"^training loss.*^speed [^\n]*", out, re.MULTILINE | re.DOTALL)[0]


def sample_in(out):
    return re.search(r"^sample.*(?=^summary)", out, re.MULTILINE | re.DOTALL)[0]


def test_resumed_training_equals_an_uninterrupted_one(run):
    assert run("--checkpoint", "whole.pt")[0] == 0
    assert run("--checkpoint", "parts.pt", "--steps", 17)[0] == 0
    code, out, _ = run("--checkpoint", "parts.pt", "--resume")
    assert code == 0
    whole, parts = load("whole.pt"), load("parts.pt")
    for learner in [*whole["learners"].values(), *parts["learners"].values()]:
        learner["held_out"] = learner["held_out"][-1]  # they were evaluated at other steps too
        assert len(learner["seconds"]) == 40 and min(learner.pop("seconds")) > 0
    assert_equal(whole, parts)
    again = run("--checkpoint", "parts.pt", "--resume")[1]
    assert sample_in(again) == sample_in(out)
    assert table_in(again) == table_in(out)  # also the times, which are those of all steps


def test_without_comparison(run):
    code, out, err = run("--no-compare", "--temperature", 0, "--prefix", "quick ")
    assert code == 0, err
    assert "torch.nn" not in out
    assert "'quick ':\n\nquick " in out
    assert list(load("runs/char_lm/lstm.pt")["learners"]) == ["rnn_ext"]


def test_ctrl_c_evaluates_and_saves(tmp_path, text):
    options = ["--text", text, *TINY, "--steps", "1000000"]
    command = [sys.executable, "-W", "error", EXAMPLES / "char_lm.py", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        seen = b""
        while b"loss" not in seen:  # the progress bar is moving
            seen += (character := process.stderr.read(1))
            assert character, seen.decode()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err.decode()
    step = int(re.search(r"stopped at step ([\d,]+); --resume", out.decode())[1].replace(",", ""))
    for learner in load(tmp_path / "runs/char_lm/lstm.pt")["learners"].values():
        assert len(learner["losses"]) == learner["held_out"][-1][0] == step < 1000000
    assert "held-out perplexity" in out.decode() and "sample" in out.decode()
    assert (tmp_path / "runs/char_lm/lstm.png").is_file()


def refused(run, folder, options, words):
    """The example must stop with one sentence that holds words, and leave folder as it was."""
    before = files(folder)
    code, _, err = run(*options)
    assert code == 2
    assert words in err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert files(folder) == before and not (folder / "runs").exists()
    return err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read input.txt: No such file or directory"),
        (b"", "input.txt is empty"),
        (b"a few words", "input.txt has 11 characters, but --batch 4 and --window 16 take 76"),
        (b"caf\xe9 " * 100, "input.txt is not UTF-8 text (byte 3 cannot be decoded)"),
    ],
)
def test_bad_text(run, tmp_path, content, words):
    if content is not None:
        (tmp_path / "input.txt").write_bytes(content)
    refused(run, tmp_path, ["--text", "input.txt"], words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--text", "."], "cannot read .: Is a directory"),
        (["--prefix", "the QUICK"], "--prefix has 'C'"),
        (["--cell", "transformer"], "argument --cell: invalid choice"),
        (["--hidden", "0"], "argument --hidden: invalid positive int value: '0'"),
        (["--lr", "nan"], "argument --lr: invalid positive float value: 'nan'"),
        (["--temperature", "-1"], "argument --temperature: invalid non-negative float value"),
        (["--epochs", "1", "--steps", "2"], "not allowed with argument"),
        (["--device", "warp"], "device 'warp' cannot be used here; try --device cpu"),
        (["--checkpoint", "text.txt/model.pt"], "cannot create the folder text.txt"),
        (["--resume"], "there is no checkpoint runs/char_lm/lstm.pt"),
    ],
)
def test_bad_option(run, tmp_path, options, words):
    refused(run, tmp_path, options, words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cell", "gru"], "trained with cell lstm, not gru"),
        (["--hidden", "13"], "trained with hidden 12, not 13"),
        (["--no-compare"], "trained with no-compare False, not True"),
        (["--text", EXAMPLES / "char_lm.py"], "trained with another text"),
    ],
)
def test_checkpoint_of_another_training(run, tmp_path, options, words):
    assert run("--steps", 1, "--checkpoint", "model.pt", "--plot", "loss.png")[0] == 0
    options = ["--checkpoint", "model.pt", "--resume", *options]
    refused(run, tmp_path, options, words)


class Intruder:
    def __reduce__(self):
        return os.mkdir, ("intruder",)


def broken_checkpoints(good):
    """Contents that are not a checkpoint, by name; good is one that is."""
    middle = len(good) // 2
    yield "empty", b""
    yield "truncated", good[:middle]
    yield "flipped bits", good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :]
    yield "text", b"not a checkpoint at all\n"
    yield "pickle", pickle.dumps({"kind": "something else"})
    torch.save(Intruder(), file := io.BytesIO())
    yield "code", file.getvalue()


def test_damaged_checkpoint(run, tmp_path):
    path = tmp_path / "model.pt"
    options = ["--checkpoint", "model.pt", "--plot", "loss.png"]
    assert run("--steps", 1, *options)[0] == 0
    good = path.read_bytes()
    for name, content in broken_checkpoints(good):
        path.write_bytes(content)
        err = refused(run, tmp_path, [*options, "--resume"], "model.pt is damaged")
        assert not (tmp_path / "intruder").exists(), (name, err)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda saved: [1, 2], "model.pt is no checkpoint of this example"),
        (lambda saved: {"kind": "another example"}, "model.pt is no checkpoint of this example"),
        (lambda saved: saved | {"learners": {}}, "model.pt is damaged"),
        (lambda saved: saved | {"rng": torch.zeros(3)}, "model.pt is damaged"),
    ],
)
def test_foreign_checkpoint(run, tmp_path, change, words):
    options = ["--checkpoint", "model.pt", "--plot", "loss.png"]
    assert run("--steps", 1, *options)[0] == 0
    torch.save(change(load("model.pt")), "model.pt")
    refused(run, tmp_path, [*options, "--resume"], words)


def test_exploding_loss_stops_without_saving(run, tmp_path):
    code, _, err = run("--lr", "1e30")
    assert code == 2
    assert "the loss became" in err and "lower --lr" in err
    assert not list(tmp_path.rglob("*.pt"))


def test_failing_write_leaves_the_old_file(example, tmp_path):
    _, outputs = example
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"new")
        raise OSError("no space left")

    with pytest.raises(outputs.InputError, match="no space left"):
        outputs.write_atomically(path, write)
    assert files(tmp_path) == {path: b"old"}
