"""What was measured, as JSON, as a Markdown page and as a picture."""

import json
import math
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import rnn_ext

from .measure import CUDNN, FLASHRNN, OURS

ROOT = Path(__file__).resolve().parents[2]


def command_output(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def describe_machine():
    properties = torch.cuda.get_device_properties(0)
    commit = command_output("git", "rev-parse", "HEAD")
    if commit and command_output("git", "status", "--porcelain", "--untracked-files=no"):
        commit += " (changed)"
    driver = command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": torch.cuda.get_device_name(0),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory GB": round(properties.total_memory / 1e9, 1),
        "driver": driver.splitlines()[0] if driver else "unknown",
        "rnn_ext": rnn_ext.__version__,
        "commit": commit or os.environ.get("RNN_EXT_COMMIT", "unknown"),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "Python": platform.python_version(),
    }


def folder_of(machine):
    slug = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    return ROOT / "benchmarks/results" / slug


def geometric_mean(values):
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def timed(rows, **wanted):
    return [r for r in rows if "seconds" in r and all(r[k] == v for k, v in wanted.items())]


def ratios(rows, peer=CUDNN):
    return [row["ratios"][peer] for row in rows if peer in row["ratios"]]


def goals(rows):
    """(what, reached, wanted, number of rows) for each goal of the project."""
    lists = [r for r in timed(rows, mode="training") if r["group"].startswith("deepbench")]
    bf16 = [r for r in lists if r["dtype"] == "bfloat16"]
    gru = [r for r in lists if r["cell"] == "gru"]
    inside = [r for r in timed(rows) if r["in_cudnn_region"]]
    grid = timed(rows, group="flashrnn", mode="training")
    found = [
        ("training in bf16, DeepBench, against cuDNN", ratios(bf16), 1.5),
        ("training GRU, DeepBench, against cuDNN", ratios(gru), 1.5),
        ("inside cuDNN's persistent fp16 region", ratios(inside), 1.0),
        ("training, FlashRNN's grid, against FlashRNN", ratios(grid, FLASHRNN), 2.0),
    ]
    return [(what, geometric_mean(r), wanted, len(r)) for what, r, wanted in found]


def summary(rows):
    lines = []
    for what, reached, wanted, count in goals(rows):
        if count:
            mark = "reached" if reached >= wanted else "NOT reached"
            lines.append(f"{what}: {reached:.2f}x over {count} rows (goal {wanted}x, {mark})")
        else:
            lines.append(f"{what}: not measured")
    wrong = [row for row in rows if "wrong" in row]
    slower = [row for row in timed(rows) if row["ratios"].get(CUDNN, math.inf) < 1]
    lines.append(f"{len(rows)} rows, {len(wrong)} wrong, {len(slower)} slower than torch.nn")
    return lines


def row_cells(row):
    shape = f"{row['batch']}, {row['steps']}, {row['inputs']}, {row['hidden']}"
    cells = [row["cell"], row["mode"], row["dtype"], shape]
    if "wrong" in row:
        return [*cells, "wrong: " + row["wrong"], *[""] * 6]
    ratio = row["ratios"][CUDNN]
    flash = row["ratios"].get(FLASHRNN)
    return [
        *cells,
        f"{row['seconds'][OURS] * 1e3:.3g}",
        f"{row['seconds'][CUDNN] * 1e3:.3g}",
        f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}** (slower)",
        f"{flash:.2f}" if flash else "",
        f"{row['us_per_step']:.2f}",
        f"{row['fraction_of_limit']:.2f}",
        f"{row['peak_bytes'][OURS] / row['peak_bytes'][CUDNN]:.2f}",
    ]


HEAD = ["cell", "mode", "dtype", "B, T, I, H", "ours ms", "torch.nn ms", "x torch.nn", "x FlashRNN"]
HEAD += ["us a step", "of the model's limit", "memory / torch.nn's"]


def markdown(result):
    lines = [f"# rnn_ext on {result['machine']['gpu']}, {result['date']}", ""]
    lines += [
        f"Made by `{result['command']}`. A model of the limit is in benchmarks/gpu/limits.py.",
        "",
    ]
    lines += [f"- {name}: {value}" for name, value in result["machine"].items()]
    lines += [f"- {name}: {value}" for name, value in result["limits"].items()]
    lines += ["", *(f"- {line}" for line in result["summary"]), ""]
    if result["not_run"]:
        lines += [f"{len(result['not_run'])} cases were not run for want of time.", ""]
    for group in dict.fromkeys(row["group"] for row in result["rows"]):
        lines += [f"## {group}", "", "| " + " | ".join(HEAD) + " |"]
        lines += ["|" + "---|" * len(HEAD)]
        rows = [row for row in result["rows"] if row["group"] == group]
        lines += ["| " + " | ".join(row_cells(row)) + " |" for row in rows]
        lines += [""]
    if result.get("latency"):
        lines += ["## Latencies", "", "| what | us |", "|---|---|"]
        lines += [f"| {name} | {value:.3g} |" for name, value in result["latency"].items()]
    return "\n".join(lines) + "\n"


def picture(result, path):
    """Speed beside torch.nn's, a dot for each case, a panel for each group."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    groups = list(dict.fromkeys(row["group"] for row in timed(result["rows"])))
    if not groups:
        return False
    colours = {"bfloat16": "#2b6cb0", "float16": "#dd6b20", "tf32": "#2f855a"}
    figure, axes = plt.subplots(
        1, len(groups), figsize=(3.4 * len(groups), 5), sharey=True, squeeze=False
    )
    cells = ("rnn", "gru", "lstm")
    for axis, group in zip(axes[0], groups):
        for shift, (dtype, colour) in zip((-0.24, 0, 0.24), colours.items()):
            rows = timed(result["rows"], group=group, dtype=dtype)
            places = [cells.index(row["cell"]) + shift for row in rows]
            axis.scatter(places, ratios(rows), s=22, alpha=0.7, color=colour, label=dtype)
        axis.axhline(1, color="black", linewidth=1)
        axis.set_yscale("log", base=2)
        axis.set_xticks(range(len(cells)), [cell.upper() for cell in cells])
        axis.set_xlim(-0.5, len(cells) - 0.5)
        axis.set_title(group, fontsize=10)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("times as fast as torch.nn (cuDNN)")
    axes[0][0].yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    dots = axes[0][0].get_legend_handles_labels()
    figure.legend(*dots, loc="lower center", ncols=len(colours), frameon=False, fontsize=9)
    figure.suptitle(f"rnn_ext on {result['machine']['gpu']}, {result['date']}")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def write(result, folder):
    """The files of a result: date.json, date.md, date.png. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / result["date"]
    files = [base.with_suffix(end) for end in (".json", ".md", ".png")]
    files[0].write_text(json.dumps(result, indent=1) + "\n")
    files[1].write_text(markdown(result))
    return files if picture(result, files[2]) else files[:2]
