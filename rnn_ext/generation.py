"""`generate`: the tokens that a recurrent language model goes on with, in one call of C++; `encode`
and `decode` do the same for an encoder-decoder."""

import math
import numbers
import operator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _C
from .language import Model, checked_tokens, first_tensor, map_state, with_batch

__all__ = ["Generated", "decode", "encode", "generate"]


class Generated(NamedTuple):
    """What `generate` and `decode` return with ``return_log_probs=True``.

    tokens: as they return it otherwise; lengths: int64 [B], how many of a row's tokens are no
    padding; log_probs: float64 [B], the sum of log p(token) over the new tokens of a row, eos
    included, under the model itself (before temperature, top_k and top_p). Without a batch each has
    one dimension less.
    """

    tokens: Tensor
    lengths: Tensor
    log_probs: Tensor


@torch.no_grad()
def generate(
    embedding,
    rnn,
    head,
    prefix,
    steps,
    temperature=1.0,
    top_k=None,
    top_p=None,
    eos=None,
    seed=None,
    *,
    lengths=None,
    hx=None,
    beams=1,
    length_penalty=0.0,
    pad=None,
    return_log_probs=False,
):
    """Continues each ``prefix`` by up to ``steps`` tokens: greedily, by sampling or by beam search.

    On the CPU the whole loop (embedding, layers, head, choice) is one call of C++ that leaves the
    interpreter to other threads, for `torch.nn.Embedding`, one direction of RNN, LSTM or GRU
    (rnn_ext's, quantized too, or torch.nn's, whose weights are used as they are) and
    `torch.nn.Linear` in float32, float64 or bfloat16. On CUDA one step is captured as a graph and
    replayed, and tokens are chosen on the device, for the same modules and float16, but for
    quantized ones and beam search. Everything else runs the same loop in Python, with a
    `FallbackWarning` that names the reason. No gradients; layers do not drop anything out, as in
    eval mode.

    Sampling takes the numbers of torch's generators as `torch.multinomial` does, so that it gives
    the tokens of the usual loop with ``torch.multinomial(torch.softmax(logits / temperature, -1),
    1)``, logits [B, V], after ``torch.manual_seed`` or with a generator of the same seed: always in
    float64, and in float32 up to what rounding changes. They do not depend on the number of
    threads.

    Args:
        embedding: [tokens] to features: `torch.nn.Embedding`, or a module that takes int64 [B, P].
        rnn: called with features and state; returns ``(output, state)``.
        head: output features to logits: `torch.nn.Linear`, tied to the embedding or not, or another
            module. It may give fewer logits than there are embeddings, not more.
        prefix: int tensor [B, P], or [P] without a batch, or a list; P >= 1. Always batch first.
        steps: how many tokens are added at most.
        temperature: logits are divided by it; 0 takes the likeliest token, the first of equal ones.
        top_k: sample among the k likeliest tokens; of equal ones the first are likelier.
        top_p: then among the fewest of them, likeliest first, whose probabilities sum to top_p or
            more (Holtzman et al. 2020, arXiv:1904.09751).
        eos: the token that ends a sequence. It is kept; ``pad`` follows. All ended: the call ends.
        seed: an int, which seeds a `torch.Generator` for this call, or a `torch.Generator`; None:
            torch's default one. Each on the device of the model: one seed draws other numbers on
            CUDA than on the CPU. A generator on the CPU serves a model on CUDA too, in Python.
        lengths: int [B], where prefixes are shorter than P and padded at their end. A row's new
            tokens follow its own prefix.
        hx: the state before the prefix, as ``rnn`` takes it. None: zeros.
        beams: more than 1: beam search with so many hypotheses, which draws nothing;
            `rnn_ext.reference.beam_search` says how it goes.
        length_penalty: beam search finds the largest log p / (number of new tokens)^length_penalty.
        pad: what fills rows up; None: eos, or 0 without eos.
        return_log_probs: return a `Generated`.

    Returns:
        int64 [B, P + n] (without a batch [P + n]): prefix and new tokens, where n <= steps is the
        number of new tokens of the longest.

    Raises:
        ValueError: numbers out of range, an empty prefix, a token that the embedding has not, sizes
            that do not fit together, both directions, or logits that are NaN or all -inf (the
            message has the step).
        TypeError: arguments of another kind.
    """
    options = Options("generate", steps, temperature, top_k, top_p, eos, seed, beams)
    options.also(length_penalty, pad, return_log_probs)
    model = Model("generate", embedding, rnn, head)
    prefix, lengths, batched = checked_tokens("generate", "prefix", embedding, prefix, lengths)
    output, state = model.read(prefix, lengths, hx if batched else with_batch(hx))
    choice = model.run(options, output, state, None)
    return options.result(choice, prefix, lengths, batched)


@torch.no_grad()
def encode(embedding, rnn, source, *, lengths=None, hx=None):
    """The state in which ``rnn`` leaves after reading ``source``: what `decode` starts from.

    Args:
        embedding, rnn, hx: as of `generate`. With both directions the state has both, which a
            decoder of one direction does not take: add or concatenate them.
        source: int tensor [B, T], or [T] without a batch, or a list.
        lengths: int [B], where sources are shorter than T.

    Returns:
        The state as ``rnn`` returns it: h_n, or of the LSTM (h_n, c_n).

    Raises:
        ValueError, TypeError: as `generate`.
    """
    model = Model("encode", embedding, rnn, None)
    source, lengths, batched = checked_tokens("encode", "source", embedding, source, lengths)
    _, state = model.read(source, lengths, hx if batched else with_batch(hx))
    return state if batched else map_state(lambda part: part.squeeze(1), state)


