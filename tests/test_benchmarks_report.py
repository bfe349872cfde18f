"""``python -m benchmarks``: tables, plots, comparisons and the command line."""

import itertools
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
    measures,
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
    row |= {"shape": {"batch": 1}, "tokens": 10}
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
    table = report.TextTable(report.peers_by_section(record), printed.append)
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
    means = rows.means(table)["core", "inference", "float32", 2]["torch.nn"]
    assert means["gru"] == (pytest.approx(4.0), 2) and means["rnn"] == (pytest.approx(3.0), 1)


def promises(table, **changes):
    return {found.text: found for found in measures.results(fake_record(table) | changes)}


def ten_shapes(cell, mode, ratios, **changes):
    named = [case.name for case in cases.all_cases() if case.group == "core"]
    return [fake_row("core", n, cell, mode, r, **changes) for n, r in zip(named, ratios)]


def test_promises_are_kept_or_not():
    found = promises(ten_shapes("gru", "inference", [9.0, 2.0] * 5))
    mean = found["inference GRU against torch.nn, mean of the ten shapes"]
    assert mean.value == pytest.approx(18**0.5) and mean.state == "NOT reached"
    assert (mean.rows, mean.needed, mean.target) == (10, 10, 4.5)
    least = found["every core shape, cell and mode against torch.nn, 2 threads"]
    assert least.value == 2.0 and least.state == "reached so far"
    assert "torch.nn, 1 thread" not in " ".join(found)
    found = promises(ten_shapes("gru", "inference", [5.0] * 4))
    assert found[mean.text].state == "reached so far" and found[mean.text].rows == 4
    lost = ten_shapes("rnn", "training", [9.0, 0.9], threads=1)
    (least,) = (r for text, r in promises(lost).items() if text.endswith("torch.nn, 1 thread"))
    assert least.state == "NOT reached so far" and "b1-t100-i512-h512 rnn" in least.worst
    assert promises([]) == {}


def test_promises_where_blas_is_fast():
    table = ten_shapes("rnn", "training", [3.5] * 4 + [1.3] * 4 + [3.5] * 2)
    found = promises(table, blas={"fast": True, "text": ""})
    kinds = {text.split(", ")[1]: r for text, r in found.items() if "fast BLAS" in text}
    assert {kind: (r.value, r.rows, r.needed, r.state) for kind, r in kinds.items()} == {
        "large shapes": (1.3, 4, 4, "reached"),
        "small shapes": (3.5, 6, 6, "reached"),
    }
    assert not any("fast BLAS" in text for text in promises(table))


def test_promises_of_one_row_each():
    quiet = {"rnn_ext": {"median": 5e-4}, "torch.nn": {"median": 1e-3}}
    name = "b1-t1-i256-h256"
    one_direction = {"one direction": {"ratio": {"median": 0.8}, "error": 0.0}}
    halved = {
        f"{kind} weights": {"ratio": {"median": 0.5}, "error": 0.0} for kind in ("bf16", "int8")
    }
    options = {"zoneout": {"ratio": {"median": 1.25}, "error": 0.0}}
    thin = "b64-t50-i1024-h1024"
    found = promises(
        [
            fake_row("stream", name, "lstm", ratio=8.5, threads=1),
            fake_row("busy", f"{name}-busy", ratio=2.0, quiet=quiet),
            fake_row("bidirectional", variants=one_direction, shape={"batch": 4}),
            fake_row("core", "b1-t200-i64-h1024", variants=halved),
            fake_row("core", thin, "lstm", "training", ratio=1.05),
            fake_row("ragged", cell="lstm", ratio=3.0),
            fake_row("beyond", mode="training", variants=options),
            fake_row("float64", cell="lstm", ratio=3.0, dtype="float64"),
            fake_memory(ours=5_400_000),
        ]
    )
    assert {text: (round(r.value, 3), r.reached) for text, r in found.items()} == {
        "inference GRU against torch.nn, mean of the ten shapes": (2.0, False),
        "training LSTM against torch.nn, mean of the ten shapes": (1.05, False),
        "training LSTM against torch.nn, the two thin shapes": (1.05, False),
        "every core shape, cell and mode against torch.nn, 2 threads": (1.05, True),
        "training, share of the FMA peak, the shapes that compute most": (0.5, False),
        "bf16 weights against our float32, batch 1, H 1024": (2.0, True),
        "int8 weights against our float32, batch 1, H 1024": (2.0, False),
        "one step, B 1, H 256, LSTM, one thread, against torch.nn": (8.5, True),
        "packed LSTM against torch.nn": (3.0, False),
        "training with zoneout takes, 1.0 is without": (1.25, False),
        "two directions cost, one is 1.0, B <= 4": (1.25, True),
        "float64 LSTM against torch.nn": (3.0, True),
        "peak of a training step, torch.nn's over ours": (1.667, True),
        "kept for the backward pass, 1.0 is 1, 5, 6 TBH for RNN, GRU, LSTM": (1.0, True),
        "slowed by a busy neighbour, torch.nn over us": (1.0, True),
    }
    table = " ".join(report.text_summary(fake_record([fake_row(ratio=2.0)])).split())
    assert (
        "what we promise on 2 threads: 1 of 2 reached" in table
        and "NOT reached so far 1 of 10" in table
    )


