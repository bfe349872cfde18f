"""Who computes: the choice of a backend, what falls back and says so, autocast, and how to ask."""

import pathlib
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from twins import (
    CELLS,
    LAYERS,
    assert_same,
    forget_warnings,
    tensors,
    torch_nn_warnings_ignored,
    twins,
)

import rnn_ext
from rnn_ext import FallbackWarning, explain, functional, use_backend
from rnn_ext.backend import current


@pytest.fixture(autouse=True)
def _each_warning_again():
    forget_warnings()
    with torch_nn_warnings_ignored():
        yield


def test_backends_by_name():
    known = rnn_ext.backends()
    assert list(known) == ["auto", "reference", "cpu", "cuda-step", "cuda-persistent"]
    assert all(isinstance(entry["available"], bool) and entry["reason"] for entry in known.values())
    assert known["cpu"]["active"] in known["cpu"]["instruction_sets"]


def test_use_backend_is_undone_and_nests():
    assert current() == "auto"
    with use_backend("reference"):
        with use_backend("cpu"):
            assert current() == "cpu"
        assert current() == "reference"
        with pytest.raises(KeyError), use_backend("auto"):
            raise KeyError
        assert current() == "reference"
        seen = []
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
        assert seen == ["auto"]
    assert current() == "auto"


def test_use_backend_refuses_what_is_not_there():
    with pytest.raises(
        ValueError, match="unknown backend 'gpu'; choose one of auto, reference, cpu"
    ):
        with use_backend("gpu"):
            pass
    for name in ("cuda-step", "cuda-persistent"):
        with pytest.raises(
            RuntimeError, match=f"'{name}' is not available: .*; use one of auto, ref"
        ):
            with use_backend(name):
                pass


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_backends_agree(name):
    ours, theirs = twins(name, 4, 3)
    input = torch.randn(*((2, 4) if name in CELLS else (5, 2, 4)), dtype=torch.float64)
    for backend in ("auto", "reference", "cpu"):
        with use_backend(backend):
            assert_same(ours(input), theirs(input))


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_float16_is_served_by_torch_nn_with_one_warning(name):
    ours, theirs = twins(name, 4, 8, dtype=torch.float16)
    input = torch.randn(*((2, 4) if name in CELLS else (5, 2, 4))).half()
    with pytest.warns(FallbackWarning, match=f"{name}: torch.nn's kernel serves instead: float16"):
        results = ours(input)
    assert_same(results, theirs(input))
    ours(input)  # says it once
    with use_backend("reference"):
        for ours_part, their_part in zip(tensors(ours(input)), tensors(results), strict=True):
            torch.testing.assert_close(ours_part, their_part, rtol=0, atol=5e-3)
    with use_backend("cpu"), pytest.raises(RuntimeError, match=f"{name}: the backend 'cpu' cannot"):
        ours(input)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: rnn_ext.RNN(4, 3, nonlinearity="sigmoid").half()(x),
            "RNN with nonlinearity='sigmoid': float16",
        ),
        (lambda x: rnn_ext.GRU(4, 3, reset_after=False).half()(x), "GRU with reset_after=False"),
        (lambda x: rnn_ext.LSTM(4, 3).half()(x, return_cells=True), "LSTM with return_cells=True"),
        (
            lambda x: rnn_ext.GRUCell(4, 3, reset_after=False).half()(x[0]),
            "GRUCell with reset_after=False",
        ),
        (
            lambda x: functional.rnn(x, None, torch.ones(3, 4).half(), torch.ones(3, 3).half()),
            "rnn: float16",
        ),
    ],
)
def test_float16_is_composed_where_torch_nn_has_no_equivalent(call, message):
    input = torch.randn(5, 2, 4).half()
    with pytest.warns(FallbackWarning, match=message) as caught:
        results = call(input)
    assert "composed of torch operations instead" in str(caught[0].message)
    assert all(part.dtype == torch.float16 for part in tensors(results))


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_other_devices_are_served_by_torch_nn(name):
    layer = getattr(rnn_ext, name)(4, 3, device="meta")
    input = torch.randn(*((2, 4) if name in CELLS else (5, 2, 4)), device="meta")
    with pytest.warns(FallbackWarning, match="no kernels for device 'meta'"):
        results = layer(input)
    assert all(part.is_meta for part in tensors(results))


