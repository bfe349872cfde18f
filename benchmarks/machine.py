"""Where and with what a measurement was made."""

import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

import rnn_ext
from rnn_ext import _C

ROOT = Path(__file__).resolve().parent.parent
OTHERS = 0.05  # of all CPUs, taken by others during the run, from which on that is said
BUSY = 0.3  # load for each CPU at the start from which times are not to be trusted


def describe():
    """CPU, instruction sets, versions, commit and load, as a dict for JSON."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": cpu_name(),
        "cpus": cpus,
        "isa": _C.cpu_isa(),
        "isas": list(_C.cpu_isas()),
        "system": f"{platform.system()} {platform.machine()}",
        "load": load,
        "busy": load is not None and load > BUSY * cpus,
        "commit": commit(),
        "versions": versions(),
    }


class Watch:
    """How much of the machine others took since it was made; only where there is /proc/stat."""

    def __init__(self):
        self.start = self.times()

    @staticmethod
    def times():
        """(seconds that all CPUs worked or were withheld, seconds of ours, seconds of all CPUs)."""
        try:
            fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        except OSError:
            return None
        ticks = os.sysconf("SC_CLK_TCK")
        user, nice, system, idle, waiting, *rest = (int(field) / ticks for field in fields)
        worked = user + nice + system + sum(rest)
        return worked, sum(os.times()[:4]), worked + idle + waiting

    def share_of_others(self):
        """Of all CPUs' time, or None where the system does not tell."""
        now = self.times()
        if now is None or self.start is None:
            return None
        worked, ours, total = (b - a for a, b in zip(self.start, now))
        return max(0.0, worked - ours) / total if total else 0.0

    def notices(self):
        """A list of one sentence, or of none on a quiet machine."""
        share = self.share_of_others()
        if share is None or share < OTHERS:
            return []
        return [
            f"NOT A QUIET MACHINE: others took {share:.0%} of its CPUs during the run. "
            "Do not quote these numbers."
        ]


def cpu_name():
    """The name that the CPU gives itself; with its family and model where that has no number."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    fields = dict(re.findall(r"^(.+?)\s*: (.*)$", text.split("\n\n")[0], re.MULTILINE))
    name = fields.get("model name", "").strip()
    if sys.platform == "darwin":
        name = output("sysctl", "-n", "machdep.cpu.brand_string") or ""
    name = " ".join(name.split()) or platform.processor() or platform.machine()
    if not re.search(r"\d", name) and "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name


def folder_name(machine):
    """The machine's name as a folder: its CPU and how many of them."""
    plain = re.sub(r"[^a-z0-9]+", "-", machine["cpu"].lower()).strip("-")
    return f"{plain}-{machine['cpus']}cpus"


def versions():
    found = {"rnn_ext": rnn_ext.__version__, "torch": torch.__version__}
    found["python"] = platform.python_version()
    found["compiler"] = _C.compiler
    for package in ("numpy", "onnxruntime"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    settings = torch.__config__.show()
    for name, pattern in (("MKL", r"oneAPI Math.*? Version (\S+)"), ("oneDNN", r"MKL-DNN v(\S+)")):
        if found_there := re.search(pattern, settings):
            found[name] = found_there[1]
    return found


def commit():
    """The commit that is checked out, with "+" if files differ from it; None outside git."""
    name = output("git", "rev-parse", "--short=10", "HEAD")
    if name is None:
        return None
    changed = output("git", "status", "--porcelain", "--untracked-files=no")
    return name + ("+" if changed else "")


def output(*command):
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def lines(record):
    """What stands above every table made from a record of __main__.py."""
    machine, found = record["machine"], record["machine"]["versions"]
    cpus = f"{machine['cpus']} CPU{'s' if machine['cpus'] != 1 else ''}"
    first = f"{machine['cpu']}, {cpus}, {machine['isa']}; {machine['system']}"
    numbers = ", ".join(f"{name} {version}" for name, version in found.items())
    made = f"commit {machine['commit'] or 'unknown'}, {record['date']}: {record['command']}"
    text = [first, numbers, made]
    for limit in record["limits"]:
        threads = f"{limit['threads']} thread{'s' if limit['threads'] != 1 else ''}"
        peak = limit["flops"]["float32"] / 1e9
        sizes = {32 << 10: "32 KiB", 2 << 20: "2 MiB", 128 << 20: "128 MiB"}
        read = [f"{limit['read'][str(s)] / 1e9:.0f} ({n})" for s, n in sizes.items()]
        text.append(f"limits of {threads}: {peak:.0f} GF/s float32, reads {', '.join(read)} GB/s")
    return text + notices(record)


def notices(record):
    """What a reader must know before believing a ratio."""
    found = [record["blas"]["text"]] if record["blas"] else []
    if record["machine"]["busy"]:
        load = record["machine"]["load"]
        found.append(
            f"NOT A QUIET MACHINE: load {load:.1f} at the start. Do not quote these numbers."
        )
    return found + record["notices"]
