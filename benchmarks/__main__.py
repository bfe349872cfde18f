"""Speed and memory of rnn_ext beside torch.nn and others.

    python -m benchmarks --quick                        # a minute
    python -m benchmarks                                # everything, some twenty minutes
    python -m benchmarks --group core --cells lstm gru --threads 1 2
    python -m benchmarks --shapes 64,50,1024,1024 --modes training --dtype float32 float64
    python -m benchmarks --shapes core/*-h1024 --busy   # beside a process that keeps a CPU busy
    python -m benchmarks --compare before.json after.json

Results are checked before anything is timed. Libraries take turns, in one process. The tables are
printed as they come, and at the end which of our promises they keep; --out receives results.json,
results.md and plots.
"""

import argparse
import datetime
import fnmatch
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from . import cases, compare, limits, machine, measure, memory, online, peers, plots, report

RESULTS = Path(__file__).resolve().parent / "results"
SECONDS, QUICK_SECONDS = 1.0, 0.3


def parse(arguments):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=formatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a few small cases, under a minute")
    add("--group", nargs="+", choices=cases.GROUPS, metavar="GROUP", help="see --list")
    add(
        "--shapes",
        "--cases",
        nargs="+",
        metavar="TEXT",
        help="only names with this text, this * pattern or this B,T,I,H",
    )
    add("--cells", nargs="+", choices=cases.CELLS, default=cases.CELLS)
    modes = (*cases.MODES, *cases.ONLINE)
    add("--modes", nargs="+", choices=modes, default=modes)
    add(
        "--dtype",
        nargs="+",
        choices=cases.ITEM_SIZE,
        help="instead of float32; groups of another dtype keep theirs",
    )
    add(
        "--peers",
        nargs="+",
        choices=peers.PEERS,
        help="default: all, but no torch.compile with --quick",
    )
    add(
        "--threads",
        nargs="+",
        type=int,
        metavar="N",
        help="default: all CPUs, for core also 1, for stream only 1",
    )
    add(
        "--busy",
        nargs="?",
        type=int,
        const=1,
        default=0,
        metavar="N",
        help="beside N (1) processes that keep a CPU busy each, and without them for comparison",
    )
    add(
        "--seconds", type=float, help=f"for each row of times; {SECONDS:g}, quick {QUICK_SECONDS:g}"
    )
    add("--out", type=Path, default=Path("runs/benchmarks"), help="default: %(default)s")
    add("--save", action="store_true", help="also as benchmarks/results/MACHINE/DATE.json")
    add("--list", action="store_true", help="show the cases and measure nothing")
    add("--render", type=Path, metavar="JSON", help="tables and plots of a saved result")
    add("--compare", nargs=2, type=Path, metavar="JSON", help="what changed between two results")
    args = parser.parse_args(arguments)
    if args.threads and min(args.threads) < 1:
        parser.error("--threads must be at least 1")
    if args.busy < 0:
        parser.error("--busy must be at least 0")
    if args.peers is None:
        args.peers = peers.QUICK if args.quick else list(peers.PEERS)
    if args.seconds is None:
        args.seconds = QUICK_SECONDS if args.quick else SECONDS
    args.chosen = chosen(args)
    if not args.chosen:
        parser.error("no case is left; --list shows them all")
    return args


def chosen(args):
    """(case, cell, mode, threads) of each row. Rows of one table follow each other."""
    known = cases.quick_cases() if args.quick else cases.all_cases()
    found = []
    for case in known:
        if args.group and case.group not in args.group:
            continue
        if args.shapes and not any(matches(text, case) for text in args.shapes):
            continue
        for dtype in dtypes(case, args.dtype):
            neighbours = args.busy or case.neighbours
            variant = replace(case, dtype=dtype, neighbours=neighbours)
            modes = [m for m in case.modes if m in args.modes and not (args.busy and m == "memory")]
            counts = args.threads or [n or torch.get_num_threads() for n in case.threads]
            found += [
                (variant, cell, mode, threads)
                for threads in dict.fromkeys(counts)
                for mode in modes
                for cell in case.cells
                if cell in args.cells
                if mode != "memory" or threads == counts[0]  # it hardly depends on them
            ]
    tables = {}
    for row in found:
        case, _, mode, threads = row
        tables.setdefault((case.group, mode, case.dtype, threads), []).append(row)
    return [row for table in tables.values() for row in table]


def dtypes(case, wanted):
    if wanted is None:
        return [case.dtype]
    return wanted if case.dtype == "float32" else [d for d in wanted if d == case.dtype]


def matches(text, case):
    shape = f"{case.batch},{case.steps},{case.inputs},{case.hidden}"
    if "," in text:
        return text.replace(" ", "") == shape
    name = f"{case.group}/{case.name}"
    return text in name or fnmatch.fnmatchcase(name, text) or fnmatch.fnmatchcase(case.name, text)


def planned_peers(args):
    """The peers that can run in each table, in the order that the user gave."""
    found = {}
    for case, cell, mode, threads in args.chosen:
        able = found.setdefault((case.group, mode, case.dtype, threads), set())
        able |= {p for p in args.peers if not peers.obstacle(p, case, cell, mode == "training")}
    return {name: [p for p in args.peers if p in able] for name, able in found.items()}


