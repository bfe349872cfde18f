"""What a build needs (Linux, Python headers, torch, a C++20 compiler), checked in that order.

Nothing here imports torch: the checks run at every stage of a pip install and importing takes
seconds. Whatever is missing ends the build with one sentence that says what to run.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

OLDEST_TORCH, NEWEST_TESTED_TORCH = (2, 11), (2, 14)
OLDEST_COMPILER = {"gcc": 11, "clang": 14}
NEWEST_TESTED_COMPILER = {"gcc": 12, "clang": 19}


class Compiler(NamedTuple):
    command: str
    family: str  # "gcc" or "clang"
    major: int


def stop(sentence):
    sys.exit(f"rnn_ext: {sentence}")


def notice(sentence):
    print(f"rnn_ext: {sentence}", file=sys.stderr, flush=True)


def expose_torch():
    """Appends the import path of the interpreter outside pip's build isolation, if torch is there.

    pip isolates a build with PYTHONPATH and PYTHONNOUSERSITE; the same interpreter without them
    sees what the user sees. Appended, never prepended: the isolated packages keep precedence.
    """
    if importlib.util.find_spec("torch"):
        return
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    script = (
        "import importlib.util, json, sys;"
        "print(json.dumps(sys.path[1:] if importlib.util.find_spec('torch') else []))"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], env=outside, cwd=os.sep, capture_output=True, text=True
    )
    paths = json.loads(found.stdout) if found.returncode == 0 else []
    sys.path += [p for p in paths if os.path.isdir(p) and p not in sys.path]


def torch_version():
    """Version of the torch that `import torch` would find, or None."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).with_name("version.py")
    written = re.search(r"""^__version__ = ["']([^"']+)""", file.read_text(), re.MULTILINE)
    return written[1] if written else importlib.metadata.version("torch")


def require_torch():
    version = torch_version()
    if version is None:
        stop(
            "compiled against the torch you already have, but none is installed for "
            f"{sys.executable}: install torch there, then run "
            "'pip install --no-build-isolation .'"
        )
    release = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    oldest = ".".join(map(str, OLDEST_TORCH))
    if release < OLDEST_TORCH:
        stop(
            f"needs torch {oldest} or newer and found {version}: run "
            f"'pip install --upgrade \"torch>={oldest}\"', then build again."
        )
    if release > NEWEST_TESTED_TORCH:
        newest = ".".join(map(str, NEWEST_TESTED_TORCH))
        notice(
            f"torch {version} is newer than the newest tested ({newest}); building all the same."
        )
    return version


def identify_compiler(command):
    """Compiler of a shell word or words such as "g++-12" or "ccache g++"; None if it cannot run."""
    try:
        macros = subprocess.run(
            [*shlex.split(command), "-dM", "-E", "-x", "c++", os.devnull],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    for family, macro in (("clang", "__clang_major__"), ("gcc", "__GNUC__")):
        major = re.search(rf"^#define {macro} (\d+)$", macros, re.MULTILINE)
        if major:
            return Compiler(command, family, int(major[1]))
    return None


def require_compiler():
    """The compiler of the CXX variable, else the first of c++, g++, clang++ that is new enough."""
    chosen = os.environ.get("CXX")
    found = [
        c for c in map(identify_compiler, [chosen] if chosen else ["c++", "g++", "clang++"]) if c
    ]
    if not found:
        tried = f"CXX={chosen} does not run" if chosen else "none of c++, g++ and clang++ runs"
        stop(
            f"needs a C++ compiler, g++ 11 or clang 14 or newer, and {tried}: install one "
            "('apt install g++' on Debian and Ubuntu) or set CXX, then build again."
        )
    fit = [c for c in found if c.major >= OLDEST_COMPILER[c.family]]
    if not fit:
        names = " and ".join(f"{c.command} ({c.family} {c.major})" for c in found)
        stop(
            f"needs g++ 11 or clang 14 or newer, and {names} is older: install a newer one, "
            "set CXX to it and build again."
        )
    return fit[0]


def require():
    """Checks everything a compiled build needs; returns (torch version, compiler)."""
    if sys.platform != "linux":
        stop("this version is built on Linux only.")
    version = require_torch()
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        stop(
            f"needs the headers of Python {sysconfig.get_python_version()} (Python.h): run "
            "'apt install python3-dev' on Debian and Ubuntu, then build again."
        )
    return version, require_compiler()
