"""Compiles kernel sources and the emulator into a shared object, once per content.

Sources are csrc/cuda/*.cu (as C++), *.cpp, and C++ files with the functions that a test calls
(entry.h). The result is kept in build/cuda_on_cpu under a name made from the preprocessed text, so
nothing is ever out of date.
"""

import hashlib
import os
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "build" / "cuda_on_cpu"

EMULATOR = ["asynchronous", "barriers", "launch", "matrices", "memory", "scheduler"]
COMMON = [
    "-std=c++20",
    "-fPIC",
    "-fno-gnu-unique",
    "-fno-semantic-interposition",
    "-DRNN_EXT_EMULATED",
]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
WORKERS = min(2, os.cpu_count() or 1)
KERNEL = {
    False: ["-O2", "-g1"],
    True: ["-O1", "-g1", "-fsanitize=thread"],
}


_compiling = threading.Semaphore(WORKERS)


def build(sources, *, race=False, flags=(), mutant=None):
    """The shared object of ``sources`` (paths relative to the repository) and the emulator.

    Args:
        race: compile with the race checker (several times slower to run).
        flags: further compiler flags, for instance ``-DNAME=1``.
        mutant: a `Mutant` to plant first; files that it does not touch are not compiled again.
    """
    return _build(tuple(sources), race, tuple(flags), mutant)


def build_ahead(jobs):
    """Builds several at a time what tests will ask for: dictionaries of the arguments of `build`.

    What cannot be built is left to the test that asks for it.
    """
    jobs = list(jobs)
    for race in {job.get("race", False) for job in jobs}:
        _machine(race)
    with ThreadPoolExecutor(WORKERS) as pool:
        wait([pool.submit(build, **job) for job in jobs])


@cache
def _build(sources, race, flags, mutant):
    root = mutant.plant(FOLDER / "mutants") if mutant else ROOT
    jobs = [(root / source, [*KERNEL[race], *flags], root) for source in sources]
    objects = [*_machine(race), *_compile_all(jobs)]
    name = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
    library = FOLDER / f"{name}.so"
    if not library.exists():
        link = ["-shared", "-Wl,-Bsymbolic", "-Wl,--no-undefined", "-ldl"]
        run_compiler([_compiler(), *map(str, objects), *link], library)
    return library


@cache
def _machine(race):
    """The emulator's own objects, which no mutant touches."""
    names = [*EMULATOR, "race" if race else "race_off"]
    return _compile_all([(HERE / f"{name}.cpp", ["-O2", "-g1"], ROOT) for name in names])


def _compile_all(jobs):
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(lambda job: _compile(*job), jobs))


@cache
def _compiler():
    compiler = shutil.which("g++") or os.environ.get("CXX")
    if not compiler:
        raise RuntimeError("cuda_on_cpu needs g++ 11 or later")
    return compiler


def _compile(source, flags, root):
    """The object of one source; ``root`` holds its csrc and tests folders."""
    includes = [f"-I{HERE}", f"-I{root}/csrc", f"-I{root}/csrc/cuda"]
    command = [_compiler(), *COMMON, *WARNINGS, *flags, *includes, "-x", "c++"]
    preprocess = subprocess.run([*command, "-E", str(source)], capture_output=True)
    if preprocess.returncode:
        raise RuntimeError(preprocess.stderr.decode())
    text = preprocess.stdout.replace(str(root).encode(), b".")
    identity = [_compiler(), *COMMON, *WARNINGS, *flags]
    key = hashlib.sha256(text + " ".join(identity).encode()).hexdigest()[:16]
    result = FOLDER / f"{source.stem}-{key}.o"
    if not result.exists():
        run_compiler([*command, "-c", str(source)], result)
    return result


def run_compiler(command, result):
    """Runs ``command -o result`` so that nobody ever sees half a result."""
    result.parent.mkdir(parents=True, exist_ok=True)
    partial = result.with_suffix(f".{os.getpid()}-{threading.get_ident()}.partial")
    with _compiling:
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    partial.replace(result)  # several processes may build the same