def list_cases(args):
    rows = {}
    for case, cell, mode, threads in args.chosen:
        rows.setdefault(case.group, {}).setdefault(case, ([], [], []))
        for found, value in zip(rows[case.group][case], (cell, mode, threads)):
            if value not in found:
                found.append(value)
    for group, found in rows.items():
        print(f"\n{group}: {cases.GROUPS[group][0]}")
        for case, (cells, modes, threads) in found.items():
            work = max(cases.flops(case, cell, "inference") for cell in cells) / 1e9
            how = f"{', '.join(modes)}; threads {', '.join(map(str, threads))}"
            print(f"  {case.name:<30} {' '.join(cells):<14} {work:8.3f} GFLOP  {how}")


def progress(total):
    """A tqdm bar on stderr, or None where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    layout = "{percentage:3.0f}% |{bar:20}| {n}/{total} [{elapsed}<{remaining}] {desc}"
    return tqdm(total=total, bar_format=layout, leave=False, disable=None)


def new_record(args, arguments):
    """Everything but the rows: machine, limits and what a reader must know."""
    record = {
        "format": 1,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks", *arguments]),
        "machine": machine.describe(),
        "peers": list(args.peers),
        "blas": None,
        "limits": [],
        "notices": [],
        "rows": [],
    }
    try:
        rates = limits.compile_rates()
    except limits.NoCompiler as reason:
        record["notices"].append(f"{reason}; the column of the limit is empty.")
        return record, {}
    record["blas"] = limits.blas(rates)
    counts = sorted({threads for *_, threads in args.chosen})
    measured = {threads: limits.measure(rates, threads) for threads in counts}
    record["limits"] = [found.to_json() for found in measured.values()]
    return record, measured


def run(args, record, measured):
    """Fills record["rows"], printing each as it comes. Ctrl-C and SIGTERM end it with what there
    is."""
    bar = progress(len(args.chosen))
    write = print if bar is None else bar.write
    table = report.TextTable(planned_peers(args), write)
    threads_before, watch = torch.get_num_threads(), machine.Watch()
    try:
        with memory.Worker() as worker:
            for case, cell, mode, threads in args.chosen:
                if bar is not None:
                    bar.set_description_str(f"{case.group}/{case.name} {cell} {mode}")
                if mode == "memory":
                    row = measure.memory_row(case, cell, threads, worker)
                elif mode in cases.ONLINE:
                    row = online.time_row(
                        case, cell, mode, threads, args.seconds, measured.get(threads)
                    )
                else:
                    row = measure.time_row(
                        case, cell, mode, threads, args.peers, args.seconds, measured
                    )
                record["rows"].append(row)
                table.add(row)
                if bar is not None:
                    bar.update()
    except KeyboardInterrupt:
        record["notices"].append("Stopped before the end.")
    finally:
        torch.set_num_threads(threads_before)
        if bar is not None:
            bar.close()
    record["notices"] += watch.notices()
    add_skipped(record)


def add_skipped(record):
    """One notice for each reason for which a library was left out."""
    reasons = {}
    for row in record["rows"]:
        for name, reason in row["skipped"].items():
            if name != peers.OURS:
                reasons[reason] = reasons.get(reason, 0) + 1
    record["notices"] += [f"{reason} ({count} rows)" for reason, count in reasons.items()]


def write_files(record, folder):
    """results.json, results.md and the plots. Returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = plots.draw(record, folder)
    files = {"results.json": json.dumps(record, indent=1) + "\n"}
    files["results.md"] = report.markdown(record, [(t, path.name) for t, path in pictures])
    for name, text in files.items():
        (folder / name).write_text(text)
    return [*(folder / name for name in files), *(path for _, path in pictures)]


def save(record):
    """A copy among the results of this machine, under its date; never over an older one."""
    folder = RESULTS / machine.folder_name(record["machine"])
    folder.mkdir(parents=True, exist_ok=True)
    day, number = record["date"][:10], 1
    while (path := folder / f"{day}{f'-{number}' * (number > 1)}.json").exists():
        number += 1
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def load(path):
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"cannot read {path}: {error}")
    if not isinstance(record, dict) or record.get("format") != 1:
        sys.exit(f"{path} is no result of python -m benchmarks")
    return record


def main(arguments):
    sys.stdout.reconfigure(errors="replace")
    args = parse(arguments)
    if args.list:
        return list_cases(args)
    if args.compare:
        return print(compare.text(*map(load, args.compare), names=args.compare))
    if args.render:
        record = load(args.render)
        table = report.TextTable(report.peers_by_section(record), print)
        for row in record["rows"]:
            table.add(row)
    else:
        record, measured = new_record(args, arguments)
        print("\n".join(machine.lines(record)))
        run(args, record, measured)
    print(f"\n{report.text_summary(record)}\n")
    paths = write_files(record, args.out)
    if args.save:
        paths.append(save(record))
    print("wrote " + ", ".join(map(str, paths)))
    return 1 if any("wrong" in row for row in record["rows"]) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
