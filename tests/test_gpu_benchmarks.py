"""What `make gpu` measures and reports, as far as it can be checked without a GPU."""

import json

import pytest

from benchmarks.gpu import report
from benchmarks.gpu.cases import Case, all_cases
from benchmarks.gpu.limits import Limits


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
    assert "**0.90** (slower)" in page and "wrong: off by 1" in page
    assert "1 cases were not run" in page and "cluster barrier, 8 blocks | 0.25" in page
