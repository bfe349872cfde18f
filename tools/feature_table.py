"""`make features`: writes docs/features.md from tests/features.py by running what it names.

Every test named there has to pass, here and now, or nothing is written. What torch.nn does on the
CPU is found out by trying it. No cell is filled in by hand but those of cuDNN, which name a source,
and of what torch.nn alone has.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

import rnn_ext

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs/features.md"
sys.path.insert(0, str(ROOT / "tests"))

from features import FEATURES, MISSING, SOURCES  # noqa: E402
from torch_nn_probes import answer  # noqa: E402

HEADER = """\
# Features

What people ask of a recurrent layer, and who does it. `make features` wrote this table: each cell
of rnn_ext stands for tests that passed in that run ({passed} of them), each cell of torch.nn on the
CPU for an attempt made in it. Cells of cuDNN repeat a source, or say that there is none.

The list is [tests/features.py](../tests/features.py); every row is about RNN, LSTM and GRU unless
it names one.

{versions}
"""


def named_tests():
    features = [feature for rows in FEATURES.values() for feature in rows]
    return list(dict.fromkeys(f"tests/{test}" for feature in features for test in feature.tests))


def run_tests(words):
    """Runs every named test; ends here unless each of them passed. Returns how many there were."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *named_tests()]
        if subprocess.run([*command, *words], cwd=ROOT).returncode:
            sys.exit("a test failed: the table stays as it was")
        cases = list(ElementTree.parse(report).iter("testcase"))
    passed = [case for case in cases if case.find("skipped") is None]
    ran = {f"{case.get('classname').replace('.', '/')}.py" for case in passed}
    ran |= {
        f"{case.get('classname').replace('.', '/')}.py::{case.get('name').partition('[')[0]}"
        for case in passed
    }
    missing = [test for test in named_tests() if test not in ran]
    if missing:
        sys.exit(f"these did not run: {', '.join(missing)}")
    return len(passed)


def attempt(torch_nn):
    if isinstance(torch_nn, str):
        return torch_nn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return answer(torch_nn)


def line(*cells):
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def link(test):
    file, _, name = test.partition("::")
    return f"[{name or file}](../tests/{file})"


def feature_line(feature, torch_nn):
    shown = ", ".join(link(test) for test in feature.tests)
    return line(feature.name, torch_nn, feature.cudnn, feature.ours, shown)


def table(passed):
    versions = (
        f"rnn_ext {rnn_ext.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {platform.machine()}"
    )
    parts = [HEADER.format(passed=passed, versions=versions)]
    for title, rows in FEATURES.items():
        parts.append(f"\n## {title}\n\n")
        parts.append(line("", "torch.nn, CPU", "torch.nn, cuDNN", "rnn_ext", "shown by"))
        parts.append("|---|---|---|---|---|\n")
        parts += [feature_line(feature, attempt(feature.torch_nn)) for feature in rows]
    parts.append("\n## What torch.nn has and rnn_ext has not\n\n")
    parts.append(line("torch.nn", "rnn_ext") + "|---|---|\n")
    parts += [line(theirs, ours) for theirs, ours in MISSING]
    parts.append("\n## Sources\n\n")
    parts += [f"- [{key}] {source}\n" for key, source in SOURCES.items()]
    return "".join(parts)


def main():
    description = f"{__doc__.splitlines()[0]} Arguments are passed on to pytest."
    _, words = argparse.ArgumentParser(description=description).parse_known_args()
    passed = run_tests(words)
    TABLE.write_text(table(passed))
    print(f"{TABLE.relative_to(ROOT)}: {passed} tests passed")


if __name__ == "__main__":
    main()
