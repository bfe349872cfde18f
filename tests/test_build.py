"""The build as a user meets it: a wheel in a clean environment, a sentence for what is missing."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import numpy
import pytest
import setuptools
import torch

import rnn_ext

ROOT = Path(__file__).resolve().parent.parent
TOOLS = Path(setuptools.__file__).parents[1]
INSTALLED = {
    sysconfig.get_path("purelib"),
    *(str(Path(m.__file__).parents[1]) for m in (torch, numpy)),
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="rnn_ext is built on Linux only")

USE_IT = """
import sys, torch, rnn_ext
assert rnn_ext.__file__.startswith(sys.prefix), rnn_ext.__file__
ours, theirs = rnn_ext.LSTM(5, 7), torch.nn.LSTM(5, 7)
ours.load_state_dict(theirs.state_dict())
x = torch.randn(4, 3, 5)
torch.testing.assert_close(ours(x)[0], theirs(x)[0])
ours(x)[0].sum().backward()
print("works", rnn_ext.__version__)
"""


def run(command, cwd=ROOT, **variables):
    """Runs a command with the RNN_EXT_* variables given, no others; .text is both its streams."""
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith("RNN_EXT_") and k != "PYTHONPATH"
    }
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=inherited | {k: str(v) for k, v in variables.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    done.text = done.stdout
    return done


def environment(folder, *visible):
    """An empty virtual environment that sees the given import folders; returns its interpreter."""
    made = run([sys.executable, "-m", "venv", "--without-pip", folder])
    assert made.returncode == 0, made.text
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "visible.pth").write_text("".join(f"{path}\n" for path in visible))
    return folder / "bin/python"


def pip(python, *words, **variables):
    command = [sys.executable, "-m", "pip", "--python", python, *words]
    return run(command, PIP_NO_INDEX="1", **variables)


@pytest.fixture(scope="module")
def build_tools(tmp_path_factory):
    """An import folder that has setuptools and nothing else: no torch."""
    folder = tmp_path_factory.mktemp("build_tools")
    for entry in ("setuptools", "_distutils_hack", "pkg_resources", "wheel", "packaging"):
        if (TOOLS / entry).is_dir():
            (folder / entry).symlink_to(TOOLS / entry)
    for info in [*TOOLS.glob("setuptools-*.dist-info"), *TOOLS.glob("wheel-*.dist-info")]:
        (folder / info.name).symlink_to(info)
    return folder


def fake_torch(folder, version):
    (folder / "torch").mkdir(parents=True)
    (folder / "torch/__init__.py").write_text('raise ImportError("a stand-in, not torch")\n')
    (folder / "torch/version.py").write_text(f"__version__ = '{version}'\n")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The source distribution of this tree, unpacked: what is not listed for it is missing here."""
    folder = tmp_path_factory.mktemp("source")
    make = "import sys, build_backend; print(build_backend.build_sdist(sys.argv[1]))"
    made = run([sys.executable, "-c", make, folder])
    assert made.returncode == 0, made.text
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    words = ["wheel", "--no-build-isolation", "--no-deps", "-w", folder, source]
    built = run([sys.executable, "-m", "pip", *words], cwd=folder, PIP_NO_INDEX="1")
    assert built.returncode == 0, built.text
    (file,) = folder.glob("*.whl")
    return file


def test_source_distribution_is_complete(source):
    listed = {str(f.relative_to(source)) for f in source.rglob("*") if f.is_file()}
    wanted = {
        str(f.relative_to(ROOT))
        for folder in ("csrc", "rnn_ext", "build_backend", "tools")
        for f in (ROOT / folder).rglob("*")
        if f.suffix in (".h", ".cpp", ".cu", ".cuh", ".py", ".pyi", ".typed")
    }
    assert wanted <= listed, sorted(wanted - listed)
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py"} <= listed
    assert not [name for name in listed if name.endswith((".so", ".o", ".pyc"))]


@pytest.mark.slow
def test_wheel_runs_in_a_clean_environment(wheel, tmp_path):
    python = environment(tmp_path / "clean", *INSTALLED)
    installed = pip(python, "install", "--no-deps", "--ignore-installed", wheel)
    assert installed.returncode == 0, installed.text
    used = run([python, "-c", USE_IT], cwd=tmp_path)
    assert used.returncode == 0 and "works" in used.text, used.text


@pytest.mark.slow
def test_wheel_holds_the_package_alone(wheel):
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        (metadata,) = (opened.read(n).decode() for n in names if n.endswith(".dist-info/METADATA"))
    inside = {name.split("/")[0] for name in names}
    assert inside == {"rnn_ext", next(n for n in inside if n.endswith(".dist-info"))}
    assert {"rnn_ext/py.typed", "rnn_ext/_C.pyi", "rnn_ext/modules.pyi"} <= set(names)
    major, minor = torch.__version__.split(".")[:2]
    assert f"\nRequires-Dist: torch=={major}.{minor}.*\n" in metadata
    assert f"\nVersion: {rnn_ext.__version__}\nSummary:" in metadata
    assert len([name for name in names if name.endswith(".so")]) == 1
    assert not [name for name in names if name.endswith((".h", ".cpp"))]


