"""`explain`: which kernel a call would run, and why."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _C, functional, normalized
from .backend import current, uncovered
from .cells import OneStep
from .layers import RecurrentLayers
from .quantization import QuantizedLayers
from .signatures import Pair

__all__ = ["LayerPlan", "Plan", "explain"]


@dataclass(frozen=True)
class LayerPlan:
    """How one layer runs in one direction.

    kernel: "cpu", "cuda-step" or "cuda-persistent" (rnn_ext's), "reference" (torch operations),
    "torch.nn" or "none" (an error); of the forward pass, where the backward pass has another one
    ``reason`` says so; isa: the CPU's instruction set, "" if it is not ours; threads: how many on
    the CPU; split: what they share out, "rows" of the batch, "columns" of the hidden state or
    "none"; reason: why.
    """

    layer: int
    direction: str  # "forward" or "reverse"
    kernel: str
    isa: str
    threads: int
    split: str
    reason: str

    def __str__(self) -> str:
        if not self.isa:
            return f"{self.kernel} kernel: {self.reason}"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads over {self.split}"
        return f"{self.kernel} kernel, {self.isa}, {threads}: {self.reason}"


@dataclass(frozen=True)
class Plan:
    """What `explain` found: ``module`` (its repr) and a `LayerPlan` for each layer and direction.

    As text it is one line, or one for each different way in which the layers run.
    """

    module: str
    steps: tuple[LayerPlan, ...]

    def __str__(self) -> str:
        where = {}
        for step in self.steps:
            where.setdefault(str(step), []).append(f"layer {step.layer} {step.direction}")
        if len(where) == 1:
            return f"{self.module}: {next(iter(where))}"
        return "\n".join(f"{self.module}, {', '.join(at)}: {text}" for text, at in where.items())


def explain(
    module: torch.nn.Module,
    input: Tensor | PackedSequence,
    hx: Tensor | Pair | None = None,
) -> Plan:
    """Which kernel ``module(input, hx)`` would run for each layer and direction, and why; runs
    nothing.

    Args:
        module: a layer or cell of rnn_ext.
        input, hx: as its forward takes them.

    Returns:
        Plan: ``str(plan)`` is one readable line; ``plan.steps`` has the details.

    Raises:
        TypeError: ``module`` is not one of ours (`accelerate` makes torch.nn's so).
        ValueError: the module cannot take this input; calling it says why.
    """
    if isinstance(module, QuantizedLayers):
        return Plan(str(module), tuple(_quantized_plans(module)))
    if isinstance(module, RecurrentLayers):
        arranged = module._arrange(input, hx)
        if arranged is not None:
            x, batch_sizes, batch, states = arranged
            steps = x.size(0) if batch_sizes is None else batch_sizes.numel()
            weights, directions = module._weights(), 2 if module.bidirectional else 1
    elif isinstance(module, OneStep):
        arranged = states = module._arrange(input, hx)
        if arranged is not None:
            x, steps, batch = input, 1, input.size(0) if input.dim() == 2 else 1
            weights, directions = [module._weights()], 1
    else:
        raise TypeError(
            f"explain: module must be a layer or cell of rnn_ext, got {type(module).__name__}; "
            "rnn_ext.accelerate(model) replaces torch.nn's"
        )
    if arranged is None:
        raise ValueError(f"explain: {module} cannot take this input; calling it says why")

    reason = uncovered(x, states, weights)
    if getattr(module, "_whole_rows", False):
        reason = reason or normalized.uncovered(x)
    plans = []
    for k, group in enumerate(weights):
        how = _choose(module, x, steps, batch, directions, group, reason)
        plans.append(LayerPlan(k // directions, "reverse" if k % directions else "forward", **how))
    return Plan(str(module), tuple(plans))


def _choose(module, x, steps, batch, directions, weights, obstacle):
    """The fields of a `LayerPlan` that do not depend on where the layer stands."""
    elsewhere = {"isa": "", "threads": torch.get_num_threads(), "split": "none"}
    backend = current()
    if backend == "reference":
        return {"kernel": "reference", "reason": "use_backend('reference') is active", **elsewhere}
    if obstacle is None and x.is_cuda and getattr(module, "_whole_rows", False):
        reason = "step-wise: a row is normalised as a whole"
        return {"kernel": "cuda-step", "reason": reason, **elsewhere}
    if obstacle is None and x.is_cuda:
        return {
            **_choose_on_cuda(module, x, steps, batch, directions, weights, backend),
            **elsewhere,
        }
    if obstacle is None:
        w_ih, w_hh = weights[:2]
        sizes = w_ih.size(1), w_hh.size(0) // functional.gates(module._cell), w_hh.size(1)
        dtype = str(x.dtype).removeprefix("torch.")
        if getattr(module, "_whole_rows", False):
            chosen = _C.plan_rows(module._cell, dtype, steps, batch, *sizes[:2])
        else:
            chosen = _C.plan_cpu(module._cell, dtype, steps, batch, *sizes, directions)
        return {field: chosen[field] for field in ("kernel", "isa", "threads", "split", "reason")}
    if backend != "auto":
        reason = f"use_backend({backend!r}) refuses: {obstacle}"
        return {"kernel": "none", "reason": reason, **elsewhere}
    kernel = "torch.nn" if module._extra is None else "reference"
    return {"kernel": kernel, "reason": obstacle, **elsewhere}


def _quantized_plans(module):
    threads = torch.get_num_threads()
    reason = f"weights of {module.kind}; fewer threads where a step has little work"
    for layer in range(module.num_layers):
        for direction in ("forward", "reverse")[: 2 if module.bidirectional else 1]:
            yield LayerPlan(layer, direction, "cpu", _C.cpu_isa(), threads, "columns", reason)


def _choose_on_cuda(module, x, steps, batch, directions, weights, backend):
    """Kernel and reason of the forward pass, and of the backward pass where that differs."""
    hidden, projected = weights[0].size(0) // functional.gates(module._cell), weights[4] is not None
    autocast = torch.is_autocast_enabled("cuda") and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype("cuda") if autocast else x.dtype
    limits = _C.cuda_device_limits(x.device.index or 0)
    norms, control = False, getattr(module, "_control", None)
    if control is not None and torch.is_grad_enabled():
        norms = control.clip is not None and control.clip[0] == "norm"
        directions = 1  # each by itself
    asked = directions, projected, norms, bool(getattr(module, "zoneout", 0)), backend
    passes = _C.plan_cuda(module._cell, dtype, steps, batch, hidden, *asked, limits)
    (kernel, reason), (backward, why) = [(k, text.partition(": ")[2]) for k, text in passes]
    if backend == "cuda-persistent" and kernel != backend:
        return {"kernel": "none", "reason": f"use_backend({backend!r}) refuses: {reason}"}
    if why != reason:
        reason += f"; backward {backward.removeprefix('cuda-')}: {why}"
    return {"kernel": kernel, "reason": reason}
