"""The random numbers of every mask: Philox 4x32-10, written to be read.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011: ten rounds of multiplications
turn a counter of four 32-bit words and a key of two into four words. There is no state, so that any
kernel can compute any of them at any time; ``rnn_ext.random`` says which counter a unit has.

>>> from rnn_ext.reference import random
>>> [hex(word) for word in random.philox([0, 0, 0, 0], 0)]
['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["STREAMS", "keep", "philox", "stream", "threshold"]

# What masks are for; each layer and direction has a stream of each.
STREAMS: tuple[str, ...] = ("zoneout_h", "zoneout_c", "weight_dropout", "variational_dropout")
_RESERVED = 8  # streams of a layer and direction


def stream(purpose: str, layer: int) -> int:
    """Fourth word of the counter: of ``STREAMS``, in a layer and direction (counted together)."""
    return _RESERVED * layer + STREAMS.index(purpose)


def threshold(p: float) -> int:
    """A word below this one is dropped, which has probability ``p`` (0 <= p < 1)."""
    return min(round(p * 2**32), 2**32 - 1)


def philox(counter: ArrayLike, seed: int) -> NDArray[np.uint32]:
    """Four words for each counter: uint32 [..., 4] to uint32 [..., 4]."""
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter).astype(np.uint64), -1, 0)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c2 = (p1 >> shift) ^ c1 ^ np.uint64(k0), (p0 >> shift) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & mask, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], -1).astype(np.uint32)


def keep(
    seed: int, stream: int, steps: ArrayLike, rows: ArrayLike, columns: int, p: float
) -> NDArray[np.bool_]:
    """bool [N, columns]: what a mask of probability ``p`` keeps in each step and sequence [N]."""
    steps, rows = np.asarray(steps), np.asarray(rows)
    quads = np.arange((columns + 3) // 4)
    parts = np.broadcast_arrays(quads, rows[:, None], steps[:, None], stream)
    words = philox(np.stack(parts, -1), seed).reshape(len(rows), -1)
    return words[:, :columns] >= threshold(p)
