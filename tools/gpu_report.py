"""Reads the machine code of the CUDA kernels: registers, spills, tensor-core instructions.

    python tools/gpu_report.py                 # compile csrc/cuda/*.cu, print a table, check it
    python tools/gpu_report.py build/x/*.o     # the same for objects that are there
    python tools/gpu_report.py --update        # write what was found into tools/gpu_limits.json

Needs nvcc (not for existing objects), c++filt, cuobjdump and nvdisasm; the last two come with the
toolkit or from PyPI: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm. No GPU.

Every kernel must match one entry of the limits file. An entry lists, for each architecture, the
most registers, bytes of stack and of static shared memory and accesses to local memory (spills) of
any of its kernels, and the instructions that each of them must contain. Warnings of ptxas that cost
speed are errors too.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIMITS = ROOT / "tools/gpu_limits.json"
OBJECTS = ROOT / "build/kernels"
# wgmma made serial, and a function that uses more registers than its callers may.
BAD_WARNINGS = {"C7508", "C7515", "C7519"}
COUNTED = ["HMMA", "HGMMA", "LDSM", "LDGSTS", "LDL", "STL"]
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)")


LIMITED = ("registers", "stack", "shared", "spills")


class Kernel(NamedTuple):
    name: str  # as in C++, without the namespace
    architecture: str
    registers: int
    stack: int  # bytes
    shared: int  # static, bytes; 1024 that the system takes count from sm_90 on
    instructions: dict  # how many of each of COUNTED, and "all"

    @property
    def spills(self):
        return self.instructions["LDL"] + self.instructions["STL"]


@cache
def tool(name):
    """Path of cuobjdump or nvdisasm: on PATH, beside nvcc, or from PyPI."""
    from build_backend import cuda

    toolkit = cuda.find_toolkit()
    folders = [toolkit.home / "bin"] if toolkit else []
    packages = [Path(sysconfig.get_path("purelib")), *map(Path, sys.path)]
    folders += [bin for package in packages for bin in sorted(package.glob("nvidia/*/bin"))]
    found = shutil.which(name) or next(
        (str(f / name) for f in folders if (f / name).exists()), None
    )
    if found is None:
        raise FileNotFoundError(f"{name} was not found: pip install nvidia-cuda-{name}")
    return found


def build_folder():
    """Where the extension's build keeps its objects, so that nothing is compiled twice: the newest
    folder with CUDA objects, or one of our own."""
    stamps = sorted(ROOT.glob("build/*-torch*/cuda/*.command"), key=lambda f: f.stat().st_mtime)
    return stamps[-1].parents[1] if stamps else OBJECTS


def compile_kernels():
    """Compiles what the build has not, for the same architectures; returns the objects."""
    from build_backend import cuda, environment

    toolkit = cuda.find_toolkit()
    if toolkit is None:
        raise FileNotFoundError("nvcc was not found: put it on PATH or set CUDA_HOME")
    sources = sorted(str(f.relative_to(ROOT)) for f in (ROOT / "csrc/cuda").glob("*.cu"))
    jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    compiler = environment.require_compiler().command
    return cuda.compile_sources(
        toolkit, sources, build_folder(), str(ROOT / "csrc"), compiler, jobs
    )


def read_objects(objects):
    """The kernels of all objects, and the bad warnings in ptxas' reports beside them."""
    kernels, warnings = [], []
    for path in map(Path, objects):
        kernels += read_object(path)
        report = path.with_suffix(".ptxas.txt")
        for line in report.read_text().splitlines() if report.exists() else []:
            if BAD_WARNINGS & set(re.findall(r"\bC\d{4}\b", line)):
                warnings.append(f"{path.stem}: {line}")
    return kernels, warnings


