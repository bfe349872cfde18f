"""What a type checker says of a call, and that it is so; `make lint` has pyright read this file.

`assert_type` is for the checker, which also complains of an ignored error that is none.
"""

import ast
import importlib
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from typing_extensions import assert_type

import rnn_ext
from rnn_ext import _C, functional, reference

X = torch.randn(5, 3, 4)
PACKED = pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
H, C = torch.zeros(1, 3, 6), torch.zeros(1, 3, 6)


PACKAGE = Path(rnn_ext.__file__).parent


def kinds(value: object) -> object:
    """The classes of a result, in its own structure."""
    if type(value) is not tuple:
        return type(value)
    return tuple(kinds(part) for part in cast("tuple[object, ...]", value))


def test_every_module_lists_its_public_names() -> None:
    names = [found.name for found in pkgutil.walk_packages(rnn_ext.__path__, "rnn_ext.")]
    modules = [
        importlib.import_module(name) for name in names if name[8:] not in ("_C", "__main__")
    ]
    assert rnn_ext.reference.cells in modules
    for module in (rnn_ext, *modules):
        listed: list[str] = module.__all__
        assert len(listed) == len(set(listed)), module.__name__
        assert [name for name in listed if not hasattr(module, name)] == [], module.__name__


def test_the_stub_of_the_compiled_part_lists_what_is_there() -> None:
    written: dict[str, int | None] = {}
    for node in ast.parse((PACKAGE / "_C.pyi").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            written[node.name] = len(node.args.posonlyargs)
        elif isinstance(node, ast.ClassDef):
            written[node.name] = None
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if not node.target.id.startswith("_"):
                written[node.target.id] = None
    present: dict[str, int | None] = {}
    for name in dir(_C):
        if not name.startswith("_"):
            text: str = getattr(getattr(_C, name), "__doc__", None) or ""
            is_function = text.startswith(f"{name}(")
            present[name] = len(re.findall(r"\barg\d+: ", text)) if is_function else None
    assert written == present


def test_the_stub_of_the_layers_has_their_arguments() -> None:
    for node in ast.parse((PACKAGE / "modules.pyi").read_text()).body:
        if isinstance(node, ast.ClassDef):
            (init,) = (part for part in node.body if isinstance(part, ast.FunctionDef))
            arguments = init.args
            names = [argument.arg for argument in arguments.args[3:] + arguments.kwonlyargs]
            defaults = [*arguments.defaults, *filter(None, arguments.kw_defaults)]
            assert len(names) == len(defaults) >= 9
            given = {key: ast.literal_eval(value) for key, value in zip(names, defaults)}
            layer: Callable[..., object] = getattr(rnn_ext, node.name)
            assert str(layer(4, 6, **given)) == str(layer(4, 6))
            positional = [given[argument.arg] for argument in arguments.args[3:]]
            assert str(layer(4, 6, *positional)) == str(layer(4, 6))


def test_layers_with_one_state() -> None:
    gru = rnn_ext.GRU(4, 6, num_layers=1, batch_first=False, reset_after=True, dtype=torch.float32)
    rnn = rnn_ext.RNN(4, 6, nonlinearity="sigmoid", recurrent_init="orthogonal", device="cpu")
    plain = assert_type(gru(X, H, lengths=[5, 2, 1]), tuple[Tensor, Tensor])
    packed = assert_type(rnn(PACKED), tuple[PackedSequence, Tensor])
    assert_type(rnn.forward(X), tuple[Tensor, Tensor])
    assert kinds(plain) == (Tensor, Tensor)
    assert kinds(packed) == (PackedSequence, Tensor)


def test_lstm() -> None:
    lstm = rnn_ext.LSTM(4, 6, forget_bias=1.0)
    states = (Tensor, Tensor)
    plain = assert_type(lstm(X, (H, C)), tuple[Tensor, tuple[Tensor, Tensor]])
    cells = assert_type(
        lstm(X, lengths=torch.tensor([1, 5, 2]), return_cells=True),
        tuple[Tensor, tuple[Tensor, Tensor], Tensor],
    )
    packed = assert_type(lstm(PACKED), tuple[PackedSequence, tuple[Tensor, Tensor]])
    packed_cells = assert_type(
        lstm(PACKED, return_cells=True),
        tuple[PackedSequence, tuple[Tensor, Tensor], PackedSequence],
    )
    assert kinds(plain) == (Tensor, states)
    assert kinds(cells) == (Tensor, states, Tensor)
    assert kinds(packed) == (PackedSequence, states)
    assert kinds(packed_cells) == (PackedSequence, states, PackedSequence)


def test_cells() -> None:
    x, h = X[0], H[0]
    assert kinds(assert_type(rnn_ext.RNNCell(4, 6)(x), Tensor)) is Tensor
    assert kinds(assert_type(rnn_ext.GRUCell(4, 6)(x, h), Tensor)) is Tensor
    pair = assert_type(rnn_ext.LSTMCell(4, 6)(x, (h, h)), tuple[Tensor, Tensor])
    assert kinds(pair) == (Tensor, Tensor)


def test_functions() -> None:
    gru, lstm = rnn_ext.GRU(4, 6), rnn_ext.LSTM(4, 6)
    of_gru, of_lstm = ([p.detach() for p in layer.parameters()] for layer in (gru, lstm))
    one = assert_type(functional.gru(X, None, of_gru[0], of_gru[1]), tuple[Tensor, Tensor])
    two = assert_type(
        functional.lstm(X, (H[0], C[0]), of_lstm[0], of_lstm[1]),
        tuple[Tensor, tuple[Tensor, Tensor]],
    )
    three = assert_type(
        functional.lstm(X, None, of_lstm[0], of_lstm[1], return_cells=True),
        tuple[Tensor, tuple[Tensor, Tensor], Tensor],
    )
    assert kinds((one, two, three)) == (
        (Tensor, Tensor),
        (Tensor, (Tensor, Tensor)),
        (Tensor, (Tensor, Tensor), Tensor),
    )


def test_generated_tokens() -> None:
    model = torch.nn.Embedding(5, 4), rnn_ext.GRU(4, 6), torch.nn.Linear(6, 5)
    tokens = assert_type(rnn_ext.generate(*model, [[1, 2], [3, 4]], 3, top_k=2, seed=0), Tensor)
    result = assert_type(
        rnn_ext.generate(*model, tokens, 2, beams=2, return_log_probs=True), rnn_ext.Generated
    )
    assert assert_type(result.log_probs, Tensor).shape == (2,) and result.tokens.shape == (2, 7)
    state = rnn_ext.encode(*model[:2], tokens)
    assert kinds(assert_type(rnn_ext.decode(*model, state, 1, 3), Tensor)) is Tensor


def test_models_keep_their_type() -> None:
    model = torch.nn.Sequential(torch.nn.GRU(4, 6))
    assert assert_type(rnn_ext.accelerate(model), torch.nn.Sequential) is model
    plan = assert_type(rnn_ext.explain(rnn_ext.GRU(4, 6), PACKED), rnn_ext.Plan)
    assert assert_type(plan.steps[0].threads, int) >= 1
    assert assert_type(rnn_ext.restore(model), torch.nn.Sequential) is model
    layer = rnn_ext.GRU(4, 6)
    assert assert_type(rnn_ext.quantize_weights(layer, "int8"), rnn_ext.GRU) is layer
    with rnn_ext.use_backend("reference") as nothing:
        assert_type(nothing, None)
    assert assert_type(rnn_ext.backends(), dict[str, dict[str, Any]])["auto"]["available"]
    assert isinstance(assert_type(rnn_ext.__version__, str), str)


def test_the_reference_takes_what_numpy_takes() -> None:
    result = reference.forward("gru", X.numpy(), None, None, [np.ones((18, 4)), np.ones((18, 6))])
    gradients = reference.backward(result, d_h_n=np.ones((3, 6)))
    assert assert_type(gradients.c0, "np.ndarray | None") is None


def test_what_is_wrong_is_seen_before_it_runs() -> None:
    """A checker reports each of these calls, or its complaint of a needless ignore fails it."""
    gru, lstm = rnn_ext.GRU(4, 6), rnn_ext.LSTM(4, 6)
    wrong: list[tuple[type[Exception], Callable[[], Any]]] = [
        (TypeError, lambda: rnn_ext.GRU(4)),  # pyright: ignore[reportCallIssue]
        (TypeError, lambda: rnn_ext.GRU(4, 6, forget_bias=1.0)),  # pyright: ignore[reportCallIssue]
        (ValueError, lambda: rnn_ext.RNN(4, 6, proj_size=2)),  # pyright: ignore[reportCallIssue]
        (TypeError, lambda: rnn_ext.LSTM(4, "6")),  # pyright: ignore[reportArgumentType]
        (TypeError, lambda: rnn_ext.LSTM(4, 6, forget_bias="1")),  # pyright: ignore[reportArgumentType]
        (AttributeError, lambda: gru(X, (H, C))),  # pyright: ignore[reportCallIssue, reportArgumentType]
        (ValueError, lambda: lstm(PACKED, lengths=[3, 2])),  # pyright: ignore[reportCallIssue, reportArgumentType]
        (TypeError, lambda: gru(X, return_cells=True)),  # pyright: ignore[reportCallIssue]
        (TypeError, lambda: rnn_ext.explain("gru", X)),  # pyright: ignore[reportArgumentType]
    ]
    for error, call in wrong:
        with pytest.raises(error):
            call()
