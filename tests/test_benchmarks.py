"""``python -m benchmarks`` measures what it says. No test looks at how long anything took."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rnn_ext

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import (  # noqa: E402
    cases,
    gate,
    limits,
    measure,
    memory,
    neighbours,
    peers,
    timing,
)
from benchmarks.cases import MODES, Case  # noqa: E402
from benchmarks.problem import calls, make_problem  # noqa: E402

sys.path.remove(str(ROOT))

TINY = Case("core", 2, 3, 4, 5, modes=MODES)
KINDS = [
    TINY,
    replace(TINY, stateful=True),
    replace(TINY, layers=2),
    replace(TINY, bidirectional=True),
    replace(TINY, layers=2, bidirectional=True, stateful=True),
    replace(TINY, batch=4, steps=9, ragged=True),
    replace(TINY, batch=4, steps=9, ragged=True, layers=2, bidirectional=True),
]


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    hurried = {"BLOCK": 1e-5, "SETTLE": 0.0, "HURRIED_ROUNDS": 3, "MOST_ROUNDS": 4}
    for name, value in hurried.items():
        monkeypatch.setattr(timing, name, value)
    yield
    torch.set_num_threads(threads)


# The table of cases


def test_cases_can_be_told_apart():
    names = [
        (c.group, c.name, cell, mode)
        for c in cases.all_cases()
        for cell in c.cells
        for mode in c.modes
    ]
    assert len(names) == len(set(names))
    assert {case.group for case in cases.all_cases()} == set(cases.GROUPS)
    assert len([case for case in cases.all_cases() if case.group == "core"]) == 10
    assert {f"{c.group}/{c.name}" for c in cases.quick_cases()} == set(cases.QUICK)
    deep = [case for case in cases.all_cases() if case.group == "deepbench"]
    assert len(deep) > 20
    assert all(cases.flops(c, c.cells[0], "inference") <= cases.CPU_SIZED for c in deep)


def test_work_by_hand():
    case = Case("core", batch=2, steps=3, inputs=5, hidden=7)
    assert cases.flops(case, "lstm", "inference") == 2 * (2 * 3) * (4 * 7) * (5 + 7)
    assert cases.flops(case, "gru", "training") == 3 * 2 * 6 * 21 * 12
    both = replace(case, layers=2, bidirectional=True)
    assert cases.flops(both, "rnn", "inference") == 2 * 6 * 7 * 2 * ((5 + 7) + (14 + 7))
    assert case.unit() == 2 * 3 * 7 * 4 and both.unit() == 4 * case.unit()


def test_ragged_cases_are_58_percent_full():
    for case in (case for case in cases.all_cases() if case.ragged):
        lengths = case.lengths()
        assert lengths == sorted(lengths, reverse=True) and lengths[0] == case.steps
        assert (
            case.tokens() == sum(lengths) == pytest.approx(0.58 * case.batch * case.steps, rel=0.02)
        )


# Numbers and results


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("cell", cases.CELLS)
@pytest.mark.parametrize("case", KINDS, ids=lambda case: f"{case.name}-{case.stateful}")
def test_libraries_get_the_same_numbers(case, cell, training):
    problem = make_problem(case, cell)
    results = []
    for library in (rnn_ext, torch.nn):
        call, name = calls(problem, problem.module(library), training)
        results.append(name(call()))
    assert results[0].keys() == results[1].keys()
    assert len(results[0]) == (
        2 + 4 * case.layers * case.directions if training else 2 + (cell == "lstm")
    )
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], msg=name)


@pytest.mark.parametrize("cell", cases.CELLS)
@pytest.mark.parametrize("case", KINDS, ids=lambda case: f"{case.name}-{case.stateful}")
def test_onnxruntime_computes_the_same(case, cell):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    problem = make_problem(case, cell)
    truth = measure.results_of(peers.torch_nn(problem, False), False)
    found = measure.results_of(peers.onnxruntime(problem, False), False)
    assert gate.check_peer(gate.errors(found, truth), torch.float32) < 1e-5


def test_a_problem_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    one, other = make_problem(TINY, "gru"), make_problem(TINY, "gru")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.input, other.input)


def test_what_peers_cannot_do_is_said(monkeypatch):
    problem = make_problem(TINY, "gru")
    with pytest.raises(peers.Unavailable, match="does not train"):
        peers.prepare("onnxruntime", problem, True)
    long = make_problem(replace(TINY, steps=40), "gru")
    with pytest.raises(peers.Unavailable, match="unrolls more than 16 steps"):
        peers.prepare("torch.compile", long, False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(peers.Unavailable, match="pip install onnx onnxruntime"):
        peers.prepare("onnxruntime", problem, False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from inside torch.compile
def test_torch_compile_computes_the_same():
    problem = make_problem(replace(TINY, steps=1, stateful=True), "gru")
    truth = measure.results_of(peers.torch_nn(problem, False), False)
    found = measure.results_of(peers.compiled(problem, False), False)
    gate.check_peer(gate.errors(found, truth), torch.float32)


# The gate


def test_the_gate():
    truth = {"output": torch.tensor([1.0, -4.0], dtype=torch.float64)}
    assert gate.errors({"output": torch.tensor([1.0, -3.0])}, truth) == {"output": 0.25}
    with pytest.raises(gate.Wrong, match="output has shape"):
        gate.errors({"output": torch.zeros(3)}, truth)
    with pytest.raises(gate.Wrong, match="output is missing"):
        gate.errors({}, truth)
    floor, dtype = {"output": 1e-6}, torch.float32
    assert gate.check_ours({"output": 3e-6}, floor, dtype) == 3e-6
    for value in (5e-6, float("nan"), float("inf")):
        with pytest.raises(gate.Wrong, match="output is off by"):
            gate.check_ours({"output": value}, floor, dtype)
    with pytest.raises(gate.Wrong):
        gate.check_peer({"output": float("nan")}, dtype)
    with pytest.raises(gate.Wrong):
        gate.check_ours({"output": 1e-9}, {"output": 0.0}, torch.float64)


def time_tiny(mode="training", names=("torch.nn",), case=TINY, **options):
    return measure.time_row(case, "gru", mode, 1, names, 0, options)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_right_row_is_timed(mode, dtype):
    row = time_tiny(mode, case=replace(TINY, dtype=dtype))
    assert "wrong" not in row and row["times"].keys() == {"rnn_ext", "torch.nn"}
    assert row["times"]["rnn_ext"]["blocks"] >= 3
    assert row["ratios"].keys() == {"torch.nn"} and "cpu kernel" in row["plan"]
    json.dumps(row)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("fault", [1.01, float("nan")])
def test_a_wrong_row_is_not_timed(monkeypatch, mode, fault):
    right = peers.ours

    def broken(problem, training):
        runner = right(problem, training)
        return peers.Runner(
            runner.call, lambda value: {n: t * fault for n, t in runner.results(value).items()}
        )

    monkeypatch.setattr(peers, "ours", broken)
    monkeypatch.setattr(timing, "alternate", None)
    row = time_tiny(mode)
    assert "output is off by" in row["wrong"] and "times" not in row


def test_a_row_without_our_kernel_is_not_timed():
    with rnn_ext.use_backend("reference"):
        row = time_tiny()
    assert "not our kernel but reference" in row["wrong"] and "times" not in row


def test_a_peer_that_fails_is_left_out(monkeypatch):
    def failing(problem, training):
        raise RuntimeError("no luck\nand more")

    monkeypatch.setitem(peers.PEERS, "unlucky", failing)
    row = time_tiny(names=("torch.nn", "unlucky"))
    assert row["skipped"] == {"unlucky": "unlucky fails: RuntimeError: no luck"}
    assert row["times"].keys() == {"rnn_ext", "torch.nn"}


def test_a_row_that_crashes_does_not_end_the_run(monkeypatch):
    def crash(*_):
        raise MemoryError

    monkeypatch.setattr(measure, "make_problem", crash)
    assert time_tiny()["wrong"] == "MemoryError: no message"


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_one_direction_beside_two(mode):
    row = time_tiny(mode, case=replace(TINY, bidirectional=True, stateful=True))
    assert row["variants"].keys() == {"one direction"} and "one direction" not in row["times"]
    assert row["variants"]["one direction"]["error"] < 1e-5
    problem = make_problem(replace(TINY, bidirectional=True), "lstm")
    both = measure.results_of(peers.torch_nn(problem, False), False)["output"]
    alone = peers.torch_nn(peers.one_direction(problem), False)
    torch.testing.assert_close(measure.results_of(alone, False)["output"], both[..., : TINY.hidden])


def test_weights_with_fewer_bits(monkeypatch):
    case = replace(TINY, batch=1, hidden=1024)

    def rounded(module, kind, factor=1):
        with torch.no_grad():
            for weight in module.parameters():
                weight.copy_(weight.bfloat16() * factor)

    monkeypatch.setattr(rnn_ext, "quantize_weights", rounded, raising=False)
    row = time_tiny("inference", case=case)
    assert row["variants"].keys() == {"bf16 weights", "int8 weights"}
    assert 1e-5 < row["variants"]["bf16 weights"]["error"] < 2e-2
    assert "variants" not in time_tiny("training", case=case)
    monkeypatch.setattr(rnn_ext, "quantize_weights", lambda module, kind: rounded(module, kind, 2))
    assert "off by" in time_tiny("inference", case=case)["wrong"]


@pytest.mark.filterwarnings("ignore:.*composed of torch operations")
def test_what_options_cost(monkeypatch):
    case = replace(TINY, options=True)
    row = time_tiny(case=case)
    assert row["variants"].keys() == {"zoneout", "weight dropout", "reset before the product"}
    assert all(found["error"] < 1e-5 for found in row["variants"].values())
    # Masks of another seed are not the same layer.
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    assert "off by" in time_tiny(case=case)["wrong"]


def test_busy_neighbours():
    """They compute while the context lasts, and are gone afterwards."""
    started = []
    right = neighbours.subprocess.Popen

    class Noted(right):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours.subprocess, "Popen", Noted)
        with pytest.raises(ZeroDivisionError), neighbours.busy(2):
            assert [process.poll() for process in started] == [None, None]
            1 / 0  # noqa: B018
    assert len(started) == 2 and all(process.returncode is not None for process in started)
    row = time_tiny("inference", case=replace(TINY, neighbours=1))
    assert row["quiet"].keys() == row["times"].keys() == {"rnn_ext", "torch.nn"}


# Timing


def test_libraries_take_turns(monkeypatch):
    monkeypatch.setattr(timing, "calls_in_a_block", lambda call: 2)
    log = []
    calls = {name: lambda name=name: log.append(name) for name in "abc"}
    samples = timing.alternate(calls, seconds=0)
    assert [len(values) for values in samples.values()] == [3, 3, 3]
    turn = "aaabbbccc"  # one untimed call and a block of two
    assert "".join(log) == turn + turn[3:] + turn[:3] + turn[6:] + turn[:6]


def test_patience_with_slow_calls(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def call():
        clock[0] += 10.0

    assert len(timing.alternate({"slow": call}, seconds=1)["slow"]) == 2


def test_short_calls_are_averaged(monkeypatch):
    monkeypatch.setattr(timing, "BLOCK", 1.0)
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def call():
        clock[0] += 0.125

    assert timing.calls_in_a_block(call) == 8
    assert timing.block(call, 8) == 0.125


def test_statistics_by_hand():
    assert timing.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0}
    assert timing.spread([7.0]) == {"median": 7.0, "q1": 7.0, "q3": 7.0}
    assert timing.ratio([1.0, 2.0, 4.0], [2.0, 4.0, 8.0])["median"] == 2.0  # drift cancels


# Limits


def fake_limits(threads=1):
    read = {1 << 10: 100.0, 1 << 20: 10.0}
    return limits.Limits(threads, {"float32": 1000.0, "float64": 500.0}, read)


def test_bandwidth_between_the_measured_sizes():
    found = fake_limits()
    assert found.bandwidth(1) == found.bandwidth(1 << 10) == 100
    assert found.bandwidth(1 << 20) == found.bandwidth(1 << 30) == 10
    assert found.bandwidth(1 << 15) == pytest.approx(1000**0.5)


def test_limit_by_hand():
    """One sequence of an RNN: the projection is arithmetic, the recurrence reads its weights."""
    case = Case("core", batch=1, steps=10, inputs=4, hidden=4)
    project, recur, read = 2 * 10 * 16 / 1000, 2 * 10 * 16 / 1000, 10 * 16 * 4 / 100
    assert read > recur and project > 16 * 4 / 100 / 10
    project = max(project, 16 * 4 / 100)
    seconds, bound = fake_limits().seconds(case, "rnn", "inference")
    assert seconds == pytest.approx(project + read) and bound == "weights"
    seconds, _ = fake_limits().seconds(case, "rnn", "training")
    assert seconds == pytest.approx(2 * (project + read) + 2 * 2 * 10 * 16 / 1000)
    wide = replace(case, batch=1000)
    flops = cases.flops(wide, "rnn", "inference")
    assert fake_limits().seconds(wide, "rnn", "inference") == (flops / 1000, "arithmetic")
    assert fake_limits().seconds(replace(case, dtype="bfloat16"), "rnn", "inference") is None
    saved = json.loads(json.dumps(fake_limits().to_json()))
    assert limits.Limits.from_json(saved) == fake_limits()


def test_rates_are_measured(monkeypatch):
    try:
        rates = limits.compile_rates()
    except limits.NoCompiler as reason:
        pytest.skip(str(reason))
    monkeypatch.setattr(limits, "ATTEMPTS", 2)
    monkeypatch.setattr(limits, "ATTEMPT_SECONDS", 2e-4)
    monkeypatch.setattr(limits, "SIZES", [1 << 14, 1 << 18])
    assert rates.flops_per_repeat(4) == 2 * rates.flops_per_repeat(8) > 0
    found = limits.measure(rates, 2)
    assert found.threads == 2 and found.read.keys() == {1 << 14, 1 << 18}
    assert min(*found.flops.values(), *found.read.values()) > 1e6
    sentence = limits.blas(rates)
    assert "torch.mm reaches" in sentence["text"] and sentence["mm"] > 0


@pytest.mark.parametrize(
    "share, text",
    [(0.95, "runs a fast path"), (0.33, "does NOT run"), (1.5, "too busy to tell")],
)
def test_a_slow_blas_is_said(monkeypatch, share, text):
    monkeypatch.setattr(limits, "multiply_adds", lambda *_: None)
    monkeypatch.setattr(limits, "best_rates", lambda *_: {"mm": share * 8e9, "peak": 8e9})
    found = limits.blas(None)
    assert text in found["text"] and f"{share:.0%}" in found["text"]


def test_no_compiler_is_said(monkeypatch):
    monkeypatch.setattr(limits.shutil, "which", lambda name: None)
    with pytest.raises(limits.NoCompiler, match="install gcc or clang"):
        limits.compile_rates()
    monkeypatch.undo()
    monkeypatch.setenv("CC", "false")
    with pytest.raises(limits.NoCompiler, match="could not compile"):
        limits.compile_rates()


# Memory


def test_memory_is_counted():
    case = replace(TINY, batch=32, steps=50, inputs=64, hidden=64)
    with memory.Worker() as worker:
        used = {cell: worker.measure("rnn_ext", case, cell, 1) for cell in cases.CELLS}
        peer = worker.measure("torch.nn", case, "gru", 1)
        failing = worker.measure("numpy", case, "gru", 1)
    states = {cell: found["saved"] / case.unit() for cell, found in used.items()}
    for cell, least in {"rnn": 1, "gru": 5, "lstm": 6}.items():
        assert least <= states[cell] <= least + 0.2  # and the first and last states
    assert peer["saved"] > case.unit()
    assert failing.startswith("KeyError")
    if sys.platform == "linux":
        assert used["lstm"]["peak"] > used["lstm"]["saved"] / 2
