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
import json
import math
import os
import shutil
import signal
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
CORES = len(os.sched_getaffinity(0))
ON_GPU = {"RNN_EXT_KERNELS_ON": "gpu"}
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"]
PYTEST += ["-W", "default::DeprecationWarning"]
LEAST = 5  # seconds: no command is started with less


class Outcome(NamedTuple):
    passed: bool
    notes: list  # the last line of each command


class Job(NamedTuple):
    title: str
    command: list
    variables: dict


def run(stage, job, seconds):
    """Runs a command, showing and keeping what it prints; kills it when its time is over."""
    title, command, variables = job
    where = f"[{stage}: {title}]" if title else f"[{stage}]"
    LOGS.mkdir(parents=True, exist_ok=True)
    print(f"{where} {' '.join(map(str, command))}", flush=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT), **variables}
    environment.pop("TORCH_CUDA_ARCH_LIST", None)  # for the cards that are here, no others
    start, last, late = time.monotonic(), [""], False
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )

    def show():
        with open(LOGS / f"{stage}.log", "a") as log:
            for line in process.stdout:
                log.write(f"{where} {line}")
                print(f"{where} {line}", end="", flush=True)
                last[0] = line.strip() or last[0]

    reader = threading.Thread(target=show)
    reader.start()
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        late = True
    finally:
        if process.poll() is None:  # late, or interrupted
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
    process.wait()
    reader.join()
    process.stdout.close()
    note = f"{title}: {last[0]}" if title else last[0]
    if late:
        note += f" (stopped after {time.monotonic() - start:.0f} s)"
    return Outcome(process.returncode == 0 and not late, [note])


def joined(outcomes):
    return Outcome(
        all(outcome.passed for outcome in outcomes), [n for o in outcomes for n in o.notes]
    )


def in_turn(stage, jobs, seconds):
    """Runs one job after the other within the time; all must pass."""
    end, outcomes = time.monotonic() + seconds, []
    for job in jobs:
        left = end - time.monotonic()
        if left < LEAST:
            outcomes.append(Outcome(False, [f"{job.title}: no time left"]))
        else:
            outcomes.append(run(stage, job, left))
    return joined(outcomes)


