"""What is handed out: versions and metadata, the wheel's machine code, public CI, the web pages."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import rnn_ext
from rnn_ext import _C

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
WORKFLOW = ROOT / ".github/workflows/ci.yml"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
# As objdump prints them: AVX and later, BMI, MOVBE. Not tzcnt, which compilers use as bsf.
BEYOND_BASELINE = re.compile(
    r"\t(v(?!er[rw]\b)\w+|andn|bextr|bls\w+|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx|lzcnt|movbe)\b"
)


def test_the_version_is_written_once():
    literal = f'"{rnn_ext.__version__}"'
    files = [*ROOT.glob("*.toml"), *ROOT.glob("*.py"), *ROOT.glob("rnn_ext/**/*.py*")]
    found = [f.name for f in files if f.suffix != ".pyc" and literal in f.read_text()]
    assert found == ["version.py"]
    assert f"[Unreleased]: {rnn_ext.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    ("built", "present", "runs"),
    [
        ("2.13.0", "2.13.0", True),
        ("2.13.0+cpu", "2.13.1+cu126", True),
        ("2.13.0", "2.14.0", False),
        ("2.13.0", "3.13.0", False),
        ("2.1.0", "2.13.0", False),
        ("2.13.0a0+git1a2b3c4", "2.13.0a0+git1a2b3c4", True),
        ("2.13.0a0+git1a2b3c4", "2.13.0a0+git5d6e7f8", False),
        ("2.14.0.dev20260101", "2.14.0", False),
    ],
)
def test_a_build_runs_with_its_minor_version_of_torch(monkeypatch, built, present, runs):
    monkeypatch.setattr(_C, "built_for_torch", built)
    monkeypatch.setattr(torch, "__version__", present)
    if runs:
        rnn_ext._check_extension()
        return
    with pytest.raises(ImportError, match=r"was built for torch .* but this is torch") as caught:
        rnn_ext._check_extension()
    assert built in str(caught.value) and present in str(caught.value)


@pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump")
@pytest.mark.skipif("sse2" not in _C.cpu_isas(), reason="x86-64 only")
def test_only_kernels_chosen_at_run_time_go_beyond_the_baseline():
    """Every other function of the module, library templates included, runs on any x86-64-v2."""
    command = ["objdump", "-d", "--no-show-raw-insn", _C.__file__]
    chosen = re.compile("|".join(name for name in _C.cpu_isas() if name != "sse2"))
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    function, strays, guarded = "", set(), 0
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line.partition("<")[2][:-2]
        elif BEYOND_BASELINE.search(line):
            if chosen.search(function):
                guarded += 1
            else:
                strays.add(function)
    assert strays == set()
    assert guarded > 1000 or len(_C.cpu_isas()) == 1


def targets(text):
    """What a text calls make with."""
    return set(re.findall(r"^(?:.*run:|.*&&)?\s*make ([a-z][\w-]*)", text, flags=re.MULTILINE))


def test_public_ci_calls_the_makefile():
    known = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split())
    public, own = targets(WORKFLOW.read_text()), targets((ROOT / ".ci/run").read_text())
    assert own == {"lint", "test"}
    assert own | {"build", "docs", "dist"} <= public <= known


def test_public_ci_covers_what_is_promised():
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    metadata = (ROOT / "pyproject.toml").read_text()
    promised = re.findall(r"Python :: (3\.\d+)", metadata)
    matrix = jobs["test"]["strategy"]["matrix"]
    assert matrix["python"] == promised and len(promised) >= 4
    environment = (ROOT / "build_backend/environment.py").read_text()
    ends = re.search(
        r"OLDEST_TORCH, NEWEST_TESTED_TORCH = \((\d+), (\d+)\), \((\d+), (\d+)\)", environment
    )
    assert matrix["torch"] == [f"{ends[1]}.{ends[2]}.0", f"{ends[3]}.{ends[4]}.0"]
    for job in jobs.values():
        assert job["runs-on"].startswith("ubuntu-")
        assert any("run" in step for step in job["steps"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!\w+:)([^)#\s]+)", prose):
        assert (page.parent / target).exists(), target
