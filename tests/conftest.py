"""Shared by all tests: a fixed seed; kernels whose working memory starts out as NaN, and whose
backward pass goes through the rows in pieces as short as they can be."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from rnn_ext import _C


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _poisoned_scratch():
    _C.poison_scratch(True)
    _C.shorten_pieces(True)


@pytest.fixture
def nan_filled():
    """Every tensor that torch allocates without a value is full of NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=_C.cpu_isas())
def isa(request):
    """Runs the test once for each instruction set of this CPU."""
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


@pytest.fixture
def threads(request):
    """``request.param`` threads, by indirect parametrization."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def examples():
    """The folder of the examples, where their modules find each other and tests find them."""
    folder = Path(__file__).resolve().parent.parent / "examples"
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture
def run_example(examples, tmp_path, monkeypatch, capfd):
    """run_example("digits", "--quick") -> (exit code, stdout, stderr); it runs in tmp_path."""
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)

    def run(name, *options):
        module, common = importlib.import_module(name), importlib.import_module("common")
        code = common.exit_code(module.main, [*map(str, options)])
        return code, *capfd.readouterr()

    return run
