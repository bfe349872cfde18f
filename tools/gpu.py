"""Everything that needs a GPU, in stages: ``make gpu``, or ``make gpu STAGE="build tests"``.

    build        compiles the extension for the cards that are here, in place
    conformance  every primitive and every persistent kernel against NumPy, as in the emulator,
                 and the latencies that the design rests on
    tests        modules on "cuda" against the reference: all backends, dtypes, streams, graphs
    sanitizer    compute-sanitizer's memcheck, racecheck and synccheck on small shapes
    bench        against torch.nn (cuDNN) and, if installed, FlashRNN; writes benchmarks/results

Needs nvcc, a CUDA torch, numpy and pytest, and no network. Runs with the Python that starts it.
Each stage prints as it goes, is stopped when its time is over, and leaves its output in build/gpu;
a table comes last. The times fit two calls of 10 minutes: build, conformance and tests; build,
sanitizer and bench. --patience 2 doubles them.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build/gpu"
LATENCY = LOGS / "latency.json"
ON_GPU = {"RNN_EXT_KERNELS_ON": "gpu"}
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"]
PYTEST += ["-W", "default::DeprecationWarning"]
SHOW_EVERY = 20.0  # seconds without output until a sign of life


class Outcome(NamedTuple):
    passed: bool
    note: str


def run(stage, command, seconds, variables=()):
    """Runs a command, showing and keeping what it prints; kills it when its time is over."""
    LOGS.mkdir(parents=True, exist_ok=True)
    print(f"[{stage}] {' '.join(map(str, command))}", flush=True)
    environment = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(ROOT),
        **dict(variables),
    }
    start, last, late = time.monotonic(), [""], False
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=ROOT,
        env=environment,
    )

    def show():
        with open(LOGS / f"{stage}.log", "a") as log:
            for line in process.stdout:
                log.write(line)
                print(f"[{stage}] {line}", end="", flush=True)
                last[0] = line.strip() or last[0]

    reader = threading.Thread(target=show)
    reader.start()
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        late = True
        process.kill()
    process.wait()
    reader.join()
    taken = time.monotonic() - start
    if late:
        return Outcome(False, f"stopped after {taken:.0f} s; {last[0]}")
    return Outcome(process.returncode == 0, last[0])


def several(stage, commands, seconds):
    """Runs (title, command, variables) one after another within the time; all must pass."""
    end, notes, passed = time.monotonic() + seconds, [], True
    for title, command, variables in commands:
        left = end - time.monotonic()
        outcome = (
            Outcome(False, "no time left") if left < 5 else run(stage, command, left, variables)
        )
        passed = passed and outcome.passed
        notes.append(f"{title}: {outcome.note}")
    return Outcome(passed, "; ".join(notes))


def build(seconds):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    outcome = run("build", command, seconds, {"RNN_EXT_CUDA": "1"})
    if not outcome.passed:
        return outcome
    return run("build", [sys.executable, "-m", "rnn_ext"], 120)


def conformance(seconds):
    start = time.monotonic()
    compile_all = [sys.executable, __file__, "--compile-kernels"]
    compiled = run("conformance", compile_all, seconds, ON_GPU)
    if not compiled.passed:
        return compiled
    primitives = "every_primitive and plain"
    kernels = "small or every_arrangement or beyond_the_registers or same_bits or replace_the_input"
    latencies = [sys.executable, __file__, "--latencies"]
    commands = [
        ("primitives", [*PYTEST, "tests/test_cuda_emulator.py", "-k", primitives], ON_GPU),
        ("latencies", latencies, ON_GPU),
        ("kernels", [*PYTEST, "tests/test_cuda_persistent.py", "-k", kernels], ON_GPU),
    ]
    return several("conformance", commands, seconds - (time.monotonic() - start))


def tests(seconds):
    parallel = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    return run("tests", [*PYTEST, *parallel, "tests/device"], seconds)


def sanitizer(seconds):
    program = shutil.which("compute-sanitizer")
    if program is None:
        return Outcome(False, "compute-sanitizer is not on PATH")
    tiny = "test_small and (lstm-bf16 or gru-Tf32x3) and (default or cluster)"
    primitives = [*PYTEST, "tests/test_cuda_emulator.py", "-k", "every_primitive and plain"]
    kernels = [*PYTEST, "tests/test_cuda_persistent.py", "-k", tiny]
    product = [*PYTEST, "tests/device/test_device_layers.py"]
    product += ["-k", "variants and ragged and (float32 or bfloat16) and (lstm or gru)"]
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    commands = []
    for tool in ("memcheck", "racecheck", "synccheck"):
        check = [program, "--tool", tool, "--error-exitcode", "9"]
        commands += [
            (f"{tool} primitives", [*check, *primitives], ON_GPU),
            (f"{tool} kernels", [*check, *kernels], ON_GPU),
        ]
    memcheck = [program, "--tool", "memcheck", "--error-exitcode", "9"]
    commands.append(("memcheck layers", [*memcheck, *product], uncached))
    return several("sanitizer", commands, seconds)


def bench(seconds):
    command = [sys.executable, "-m", "benchmarks.gpu", "--seconds", seconds - 30]
    if LATENCY.exists():
        command += ["--latency", LATENCY]
    return run("bench", command, seconds)


STAGES = {  # with the seconds that each may take
    "build": (build, 180),
    "conformance": (conformance, 190),
    "tests": (tests, 210),
    "sanitizer": (sanitizer, 140),
    "bench": (bench, 270),
}


def compile_kernels():
    """Compiles what the conformance stage runs, on all cores at once."""
    sys.path.insert(0, str(ROOT / "tests"))
    import persistent_cases
    import test_cuda_persistent as persistent
    from cuda_on_cpu import conformance, latency
    from cuda_on_cpu.on_device import build_for_device

    jobs = [((module.SOURCE,), ()) for module in (conformance, latency)]
    flags = [persistent_cases.kernel_flags(*pair) for pair in persistent.FULL + persistent.SOME]
    jobs += [((persistent_cases.SOURCE,), tuple(f)) for f in flags]
    done = 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for library in pool.map(lambda job: build_for_device(*job), jobs):
            done += 1
            print(f"compiled {done} of {len(jobs)}: {library.name}", flush=True)


def latencies():
    """Prints and keeps what the GPU takes for barriers and exchanges."""
    sys.path.insert(0, str(ROOT / "tests"))
    from cuda_on_cpu import Kernels, latency

    kernels = Kernels([latency.SOURCE])
    for name, value in latency.limits(kernels).items():
        print(f"{name}: {value}")
    table = latency.measure(kernels)
    for name, value in table.items():
        print(f"{name}: {value:.3g}", flush=True)
    LATENCY.write_text(json.dumps(table, indent=1))


def check_machine():
    import torch

    if torch.version.cuda is None:
        sys.exit(f"make gpu: torch {torch.__version__} has no CUDA; choose a Python with PYTHON=")
    if not torch.cuda.is_available():
        sys.exit("make gpu: torch sees no CUDA device")
    for i in range(torch.cuda.device_count()):
        print(f"GPU {i}: {torch.cuda.get_device_name(i)}, torch {torch.__version__}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)} (default: all)")
    parser.add_argument("--patience", type=float, default=1, help="times the stages' seconds")
    parser.add_argument("--compile-kernels", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--latencies", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile_kernels:
        return compile_kernels()
    if options.latencies:
        return latencies()
    unknown = set(options.stages) - set(STAGES)
    if unknown:
        sys.exit(f"make gpu: no stage {sorted(unknown)}; there are {', '.join(STAGES)}")
    check_machine()
    outcomes = {}
    for name in options.stages or STAGES:
        stage, seconds = STAGES[name]
        (LOGS / f"{name}.log").unlink(missing_ok=True)
        start = time.monotonic()
        outcomes[name] = stage(seconds * options.patience), time.monotonic() - start
        if name == "build" and not outcomes[name][0].passed:
            break
    print("\nstage        result  seconds")
    for name, (outcome, taken) in outcomes.items():
        result = "passed" if outcome.passed else "FAILED"
        print(f"{name:12} {result}  {taken:7.0f}  {outcome.note}")
    sys.exit(not all(outcome.passed for outcome, _ in outcomes.values()))


if __name__ == "__main__":
    main()
