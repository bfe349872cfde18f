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


def means(rows):
    """A line for each group, mode and dtype: (those three, rows, x torch.nn, x FlashRNN, losses);
    geometric means, NaN where a library was not there."""
    kinds = dict.fromkeys((row["group"], row["mode"], row["dtype"]) for row in timed(rows))
    lines = []
    for kind in kinds:
        own = timed(rows, **dict(zip(("group", "mode", "dtype"), kind)))
        losses = sum(ratio < 1 for ratio in ratios(own))
        speeds = (geometric_mean(ratios(own, peer)) for peer in (CUDNN, FLASHRNN))
        lines.append((*kind, len(own), *speeds, losses))
    return lines


def means_table(rows):
    head = ["group", "mode", "dtype", "rows", "x torch.nn", "x FlashRNN", "slower than torch.nn"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for *kind, count, torch_nn, flash, losses in means(rows):
        speeds = ["" if math.isnan(x) else f"{x:.2f}" for x in (torch_nn, flash)]
        lines.append("| " + " | ".join([*kind, str(count), *speeds, str(losses)]) + " |")
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
        f"{row['peak_bytes'][OURS] / max(row['peak_bytes'][CUDNN], 1):.2f}",
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
    if timed(result["rows"]):
        lines += ["## Geometric means", "", *means_table(result["rows"]), ""]
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


COLOURS = {"bfloat16": "#2b6cb0", "float16": "#dd6b20", "tf32": "#2f855a"}
CELLS = ("rnn", "gru", "lstm")
MARKERS = {"inference": "o", "training": "^"}
PICTURES = {  # end of the file's name: (what a dot's height is, its title, the line that is drawn)
    "speed": (lambda row: row["ratios"].get(CUDNN), "times as fast as torch.nn (cuDNN)", 1),
    "limit": (lambda row: row["fraction_of_limit"], "fraction of the modelled limit", 1),
}


def picture(result, path, height, title, line):
    """A dot for each case, a panel for each group; ``height`` of a row, or None for no dot."""
    from matplotlib import pyplot as plt

    groups = list(dict.fromkeys(row["group"] for row in timed(result["rows"])))
    figure, axes = plt.subplots(
        1, len(groups), figsize=(max(2.6 * len(groups), 5), 5), sharey=True, squeeze=False
    )
    for axis, group in zip(axes[0], groups):
        for row in timed(result["rows"], group=group):
            value = height(row)
            if value is not None:
                place = CELLS.index(row["cell"]) + 0.24 * (list(COLOURS).index(row["dtype"]) - 1)
                style = {"color": COLOURS[row["dtype"]], "marker": MARKERS[row["mode"]]}
                axis.scatter(place, value, s=24, alpha=0.7, linewidths=0, **style)
        axis.axhline(line, color="black", linewidth=1)
        axis.set_yscale("log", base=2)
        axis.set_xticks(range(len(CELLS)), [cell.upper() for cell in CELLS])
        axis.set_xlim(-0.5, len(CELLS) - 0.5)
        axis.set_title(group, fontsize=10)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel(title)
    axes[0][0].yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    dots = [
        plt.Line2D([], [], color=c, marker="s", linestyle="", label=n) for n, c in COLOURS.items()
    ]
    dots += [
        plt.Line2D([], [], color="grey", marker=m, linestyle="", label=n)
        for n, m in MARKERS.items()
    ]
    figure.legend(handles=dots, loc="lower center", ncols=len(dots), frameon=False, fontsize=9)
    figure.suptitle(f"rnn_ext on {result['machine']['gpu']}, {result['date']}")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def pictures(result, base):
    """Paths of the pictures that were drawn; none without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no pictures: pip install matplotlib", flush=True)
        return []
    if not timed(result["rows"]):
        return []
    matplotlib.use("Agg")
    paths = []
    for name, what in PICTURES.items():
        paths.append(base.with_name(f"{base.name}-{name}.png"))
        picture(result, paths[-1], *what)
    return paths


def write(result, folder):
    """The files of a result: date.json, date.md, date-*.png. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / result["date"]
    files = [base.with_suffix(end) for end in (".json", ".md")]
    files[0].write_text(json.dumps(result, indent=1) + "\n")
    drawn = pictures(result, base)
    page = markdown(result) + "".join(f"\n![{path.stem}]({path.name})\n" for path in drawn)
    files[1].write_text(page)
    return files + drawn
