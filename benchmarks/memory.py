"""Memory of a training step, each measured in a process of its own.

    python -m benchmarks.memory     # reads tasks from stdin and writes results, one JSON a line

A worker imports everything and then forks for every task: what one task leaves behind (memory that
an allocator keeps, threads, compiled primitives) cannot hide what the next one takes.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Worker:
    """Starts the process at the first task."""

    def __init__(self):
        self.process = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()

    def measure(self, library, case, cell, threads):
        """{"saved", "peak"} in bytes, or a string that says why there is none. The peak is None
        where the system does not tell."""
        if self.process is None:
            # glibc returns large blocks to the system at once, so that the peak is exact. NumPy's
            # threads would make the fork unsafe.
            environment = os.environ | {
                "MALLOC_MMAP_THRESHOLD_": "65536",
                "MALLOC_TRIM_THRESHOLD_": "65536",
                "OPENBLAS_NUM_THREADS": "1",
            }
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.memory"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is for the parent, which then ends this one
            )
        task = {"library": library, "case": asdict(case), "cell": cell, "threads": threads}
        try:
            print(json.dumps(task), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        return json.loads(answer) if answer else "the measuring process did not start"


def resident(field):
    """VmRSS (now) or VmHWM (most since `forget_peak`) in bytes; None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def forget_peak():
    """Frees what can be freed, and starts the peak anew. False where the system cannot."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return False
    return True


def saved_bytes(step, leaves):
    """Bytes that autograd keeps between forward and backward, each storage once, without the
    input and the parameters (``leaves``)."""
    import torch

    given = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    kept = {}

    def note(tensor):
        if not tensor.is_mkldnn:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given:
                kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return sum(kept.values())


def measure(task):
    """What `Worker.measure` returns, in this process."""
    import torch

    import rnn_ext

    from .cases import Case
    from .problem import calls, data, make_problem

    library = {"rnn_ext": rnn_ext, "torch.nn": torch.nn}[task["library"]]
    torch.set_num_threads(task["threads"])

    def prepare(case):
        problem = make_problem(case, task["cell"])
        module = problem.module(library)
        call, _ = calls(problem, module, training=True)
        return call, [data(problem.input), *module.parameters()]

    case = Case(**task["case"])
    small = Case(**{**task["case"], "batch": 2, "steps": 2, "inputs": 8, "hidden": 32})
    prepare(small)[0]()  # code and threads are there before the peak counts
    call, _ = prepare(case)
    exact = forget_peak()
    before = resident("VmRSS")
    call()
    after = resident("VmHWM") if exact else None
    call, leaves = prepare(case)
    known = after is not None and before is not None
    return {"saved": saved_bytes(call, leaves), "peak": after - before if known else None}


def in_a_fork(task):
    """`measure` in a child; its answer, or what killed it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            try:
                answer = measure(task)
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"
            with os.fdopen(writer, "w") as pipe:
                json.dump(answer, pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    return answer or json.dumps(f"the measuring process ended with status {status}")


def main():
    # Everything that the children need is imported once, without starting threads.
    import torch.fx.experimental.symbolic_shapes  # noqa: F401, by autograd.grad, at its first call

    from .cases import Case
    from .problem import make_problem

    make_problem(Case("none", 1, 1, 1, 1), "rnn")
    gc.freeze()
    for line in sys.stdin:
        print(in_a_fork(json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
