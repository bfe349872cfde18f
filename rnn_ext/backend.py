"""Which implementation runs: the choice a user can make, and the warning when it is not ours."""

import contextlib
import contextvars
import warnings

import torch

from .version import __version__

_CUDA_MISSING = f"rnn_ext {__version__} has no CUDA kernels"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_DTYPE_NAMES = "float32, float64 or bfloat16"

_current = contextvars.ContextVar("rnn_ext_backend", default="auto")
_warned = set()


class FallbackWarning(UserWarning):
    """No kernel of rnn_ext covers the call, so something slower serves it; the text says why."""


def warn_once(reason):
    """Warns of ``reason`` with a `FallbackWarning`, the first time in this process."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(reason, FallbackWarning, stacklevel=3)


def backends() -> dict[str, dict]:
    """The backends by name, each a dict with ``available`` (bool) and ``reason`` (what it is or
    lacks).

    ``"cpu"`` also lists the instruction sets it can use here, best first, and the active one.
    """
    from . import _C

    return {
        "auto": {"available": True, "reason": "the fastest kernel that covers the input"},
        "reference": {
            "available": True,
            "reason": "torch operations and a Python loop: any device, any dtype, slow",
        },
        "cpu": {
            "available": True,
            "reason": f"fused kernels for {_DTYPE_NAMES} on the CPU",
            "instruction_sets": list(_C.cpu_isas()),
            "active": _C.cpu_isa(),
        },
        "cuda-step": {"available": False, "reason": _CUDA_MISSING},
        "cuda-persistent": {"available": False, "reason": _CUDA_MISSING},
    }


def current() -> str:
    """Name of the active backend."""
    # torch.compile cannot trace a context variable; code that it compiled runs the kernels.
    if torch.compiler.is_compiling():
        return "auto"
    return _current.get()


@contextlib.contextmanager
def use_backend(name: str):
    """Context manager: run rnn_ext's layers on backend ``name`` in this thread (or task) only.

    Models that torch.compile compiled do not look at it: they run the kernels, as under "auto".

    Args:
        name: ``"auto"`` (the default: the fastest kernel that covers the input), ``"reference"``,
            ``"cpu"``, ``"cuda-step"`` or ``"cuda-persistent"``. All but ``"auto"`` and
            ``"reference"`` raise ``RuntimeError`` on input they do not cover.

    Raises:
        ValueError: ``name`` is no backend.
        RuntimeError: the backend is not available here; the message says why.
    """
    known = backends()
    if name not in known:
        raise ValueError(f"use_backend: unknown backend {name!r}; choose one of {', '.join(known)}")
    if not known[name]["available"]:
        usable = ", ".join(key for key, entry in known.items() if entry["available"])
        raise RuntimeError(
            f"use_backend: {name!r} is not available: {known[name]['reason']}; use one of {usable}"
        )
    token = _current.set(name)
    try:
        yield
    finally:
        _current.reset(token)


def uncovered(x, states, weights):
    """Why no kernel takes these together (a phrase), or None if one does.

    ``states`` are tensors, ``weights`` groups of tensors or None.
    """
    dtype = x.dtype
    tensors = [x, *states]
    for group in weights:
        tensors += group
    for tensor in tensors:
        if tensor is not None and (tensor.dtype != dtype or not tensor.is_cpu):
            return _mixed([tensor for tensor in tensors if tensor is not None])
    if dtype not in _DTYPES:
        return f"{_name(dtype)} has no CPU kernel (use {_DTYPE_NAMES})"
    if dtype != torch.float64 and torch.is_autocast_enabled("cpu"):
        return _autocast([x])
    return _recording()


def _mixed(tensors):
    first = tensors[0]
    if any(tensor.device != first.device for tensor in tensors):
        return "its tensors are on different devices"
    if first.is_cuda:
        return _CUDA_MISSING
    if not first.is_cpu:
        return f"there are no kernels for device {first.device.type!r}"
    if torch.is_autocast_enabled("cpu"):
        return _autocast(tensors)
    return "its tensors have different dtypes"


def _autocast(tensors):
    dtype = torch.get_autocast_dtype("cpu")
    castable = all(tensor.dtype in (torch.float32, torch.bfloat16) for tensor in tensors)
    if dtype == torch.bfloat16 and castable:
        return _recording()
    return f"autocast to {_name(dtype)} from these dtypes has no CPU kernel"


def _recording():
    if torch.jit.is_tracing():
        return "torch.jit.trace records only operators of torch"
    return None


def _name(dtype):
    return str(dtype).removeprefix("torch.")
