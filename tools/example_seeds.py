"""Runs examples with several seeds: what rnn_ext and torch.nn reach in the mean, and how far apart.

    python tools/example_seeds.py forecast tagging                 # as by default, seeds 0, 1, 2
    python tools/example_seeds.py control --seeds 0 1 2 3 --long   # other options are the example's

The figure is that of an example's summary line. Per library: the mean, and the lowest and highest
of the seeds. Two libraries agree when the means are no further apart than the seeds of one are.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NUMBER = r"(-?\d+(?:\.(\d+))?)(%?)"
SUMMARY = re.compile(rf"^summary  \w+: (.*?) {NUMBER} \(torch\.nn {NUMBER}\)", re.MULTILINE)


@dataclass(frozen=True)
class Headline:
    """What an example reached: "held-out perplexity", 3.5581 with rnn_ext, 3.5442 with torch.nn."""

    label: str
    values: tuple  # of rnn_ext and torch.nn
    digits: int  # after the point
    percent: bool


def headline(printed):
    """The `Headline` in what an example printed; None where it compares no libraries."""
    found = SUMMARY.search(printed)
    if found is None:
        return None
    label, ours, decimals, percent, theirs, *_ = found.groups()
    return Headline(label, (float(ours), float(theirs)), len(decimals or ""), bool(percent))


def table_row(name, headlines):
    """A row of a table in Markdown: the example, its figure, rnn_ext, torch.nn, do they agree?"""
    first, cells, means, spreads = headlines[0], [], [], []
    unit = " %" if first.percent else ""
    for values in zip(*(one.values for one in headlines)):
        means.append(sum(values) / len(values))
        spreads.append(max(values) - min(values))
        mean, low, high = (f"{v:.{first.digits}f}" for v in (means[-1], min(values), max(values)))
        cells.append(f"{mean}{unit} ({low} to {high})")
    agree = abs(means[0] - means[1]) <= max(spreads)
    return f"| {name} | {first.label} | {' | '.join(cells)} | {'yes' if agree else 'no'} |"


def run(name, seed, options):
    """The headline of one run, which writes its files to a folder that is then deleted."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, EXAMPLES / f"{name}.py", "--seed", str(seed), *options]
        command += ["--checkpoint", f"{folder}/model.pt", "--plot", f"{folder}/plot.png"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{name} ended with exit code {done.returncode}; it said why above")
    return headline(done.stdout) or sys.exit(f"the summary of {name} does not name torch.nn")


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("examples", nargs="+", metavar="EXAMPLE", help="a name, without .py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    args, options = parser.parse_known_args()
    for name in args.examples:
        if not (EXAMPLES / f"{name}.py").is_file():
            parser.error(f"there is no examples/{name}.py")
    print("| example | figure | rnn_ext | torch.nn | agree |\n|---|---|---:|---:|---|", flush=True)
    for name in args.examples:
        headlines = [run(name, seed, options) for seed in args.seeds]
        print(table_row(name, headlines), flush=True)


if __name__ == "__main__":
    main()
