"""The machine code of the CUDA kernels: registers and spills within limits, tensor cores in use."""

import ctypes
import importlib.util
import json
import os
import time
from pathlib import Path

import persistent_cases
import pytest
from cuda_on_cpu import conformance, latency, on_device

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("gpu_report", ROOT / "tools/gpu_report.py")
gpu_report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_report)

LIMITS = {
    "persistent_": {
        "needs": ["HMMA"],
        "most": {"sm_90a": {"registers": 200, "stack": 0, "shared": 1024, "spills": 0}},
    },
    "step": {"needs": [], "most": {}},
}
FINE = gpu_report.Kernel(
    "persistent_kernel<bf16>",
    "sm_90a",
    168,
    0,
    1024,
    dict.fromkeys(gpu_report.COUNTED, 0) | {"HMMA": 8},
)


@pytest.mark.parametrize(
    "change, problem",
    [
        ({}, None),
        ({"registers": 201}, "registers 201, at most 200"),
        ({"stack": 8}, "stack 8, at most 0"),
        ({"shared": 2048}, "shared 2048, at most 1024"),
        ({"instructions": FINE.instructions | {"LDL": 2, "STL": 1}}, "spills 3, at most 0"),
        ({"instructions": FINE.instructions | {"HMMA": 0}}, "has no HMMA instruction"),
        ({"architecture": "sm_80", "stack": 8}, None),
        ({"name": "unknown_kernel"}, "matches 0 entries"),
    ],
)
def test_what_breaks_a_limit_is_named(change, problem):
    problems = gpu_report.check([FINE._replace(**change)], [], LIMITS)
    assert problems == [] if problem is None else problem in problems[0]


def test_bad_warnings_of_ptxas_are_problems(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "read_object", lambda path: [])
    for name, text in [
        ("good", "ptxas info : Used 168 registers"),
        ("bad", "ptxas info : (C7515) Potential Performance Loss: wgmma.mma_async is serialized"),
    ]:
        (tmp_path / f"{name}.ptxas.txt").write_text(text)
    _, warnings = gpu_report.read_objects([tmp_path / "good.o", tmp_path / "bad.o"])
    assert len(warnings) == 1 and warnings[0].startswith("bad: ")


def test_an_update_never_allows_spills_in_persistent_kernels_on_hopper():
    spilling = FINE._replace(registers=255, stack=16, instructions=FINE.instructions | {"LDL": 9})
    updated = gpu_report.updated([spilling, spilling._replace(architecture="sm_80")], LIMITS)
    most = updated["persistent_"]["most"]
    assert most["sm_90a"] == {"registers": 255, "stack": 0, "shared": 1024, "spills": 0}
    assert most["sm_80"]["spills"] == 9


@pytest.mark.slow
def test_every_kernel_is_within_the_limits(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    try:
        gpu_report.tool("cuobjdump")
        gpu_report.tool("nvdisasm")
        objects = gpu_report.compile_kernels()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    limits = json.loads(gpu_report.LIMITS.read_text())
    kernels, warnings = gpu_report.read_objects(objects)
    problems = gpu_report.check(kernels, warnings, limits)
    assert not problems, "\n".join(problems)
    assert len(kernels) > 100


@pytest.fixture
def built(tmp_path, monkeypatch):
    """A stand-in for the repository, in which the extension's build has left objects."""
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)

    def leave(name, age):
        stamp = tmp_path / "build" / name / "cuda/step.command"
        stamp.parent.mkdir(parents=True)
        stamp.touch()
        os.utime(stamp, (time.time() - age,) * 2)
        return stamp.parents[1]

    return leave


def test_the_objects_of_the_newest_build_are_used(built):
    assert gpu_report.build_folder() == gpu_report.OBJECTS
    built("cpython-312-torch2.11-a", age=60)
    newest = built("cpython-312-torch2.11-b", age=10)
    built("cpython-312-torch2.11-c", age=90)
    assert gpu_report.build_folder() == newest


@pytest.mark.slow
@pytest.mark.parametrize(
    "source, flags, functions",
    [
        (conformance.SOURCE, (), ["conformance"]),
        (latency.SOURCE, (), ["latency", "resident", "limits"]),
        (
            persistent_cases.SOURCE,
            tuple(persistent_cases.kernel_flags("gru", "bf16")),
            ["workspace_bytes", "forward", "backward"],
        ),
    ],
    ids=["conformance", "latency", "persistent"],
)
def test_what_runs_on_a_gpu_compiles_and_exports_what_python_calls(
    source, flags, functions, monkeypatch
):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    on_device._toolkit.cache_clear()
    try:
        library = ctypes.CDLL(str(on_device.build_for_device((source,), flags)))
    except RuntimeError as missing:
        if "need nvcc" not in str(missing):
            raise
        pytest.skip(str(missing))
    finally:
        on_device._toolkit.cache_clear()
    for name in [*functions, "cuda_on_cpu_error", "on_device_allocate", "on_device_copy"]:
        assert getattr(library, name)
