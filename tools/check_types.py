"""`make types`: what a user's type checker will say of rnn_ext.

Two questions, both to basedpyright (pyright with its own node): is every public name of the package
fully typed, and does tests/test_typing.py, which calls them rightly and wrongly, get the types and
the complaints it expects? torch has to be installed, rnn_ext need not be compiled.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*words):
    # The checker asks the first `python` on PATH where packages are.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [sys.executable, "-m", "basedpyright", *words],
        cwd=ROOT,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def untyped(report):
    """A line for each public name whose type is not known in full."""
    for symbol in report["typeCompleteness"]["symbols"]:
        if symbol["isExported"] and not symbol["isTypeKnown"]:
            yield symbol["name"]
            for entry in symbol["diagnostics"]:
                yield f"  {entry['message']}"


def main():
    package = run("--verifytypes", "rnn_ext", "--ignoreexternal", "--outputjson")
    report = json.loads(package.stdout)
    completeness = report.get("typeCompleteness")
    if not completeness or not completeness["symbols"]:
        sys.exit(f"rnn_ext's types could not be read: {package.stdout}")
    missing = list(untyped(report))
    print(*missing, sep="\n", end="\n" if missing else "")
    print(f"public names with known types: {100 * completeness['completenessScore']:.1f} %")
    usage = run("--project", str(ROOT / "pyproject.toml"))  # and no file further up
    print(usage.stdout, end="")
    sys.exit(bool(missing) or usage.returncode)


if __name__ == "__main__":
    main()
