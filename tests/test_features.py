"""docs/features.md is the table of tests/features.py. That they pass, `make features` finds out."""

import ast
import importlib.util
from pathlib import Path

import pytest
import torch_nn_probes as probes
from features import FEATURES, MISSING, SOURCES

import rnn_ext

ROOT = Path(__file__).resolve().parent.parent
TABLE = (ROOT / "docs/features.md").read_text()
ROWS = [feature for rows in FEATURES.values() for feature in rows]


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("feature_table", ROOT / "tools/feature_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_named_test_exists():
    for feature in ROWS:
        assert feature.tests, feature.name
        for test in feature.tests:
            file, _, name = test.partition("::")
            tree = ast.parse((ROOT / "tests" / file).read_text())
            functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
            assert not name or name in functions, test
            assert any(function.startswith("test_") for function in functions), test


def test_the_table_is_that_of_the_list(generator):
    """All but torch.nn's answers, which only a run gives: "?" stands for them."""
    written = TABLE[: TABLE.index("## What torch.nn has")].splitlines(keepends=True)
    shown = [row for row in written if row.startswith("| ") and "shown by" not in row]
    assert len(shown) == len(ROWS), "run `make features`"
    for row, feature in zip(shown, ROWS):
        first, found = row.removeprefix("| ").split(" | ")[:2]
        assert found, first
        assert row == generator.feature_line(feature, found), "run `make features`"
        if isinstance(feature.torch_nn, str):
            assert found == feature.torch_nn
        else:
            assert "yes" in found or "no: " in found or "int8" in found
    for title in FEATURES:
        assert f"## {title}" in TABLE
    for pair in MISSING:
        assert generator.line(*pair) in TABLE
    assert f"rnn_ext {rnn_ext.__version__}, torch " in TABLE


def test_a_cell_of_cudnn_names_its_source_or_says_that_there_is_none():
    unsourced = ("not measured", "not compared", "as on the CPU")
    for feature in ROWS:
        if feature.cudnn not in unsourced:
            assert feature.cudnn[-3:] in {f"[{key}]" for key in SOURCES}, feature.name
    cited = {feature.cudnn[-2] for feature in ROWS if feature.cudnn.endswith("]")}
    assert cited == SOURCES.keys()


def test_probes_tell_apart_what_works_what_has_a_catch_and_what_fails():
    def fails():
        raise ValueError("\nthe first line that says something\nmore")

    assert probes.answer(lambda: None) == "yes"
    assert probes.answer(lambda: "only on Tuesdays") == "only on Tuesdays"
    assert probes.answer(fails) == "no: ValueError: the first line that says something"
    some = probes.each(lambda kind: None if kind == "GRU" else fails())
    assert some() == "RNN, LSTM: no: ValueError: the first line that says something; GRU: yes"
    assert probes.answer(probes.packed) == "yes"
    assert probes.answer(probes.sigmoid).startswith("no: ValueError: Unknown nonlinearity")