@torch.no_grad()
def decode(
    embedding,
    rnn,
    head,
    state,
    bos,
    steps,
    eos=None,
    temperature=1.0,
    top_k=None,
    top_p=None,
    seed=None,
    *,
    beams=1,
    length_penalty=0.0,
    pad=None,
    return_log_probs=False,
):
    """As `generate`, from a state (of `encode`) and the token ``bos`` that begins a sequence.

    Args:
        state: as ``rnn`` takes it, [layers, B, size], or [layers, size] without a batch.
        bos: an int, or one for each sequence [B].
        embedding, rnn, head, steps: as of `generate`, and so are all arguments that follow.

    Returns:
        int64 [B, n] (without a batch [n]): the new tokens alone, without ``bos``.

    Raises:
        ValueError, TypeError: as `generate`.
    """
    options = Options("decode", steps, temperature, top_k, top_p, eos, seed, beams)
    options.also(length_penalty, pad, return_log_probs)
    model = Model("decode", embedding, rnn, head)
    batched = first_tensor(state).dim() == 3
    state = map_state(lambda part: part if batched else part.unsqueeze(1), state)
    batch, device = first_tensor(state).size(1), first_tensor(state).device
    bos = torch.as_tensor(bos, device=device)
    if bos.dim() == 0:
        bos = bos.expand(batch)
    if bos.shape != (batch,):
        raise ValueError(f"decode: bos must be a token or [{batch}] tokens, got {list(bos.shape)}")
    bos = checked_tokens("decode", "bos", embedding, bos.unsqueeze(1), None)[0].squeeze(1)
    choice = model.run(options, None, state, bos)
    return options.result(choice, None, None, batched)


class Options:
    """The arguments that say how tokens are chosen, checked."""

    def __init__(self, name, steps, temperature, top_k, top_p, eos, seed, beams):
        self.name = name
        self.steps = self.whole("steps", steps, 1)
        self.temperature = self.number("temperature", temperature)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"{name}: temperature must be 0 or more, got {temperature}")
        self.top_k = 0 if top_k is None else self.whole("top_k", top_k, 1)
        self.top_p = 1.0 if top_p is None else self.number("top_p", top_p)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"{name}: top_p must be above 0 and at most 1, got {top_p}")
        self.eos = None if eos is None else self.whole("eos", eos, 0)
        self.beams = self.whole("beams", beams, 1)
        if self.beams > 1 and (temperature not in (0, 1) or (top_k, top_p, seed) != (None,) * 3):
            raise ValueError(
                f"{name}: beam search draws nothing: leave out temperature, top_k, top_p and seed, "
                "or give beams=1"
            )
        self.seed = seed
        if seed is not None and not isinstance(seed, torch.Generator):
            self.seed = self.whole("seed", seed, None)

    def also(self, length_penalty, pad, return_log_probs):
        self.length_penalty = self.number("length_penalty", length_penalty)
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"{self.name}: length_penalty must be finite, got {length_penalty}")
        self.pad = (self.eos or 0) if pad is None else self.whole("pad", pad, None)
        self.return_log_probs = bool(return_log_probs)

    def whole(self, key, value, least):
        try:
            number = operator.index(value)
        except TypeError:
            number = None
        if number is None or isinstance(value, bool):
            raise TypeError(f"{self.name}: {key} must be an int, got {value!r}") from None
        if least is not None and number < least:
            raise ValueError(f"{self.name}: {key} must be at least {least}, got {number}")
        return number

    def number(self, key, value):
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise TypeError(f"{self.name}: {key} must be a number, got {value!r}")
        return float(value)

    def generator(self, device):
        """The generator that draws on ``device``, or None for torch's default one there."""
        if self.seed is None:
            return None
        if not isinstance(self.seed, torch.Generator):
            return torch.Generator(device).manual_seed(self.seed)
        if self.seed.device.type != device.type:
            where = {"cpu": "the CPU", "cuda": "CUDA"}.get(device.type, device.type)
            raise ValueError(
                f"{self.name}: seed must be a generator on {where}, got {self.seed.device}"
            )
        return self.seed

    def check_eos(self, tokens):
        if self.eos is not None and self.eos >= tokens:
            raise ValueError(
                f"{self.name}: eos is {self.eos}, but the head gives logits for {tokens} tokens"
            )

    def choice(self, batch, tokens):
        """What chooses among so many tokens for so many sequences."""
        self.check_eos(tokens)
        return _C.TokenChoice(
            batch, tokens, self.steps, self.temperature, self.top_k, self.top_p,
            -1 if self.eos is None else self.eos, self.return_log_probs, self.beams,
            self.length_penalty, self.generator(torch.device("cpu")),
        )  # fmt: skip

    def result(self, choice, prefix, lengths, batched):
        """What the caller gets of the chosen tokens, which follow the prefixes."""
        tokens, counts, log_probs = choice.chosen()
        batch = tokens.size(0)
        if prefix is None:
            prefix = tokens.new_empty(batch, 0)
        before = torch.full((batch,), prefix.size(1)) if lengths is None else lengths
        total = before + counts
        width = int(total.max()) if batch else prefix.size(1)
        at = torch.arange(width).expand(batch, width)
        padded = torch.cat((prefix.cpu(), tokens), 1)
        # Column j of a row is its prefix's, or the new token j - before.
        source = torch.where(at < before[:, None], at, at - before[:, None] + prefix.size(1))
        source = source.clamp_max(max(padded.size(1) - 1, 0))
        joined = padded.gather(1, source).masked_fill(at >= total[:, None], self.pad)
        results = [part.to(prefix.device) for part in (joined, total, log_probs)]
        if not batched:
            results = [part.squeeze(0) for part in results]
        return Generated(*results) if self.return_log_probs else results[0]
