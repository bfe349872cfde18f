"""The layer's kernels under torch.func: vmap, grad and what is built of them.

A dimension that vmap adds to inputs and states becomes part of the batch of one kernel call, whose
backward pass sums the weights' gradients over each of its entries alone: per-sample gradients cost
one call. Where vmap gives each entry weights of its own, there is a call for each. Gradients of
gradients are composed of torch operations, and so are forward-mode derivatives, which no kernel
computes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from . import _C, composite
from .backend import current, warn_once
from .folding import fold, one_by_one, unfold
from .zoneout import Zoneout, with_masks

__all__ = ["Call", "layer", "layer_backward", "vjp", "watched", "watched_backward"]

_STATES = 3  # input, h0, c0; what follows are weights
_INPUTS = 8
_SHOWN = 4  # output, h_n, c_n, cells; what follows is for the backward pass
_Kind = _functorch.TransformType


@dataclass(frozen=True)
class Call:
    """What a layer is given beside tensors, and its backward pass besides.

    Functions take only the tensors that are ``present``: of the eight inputs, then of the four that
    the forward pass saved and of the gradients of its four results. ``save``: keep what the
    backward pass and the fourth result need. ``isa`` is what the forward kernel returned with what
    it saved; ``wanted`` are the inputs that are to get a gradient. ``groups`` are the sizes of the
    dimensions that vmap added to the batch, each of whose entries gets gradients of the weights:
    they stand before the weights' own dimensions.
    """

    cell: str
    batch_sizes: Tensor | None
    reverse: bool
    backend: str
    resets: Tensor | None = None
    zoneout: Zoneout | None = None
    save: bool = True
    isa: str = ""
    present: tuple[bool, ...] = ()
    wanted: tuple[bool, ...] = ()
    groups: tuple[int, ...] = ()

    def spread(self, tensors: Any) -> list[Any]:
        """The tensors in their places, None elsewhere."""
        return _spread(self.present, tensors)

    def folded(self, size: int) -> "Call":
        """For ``size`` times the batch, whose entries get gradients of their own."""
        sizes = None if self.batch_sizes is None else self.batch_sizes * size
        resets = None if self.resets is None else self.resets.repeat_interleave(size, -1)
        zoneout = with_masks(self.zoneout, lambda hold: hold.repeat_interleave(size, -2))
        call = replace(self, batch_sizes=sizes, resets=resets, zoneout=zoneout)
        return replace(call, groups=(*self.groups, size))

    def unfolded(self) -> "Call":
        """What the innermost `folded` was made of."""
        sizes = None if self.batch_sizes is None else self.batch_sizes // self.groups[-1]
        resets = None if self.resets is None else self.resets[..., :: self.groups[-1]]
        zoneout = with_masks(self.zoneout, lambda hold: hold[..., :: self.groups[-1], :])
        call = replace(self, batch_sizes=sizes, resets=resets, zoneout=zoneout)
        return replace(call, groups=self.groups[:-1])


@dataclass(frozen=True)
class _Results:
    """Which of a forward pass's results there are, and the instruction set that saved them."""

    present: tuple[bool, ...]
    isa: str