def read_object(path):
    """The kernels of one object. What was read is kept beside it, for reading takes seconds."""
    key = hashlib.sha256(path.read_bytes()).hexdigest()
    kept = path.with_suffix(".report.json")
    if kept.exists():
        report = json.loads(kept.read_text())
        if report["object"] == key:
            return [Kernel(*fields) for fields in report["kernels"]]
    resources = _dump("--dump-resource-usage", path)
    sizes, architecture, function = {}, None, None
    for line in resources.splitlines():
        if match := re.match(r"arch = (\S+)", line):
            architecture = match[1]
        elif match := re.match(r" Function (\S+):", line):
            function = match[1]
        elif match := re.match(r"  REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            sizes[architecture, function] = tuple(map(int, match.groups()))
    names = _readable(sorted({function for _, function in sizes}))
    kernels = []
    for architecture in sorted({architecture for architecture, _ in sizes}):
        counts = _count_instructions(_dump("-arch", architecture, "--dump-sass", path))
        for function, instructions in counts.items():
            sized = sizes[architecture, function]
            kernels.append(Kernel(names[function], architecture, *sized, instructions))
    kept.write_text(json.dumps({"object": key, "kernels": kernels}))
    return kernels


def _dump(*arguments):
    folder = str(Path(tool("nvdisasm")).parent)
    environment = {**os.environ, "PATH": os.pathsep.join([folder, os.environ.get("PATH", "")])}
    command = [tool("cuobjdump"), *map(str, arguments)]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout


def _count_instructions(code):
    counts, function = {}, None
    for line in code.splitlines():
        if match := INSTRUCTION.match(line):
            name = match[1]
            function["all"] += 1
            if name in function:
                function[name] += 1
        elif match := re.search(r"Function : (\S+)", line):
            function = counts[match[1]] = dict.fromkeys(["all", *COUNTED], 0)
    return counts


def _readable(names):
    """Demangled, without what all names share: namespaces and arguments."""
    command = ["c++filt", "-p"]
    done = subprocess.run(
        command, input="\n".join(names), capture_output=True, text=True, check=True
    )
    short = {}
    for name, text in zip(names, done.stdout.splitlines()):
        text = re.sub(r"rnn_ext::cuda::|\(anonymous namespace\)::|_GLOBAL__N_\w+::", "", text)
        text = text.replace("__nv_bfloat16", "bf16").replace("__half", "fp16")
        short[name] = re.sub(r"\((\w+)\)(?=\d)", "", text).removeprefix("void ")
    return short


def check(kernels, warnings, limits):
    """What is wrong, one sentence each."""
    problems = list(warnings)
    for kernel in kernels:
        entries = [entry for pattern, entry in limits.items() if re.match(pattern, kernel.name)]
        where = f"{kernel.name} on {kernel.architecture}"
        if len(entries) != 1:
            problems.append(f"{where}: matches {len(entries)} entries of the limits file, not one")
            continue
        (entry,) = entries
        allowed = entry["most"].get(kernel.architecture)
        if allowed is not None:
            for name, most in allowed.items():
                if getattr(kernel, name) > most:
                    problems.append(f"{where}: {name} {getattr(kernel, name)}, at most {most}")
        for name in entry["needs"]:
            if not kernel.instructions[name]:
                problems.append(f"{where}: has no {name} instruction")
    return problems


def updated(kernels, limits):
    """The limits with what was found; spills of a persistent kernel on sm_90a stay forbidden."""
    result = {}
    for pattern, entry in limits.items():
        most = dict(entry["most"])
        for kernel in kernels:
            if re.match(pattern, kernel.name):
                most.setdefault(kernel.architecture, {})
        for architecture in most:
            mine = [
                k for k in kernels if re.match(pattern, k.name) and k.architecture == architecture
            ]
            if mine:
                values = {name: max(getattr(k, name) for k in mine) for name in LIMITED}
                values["registers"] = min(-(-values["registers"] // 8) * 8, 255)
                if pattern.startswith("persistent") and architecture == "sm_90a":
                    values |= {"stack": 0, "spills": 0}
                most[architecture] = values
        result[pattern] = {"needs": entry["needs"], "most": most}
    return result


def formatted(limits):
    """JSON with a line for each architecture."""
    entries = []
    for pattern, entry in limits.items():
        most = [f"      {json.dumps(a)}: {json.dumps(m)}" for a, m in sorted(entry["most"].items())]
        lines = [f"  {json.dumps(pattern)}: {{", f'    "needs": {json.dumps(entry["needs"])},']
        lines += ['    "most": {', ",\n".join(most), "    }", "  }"]
        entries.append("\n".join(lines))
    return "{\n" + ",\n".join(entries) + "\n}\n"


def table(kernels):
    lines = [f"{'':8} {'regs':>4} {'stack':>5} {'spill':>5} {'code':>6}  kernel"]
    for k in sorted(kernels, key=lambda k: (k.name, k.architecture)):
        others = [f"{n} {k.instructions[n]}" for n in COUNTED[:4] if k.instructions[n]]
        line = (
            f"{k.architecture:8} {k.registers:4} {k.stack:5} {k.spills:5} {k.instructions['all']:6}"
        )
        lines.append(f"{line}  {k.name}  [{', '.join(others)}]")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("objects", nargs="*", help="compiled kernels (default: compile them)")
    parser.add_argument("--update", action="store_true", help="write the limits file")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT) if not options.objects else None
    kernels, warnings = read_objects(options.objects or compile_kernels())
    print(table(kernels))
    limits = json.loads(LIMITS.read_text())
    if options.update:
        limits = updated(kernels, limits)
        LIMITS.write_text(formatted(limits))
    problems = check(kernels, warnings, limits)
    print("\n".join(problems) or f"{len(kernels)} kernels are within the limits")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