def together(stage, jobs, seconds):
    """Runs the jobs beside each other, the cores shared out among them; all must pass."""
    share = {"OMP_NUM_THREADS": str(max(1, CORES // len(jobs)))}
    share |= {"OPENBLAS_NUM_THREADS": share["OMP_NUM_THREADS"]}
    jobs = [job._replace(variables=job.variables | share) for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        return joined(list(pool.map(lambda job: run(stage, job, seconds), jobs)))


def has_clusters():
    import torch

    return torch.cuda.get_device_capability() >= (9, 0)


def chosen(expression):
    """A choice of pytest -k, without what the GPU lacks."""
    if has_clusters():
        return expression
    return f"({expression}) and not cluster and not deliveries"


def build(seconds):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    outcome = run("build", Job("", command, {"RNN_EXT_CUDA": "1"}), seconds)
    if not outcome.passed:
        return outcome
    return run("build", Job("", [sys.executable, "-m", "rnn_ext"], {}), 120)


def conformance(seconds):
    start = time.monotonic()
    compile_all = [sys.executable, __file__, "--compile-kernels"]
    compiled = run("conformance", Job("compile", compile_all, ON_GPU), seconds)
    if not compiled.passed:
        return compiled
    primitives = chosen("every_primitive and plain")
    kernels = "small or every_arrangement or beyond_the_registers or same_bits or replace_the_input"
    kernels = [*PYTEST, "tests/test_cuda_persistent.py", "-k", chosen(kernels)]
    jobs = [
        Job("primitives", [*PYTEST, "tests/test_cuda_emulator.py", "-k", primitives], ON_GPU),
        Job("latencies", [sys.executable, __file__, "--latencies"], ON_GPU),
        Job("kernels", kernels, ON_GPU),
    ]
    return in_turn("conformance", jobs, seconds - (time.monotonic() - start))


def tests(seconds):
    """Parts of about the same length: the layers by backend and width of their numbers."""
    layers, modules = "tests/device/test_device_layers.py", "tests/device/test_device_modules.py"
    wide = "(float32 or float64)"
    jobs = [Job("modules", [*PYTEST, modules], {})]
    for backend in ("cuda-step", "cuda-persistent", None):
        own = backend or "not cuda-step and not cuda-persistent"
        for numbers in (wide, f"not {wide}"):
            title = f"{backend or 'others'}, {numbers}"
            jobs.append(Job(title, [*PYTEST, layers, "-k", f"{own} and {numbers}"], {}))
    return together("tests", jobs, seconds)


def sanitizer(seconds):
    program = shutil.which("compute-sanitizer")
    if program is None:
        return Outcome(False, ["compute-sanitizer is not on PATH"])
    tiny = chosen("test_small and (lstm-bf16 or gru-Tf32x3) and (default or cluster)")
    primitives = chosen("every_primitive and plain")
    primitives = [*PYTEST, "tests/test_cuda_emulator.py", "-k", primitives]
    kernels = [*PYTEST, "tests/test_cuda_persistent.py", "-k", tiny]
    some = "variants and ragged_reverse and (float32 or bfloat16) and (lstm or gru) and not auto"
    layers = [*PYTEST, "tests/device/test_device_layers.py", "-k", some]
    jobs = []
    for tool in ("memcheck", "racecheck", "synccheck"):
        # Errors that the runtime returns are ours to check, and torch asks for what may fail.
        quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
        check = [program, "--tool", tool, "--error-exitcode", "9", *quiet]
        jobs.append(Job(f"{tool} primitives", [*check, *primitives], ON_GPU))
        jobs.append(Job(f"{tool} kernels", [*check, *kernels], ON_GPU))
        if tool == "memcheck":  # each tensor in memory of its own, to see what runs over
            uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            jobs.append(Job("memcheck layers", [*check, *layers], uncached))
    return together("sanitizer", jobs, seconds)


def bench(seconds):
    command = [sys.executable, "-m", "benchmarks.gpu", "--seconds", seconds - 30]
    if LATENCY.exists():
        command += ["--latency", LATENCY]
    return run("bench", Job("", command, {}), seconds)


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
    with ThreadPoolExecutor(CORES) as pool:
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
        print(f"{name}: {value:.3g}", flush=True)  # nan: the GPU does not launch it
    measured = {name: value for name, value in table.items() if math.isfinite(value)}
    LATENCY.write_text(json.dumps(measured, indent=1))


def check_machine():
    try:
        import torch
    except ImportError:
        sys.exit(f"make gpu: {sys.executable} has no torch; choose a Python with PYTHON=")
    if torch.version.cuda is None:
        sys.exit(f"make gpu: torch {torch.__version__} has no CUDA; choose a Python with PYTHON=")
    if not torch.cuda.is_available():
        sys.exit("make gpu: torch sees no CUDA device")
    for i in range(torch.cuda.device_count()):
        print(f"GPU {i}: {torch.cuda.get_device_name(i)}, torch {torch.__version__}", flush=True)


def table(outcomes):
    """The summary: a line for each stage, and one more for each further command of it."""
    lines = ["stage        result  seconds"]
    for name, (outcome, taken) in outcomes.items():
        result = "passed" if outcome.passed else "FAILED"
        first, *others = outcome.notes
        lines.append(f"{name:12} {result}  {taken:7.0f}  {first}")
        lines += [" " * 30 + note for note in others]
    return "\n".join(lines)


def run_stages(names, patience):
    """Outcome and seconds of each stage by name; what was not built is not run."""
    outcomes = {}
    for name in names:
        stage, seconds = STAGES[name]
        (LOGS / f"{name}.log").unlink(missing_ok=True)
        start = time.monotonic()
        outcome = stage(seconds * patience)
        outcomes[name] = outcome, time.monotonic() - start
        if name == "build" and not outcome.passed:
            break
    return outcomes


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
    outcomes = run_stages(options.stages or STAGES, options.patience)
    print("\n" + table(outcomes))
    sys.exit(not all(outcome.passed for outcome, _ in outcomes.values()))


if __name__ == "__main__":
    main()