def watched() -> bool:
    """Whether a transform of torch.func or a forward-mode derivative sees what runs now."""
    return (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


def watched_backward(upstream: Sequence[Tensor | None]) -> bool:
    """Whether gradients are to be differentiated again, or something else watches them."""
    return torch.is_grad_enabled() or watched() or _batched_by_autograd(upstream)


def layer(
    cell: str,
    tensors: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    reverse: bool,
    return_cells: bool,
    resets: Tensor | None = None,
    zoneout: Zoneout | None = None,
) -> tuple[Any, ...]:
    """As ``ops.layer``, where something is `watched`."""
    backend, obstacle = current(), _obstacle()
    if resets is not None and obstacle is None:
        bare = _without_transforms(resets)
        if bare is None:
            obstacle = "resets that differ between the entries of torch.func.vmap have"
        else:
            with torch._C._DisableFuncTorch():  # which would wrap it again
                resets = bare.clone()  # the backward pass is not told of a change
    if zoneout is not None and obstacle is None:
        zoneout = tuple(hold if hold is None else _without_transforms(hold) for hold in zoneout)
    if backend != "reference":
        if obstacle is None:
            backend = backend if tensors[0].is_cuda else "auto"
            present, given = _present(tensors)
            save = return_cells or torch.is_grad_enabled() or _Kind.Grad in _active()
            call = Call(cell, batch_sizes, reverse, backend, resets, zoneout, save, present=present)
            *results, kept = _Layer.apply(call, *given)
            return tuple(_spread(kept.present, results)[:_SHOWN])
        if backend != "auto":
            raise RuntimeError(
                f"rnn_ext: the backend {backend!r} cannot run this: {obstacle} no kernel; "
                "use 'auto'"
            )
        _warn_composed(obstacle)
    return composite.layer(
        cell, *tensors, batch_sizes=batch_sizes, reverse=reverse, resets=resets, zoneout=zoneout
    )


def layer_backward(
    call: Call,
    tensors: Sequence[Tensor | None],
    saved: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of ``tensors``, None for what is not wanted; differentiable again.

    ``saved`` are the forward kernel's states, cells, gates and middle, ``upstream`` the gradients
    of its first four results, each a tensor or None.
    """
    wanted = tuple(w and t is not None for t, w in zip(tensors, wanted))
    if not any(wanted) or all(d is None for d in upstream):
        return [None] * _INPUTS
    obstacle = _obstacle()
    if _batched_by_autograd(upstream):
        obstacle = "torch.autograd.grad(is_grads_batched=True), and jacobian(vectorize=True), has"
    if obstacle is None:
        present, given = _present((*tensors, *saved, *upstream))
        results = _LayerBackward.apply(replace(call, wanted=wanted, present=present), *given)
    else:
        _warn_composed(obstacle)
        results = _composed_gradients(replace(call, wanted=wanted), tensors, upstream)
    return _spread(wanted, results)


def _obstacle():
    """What has no kernel (a subject and its verb), or None."""
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode derivatives have"
    active = _active()
    if _Kind.Jvp in active:
        return "forward-mode derivatives have"
    return None if active <= {_Kind.Vmap, _Kind.Grad} else "this transform of torch.func has"


def _warn_composed(obstacle):
    warn_once(f"rnn_ext: {obstacle} no kernel; composed of torch operations instead")


def _active():
    """The kinds of the transforms that see what runs now."""
    return {level.key() for level in _functorch.get_interpreter_stack() or ()}


def _batched_by_autograd(tensors):
    """Whether an older vmap than torch.func's is at work, which knows no rules for Functions."""
    for tensor in tensors:
        if tensor is not None and _functorch.is_legacy_batchedtensor(tensor):
            return True
    return False


def _without_transforms(tensor):
    """What torch.func wrapped, or None if that has a dimension for the entries of a vmap."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return None
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def _present(tensors):
    """Which tensors there are, and those."""
    present = tuple(t is not None for t in tensors)
    return present, tuple(compress(tensors, present))


def _spread(present, tensors):
    tensors = iter(tensors)
    return [next(tensors) if p else None for p in present]


def _apply(function, *arguments):
    """``function.apply``, or without what that costs if nothing needs it."""
    if watched() or (torch.is_grad_enabled() and any(t.requires_grad for t in arguments[1:])):
        return function.apply(*arguments)
    return function.forward(*arguments)


# What torch does with the arguments and results of a Function under a transform costs tens of
# microseconds for each of them: hence none that is None.


class _Layer(torch.autograd.Function):
    """Of (output, h_n, c_n, cells, states, wide cells, gates, middle) those there are, and
    `_Results`. Tensors alias nothing: states (wide cells) are left out where they repeat output
    (cells)."""

    @staticmethod
    def forward(call, *tensors):
        results = _C.layer_forward(
            call.cell,
            *call.spread(tensors),
            call.batch_sizes,
            call.reverse,
            call.resets,
            call.zoneout,
            call.save,
            call.backend,
        )
        if not call.save:
            present, results = _present((*results, *[None] * 5))
            return *results, _Results(present, "")
        output, h_n, c_n, states, cells, gates, middle, isa = results
        wide_cells = None
        if states is output:
            states = None
        if cells is not None and cells.dtype != output.dtype:
            wide_cells, cells = cells, cells.to(output.dtype)
        present, results = _present((output, h_n, c_n, cells, states, wide_cells, gates, middle))
        return *results, _Results(present, isa)

    @staticmethod
    def setup_context(ctx, inputs, results):
        call, *tensors = inputs
        *results, ctx.results = results
        ctx.call = replace(call, isa=ctx.results.isa)
        ctx.set_materialize_grads(False)
        shown = sum(ctx.results.present[:_SHOWN])
        ctx.mark_non_differentiable(*results[shown:])
        ctx.save_for_backward(*tensors, *results)

    @staticmethod
    def backward(ctx, *upstream):
        kept = iter(ctx.saved_tensors)
        tensors = ctx.call.spread(kept)
        output, _, _, cells, states, wide_cells, gates, middle = _spread(ctx.results.present, kept)
        saved = (
            output if states is None else states,
            cells if wide_cells is None else wide_cells,
            gates,
            middle,
        )
        upstream = _spread(ctx.results.present, upstream)[:_SHOWN]
        wanted = [bool(needed) for needed in ctx.call.spread(ctx.needs_input_grad[1:])]
        gradients = layer_backward(ctx.call, tensors, saved, upstream, wanted)
        return None, *compress(gradients, ctx.call.present)

    @staticmethod
    def vmap(info, in_dims, call, *tensors):
        dims, size = in_dims[1:], info.batch_size
        states = sum(call.present[:_STATES])
        if any(dim is not None for dim in dims[states:]) or not size:
            return one_by_one(partial(_apply, _Layer), size, in_dims, (call, *tensors))
        folded = [fold(t, dim, size) for t, dim in zip(tensors[:states], dims)]
        *results, kept = _apply(_Layer, call.folded(size), *folded, *tensors[states:])
        dims = [r.dim() - 1 for r in results]
        return (*(unfold(r, size) for r in results), kept), (*dims, None)


class _LayerBackward(torch.autograd.Function):
    """The gradients that are wanted, in order."""

    @staticmethod
    def forward(call, *tensors):
        tensors = call.spread(tensors)
        saved = _INPUTS + 4
        gradients = _C.layer_backward(
            call.cell,
            *tensors[:_INPUTS],
            call.batch_sizes,
            call.reverse,
            call.resets,
            call.zoneout,
            *tensors[_INPUTS:saved],
            call.isa,
            *tensors[saved:],
            call.wanted,
            prod(call.groups),
            call.backend,
        )
        return tuple(
            g if i < _STATES else g.view(*call.groups, *tensors[i].shape)
            for i, g in enumerate(gradients)
            if g is not None
        )

    @staticmethod
    def setup_context(ctx, inputs, results):
        ctx.call, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *upstream):
        used, upstream = _present(_spread(ctx.call.wanted, upstream))
        if not upstream:
            return (None,) * len(ctx.needs_input_grad)
        _warn_composed("gradients of gradients have")
        call = replace(ctx.call, wanted=used)  # of no other gradient is there a gradient
        tensors = call.spread(ctx.saved_tensors)
        needed = call.spread(ctx.needs_input_grad[1:])
        for kept in range(_INPUTS, _INPUTS + 4):  # recomputed from the inputs
            needed[kept] = False

        def gradients(*given):
            return _composed_gradients(call, given[:_INPUTS], given[_INPUTS + 4 :])

        found = vjp(gradients, tensors, needed, upstream)
        return None, *compress(found, call.present)

    @staticmethod
    def vmap(info, in_dims, call, *tensors):
        dims, size = in_dims[1:], info.batch_size
        first, last = sum(call.present[:_STATES]), sum(call.present[:_INPUTS])
        if any(dim is not None for dim in dims[first:last]) or not size:
            return one_by_one(partial(_apply, _LayerBackward), size, in_dims, (call, *tensors))
        folded = [
            t if first <= i < last else fold(t, dim, size)
            for i, (t, dim) in enumerate(zip(tensors, dims))
        ]
        results = _apply(_LayerBackward, call.folded(size), *folded)
        states = sum(call.wanted[:_STATES])
        dims = [r.dim() - 1 if i < states else len(call.groups) for i, r in enumerate(results)]
        return (*(unfold(r, size) for r in results[:states]), *results[states:]), tuple(dims)


def _composed_gradients(call, tensors, upstream):
    """What `_LayerBackward` computes, of torch operations."""
    if call.groups:
        return _composed_by_group(call, tensors, upstream)
    present = [d is not None for d in upstream]

    def results(*tensors):
        all_results = composite.layer(
            call.cell,
            *tensors,
            batch_sizes=call.batch_sizes,
            reverse=call.reverse,
            resets=call.resets,
            zoneout=call.zoneout,
        )
        return tuple(r for r, p in zip(all_results, present) if p)

    upstream = [d for d in upstream if d is not None]
    found = vjp(results, tensors, call.wanted, upstream, again=True)
    return tuple(d for d, w in zip(found, call.wanted) if w)


def _composed_by_group(call, tensors, upstream):
    size, inner = call.groups[-1], call.unfolded()
    given = (*tensors, *upstream)
    folded = [t is not None and not _STATES <= i < _INPUTS for i, t in enumerate(given)]
    states = sum(call.wanted[:_STATES])
    results = torch.func.vmap(
        lambda *given: _composed_gradients(inner, given[:_INPUTS], given[_INPUTS:]),
        tuple(t.dim() - 1 if f else None for t, f in zip(given, folded)),
        (*[-2] * states, *[len(inner.groups)] * (sum(call.wanted) - states)),
    )(*(unfold(t, size) if f else t for t, f in zip(given, folded)))
    return (*(r.flatten(-3, -2) for r in results[:states]), *results[states:])


def vjp(
    function: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    wanted: Sequence[bool],
    upstream: Sequence[Tensor],
    again: bool = False,
) -> list[Tensor | None]:
    """The gradients of those ``tensors`` that are ``wanted``, None for others.

    ``function`` takes all of them. ``again``: the gradients are to be differentiable.
    """

    def of_wanted(*leaves):
        leaves = iter(leaves)
        return function(*(next(leaves) if w else t for t, w in zip(tensors, wanted)))

    leaves = [t for t, w in zip(tensors, wanted) if w]
    if watched():
        found = torch.func.vjp(of_wanted, *leaves)[1](tuple(upstream))
    else:
        # torch.func would refuse hooks on saved tensors.
        again = again or torch.is_grad_enabled()
        with torch.enable_grad():
            # Aliases: a weight given twice still gets one gradient for each place it stands in.
            leaves = [t.view_as(t) for t in leaves]
            leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in leaves]
            results = of_wanted(*leaves)
            found = torch.autograd.grad(
                results, leaves, upstream, create_graph=again, materialize_grads=True
            )
    found = iter(found)
    return [next(found) if w else None for w in wanted]
