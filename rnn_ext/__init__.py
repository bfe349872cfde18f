"""Recurrent layers for PyTorch that replace torch.nn's in one line.

>>> import torch, rnn_ext
>>> lstm = rnn_ext.LSTM(10, 20)  # torch.nn.LSTM's arguments, parameters and results
>>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))

or in a model that exists:

>>> model = rnn_ext.accelerate(torch.nn.Sequential(torch.nn.GRU(10, 20)))

``rnn_ext.functional`` has the layers as functions, ``rnn_ext.online`` learns while a stream runs,
``rnn_ext.reference`` has the equations in NumPy; ``python -m rnn_ext`` says what runs here.
"""

import importlib
import re

import torch

from .version import __version__


def _same_interface(built: str, present: str) -> bool:
    """Whether what was compiled for one torch runs with another: releases of one minor version.

    Development versions have no such promise: they must be the same.
    """
    release = re.compile(r"(\d+\.\d+)\.\d+(\+(cpu|cu\d+|rocm[\d.]+|xpu))?")
    minors = [match and match[1] for match in map(release.fullmatch, (built, present))]
    return built == present or (None not in minors and minors[0] == minors[1])


def _check_extension() -> None:
    """Imports the compiled part first, so that what is wrong with it is said in one sentence."""
    reinstall = "run `pip install --no-build-isolation --force-reinstall --no-deps .` in its source"
    try:
        _C = importlib.import_module(f"{__name__}._C")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}._C":
            raise
        raise ImportError(f"rnn_ext is not built: {reinstall}") from None
    except ImportError as error:
        if "undefined symbol" not in str(error):
            raise
        raise ImportError(
            f"rnn_ext was built for another torch than {torch.__version__}: {reinstall} ({error})"
        ) from None
    if not _same_interface(_C.built_for_torch, torch.__version__):
        raise ImportError(
            f"rnn_ext was built for torch {_C.built_for_torch}, but this is torch "
            f"{torch.__version__}: {reinstall}"
        )


_check_extension()

from . import converters, functional, online, reference  # noqa: E402
from .backend import FallbackWarning, backends, use_backend  # noqa: E402
from .cells import GRUCell, LSTMCell, RNNCell  # noqa: E402
from .diagnostics import GradientFlow, gradient_flow  # noqa: E402
from .generation import Generated, decode, encode, generate  # noqa: E402
from .jordan import JordanRNN  # noqa: E402
from .modules import GRU, LSTM, RNN  # noqa: E402
from .plan import Plan, explain  # noqa: E402
from .quantization import quantize_weights  # noqa: E402
from .swap import accelerate, restore  # noqa: E402

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "FallbackWarning",
    "GRUCell",
    "Generated",
    "GradientFlow",
    "JordanRNN",
    "LSTMCell",
    "Plan",
    "RNNCell",
    "__version__",
    "accelerate",
    "backends",
    "converters",
    "decode",
    "encode",
    "explain",
    "functional",
    "generate",
    "gradient_flow",
    "online",
    "quantize_weights",
    "reference",
    "restore",
    "use_backend",
]
