"""A dimension that vmap added, as more rows of a batch, or as calls one after the other."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["fold", "one_by_one", "unfold"]


def fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """[..., rows, features] with a vmapped dimension ``dim`` as [..., rows * size, features]."""
    if dim is None:
        tensor = tensor.unsqueeze(-2).expand(*tensor.shape[:-1], size, tensor.shape[-1])
    else:
        tensor = tensor.movedim(dim, -2)
    return tensor.flatten(-3, -2)


def unfold(tensor: Tensor, size: int) -> Tensor:
    """The reverse of `fold`; the vmapped dimension is the last but one."""
    return tensor.unflatten(-2, (tensor.shape[-2] // size, size))


def one_by_one(
    function: Callable[..., tuple[Any, ...]],
    size: int,
    in_dims: Sequence[int | None],
    arguments: Sequence[Any],
) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
    """The vmap rule that calls ``function`` for each entry of the vmapped dimension."""
    if not size:  # one entry of zeros, for the shapes
        arguments = [
            a if dim is None else a.new_zeros((*a.shape[:dim], 1, *a.shape[dim + 1 :]))
            for a, dim in zip(arguments, in_dims)
        ]
        results, dims = one_by_one(function, 1, in_dims, arguments)
        return tuple(r[:0] if isinstance(r, Tensor) else r for r in results), dims
    entries = [
        function(*(a if dim is None else a.select(dim, k) for a, dim in zip(arguments, in_dims)))
        for k in range(size)
    ]
    results = [torch.stack(r) if isinstance(r[0], Tensor) else r[0] for r in zip(*entries)]
    return tuple(results), tuple(0 if isinstance(r, Tensor) else None for r in results)
