"""Speed and memory of rnn_ext beside torch.nn and others.

    python -m benchmarks --quick                        # a minute
    python -m benchmarks                                # everything, some ten minutes
    python -m benchmarks --group core --cells lstm gru --threads 1 2
    python -m benchmarks --cases h1024 --modes inference --peers torch.nn torch.compile
    python -m benchmarks --compare before.json after.json

Results are checked before anything is timed. Libraries take turns, in one process. The tables are
printed as they come; --out receives results.json, results.md and plots.
"""

import argparse
import datetime
import fnmatch
import json
import sys
from pathlib import Path

import torch

from . import cases, compare, limits, machine, measure, memory, peers, plots, report

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
    add("--cases", nargs="+", metavar="TEXT", help="only names with this text, or this * pattern")
    add("--cells", nargs="+", choices=cases.CELLS, default=cases.CELLS)
    add("--modes", nargs="+", choices=cases.MODES, default=cases.MODES)
    add("--peers", nargs="+", choices=peers.PEERS, default=peers.DEFAULT)
    add("--threads", nargs="+", type=int, default=[torch.get_num_threads()], metavar="N")
    add(
        "--seconds", type=float, help=f"for each row of times; {SECONDS:g}, quick {QUICK_SECONDS:g}"
    )
    add("--out", type=Path, default=Path("runs/benchmarks"), help="default: %(default)s")
    add("--save", action="store_true", help="also as benchmarks/results/MACHINE/DATE.json")
    add("--list", action="store_true", help="show the cases and measure nothing")
    add("--render", type=Path, metavar="JSON", help="tables and plots of a saved result")
    add("--compare", nargs=2, type=Path, metavar="JSON", help="what changed between two results")
    args = parser.parse_args(arguments)
    if min(args.threads) < 1:
        parser.error("--threads must be at least 1")
    if args.seconds is None:
        args.seconds = QUICK_SECONDS if args.quick else SECONDS
    args.chosen = chosen(args)
    if not args.chosen:
        parser.error("no case is left; --list shows them all")
    return args


def chosen(args):
    """(case, cell, mode) of each row for one number of threads, in the order of the table."""
    known = cases.quick_cases() if args.quick else cases.all_cases()
    rows = []
    for group in cases.GROUPS:
        if args.group and group not in args.group:
            continue
        for mode in cases.MODES:
            for case in known:
                if case.group != group or mode not in case.modes or mode not in args.modes:
                    continue
                if args.cases and not any(matches(text, case) for text in args.cases):
                    continue
                rows += [(case, cell, mode) for cell in case.cells if cell in args.cells]
    return rows


def matches(text, case):
    name = f"{case.group}/{case.name}"
    return text in name or fnmatch.fnmatchcase(name, text) or fnmatch.fnmatchcase(case.name, text)


def list_cases(args):
    rows = {}
    for case, cell, mode in args.chosen:
        rows.setdefault(case.group, {}).setdefault(case, ([], []))
        for found, value in zip(rows[case.group][case], (cell, mode)):
            if value not in found:
                found.append(value)
    for group, found in rows.items():
        print(f"\n{group}: {cases.GROUPS[group][0]}")
        for case, (cells, modes) in found.items():
            work = max(cases.flops(case, cell, "inference") for cell in cells) / 1e9
            print(f"  {case.name:<30} {' '.join(cells):<14} {work:8.3f} GFLOP  {', '.join(modes)}")


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
    measured = {threads: limits.measure(rates, threads) for threads in sorted(set(args.threads))}
    record["limits"] = [found.to_json() for found in measured.values()]
    return record, measured


def run(args, record, measured):
    """Fills record["rows"], printing each as it comes. Ctrl-C ends it with what there is."""
    bar = progress(len(args.chosen) * len(args.threads))
    write = print if bar is None else bar.write
    table = report.TextTable(args.peers, write)
    threads_before = torch.get_num_threads()
    try:
        with memory.Worker() as worker:
            for threads in args.threads:
                for case, cell, mode in args.chosen:
                    if bar is not None:
                        bar.set_description_str(f"{case.group}/{case.name} {cell} {mode}")
                    if mode == "memory":
                        row = measure.memory_row(case, cell, threads, worker)
                    else:
                        row = measure.time_row(
                            case, cell, mode, threads, args.peers, args.seconds, measured
                        )
                    record["rows"].append(row)
                    table.add(row)
                    if bar is not None:
                        bar.update()
    except KeyboardInterrupt:
        record["notices"].append("Stopped by Ctrl-C before the end.")
    finally:
        torch.set_num_threads(threads_before)
        if bar is not None:
            bar.close()
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
        table = report.TextTable(record["peers"], print)
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
    sys.exit(main(sys.argv[1:]))