def test_mixed_dtypes_that_torch_nn_takes():
    ours, theirs = twins("LSTMCell", 4, 3, dtype=torch.float32)
    hx = torch.randn(2, 3), torch.randn(2, 3).double()
    input = torch.randn(2, 4)
    with pytest.warns(FallbackWarning, match="different dtypes"):
        assert_same(ours(input, hx), theirs(input, hx))


def test_what_torch_nn_takes_though_it_does_not_say_so():
    """torch.nn.LSTM does not check the state of packed input, and lets c_0 broadcast."""
    ours, theirs = twins("LSTM", 4, 3)
    packed = pack_padded_sequence(torch.randn(5, 2, 4, dtype=torch.float64), [5, 3])
    hx = torch.randn(1, 2, 3, dtype=torch.float64), torch.randn(1, 1, 3, dtype=torch.float64)
    with pytest.warns(FallbackWarning, match="it takes this input, rnn_ext does not"):
        assert_same(ours(packed, hx), theirs(packed, hx))
    with pytest.raises(RuntimeError, match="LSTM with return_cells=True cannot take this input"):
        ours(packed, hx, return_cells=True)


AUTOCAST = {
    "padded": lambda x: x,
    "bfloat16 input": lambda x: x.bfloat16(),
    "packed": lambda x: pack_padded_sequence(x, [5, 2]),
    "empty": lambda x: x[:, :0],
    "unbatched": lambda x: x[:, 0],
}


@pytest.mark.parametrize("kind", AUTOCAST)
@pytest.mark.parametrize("with_state", [False, True], ids=["zero state", "given state"])
@pytest.mark.parametrize(
    ("name", "options"), [(name, {}) for name in LAYERS] + [("LSTM", {"proj_size": 2})], ids=str
)
def test_autocast_gives_the_dtypes_of_torch(name, options, with_state, kind):
    ours, theirs = twins(name, 4, 8, 2, dtype=torch.float32, bidirectional=True, **options)
    input = AUTOCAST[kind](torch.randn(5, 2, 4))
    batch = {"empty": (0,), "unbatched": ()}.get(kind, (2,))
    hx = None
    if with_state:
        hx = [torch.randn(4, *batch, options.get("proj_size", 8)), torch.randn(4, *batch, 8)]
        hx = tuple(hx) if name == "LSTM" else hx[0]
    with torch.autocast("cpu", torch.bfloat16):
        our_results, their_results = tensors(ours(input, hx)), tensors(theirs(input, hx))
    for our, their in zip(our_results, their_results, strict=True):
        assert our.dtype == their.dtype
        torch.testing.assert_close(our, their, rtol=0, atol=3e-2)
    sum(part.float().sum() for part in our_results).backward()
    assert ours.weight_hh_l0.grad.dtype == torch.float32


@pytest.mark.parametrize("name", CELLS)
def test_autocast_of_cells(name):
    ours, theirs = twins(name, 4, 8, dtype=torch.float32)
    x, h, c = torch.randn(2, 4), torch.randn(2, 8), torch.randn(2, 8)
    pair = name == "LSTMCell"
    with torch.autocast("cpu", torch.bfloat16):
        for input in (x, x.bfloat16()):
            for state in (None, (h, c), (h.bfloat16(), c.bfloat16())):
                hx = state if pair or state is None else state[0]
                our_results, their_results = tensors(ours(input, hx)), tensors(theirs(input, hx))
                for our, their in zip(our_results, their_results, strict=True):
                    assert our.dtype == their.dtype
                    torch.testing.assert_close(our, their, rtol=0, atol=3e-2)


