"""``python -m benchmarks``: tables, plots, comparisons and the command line."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import (  # noqa: E402
    __main__,
    cases,
    compare,
    gate,
    limits,
    machine,
    measure,
    plots,
    report,
    rows,
    timing,
)

sys.path.remove(str(ROOT))

TINY = cases.Case("core", 2, 3, 4, 5, modes=cases.MODES)


def fake_row(group="core", case="b1-t1-i1-h1", cell="gru", mode="inference", ratio=2.0, **changes):
    quartiles = {"median": 1e-3, "q1": 0.9e-3, "q3": 1.2e-3, "best": 0.9e-3, "blocks": 9}
    slower = {key: value * ratio for key, value in quartiles.items()}
    row = {"group": group, "case": case, "cell": cell, "mode": mode, "dtype": "float32"}
    row |= {
        "threads": 2,
        "flops": 5e7,
        "skipped": {},
        "limit": {"seconds": 5e-4, "bound": "weights"},
    }
    row["times"] = {"rnn_ext": quartiles, "torch.nn": slower}
    row["ratios"] = {"torch.nn": {"median": ratio, "q1": 0.9 * ratio, "q3": 1.05 * ratio}}
    return row | changes


def fake_memory(case="b1-t1-i1-h1", ours=6_000_000, theirs=9_000_000):
    used = {
        "rnn_ext": {"saved": ours, "peak": 2 * ours},
        "torch.nn": {"saved": theirs, "peak": 2 * theirs},
    }
    row = fake_row(case=case, mode="memory", memory=used, unit=1_000_000)
    return {key: value for key, value in row.items() if key not in ("times", "ratios", "limit")}


def fake_limits(threads):
    return limits.Limits(threads, {"float32": 1e11}, dict.fromkeys(limits.SIZES, 1e10))


def fake_record(table):
    return {
        "format": 1,
        "date": "2026-01-02T03:04:05+00:00",
        "command": "python -m benchmarks",
        "machine": machine.describe() | {"busy": False, "commit": "0123456789"},
        "peers": ["torch.nn", "onnxruntime"],
        "blas": {"text": "torch.mm reaches 33%"},
        "limits": [fake_limits(2).to_json()],
        "notices": [],
        "rows": table,
    }


def test_every_loss_is_marked():
    assert rows.losses(fake_row(ratio=1.5)) == []
    assert rows.losses(fake_row(ratio=0.9)) == ["SLOWER than torch.nn"]
    assert rows.losses(fake_row(ratio=0.97)) == ["SLOWER than torch.nn (within the spread)"]
    assert rows.losses(fake_memory()) == []
    worse = rows.losses(fake_memory(ours=20_000_000))
    assert worse == ["saves MORE than torch.nn", "higher PEAK than torch.nn"]
    wrong = fake_row(cell="lstm", wrong="output is off by 1")
    del wrong["times"], wrong["ratios"]
    record = fake_record([fake_row(ratio=0.9), fake_row(case="b2", ratio=4), wrong, fake_memory()])
    printed = []
    table = report.TextTable(record["peers"], printed.append)
    for row in record["rows"]:
        table.add(row)
    for text in ("\n".join(printed), report.markdown(record)):
        assert text.count("SLOWER than torch.nn") >= 1 and "WRONG, not timed" in text
        assert "50%" in text and "4.00x" in text
    summary = report.text_summary(record)
    assert "slower than torch.nn in 1 of 2 rows" in summary and "1 rows are WRONG" in summary
    assert "torch.mm reaches 33%" in report.markdown(record)


def test_geometric_means():
    table = [fake_row(ratio=2.0), fake_row(case="b2", ratio=8.0), fake_row(cell="rnn", ratio=3.0)]
    means = rows.means(table)["core", "inference", 2]["torch.nn"]
    assert means["gru"] == (pytest.approx(4.0), 2) and means["rnn"] == (pytest.approx(3.0), 1)


def test_texts():
    assert report.duration(1.234e-6) == "1.23 us" and report.duration(0.0456) == "45.6 ms"
    assert report.duration(2.5) == "2.50 s" and report.duration(4e-10) == "0.00 us"
    assert [report.times(x) for x in (0.5, 9.96, 123.4)] == ["0.50x", "10.0x", "123x"]


def test_comparison():
    before = fake_record([fake_row(ratio=2.0), fake_row(case="b2", ratio=2.0), fake_memory()])
    after = fake_record([fake_row(ratio=3.0), fake_row(case="b2", ratio=0.9), fake_row(case="b3")])
    after["machine"] = after["machine"] | {"cpu": "another"}
    text = compare.text(before, after)
    assert "not the same cpu" in text and "2 rows are in one of the two only" in text
    first, second = (line for line in text.splitlines() if "core/" in line)
    assert "1.50x  <- faster" in first and "0.45x  <- SLOWER; now SLOWER than torch.nn" in second
    assert "<-" not in compare.text(before, before)


def rows_of(some):
    table = []
    for case in some:
        for cell in case.cells:
            names = case.group, case.name, cell
            table += [fake_row(*names, mode) for mode in case.modes if mode != "memory"]
            table += [fake_memory(case.name)] * ("memory" in case.modes)
    return table


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    every_group = {case.group: case for case in cases.all_cases()}
    pictures = plots.draw(fake_record(rows_of(every_group.values())), tmp_path)
    assert [title.split(",")[0] for title, _ in pictures] == ["speedup", "throughput", "memory"]
    lists = [every_group["deepbench"], every_group["torch-rnn"]]
    assert plots.one_each(rows_of(lists)) and not plots.one_each(rows_of(every_group.values()))
    pictures += plots.draw(fake_record(rows_of(lists)) | {"limits": []}, tmp_path / "..")
    for _, path in pictures:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_a_picture_is_not_longer_than_a_page():
    table = rows_of(cases.all_cases())
    shared = plots.parts(table)
    assert sum(map(len, shared)) == len(table) and len(shared) > 1
    for part in shared:
        assert len({row["group"] for row in part}) == 1 or len(plots.places(part)[0]) <= 48


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """The command with one tiny case and without measuring limits, in a folder of its own."""
    monkeypatch.setattr(cases, "GROUPS", {"core": ("tiny", lambda: [TINY])})
    monkeypatch.setattr(__main__, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(limits, "compile_rates", lambda: None)
    monkeypatch.setattr(limits, "measure", lambda rates, threads: fake_limits(threads))
    monkeypatch.setattr(limits, "blas", lambda rates: {"text": "torch.mm reaches 33%"})
    for name, value in {
        "BLOCK": 1e-5,
        "SETTLE": 0.0,
        "HURRIED_ROUNDS": 3,
        "MOST_ROUNDS": 4,
    }.items():
        monkeypatch.setattr(timing, name, value)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda *options: __main__.main(["--seconds", "0", *map(str, options)])
    torch.set_num_threads(threads)


def test_a_run_from_end_to_end(tool, tmp_path, capsys):
    assert tool("--peers", "torch.nn", "--threads", 1, 2, "--modes", "inference", "--save") == 0
    out = capsys.readouterr().out
    assert "core, inference, 1 thread: tiny" in out and "b2-t3-i4-h5" in out
    assert "torch.mm reaches 33%" in out
    record = json.loads((tmp_path / "runs/benchmarks/results.json").read_text())
    assert [(row["threads"], row["cell"]) for row in record["rows"]] == [
        (threads, cell) for threads in (1, 2) for cell in cases.CELLS
    ]
    assert all(row["limit"]["seconds"] > 0 for row in record["rows"])
    assert "| b2-t3-i4-h5 | gru |" in (tmp_path / "runs/benchmarks/results.md").read_text()
    (saved,) = (tmp_path / "results").glob("*/*.json")
    assert saved.name == f"{record['date'][:10]}.json"
    assert json.loads(saved.read_text())["rows"] == record["rows"]

    assert tool("--render", saved, "--out", tmp_path / "again") == 0
    assert (tmp_path / "again/results.json").is_file()
    tool("--compare", saved, saved)
    assert "geometric mean of the change" in capsys.readouterr().out
    second = __main__.save(record)
    assert second.name == f"{record['date'][:10]}-2.json" and saved.is_file()


def test_a_wrong_result_is_an_exit_code(tool, monkeypatch):
    monkeypatch.setattr(gate, "FACTOR", -1)
    assert tool("--modes", "inference", "--peers", "torch.nn") == 1


def test_ctrl_c_keeps_what_there_is(tool, monkeypatch, tmp_path, capsys):
    right, count = measure.time_row, []

    def interrupted(*arguments):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return right(*arguments)

    monkeypatch.setattr(measure, "time_row", interrupted)
    tool("--modes", "inference", "--peers", "torch.nn")
    record = json.loads((tmp_path / "runs/benchmarks/results.json").read_text())
    assert len(record["rows"]) == 1 and "Stopped by Ctrl-C" in capsys.readouterr().out


def test_choosing(capsys):
    def names(*options):
        return {(c.group, c.name) for c, _, _ in __main__.parse(options).chosen}

    assert len(names("--group", "core")) == 10
    assert names("--cases", "b64-t50-i1024") == {("core", "b64-t50-i1024-h1024")}
    assert names("--cases", "core/*-h1024") == names("--group", "core", "--cases", "h1024")
    assert {cell for _, cell, _ in __main__.parse(["--cells", "gru"]).chosen} == {"gru"}
    assert {mode for _, _, mode in __main__.parse(["--modes", "memory"]).chosen} == {"memory"}
    __main__.main(["--list", "--quick"])
    assert "b64-t100-i256-h256" in capsys.readouterr().out
    for wrong in (["--cases", "nothing"], ["--threads", "0"], ["--group", "nothing"]):
        with pytest.raises(SystemExit):
            __main__.parse(wrong)


@pytest.mark.parametrize("content", ["", "[1]", "{}", None])
def test_a_file_that_is_no_result(content, tmp_path):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=r"a\.json"):
        __main__.load(path)
