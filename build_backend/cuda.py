"""CUDA sources: finds nvcc, decides whether to use it, compiles csrc/cuda/*.cu to objects.

torch's CUDAExtension is not used: it refuses a CPU torch, and a machine with nvcc and no GPU must
be able to build and check the kernels. Kernel files include no torch header, so nvcc needs none of
torch's flags.
"""

import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from .environment import notice, stop

DEFAULT_ARCHITECTURES = "8.0;9.0a;10.0a"


class Toolkit(NamedTuple):
    nvcc: str
    home: Path
    version: tuple[int, int]

    @property
    def link_flags(self):
        """The static runtime: the module must import on a machine without a driver."""
        folders = [f"-L{self.home / name}" for name in ("lib64", "lib")]
        libraries = ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        return [*folders, *libraries, "-Wl,--exclude-libs,ALL"]


def find_toolkit():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for nvcc in ([f"{home}/bin/nvcc"] if home else []) + [shutil.which("nvcc")]:
        if not nvcc or not os.access(nvcc, os.X_OK):
            continue
        dry_run = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull]
        plan = subprocess.run(dry_run, capture_output=True, text=True).stderr
        top = re.search(r"^#\$ TOP=(.*)$", plan, re.MULTILINE)  # nvcc may be a wrapper script
        banner = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        version = re.search(r"release (\d+)\.(\d+)", banner)
        if top and version:
            return Toolkit(nvcc, Path(top[1]).resolve(), (int(version[1]), int(version[2])))
    return None


def wanted_toolkit(torch_cuda):
    """Toolkit to use, or None. RNN_EXT_CUDA=auto takes it when torch has the same CUDA major."""
    mode = os.environ.get("RNN_EXT_CUDA", "auto").lower()
    if mode not in ("auto", "0", "1"):
        stop(f"RNN_EXT_CUDA is {mode!r}: set it to auto, 0 or 1.")
    if mode == "0":
        return None
    toolkit = find_toolkit()
    if mode == "1" and toolkit is None:
        stop("RNN_EXT_CUDA=1, but no nvcc was found: put it on PATH or set CUDA_HOME.")
    if mode == "auto" and toolkit and torch_cuda is None:
        return None
    if mode == "auto" and toolkit and int(torch_cuda.split(".")[0]) != toolkit.version[0]:
        notice(f"nvcc {toolkit.version} and torch's CUDA {torch_cuda} differ: no CUDA kernels.")
        return None
    return toolkit


def architectures(toolkit):
    """Architectures to compile for, as torch writes them ("9.0a"): listed, present, or default."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if listed:
        return re.split(r"[; ]+", listed.strip("; "))
    import torch

    if torch.cuda.is_available():
        cards = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return [f"{major}.{minor}" + "a" * (major >= 9) for major, minor in sorted(cards)]
    listing = [toolkit.nvcc, "--list-gpu-code"]
    known = subprocess.run(listing, capture_output=True, text=True).stdout.split()
    default = DEFAULT_ARCHITECTURES.split(";")
    usable = [a for a in default if f"sm_{a.replace('.', '').rstrip('a')}" in known]
    for architecture in sorted(set(default) - set(usable)):
        notice(f"this nvcc does not know architecture {architecture}: left out.")
    return usable


def gencode(architecture):
    parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", architecture)
    if not parts:
        stop(f"TORCH_CUDA_ARCH_LIST: cannot read {architecture!r}; write it like '8.0;9.0a'.")
    name = parts[1] + parts[2] + parts[3]
    code = f"[sm_{name},compute_{name}]" if parts[4] else f"sm_{name}"
    return f"-gencode=arch=compute_{name},code={code}"


def _up_to_date(obj, depfile, command, stamp):
    if not all(f.exists() for f in (obj, depfile, stamp)) or stamp.read_text() != command:
        return False
    listed = depfile.read_text().replace("\\\n", " ").split(": ", 1)[1]
    files = [Path(f.replace("\\ ", " ")) for f in re.split(r"(?<!\\)\s+", listed) if f]
    return all(f.exists() and f.stat().st_mtime < obj.stat().st_mtime for f in files)


def compile_sources(toolkit, sources, folder, include, cxx, jobs):
    """Compiles what changed; returns the objects. ptxas' report is kept beside each object."""
    folder = Path(folder, "cuda")
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++20", "-O3", "-lineinfo", "-Xptxas=-v,-warn-spills", f"-I{include}"]
    flags += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", f"-ccbin={cxx}"]
    flags += map(gencode, architectures(toolkit))
    flags += shlex.split(os.environ.get("RNN_EXT_NVCC_FLAGS", ""))

    def one(source):
        obj, depfile, stamp, report = (
            folder / (Path(source).stem + end) for end in (".o", ".d", ".command", ".ptxas.txt")
        )
        command = [toolkit.nvcc, *flags, "-MD", "-MF", str(depfile), "-c", source, "-o", str(obj)]
        if _up_to_date(obj, depfile, shlex.join(command), stamp):
            return str(obj)
        print(shlex.join(command), flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        report.write_text(done.stdout)
        if done.returncode:
            stop(f"nvcc failed on {source}:\n{done.stdout}")
        stamp.write_text(shlex.join(command))
        return str(obj)

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, sources))