def test_autocast_leaves_float64_and_its_own_kernels_alone():
    ours, theirs = twins("GRU", 4, 3)
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(ours(x), theirs(x))
    half, _ = twins("GRU", 4, 3, dtype=torch.float32)
    with (
        torch.autocast("cpu", torch.float16),
        pytest.warns(FallbackWarning, match="autocast to float16"),
    ):
        half(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n = functional.rnn(x.float(), None, torch.ones(3, 4), torch.ones(3, 3).bfloat16())
        assert output.dtype == h_n.dtype == torch.bfloat16
        sigmoid, _ = rnn_ext.RNN(4, 3, nonlinearity="sigmoid")(x.float())
        assert sigmoid.dtype == torch.bfloat16


def test_explain_says_what_runs_and_why():
    layer = rnn_ext.LSTM(4, 3, 2, bidirectional=True)
    x = torch.randn(5, 2, 4)
    plan = explain(layer, x)
    assert [(step.layer, step.direction) for step in plan.steps] == [
        (0, "forward"),
        (0, "reverse"),
        (1, "forward"),
        (1, "reverse"),
    ]
    active = rnn_ext.backends()["cpu"]["active"]
    for step in plan.steps:
        assert (step.kernel, step.isa) == ("cpu", active)
        assert step.threads >= 1 and step.split in ("rows", "columns", "none") and step.reason
    for line in str(plan).splitlines():
        assert line.startswith(str(layer)) and f"cpu kernel, {active}, " in line
    assert explain(layer, pack_padded_sequence(x, [5, 2])).steps[0].kernel == "cpu"
    assert explain(layer, x[:, 0]).steps[0].kernel == "cpu"
    assert len(explain(rnn_ext.GRUCell(4, 3), x[0]).steps) == 1

    with use_backend("reference"):
        assert explain(layer, x).steps[0].kernel == "reference"
    half = layer.half()
    assert str(explain(half, x.half())).endswith(
        "torch.nn kernel: float16 has no CPU kernel (use float32, float64 or bfloat16)"
    )
    with use_backend("cpu"):
        assert "refuses: float16" in str(explain(half, x.half()))
    original = rnn_ext.GRU(4, 3, reset_after=False).half()
    assert explain(original, x.half()).steps[0].kernel == "reference"


def test_explain_refuses_what_cannot_run():
    with pytest.raises(TypeError, match=r"rnn_ext\.accelerate"):
        explain(torch.nn.LSTM(4, 3), torch.randn(5, 2, 4))
    for module, shape in ((rnn_ext.LSTM(4, 3), (5, 2, 9)), (rnn_ext.LSTMCell(4, 3), (5, 2, 4))):
        with pytest.raises(ValueError, match="cannot take this input"):
            explain(module, torch.randn(*shape))


def test_functional_is_one_layer_in_one_direction():
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    for name, call in (("RNN", functional.rnn), ("GRU", functional.gru), ("LSTM", functional.lstm)):
        layer = twins(name, 4, 3, bidirectional=True)[1]
        for reverse in (False, True):
            names = layer._all_weights[int(reverse)]
            weights = [getattr(layer, key) for key in names]
            output, state = call(x, None, *weights, reverse=reverse)
            expected, hidden = layer(x)
            assert_same(output, expected[..., 3:] if reverse else expected[..., :3])
            assert_same(
                state,
                tuple(h[int(reverse)] for h in hidden) if name == "LSTM" else hidden[int(reverse)],
            )
            given = call(x.transpose(0, 1), state, *weights, reverse=reverse, batch_first=True)
            assert_same(given[0].transpose(0, 1), call(x, state, *weights, reverse=reverse)[0])
            packed = pack_padded_sequence(x, [5, 3])
            assert_same(
                call(packed.data, None, *weights, reverse=reverse, batch_sizes=packed.batch_sizes)[
                    0
                ],
                layer(packed)[0].data[:, 3:] if reverse else layer(packed)[0].data[:, :3],
            )


def test_functional_lstm_extras():
    layer = rnn_ext.LSTM(4, 3, proj_size=2, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    results = functional.lstm(x, None, *layer._weights()[0], return_cells=True, batch_first=True)
    expected = layer(x, return_cells=True)
    assert_same(results, (expected[0], tuple(part[0] for part in expected[1]), expected[2]))
    with use_backend("reference"):
        assert len(functional.lstm(x, None, *layer._weights()[0], batch_first=True)) == 2


def test_the_command_line_says_what_is_here():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "rnn_ext"], capture_output=True, text=True, check=True
    )
    for text in (rnn_ext.__version__, torch.__version__, "backends", "cuda-persistent", "threads"):
        assert text in done.stdout
    assert not done.stderr


@pytest.mark.parametrize(
    ("extension", "message"),
    [
        (None, "rnn_ext is not built: run `pip install"),
        ("built_for_torch = '1.0'", "rnn_ext was built for torch 1.0, but this is torch"),
        ("raise ImportError('x.so: undefined symbol: at')", "rnn_ext was built for another torch"),
    ],
)
def test_a_missing_or_foreign_extension_is_named_at_import(tmp_path, extension, message):
    source = pathlib.Path(rnn_ext.__file__).parent
    shutil.copytree(source, tmp_path / "rnn_ext", ignore=shutil.ignore_patterns("_C.*"))
    if extension is not None:
        (tmp_path / "rnn_ext" / "_C.py").write_text(extension)
    # An editable installation would lend its extension to the copy.
    program = (
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import rnn_ext"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: {message}") and "--force-reinstall" in last
