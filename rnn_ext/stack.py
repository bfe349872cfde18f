"""Layers over directions: what modules, cells and functions run their kernels through."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .hooks import Hooks

__all__ = ["stack", "with_restored"]


def with_restored(
    h0: Tensor, c0: Tensor | None, restored: Sequence[Tensor] | None, packed: bool
) -> tuple[Tensor, Tensor | None]:
    """h0 and c0 of a layer, each with what resets restore under it: ``restored``, [B or 1, size],
    or zeros, which the kernels need not be told."""
    states = [h0] if c0 is None else [h0, c0]
    if restored is None:
        if not (packed and torch.compiler.is_compiling()):
            return h0, c0
        restored = [torch.zeros_like(state) for state in states]
    joined = [torch.cat((s, r.expand(s.shape))) for s, r in zip(states, restored)]
    return joined[0], None if c0 is None else joined[1]


def stack(
    cell: str,
    x: Tensor,
    h0: Sequence[Tensor],
    c0: Sequence[Tensor | None],
    weights: Sequence[tuple[Tensor | None, ...]],
    directions: int = 1,
    *,
    dropout: float = 0.0,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    resets: Tensor | None = None,
    return_cells: bool = False,
    fused: bool = True,
    run: Callable[..., Any] | None = None,
    hooks: Hooks | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor | None], Tensor | None]:
    """Layers over directions over ``run`` (``ops.layer``), with dropout between layers; no checks.

    ``h0``, ``c0`` (Nones but for the LSTM) and ``weights`` (w_ih, w_hh, b_ih, b_hh, w_hr) are lists
    with an entry for each layer and direction, directions innermost; ``x`` is [T, B, I], or [N, I]
    with ``batch_sizes``, ``resets`` [T, B] or [N]; ``hooks`` is what happens around layers. Returns
    ``output``, the lists of h_n and c_n, and with ``return_cells`` the last layer's cells. Under
    autocast the results have the dtypes that torch.nn gives them, ``fused`` for the layers, not
    ``fused`` for the cells.
    """
    device = "cuda" if x.is_cuda else "cpu"
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        fused = fused and batch_sizes is None and x.size(1) > 0
        dtype, h_dtype = _autocast_dtypes(
            device, cell, h0[0], c0[0], weights[0][4] is not None, fused
        )
        with torch.autocast(device, enabled=False):
            output, h_n, c_n, cells = stack(
                cell,
                x.to(dtype),
                _cast(h0, dtype),
                _cast(c0, dtype),
                [_cast(group, dtype) for group in weights],
                directions,
                dropout=dropout,
                batch_sizes=batch_sizes,
                reverse=reverse,
                resets=resets,
                return_cells=return_cells,
                run=run,
                hooks=hooks,
            )
        return output.to(h_dtype), _cast(h_n, h_dtype), c_n, cells

    run = run or ops.layer
    if len(weights) == 1 and hooks is None:  # the loops below cost as much as a step's kernel
        x, h_n, c_n, cells = run(
            cell,
            x,
            h0[0],
            c0[0],
            *weights[0],
            batch_sizes=batch_sizes,
            reverse=reverse,
            resets=resets,
            return_cells=return_cells,
        )
        return x, [h_n], [c_n], cells
    h_n, c_n = [], []
    for first in range(0, len(weights), directions):
        before = x
        if first and dropout:
            x = torch.dropout(x, dropout, True)
        if hooks is not None:
            x = hooks.before(first, x, batch_sizes)
        options = {
            "batch_sizes": batch_sizes,
            "resets": resets,
            "return_cells": return_cells and first + directions == len(weights),
        }
        group = [(h0[k], c0[k], *weights[k]) for k in range(first, first + directions)]
        if hooks is not None and hooks.looks_at_cells(group):
            options["return_cells"] = True
        more = [{}] * directions if hooks is None else hooks.options(first, x, group, batch_sizes)
        if directions == 2 and run is ops.layer:
            zoneout = [m.get("zoneout") for m in more]
            results = ops.both_directions(
                cell, x, *group, reverse=reverse, zoneout=zoneout, **options
            )
        else:
            results = [
                run(cell, x, *tensors, reverse=reverse != bool(k), **options, **more[k])
                for k, tensors in enumerate(group)
            ]
        given = x
        if directions == 1:
            x, _, _, cells = results[0]
        else:
            x = torch.cat([result[0] for result in results], -1)
            cells = [result[3] for result in results]
        if hooks is not None:
            hooks.record(cell, given, group, results, batch_sizes, resets)
            x = hooks.after(first, before, x)
        h_n += [result[1] for result in results]
        c_n += [result[2] for result in results]
    if not return_cells:
        return x, h_n, c_n, None
    return x, h_n, c_n, torch.cat(cells, -1) if directions > 1 else cells


def _autocast_dtypes(device, cell, h0, c0, projected, fused):
    """What torch.nn computes in and returns h in.

    On CUDA layers and cells are cast as a whole, on the CPU products, and a fused LSTM as a whole.
    """
    cast = torch.get_autocast_dtype(device)
    if device == "cuda" or cell.startswith("rnn") or (cell == "lstm" and fused and not projected):
        return cast, cast
    state = torch.promote_types((h0 if c0 is None else c0).dtype, cast)
    return state, cast if projected else state


def _cast(tensors, dtype):
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]
