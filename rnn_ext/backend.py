"""Which implementation runs: the choice a user can make, and the warning when it is not ours."""

import contextlib
import contextvars
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_any_autocast_enabled, _is_tracing
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import _C

__all__ = [
    "FallbackWarning",
    "backends",
    "current",
    "is_plain_call",
    "uncovered",
    "use_backend",
    "warn_once",
    "without_kernels",
]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_DTYPE_NAMES = "float32, float64 or bfloat16"
_CUDA_DTYPES = (*_DTYPES, torch.float16)
_CUDA_DTYPE_NAMES = "float32, float64, float16 or bfloat16"

_current = contextvars.ContextVar("rnn_ext_backend", default="auto")
_warned: set[str] = set()


class FallbackWarning(UserWarning):
    """No kernel of rnn_ext covers the call, so something slower serves it; the text says why."""


@torch.compiler.assume_constant_result  # what is compiled warns when it is
def warn_once(reason: str) -> None:
    """Warns of ``reason`` with a `FallbackWarning`, the first time in this process."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(reason, FallbackWarning, stacklevel=3)


def backends() -> dict[str, dict[str, Any]]:
    """The backends by name, each a dict with ``available`` (bool) and ``reason`` (what it is or
    lacks).

    ``"cpu"`` also lists the instruction sets it can use here, best first, and the active one.
    """
    obstacle = _cuda_obstacle()
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
        "cuda-step": {
            "available": obstacle is None,
            "reason": obstacle
            or f"one product and one fused kernel a step, for {_CUDA_DTYPE_NAMES} on GPUs of "
            f"compute capability {_cuda_architectures()}",
        },
        "cuda-persistent": {
            "available": obstacle is None,
            "reason": obstacle
            or "one kernel for the whole sequence that keeps the recurrent weights on chip, for "
            "float32, float16 and bfloat16 where they fit",
        },
    }


def _cuda_obstacle():
    """Why no CUDA kernel can run in this process (a phrase), or None."""
    obstacle = _C.cuda_unavailable()
    if not obstacle and torch.version.cuda is None:
        obstacle = f"this torch ({torch.__version__}) has no CUDA"
    return obstacle or None


def _cuda_architectures():
    return _C.cuda_architectures.replace(";", ", ")


def current() -> str:
    """Name of the active backend."""
    # torch.compile cannot trace a context variable; code that it compiled runs the kernels.
    if torch.compiler.is_compiling():
        return "auto"
    return _current.get()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Context manager: run rnn_ext's layers on backend ``name`` in this thread (or task) only.

    Models that torch.compile compiled do not look at it: they run the kernels, as under "auto".

    Args:
        name: ``"auto"`` (the default: the fastest kernel that covers the input), ``"reference"``,
            ``"cpu"``, ``"cuda-step"`` or ``"cuda-persistent"``. All but ``"auto"`` and
            ``"reference"`` raise ``RuntimeError`` on input they do not cover.
            ``"cuda-persistent"`` does so in the forward pass; a backward pass that has no
            persistent kernel runs step by step (`explain` says so beforehand).

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


def is_plain_call() -> bool:
    """Whether nothing watches or rewrites what runs: no compiler, transform, tracer or autocast,
    and the backend is "auto"."""
    return not (
        is_compiling()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _is_any_autocast_enabled()
        or _is_tracing()
        or _current.get() != "auto"
    )


def uncovered(
    x: Tensor, states: Iterable[Tensor | None], weights: Iterable[Iterable[Tensor | None]]
) -> str | None:
    """Why no kernel takes these together (a phrase), or None if one does.

    ``states`` are tensors, ``weights`` groups of tensors or None.
    """
    dtype = x.dtype
    backend = current()
    if backend not in ("auto", "reference") and x.is_cuda != backend.startswith("cuda"):
        return f"its input is on {x.device}"
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
        return _uncovered_on_cuda(tensors)
    if not first.is_cpu:
        return without_kernels(first.device)
    if torch.is_autocast_enabled("cpu"):
        return _autocast(tensors)
    return "its tensors have different dtypes"


def without_kernels(device: torch.device) -> str | None:
    """Why no kernel of this build runs on ``device`` (a phrase), or None."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"there are no kernels for device {device.type!r}"
    if not _C.cuda_architectures:
        return "this build has no CUDA kernels"
    if torch.compiler.is_compiling():
        return None
    capability = torch.cuda.get_device_capability(device)
    if any(_runs_on(name, capability) for name in _C.cuda_architectures.split(";")):
        return None
    return (
        f"its kernels were compiled for compute capability {_cuda_architectures()}, and this GPU "
        f"has {capability[0]}.{capability[1]}"
    )


def _uncovered_on_cuda(tensors):
    obstacle = without_kernels(tensors[0].device)
    if obstacle is not None:
        return obstacle
    dtypes = {tensor.dtype for tensor in tensors}
    if torch.is_autocast_enabled("cuda") and torch.float64 not in dtypes:
        dtypes = {torch.get_autocast_dtype("cuda")}
    if len(dtypes) > 1:
        return "its tensors have different dtypes"
    (dtype,) = dtypes
    if dtype not in _CUDA_DTYPES:
        return f"{_name(dtype)} has no CUDA kernel (use {_CUDA_DTYPE_NAMES})"
    return _recording()


def _runs_on(architecture, capability):
    """Whether code for ``architecture``, as TORCH_CUDA_ARCH_LIST names it, runs on a GPU."""
    name, ptx, _ = architecture.partition("+PTX")
    major, minor = (int(number) for number in name.rstrip("af").split("."))
    if name.endswith("a"):  # of this GPU alone
        return capability == (major, minor)
    if ptx and not name.endswith("f"):
        return capability >= (major, minor)
    return capability[0] == major and capability[1] >= minor


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
