"""Random masks that depend on a seed and a position alone, the same on every device and backend.

The numbers are those of Philox 4x32-10, which has no state: a kernel, a recomputation or a second
backward pass finds the same ones again, in any order and with any number of threads. The key is the
seed; the counter of four words is

    (unit // 4, sequence, step, stream),

and a unit takes word ``unit % 4`` of the result. ``stream`` tells what the mask is for, in which
layer and direction. Where the sequence has no meaning (`weight_dropout`), it is the row of the
matrix. A number is kept where its word is at least ``threshold(p)``. csrc/ops/random.cpp,
csrc/cuda/random.cu and ``rnn_ext.reference.random`` compute the same, and so do torch operations
where there is no kernel: under torch.func, in torch.jit.trace and on other devices.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch
from torch import Tensor

from . import _C, library
from .backend import without_kernels
from .reference.random import STREAMS, stream, threshold

__all__ = ["STREAMS", "draw_seed", "mask", "stream", "threshold"]

_WORD = 0xFFFFFFFF
_SEEDS = 2**62


def draw_seed() -> Tensor:
    """A seed from torch's generator of the CPU, which torch.manual_seed governs: int64, no
    dimensions."""
    seed = torch.randint(_SEEDS, (), device="cpu")
    if torch._C._functorch.is_batchedtensor(seed):
        raise RuntimeError(
            "rnn_ext: masks cannot differ between the entries of torch.func.vmap; use "
            "randomness='same'"
        )
    return seed


def mask(
    seed: Tensor,
    stream: int,
    steps: Tensor,
    rows: Tensor,
    columns: int,
    p: float,
    kept: float,
    like: Tensor,
    dropped: float = 0.0,
) -> Tensor:
    """``kept`` with probability 1 - p, else ``dropped``: [N, columns] of the dtype and device of
    ``like``, which may be bool.

    Args:
        seed: of `draw_seed`.
        stream: of `stream`.
        steps, rows: int64 [N]: time and sequence of each row of the result.
    """
    limit = threshold(p)
    composed = torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    if not like.is_cpu:
        steps, rows = steps.to(like.device), rows.to(like.device)
        composed = composed or without_kernels(like.device) is not None
    if not composed:
        where = stream, steps, rows, columns, limit, dropped, kept
        if torch.compiler.is_compiling():
            return library.random_mask(seed, *where, like.dtype)
        return _C.random_mask(seed.item(), *where, like)
    quads = torch.arange((columns + 3) // 4, device=like.device)
    words = _philox(seed, (quads, rows[:, None], steps[:, None], stream))
    words = torch.stack(words, -1).flatten(1)[:, :columns]
    kept, dropped = (torch.tensor(value, dtype=like.dtype) for value in (kept, dropped))
    return torch.where(words >= limit, kept, dropped)


def _philox(seed, counter):
    """The four words of each counter, in int64 tensors; `counter` broadcasts."""
    key = [seed & _WORD, (seed >> 32) & _WORD]
    shape = torch.broadcast_shapes(*(c.shape for c in counter if isinstance(c, Tensor)))
    like = counter[0]
    c0, c1, c2, c3 = (
        c.expand(shape) if isinstance(c, Tensor) else like.new_full(shape, c) for c in counter
    )
    if like.is_cuda:
        key = [k.to(like.device) for k in key]
    for _ in range(10):
        high0, low0 = _product(0xD2511F53, c0)
        high1, low1 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key[0], low1, high0 ^ c3 ^ key[1], low0
        key = [(key[0] + 0x9E3779B9) & _WORD, (key[1] + 0xBB67AE85) & _WORD]
    return c0, c1, c2, c3


def _product(factor, words):
    """The higher and the lower word of factor * words, without a number past 63 bits."""
    low = factor * (words & 0xFFFF)
    middle = factor * (words >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
