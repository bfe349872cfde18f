"""The benchmark group "online": its rows are checked; no test looks at how long anything took."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from streams import bptt

import rnn_ext

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import cases, measures, online, plots, report, timing  # noqa: E402
from benchmarks.cases import Case  # noqa: E402

sys.path.remove(str(ROOT))

TINY = Case("online", 2, 1, 4, 5, modes=cases.ONLINE)
PEAKS = {"threads": 1, "flops": {"float32": 1e11}, "read": {}}


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    threads = torch.get_num_threads()
    hurried = {"BLOCK": 1e-5, "SETTLE": 0.0, "HURRIED_ROUNDS": 3, "MOST_ROUNDS": 4}
    for name, value in hurried.items():
        monkeypatch.setattr(timing, name, value)
    yield
    torch.set_num_threads(threads)


def row(cell, mode, case=TINY):
    return online.time_row(case, cell, mode, 1, 0.0, None)


@pytest.mark.parametrize("mode", cases.ONLINE)
@pytest.mark.parametrize("cell", cases.CELLS)
def test_rows(cell, mode):
    found = row(cell, mode, replace(TINY, steps=3))
    assert "wrong" not in found and found["flops"] > 0
    peers = {"rnn_ext"} if mode == "chunked" else {"rnn_ext", "torch.nn"}
    assert set(found["times"]) == set(found["errors"]) == peers
    assert ("exact" in found.get("variants", {})) == (mode == "chunked")


@pytest.mark.parametrize("cell", cases.CELLS)
def test_the_peer_computes_the_gradients_of_bptt(cell):
    problem = online.Problem(TINY, cell)
    found = problem.results(online.InTorch, "exact", torch.float64)
    module = problem.module(torch.float64)
    h, gradients = bptt(module, problem.x.double(), problem.d_h.double())
    assert (found["h"] - h).abs().max() <= 1e-12
    for name, gradient in gradients.items():
        assert (found[f"gradient of {name}"] - gradient).abs().max() <= 1e-12


@pytest.mark.parametrize("mode", cases.ONLINE)
def test_nothing_wrong_is_timed(mode, monkeypatch):
    class Broken(rnn_ext.online.RTRL):
        def accumulate(self, d_h):
            super().accumulate(1.001 * d_h)

    monkeypatch.setattr(rnn_ext.online, "RTRL", Broken)
    found = row("gru", mode)
    assert "gradient of" in found["wrong"] and "times" not in found


def test_work_by_hand():
    """P of a GRU with I = 4, H = 5; the LSTM has two states; a product once in 32 steps."""
    parameters = 3 * 5 * (4 + 5 + 2)
    of_gru = 2 * parameters * (4 * 5 + 2 * 5 * 5 / 32 + 32)
    of_lstm = 2 * parameters / 3 * 4 * (4 * 10 + 2 * 10 * 10 / 32 + 32)
    assert cases.flops(TINY, "gru", "exact") == pytest.approx(of_gru)
    assert cases.flops(TINY, "lstm", "exact") == pytest.approx(of_lstm)
    assert cases.flops(TINY, "gru", "snap1") == 4 * 2 * parameters
    (product,) = cases.products(TINY, "lstm", "exact")
    assert product.weight_bytes == product.working_set == 4 * 2 * 10 * parameters / 3 * 4
    assert cases.PENDING == rnn_ext._C.rtrl_pending_steps


def test_tables_promises_and_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        row(cell, mode, case)
        for mode in cases.ONLINE
        for cell in ("rnn", "lstm")
        for case in (TINY, replace(TINY, hidden=6))
    ]
    record = {"rows": rows, "limits": [PEAKS], "blas": None, "peers": ["torch.nn"]}
    lines = []
    table = report.TextTable(report.peers_by_section(record), lines.append)
    for each in rows:
        table.add(each)
    assert sum("real-time recurrent learning" in line for line in lines) == 3
    assert sum("as fast as exact" in line for line in lines) == 4
    large = Case("online", 16, 1, 128, 128)
    bound = {"seconds": 1e-9, "bound": "weights"}
    fields = {"case": large.name, "group": "online", "limit": bound}
    record["rows"] = [each | fields for each in rows if each["mode"] == "exact"][:1]
    found = {result.text: result for result in measures.results(record)}
    share = found["exact RTRL, share of what arithmetic and memory allow, one thread, H 128, B 16"]
    assert share.target == 0.7 and share.rows == 1 and share.needed == 3
    figure = plots.online(rows)
    figure.savefig(tmp_path / "online.png")
    assert [len(axes.lines) for axes in figure.axes] == [3, 3, 4]
