"""``python -m benchmarks.gpu``: measures, prints every row as it comes, writes the results."""

import argparse
import datetime
import json
import sys
import time
from pathlib import Path

import torch

import rnn_ext

from . import report
from .cases import DTYPES, all_cases
from .limits import Limits
from .measure import CUDNN, OURS, measure


def arguments():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=420, help="time for all (default 420)")
    parser.add_argument("--each", type=float, default=0.15, help="seconds of a case (default 0.15)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--filter", default="", help="only cases with this in group or name")
    parser.add_argument("--latency", type=Path, help="JSON that cuda_on_cpu.latency measured")
    parser.add_argument("--out", type=Path, help="folder (default benchmarks/results/<gpu>)")
    return parser.parse_args()


def line(row):
    if "wrong" in row:
        return f"{row['case']}: WRONG, {row['wrong']}"
    ours, theirs = (row["seconds"][name] * 1e3 for name in (OURS, CUDNN))
    times = f"{ours:9.3f} ms, torch.nn {theirs:9.3f} ms, {row['ratios'][CUDNN]:5.2f}x"
    return f"{row['case']:50} {times}, {row['us_per_step']:7.2f} us a step, {row['plan']}"


def main():
    options = arguments()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: no CUDA device")
    step = rnn_ext.backends()["cuda-step"]
    if not step["available"]:
        sys.exit(f"benchmarks.gpu: {step['reason']}")
    start = time.perf_counter()
    torch.backends.cudnn.benchmark = False
    machine = report.describe_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    known = options.latency and options.latency.exists()
    latency = json.loads(options.latency.read_text()) if known else None
    limits = Limits(latency)
    print(", ".join(f"{name} {value}" for name, value in limits.describe().items()), flush=True)
    cases = all_cases(options.dtype)
    cases = [case for case in cases if options.filter in f"{case.group} {case.name}"]
    rows, not_run = [], []
    for i, case in enumerate(cases):
        if time.perf_counter() - start > options.seconds:
            not_run = [case.name for case in cases[i:]]
            break
        try:
            row = measure(case, limits, options.each)
        except (RuntimeError, torch.OutOfMemoryError) as reason:
            first = str(reason).splitlines()[0]
            row = {"case": case.name, "group": case.group, "wrong": first, "in_cudnn_region": False}
            for name in ("cell", "mode", "dtype", "batch", "steps", "inputs", "hidden"):
                row[name] = getattr(case, name)
        rows.append(row)
        torch.cuda.empty_cache()
        print(f"[{i + 1}/{len(cases)}] {line(row)}", flush=True)
    result = {
        "date": datetime.date.today().isoformat(),
        "command": "python -m benchmarks.gpu " + " ".join(sys.argv[1:]),
        "machine": machine,
        "limits": limits.describe(),
        "latency": latency,
        "summary": report.summary(rows),
        "rows": rows,
        "not_run": not_run,
    }
    files = report.write(result, options.out or report.folder_of(machine))
    print("\n".join(result["summary"]))
    if not_run:
        print(f"{len(not_run)} cases were not run for want of time")
    print("wrote " + ", ".join(map(str, files)))
    sys.exit(any("wrong" in row for row in rows))


if __name__ == "__main__":
    main()
