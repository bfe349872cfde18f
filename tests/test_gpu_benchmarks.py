"""What `make gpu` measures and reports, as far as it can be checked without a GPU."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import measure, report
from benchmarks.gpu.cases import Case, all_cases
from benchmarks.gpu.limits import Limits

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("gpu", ROOT / "tools/gpu.py")
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


def case(cell="lstm", batch=16, steps=100, hidden=512, mode="training", dtype="float16"):
    return Case("deepbench-training", cell, batch, steps, hidden, hidden, mode, dtype)


@pytest.fixture
def h200():
    limits = object.__new__(Limits)
    limits.multiprocessors = 132
    limits.flops = {"bfloat16": 8e14, "float16": 8e14, "tf32": 4e14}
    limits.bytes_per_second, limits.sync, limits.beta = 4.3e12, 0.3e-6, 100e9
    return limits


def row(case, ratio, seconds=1e-3):
    fields = ("cell", "mode", "dtype", "batch", "steps", "inputs", "hidden", "group")
    return {name: getattr(case, name) for name in fields} | {
        "case": case.name,
        "in_cudnn_region": case.in_cudnn_region,
        "seconds": {"rnn_ext": seconds, "torch.nn": seconds * ratio},
        "ratios": {"torch.nn": ratio},
        "us_per_step": 10.0,
        "fraction_of_limit": 0.5,
        "peak_bytes": {"rnn_ext": 1, "torch.nn": 2},
    }


def test_every_case_is_named_once_and_the_lists_are_whole():
    cases = all_cases()
    assert len({(c.group, c.name) for c in cases}) == len(cases)
    names = {c.name for c in cases}
    assert "lstm-b16-t1024-i768-h768-training-bfloat16" in names
    assert "gru-b4096-t64-i128-h256-training-float16" in names
    assert "rnn-b1-t1-i256-h256-inference-tf32" in names
    assert "gru-b32-t1500-i2816-h2816-training-bfloat16" in names
    assert "lstm-b1-t25-i2048-h2048-inference-float16" in names


@pytest.mark.parametrize(
    "change, inside",
    [
        ({}, True),
        ({"dtype": "bfloat16"}, False),
        ({"cell": "gru"}, False),
        ({"hidden": 1152}, False),
        ({"hidden": 500}, False),
        ({"batch": 12}, False),
        ({"batch": 256}, False),
    ],
)
def test_the_region_where_cudnn_keeps_weights_on_chip(change, inside):
    assert case(**change).in_cudnn_region == inside


def test_the_limit_grows_with_the_work(h200):
    def seconds(**change):
        return h200.seconds(case(**change))

    assert 0.4e-6 * 100 < seconds(mode="inference") < 2e-6 * 100  # steps cannot be faster than that
    assert seconds(mode="inference") < seconds()
    assert seconds(hidden=512) < seconds(hidden=1024) < seconds(hidden=4096)
    assert seconds(batch=16) < seconds(batch=128)
    assert seconds(steps=100) < seconds(steps=200)


def test_a_report_counts_losses_and_goals(tmp_path):
    bf16 = [row(case(dtype="bfloat16", batch=b), ratio) for b, ratio in ((16, 4.0), (32, 1.0))]
    rows = [*bf16, row(case(), 0.9), {**row(case(batch=8), 1), "wrong": "off by 1"}]
    del rows[-1]["seconds"]
    goals = {what: (reached, count) for what, reached, _, count in report.goals(rows)}
    assert goals["training in bf16, DeepBench, against cuDNN"] == (pytest.approx(2.0), 2)
    assert goals["inside cuDNN's persistent fp16 region"] == (pytest.approx(0.9), 1)
    lines = report.summary(rows)
    assert lines[-1] == "4 rows, 1 wrong, 1 slower than torch.nn"
    assert any("0.90x over 1 rows (goal 1.0x, NOT reached)" in line for line in lines)
    result = {
        "date": "2026-01-02",
        "command": "python -m benchmarks.gpu",
        "machine": {"gpu": "A GPU"},
        "limits": {},
        "latency": {"cluster barrier, 8 blocks": 0.25},
        "summary": lines,
        "rows": rows,
        "not_run": ["x"],
    }
    files = report.write(result, tmp_path / "a-gpu")
    assert json.loads(files[0].read_text())["rows"] == rows
    page = files[1].read_text()
    assert "| deepbench-training | training | bfloat16 | 2 | 2.00 |  | 0 |" in page
    assert "| deepbench-training | training | float16 | 1 | 0.90 |  | 1 |" in page
    assert "**0.90** (slower)" in page and "wrong: off by 1" in page
    assert "1 cases were not run" in page and "cluster barrier, 8 blocks | 0.25" in page


def test_pictures_need_matplotlib_and_nothing_else_does(tmp_path, monkeypatch, capsys):
    result = {"date": "2026-01-02", "machine": {"gpu": "A GPU"}, "rows": [row(case(), 1.2)]}
    base = tmp_path / result["date"]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        assert report.pictures(result, base) == []
    assert "no pictures: pip install matplotlib" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    drawn = report.pictures(result, base)
    assert [path.name for path in drawn] == ["2026-01-02-speed.png", "2026-01-02-limit.png"]
    assert all(path.read_bytes()[1:4] == b"PNG" for path in drawn)
    assert report.pictures(result | {"rows": []}, base) == []


class Event:
    """Of torch.cuda, by the wall clock."""

    def __init__(self, enable_timing):
        self.time = 0.0

    def record(self):
        self.time = gpu.time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.time - self.time) * 1e3


@pytest.fixture
def on_the_cpu(monkeypatch):
    """measure() as it is, on the CPU: a stand-in for what torch.cuda times and counts."""
    monkeypatch.setattr(measure, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_a_row_is_checked_then_timed(cell, mode, h200, on_the_cpu):
    small = Case("speech", cell, 3, 5, 8, 16, mode, "tf32")
    found = measure.measure(small, h200, 0.01)
    assert "wrong" not in found and found["plan"].startswith("cpu kernel")
    assert set(found["seconds"]) == {"rnn_ext", "torch.nn"} == {*found["ratios"], "rnn_ext"}
    assert found["us_per_step"] == pytest.approx(found["seconds"]["rnn_ext"] / 5 * 1e6)
    assert found["fraction_of_limit"] > 0 and len(found["errors"]) == 2
    json.dumps(found)


def test_a_wrong_result_is_not_timed(h200, on_the_cpu, monkeypatch):
    make = measure.make_module

    def broken(library, case, dtype):
        module = make(library, case, dtype)
        if library is measure.rnn_ext:
            module.weight_hh_l0.data[0] += 0.5
        return module

    monkeypatch.setattr(measure, "make_module", broken)
    found = measure.measure(Case("rl", "gru", 3, 5, 8, 16, "training", "tf32"), h200, 0.01)
    assert found["wrong"].startswith("off by") and "seconds" not in found


def python(text, **variables):
    return gpu.Job("job", [sys.executable, "-c", text], variables)


def test_a_stage_runs_its_jobs_and_says_what_came_last(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "LOGS", tmp_path)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a")
    good = python(
        "import os; print(os.environ['A'], os.environ.get('TORCH_CUDA_ARCH_LIST'))", A="1"
    )
    bad = python("print('half way'); raise SystemExit(3)")
    for several in (gpu.in_turn, gpu.together):
        outcome = several("stage", [good, bad], 60)
        assert not outcome.passed and outcome.notes == ["job: 1 None", "job: half way"]
        assert several("stage", [good], 60).passed
    assert "[stage: job] half way\n" in (tmp_path / "stage.log").read_text()
    assert "[stage: job] half way\n" in capsys.readouterr().out


def test_a_job_is_stopped_when_its_time_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LOGS", tmp_path)
    endless = python("import time; print('began', flush=True); time.sleep(60)")
    start = gpu.time.monotonic()
    outcome = gpu.run("stage", endless, 2)
    assert gpu.time.monotonic() - start < 30
    assert not outcome.passed and outcome.notes[0].startswith("job: began (stopped after ")
    assert gpu.in_turn("stage", [endless], 1).notes == ["job: no time left"]


def test_all_stages_are_run_and_summed_up_unless_the_build_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LOGS", tmp_path)
    fine, failed = gpu.Outcome(True, ["12 passed"]), gpu.Outcome(False, ["a: 1 failed", "b: fine"])
    stages = {"build": (lambda s: fine, 1), "tests": (lambda s: failed, 1)}
    monkeypatch.setattr(gpu, "STAGES", stages | {"bench": (lambda s: fine, 1)})
    lines = gpu.table(gpu.run_stages(gpu.STAGES, 1)).splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["build", "passed"], ["tests", "FAILED"]]
    assert lines[3].strip() == "b: fine" and lines[4].startswith("bench        passed")
    monkeypatch.setattr(gpu, "STAGES", {"build": (lambda s: failed, 1), "tests": (None, 1)})
    assert list(gpu.run_stages(gpu.STAGES, 1)) == ["build"]


def test_every_device_test_is_in_exactly_one_job(monkeypatch, tmp_path):
    jobs = []
    monkeypatch.setattr(gpu, "together", lambda stage, given, seconds: jobs.extend(given))
    gpu.tests(1)
    layers = [job.command[-1] for job in jobs if "-k" in job.command]
    assert len(jobs) == len(layers) + 1  # the rest in one
    for backend in ("cuda-step", "cuda-persistent", "auto"):
        for dtype in ("float32", "float64", "float16", "bfloat16", ""):
            name = f"test[{backend}-lstm-{dtype}-shape]"
            words = {
                w: repr(w in name) for w in ("cuda-step", "cuda-persistent", "float32", "float64")
            }
            found = 0
            for expression in layers:
                for word, value in words.items():
                    expression = expression.replace(word, value)
                found += eval(expression)
            assert found == 1, name
