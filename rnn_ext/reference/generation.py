"""How a token is chosen from logits, and beam search: what `rnn_ext.generate` does, in NumPy."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["beam_search", "sample"]


def log_softmax(logits: ArrayLike) -> np.ndarray:
    """log p of every token, [V] of logits [V]."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = shifted - shifted.max()
    return shifted - np.log(np.exp(shifted).sum())


def kept_tokens(
    logits: ArrayLike,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> list[int]:
    """The tokens that may be drawn, likeliest first: the ``top_k`` first ones, and of these the
    fewest whose probabilities among the k sum to ``top_p`` or more (Holtzman et al. 2020)."""
    logits = np.asarray(logits, dtype=np.float64)
    kept = np.argsort(-logits, kind="stable")[:top_k]
    p = np.exp(log_softmax(logits[kept] / temperature))
    above = np.cumsum(p) - p  # the mass of what is likelier
    return [int(token) for token, mass in zip(kept, above) if top_p is None or mass < top_p]


def sample(
    logits: ArrayLike,
    noise: ArrayLike,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> int:
    """The token with the largest p / noise: with ``noise`` [V] drawn from the exponential
    distribution each token wins with its probability p (this is how `torch.multinomial` draws).
    ``temperature=0`` gives the likeliest token."""
    if temperature == 0:
        return int(np.argmax(np.asarray(logits)))
    kept = sorted(kept_tokens(logits, temperature, top_k, top_p))
    log_p = log_softmax(np.asarray(logits, dtype=np.float64)[kept] / temperature)
    return kept[int(np.argmax(np.exp(log_p) / np.asarray(noise)[kept]))]


def beam_search(
    logits_after: Callable[[tuple[int, ...]], ArrayLike],
    beams: int,
    steps: int,
    eos: int | None = None,
    length_penalty: float = 0.0,
) -> tuple[tuple[int, ...], float]:
    """The best sequence found and its log-probability.

    At every step each of the ``beams`` hypotheses is continued by every token, and the 2 * beams
    likeliest continuations are looked at in order: one that ends with ``eos`` and is among the
    first ``beams`` is finished, of the others the first ``beams`` live on. The best ``beams``
    finished ones are kept, by log p / length^length_penalty, lengths with eos. The search ends
    after ``steps`` tokens, or when ``beams`` are finished and nothing that lives can become better
    than the worst of them.

    Args:
        logits_after: the logits [V] that follow the tokens chosen so far.
    """

    def score(hypothesis: tuple[float, tuple[int, ...]]) -> float:
        return hypothesis[0] / len(hypothesis[1]) ** length_penalty

    living: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    finished: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, steps + 1):
        continued = []
        for log_p, tokens in living:
            following = log_softmax(logits_after(tokens))
            continued += [(log_p + f, (*tokens, i)) for i, f in enumerate(following)]
        continued = [c for c in continued if c[0] > -np.inf]
        continued.sort(key=lambda hypothesis: -hypothesis[0])
        looked_at: Sequence[tuple[float, tuple[int, ...]]] = continued[: 2 * beams]
        finished += [c for c in looked_at[:beams] if c[1][-1] == eos]
        finished = sorted(finished, key=lambda hypothesis: -score(hypothesis))[:beams]
        living = [c for c in looked_at if c[1][-1] != eos][:beams]
        if not living:
            break
        longest = steps if length_penalty > 0 else length + 1
        hope = living[0][0] / longest**length_penalty
        if len(finished) == beams and score(finished[-1]) >= hope:
            living = []
            break
    log_p, tokens = max(finished + living, key=score)
    return tokens, float(log_p)
