"""The machine code of the CUDA kernels: registers and spills within limits, tensor cores in use."""

import importlib.util
import json
from pathlib import Path

import pytest

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