def test_the_first_line_tells_it_all():
    table = [fake_row(ratio=2.0), fake_row(case="b2", ratio=8.0), fake_row(cell="lstm", ratio=0.9)]
    line = report.headline(fake_record(table))
    assert (
        "inference GRU 4.00x, LSTM 0.90x" in line and "Slower than torch.nn in 1 of 3 rows" in line
    )
    assert "least 0.90x (core/b1-t1-i1-h1 lstm inference, 2 threads)" in line
    assert report.markdown(fake_record(table)).splitlines()[2] == f"**{line}**"
    busy = fake_record(table) | {"notices": ["NOT A QUIET MACHINE: others"]}
    assert report.headline(busy) == f"NOT A QUIET MACHINE, do not quote: {line}"
    assert "Nothing was timed" in report.headline(fake_record([fake_memory()]))


def test_what_else_is_said_of_a_row():
    variants = {
        "one direction": {"ratio": {"median": 0.8}, "error": 1e-7},
        "bf16 weights": {"ratio": {"median": 0.5}, "error": 2e-3},
        "zoneout": {"ratio": {"median": 1.25}, "error": 1e-7},
    }
    quiet = {"rnn_ext": {"median": 1e-4}, "torch.nn": {"median": 1e-3}}
    row = fake_row(variants=variants, quiet=quiet)
    text = report.text_row(row, ["torch.nn"])
    assert "costs 1.25x one direction" in text
    assert "bf16 weights: 2.00x as fast, error 0.002" in text and "zoneout costs 1.25x" in text
    assert "slows us 10.00x, torch.nn 2.00x" in text and "slowed MORE than torch.nn" in text
    assert rows.losses(fake_row(quiet={"rnn_ext": {"median": 1e-3}} | quiet)) != []
    same = {"rnn_ext": {"median": 1e-3}, "torch.nn": {"median": 1e-3}}
    assert rows.losses(fake_row(quiet=same)) == []


def test_others_on_the_machine_are_noticed(monkeypatch):
    seconds = [(100.0, 10.0, 1000.0)]
    monkeypatch.setattr(machine.Watch, "times", staticmethod(lambda: seconds[0]))
    watch = machine.Watch()
    seconds[0] = (200.0, 108.0, 1200.0)  # 100 of 200 were worked, all but 2 by us
    assert watch.share_of_others() == pytest.approx(0.01) and watch.notices() == []
    seconds[0] = (200.0, 60.0, 1200.0)
    assert "others took 25% of its CPUs" in watch.notices()[0]
    seconds[0] = None
    assert watch.notices() == []


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
    backwards = reversed([case for case in cases.all_cases() if case.group != "online"])
    every_group = {case.group: case for case in backwards}  # the first of each
    pictures = plots.draw(fake_record(rows_of(every_group.values())), tmp_path)
    kinds = ["speedup"] * 2 + ["throughput"] * 2 + ["memory"]  # and the lists on their own
    assert [title.split(",")[0] for title, _ in pictures] == kinds
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
    assert len(record["rows"]) == 1 and "Stopped before the end" in capsys.readouterr().out


def test_choosing(capsys):
    def names(*options):
        return {(c.group, c.name) for c, *_ in __main__.parse(options).chosen}

    def chosen(*options):
        return [(c.group, c.dtype, mode, n) for c, _, mode, n in __main__.parse(options).chosen]

    assert len(names("--group", "core")) == 10
    assert names("--shapes", "64,50,1024,1024") == {("core", "b64-t50-i1024-h1024")}
    assert {n for group, _, _, n in chosen() if group == "stream"} == {1}
    assert {n for group, _, _, n in chosen() if group == "core"} == {1, torch.get_num_threads()}
    assert {n for *_, n in chosen("--threads", "3")} == {3}
    assert {(g, d) for g, d, *_ in chosen("--dtype", "float64") if g in ("core", "float64")} == {
        ("core", "float64"),
        ("float64", "float64"),
    }
    assert "bfloat16" not in {group for group, *_ in chosen("--dtype", "float64")}
    busy = __main__.parse(["--busy", "--group", "core"]).chosen
    assert {c.neighbours for c, *_ in busy} == {1} and "memory" not in {m for _, _, m, _ in busy}
    sections = [key for key, _ in itertools.groupby(chosen())]
    assert len(sections) == len(set(sections))  # each table is printed once
    assert names("--cases", "b64-t50-i1024") == {("core", "b64-t50-i1024-h1024")}
    assert names("--cases", "core/*-h1024") == names("--group", "core", "--cases", "h1024")
    assert {cell for _, cell, *_ in __main__.parse(["--cells", "gru"]).chosen} == {"gru"}
    assert {mode for _, _, mode, _ in __main__.parse(["--modes", "memory"]).chosen} == {"memory"}
    __main__.main(["--list", "--quick"])
    assert "b64-t100-i256-h256" in capsys.readouterr().out
    for wrong in (
        ["--cases", "nothing"],
        ["--threads", "0"],
        ["--busy", "-1"],
        ["--group", "nothing"],
    ):
        with pytest.raises(SystemExit):
            __main__.parse(wrong)


@pytest.mark.parametrize("content", ["", "[1]", "{}", None])
def test_a_file_that_is_no_result(content, tmp_path):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=r"a\.json"):
        __main__.load(path)
