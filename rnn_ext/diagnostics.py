"""`gradient_flow`: how the gradient of a loss grows or vanishes on its way back in time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .control import Control
from .layers import RecurrentLayers
from .recompute import Flow
from .signatures import Lengths, Pair

__all__ = ["GradientFlow", "gradient_flow"]


@dataclass(frozen=True)
class GradientFlow:
    """What `gradient_flow` found, for L layers, D directions, T steps and B sequences.

    norms: ||dL/dh_t|| over units and sequences, [L, D, T]; per_sample: over units alone,
    [L, D, T, B], in the order of the batch and zero past a sequence's length; both in float64 on
    the CPU.
    """

    norms: Tensor
    per_sample: Tensor

    def plot(self, ax: Any = None) -> Any:
        """Draws ||dL/dh_t|| over t, on a logarithmic scale, a line for each layer and direction;
        returns the axes.

        Args:
            ax: matplotlib axes to draw on; None: new ones.

        Raises:
            ImportError: matplotlib is not installed.
        """
        if ax is None:
            try:
                import matplotlib.pyplot as plt
            except ImportError:
                raise ImportError(
                    "GradientFlow.plot: matplotlib is not installed; run `pip install matplotlib`, "
                    "or draw .norms with something else"
                ) from None
            ax = plt.subplots()[1]
        layers, directions, _ = self.norms.shape
        for layer in range(layers):
            for direction in range(directions):
                label = f"layer {layer}" + (" reverse" if direction else "")
                values = self.norms[layer, direction]
                ax.plot(torch.where(values > 0, values, torch.nan).tolist(), label=label)
        ax.set_yscale("log")
        ax.set_xlabel("step t")
        ax.set_ylabel("norm of dL/dh_t")
        ax.legend()
        return ax


def gradient_flow(
    module: RecurrentLayers,
    input: Tensor | PackedSequence,
    hx: Tensor | Pair | None = None,
    *,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    upstream: Tensor | None = None,
    lengths: Lengths = None,
    resets: Tensor | None = None,
    initial_state: Tensor | Pair | None = None,
) -> GradientFlow:
    """||dL/dh_t|| for every step, layer and direction, from one forward and one backward pass.

    dL/dh_t is the whole derivative, through the output at t and through all later steps (and
    layers), before ``grad_clip`` limits it. It decays over time where gradients vanish and grows
    where they explode (Bengio et al. 1994; Pascanu et al. 2013, arXiv:1211.5063). Nothing is added
    to any ``.grad``. The backward kernels take the norms in passing, on CUDA step by step.

    Args:
        module: an RNN, LSTM or GRU of rnn_ext.
        input, hx, lengths, resets, initial_state: as its forward takes them.
        loss_fn: called with the output and the state that forward returns, gives the loss L, a
            scalar tensor.
        upstream: instead of ``loss_fn``, dL/d(output), shaped like the output (of packed input its
            data).

    Raises:
        TypeError: ``module`` is no layer of rnn_ext.
        ValueError: not exactly one of ``loss_fn`` and ``upstream``, or one of another shape.
        RuntimeError: the layer runs on torch.nn's kernel, which gives no such gradients.
    """
    if not isinstance(module, RecurrentLayers):
        raise TypeError(
            f"gradient_flow: module must be an RNN, LSTM or GRU of rnn_ext, got "
            f"{type(module).__name__}; rnn_ext.accelerate(model) replaces torch.nn's"
        )
    if (loss_fn is None) == (upstream is None):
        raise ValueError("gradient_flow: give either loss_fn or upstream")
    flows: list[Flow] = []
    before = module._control
    try:
        module._control = (before or Control()).watching(flows)
        with torch.enable_grad():
            packed = isinstance(input, PackedSequence)
            leaf = (input.data if packed else input).detach().requires_grad_()
            given = PackedSequence(leaf, *input[1:]) if packed else leaf
            starts = {"resets": resets, "initial_state": initial_state}
            output, state = module(given, hx, lengths=lengths, **starts)
            _backward(leaf, output, state, loss_fn, upstream)
    finally:
        module._control = before
    directions = 2 if module.bidirectional else 1
    if len(flows) != module.num_layers * directions:
        raise RuntimeError(
            f"gradient_flow: no kernel of rnn_ext runs this; rnn_ext.explain says why: {module}"
        )
    per_sample = _by_sample(flows, input, output, lengths, module.batch_first)
    per_sample = per_sample.unflatten(0, (module.num_layers, directions))
    return GradientFlow(torch.linalg.vector_norm(per_sample, dim=-1), per_sample)


def _backward(leaf, output, state, loss_fn, upstream):
    """Runs the backward pass, whose gradient of the input alone is asked for."""
    if loss_fn is not None:
        loss = loss_fn(output, state)
        if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
            raise ValueError(
                "gradient_flow: loss_fn must return a scalar tensor that depends on output or state"
            )
        torch.autograd.grad(loss, leaf, allow_unused=True)
        return
    data = output.data if isinstance(output, PackedSequence) else output
    if upstream.shape != data.shape:
        raise ValueError(
            f"gradient_flow: upstream must have shape {list(data.shape)}, that of the output, got "
            f"{list(upstream.shape)}"
        )
    torch.autograd.grad(data, leaf, upstream)


def _by_sample(flows, input, output, lengths, batch_first):
    """[flows, T, B] of the norms, zero where no gradient came."""
    if isinstance(input, PackedSequence):
        steps, order = input.batch_sizes.numel(), input
    else:
        steps, order = input.size(1 if batch_first and input.dim() == 3 else 0), None
        if lengths is not None:
            given = torch.as_tensor(lengths, device="cpu")
            order = pack_padded_sequence(
                torch.zeros(steps, given.numel(), 1), given, enforce_sorted=False
            )
    norms = []
    for flow in flows:
        if flow.norms is None:
            norms.append(None)
        elif order is None or flow.norms.numel() != order.data.size(0):
            norms.append(flow.norms.detach().cpu().double().reshape(steps, -1))
        else:
            rows = flow.norms.detach().cpu().double().unsqueeze(-1)
            indices = (None if i is None else i.cpu() for i in order[2:])
            padded = PackedSequence(rows, order.batch_sizes, *indices)
            norms.append(pad_packed_sequence(padded, total_length=steps)[0].squeeze(-1))
    there = next((n for n in norms if n is not None), None)
    if there is None:
        raise ValueError("gradient_flow: the loss depends on no output and no state of the layers")
    return torch.stack([torch.zeros_like(there) if n is None else n for n in norms])