def test_isolated_build_sees_the_installed_torch(build_tools, tmp_path):
    """pip isolates with two variables and drops the environment's own packages from the path."""
    python = environment(tmp_path / "outer", *INSTALLED)
    hidden = tmp_path / "isolation"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.path = [p for p in sys.path if 'site-packages' not in p]\n"
        f"sys.path.append({str(build_tools)!r})\n"
    )
    look = "import importlib.util as u, sys; print(bool(u.find_spec('torch')))"
    isolated = {"PYTHONPATH": hidden, "PYTHONNOUSERSITE": "1"}
    assert run([python, "-c", look], cwd=tmp_path, **isolated).text.strip() == "False"
    script = f"import build_backend; {look}; print(*build_backend.get_requires_for_build_wheel())"
    seen = run([python, "-c", script], **isolated)
    assert seen.returncode == 0 and "True" in seen.text.split(), seen.text
    assert not re.search(r"\btorch\b.*[<>=]", seen.text)


def said(done):
    """Our one sentence in pip's output; fails when there is none or more than one."""
    assert done.returncode != 0, done.text
    sentences = [line.strip() for line in done.text.splitlines() if "rnn_ext: " in line]
    assert len(sentences) == 1, done.text
    assert "Traceback" not in done.text, done.text
    return sentences[0]


BUILD = ["wheel", "--no-build-isolation", "--no-deps", str(ROOT)]


def test_no_torch(build_tools, tmp_path):
    python = environment(tmp_path / "bare", build_tools)
    sentence = said(pip(python, *BUILD, "-w", tmp_path))
    assert "none is installed" in sentence and "pip install --no-build-isolation ." in sentence


def test_torch_too_old(build_tools, tmp_path):
    python = environment(tmp_path / "bare", fake_torch(tmp_path / "fake", "2.10.1"), build_tools)
    sentence = said(pip(python, *BUILD, "-w", tmp_path))
    assert "torch 2.11 or newer and found 2.10.1" in sentence and "pip install" in sentence


def test_torch_that_cannot_be_imported(build_tools, tmp_path):
    python = environment(tmp_path / "bare", fake_torch(tmp_path / "fake", "2.13.0"), build_tools)
    sentence = said(pip(python, *BUILD, "-w", tmp_path))
    assert "installed but cannot be imported (a stand-in, not torch)" in sentence


def test_newer_torch_than_tested_is_a_notice(build_tools, tmp_path):
    python = environment(tmp_path / "bare", fake_torch(tmp_path / "fake", "2.99.0"), build_tools)
    script = "import build_backend; print(build_backend.get_requires_for_build_wheel())"
    done = run([python, "-c", script])
    assert done.returncode == 0, done.text
    assert "torch 2.99.0 is newer than the newest tested" in done.text


def test_no_compiler(build_tools, tmp_path):
    python = environment(tmp_path / "bare", fake_torch(tmp_path / "fake", "2.13.0"), build_tools)
    sentence = said(pip(python, *BUILD, "-w", tmp_path, CXX="/nonexistent/g++"))
    assert "needs a C++ compiler" in sentence and "CXX=/nonexistent/g++ does not run" in sentence
    nowhere = {"PATH": tmp_path, "CXX": ""}
    sentence = said(pip(python, *BUILD, "-w", tmp_path, **nowhere))
    assert "none of c++, g++ and clang++ runs" in sentence and "apt install g++" in sentence


def test_compiler_too_old(build_tools, tmp_path):
    old = tmp_path / "g++-9"
    old.write_text("#!/bin/sh\necho '#define __GNUC__ 9'\n")
    old.chmod(0o755)
    python = environment(tmp_path / "bare", fake_torch(tmp_path / "fake", "2.13.0"), build_tools)
    sentence = said(pip(python, *BUILD, "-w", tmp_path, CXX=old))
    assert "(gcc 9) is older" in sentence


def test_cuda_switch_is_checked(build_tools, tmp_path):
    script = "from build_backend import cuda; print(cuda.wanted_toolkit(None))"
    wrong = run([sys.executable, "-c", script], RNN_EXT_CUDA="yes")
    assert wrong.returncode != 0 and "RNN_EXT_CUDA is 'yes': set it to auto, 0 or 1" in wrong.text
    missing = {"PATH": tmp_path, "CUDA_HOME": "", "CUDA_PATH": ""}
    absent = run([sys.executable, "-c", script], RNN_EXT_CUDA="1", **missing)
    assert absent.returncode != 0 and "no nvcc was found" in absent.text
    off = run([sys.executable, "-c", script], RNN_EXT_CUDA="0")
    assert off.returncode == 0 and off.text.strip() == "None"


def test_module_of_another_torch_is_refused():
    script = "import torch; torch.__version__ = '9.9.9'; import rnn_ext"
    refused = run([sys.executable, "-c", script])
    assert refused.returncode != 0
    last = refused.text.strip().splitlines()[-1]
    assert last.startswith("ImportError: rnn_ext was built for torch")
    assert "9.9.9" in last and "pip install" in last


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
def test_one_openmp_runtime_is_loaded():
    script = """
import re, torch, rnn_ext
torch.set_num_threads(2)
rnn_ext.LSTM(64, 64)(torch.randn(20, 32, 64))[0].sum().backward()
torch.randn(512, 512) @ torch.randn(512, 512)
with open("/proc/self/maps") as maps:
    files = {line.split()[-1] for line in maps}
print(*(f for f in files if re.search(r"/lib(g|i)?omp[^/]*\\.so", f)))
"""
    done = run([sys.executable, "-c", script])
    assert done.returncode == 0, done.text
    assert len(done.text.split()) == 1, done.text


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_help_names_every_command():
    done = run(["make", "help"])
    targets = re.search(r"^\.PHONY: help environment (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert done.returncode == 0
    for target in targets[1].split():
        assert f"make {target}" in done.text
