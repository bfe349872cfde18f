"""The loop of `generate` on a GPU: one step, from the output of the layers to the next output, that
leaves every number on the device, captured once as a CUDA graph and replayed.

A step is a function of the tensors of `TokenLoop` alone and needs no GPU; only `run` captures.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .generation import Options

__all__ = ["TokenLoop"]

_EAGER = 2  # steps before the capture: they load what a capture may not
_BETWEEN_LOOKS = 16  # steps after which the host asks whether all sequences have ended
_NO_TOKEN, _NOT_FINITE = 1, 2


class TokenLoop:
    """Chosen tokens of sequences [B], as csrc/ops/sampling.cpp chooses them.

    read: tokens [B] and a tuple of states to (output [B, F], states). head: output to logits
    [B, V]. The tensors given are overwritten.
    """

    def __init__(
        self,
        options: "Options",
        read: Callable[[Tensor, Any], tuple[Tensor, tuple[Tensor, ...]]],
        head: Callable[[Tensor], Tensor],
        output: Tensor,
        states: tuple[Tensor, ...],
        generator: torch.Generator | None,
    ) -> None:
        self.options: Options = options
        self.read: Callable[[Tensor, Any], tuple[Tensor, tuple[Tensor, ...]]] = read
        self.head: Callable[[Tensor], Tensor] = head
        self.output: Tensor = output
        self.states: tuple[Tensor, ...] = states
        self.generator: torch.Generator | None = generator
        batch, device = output.size(0), output.device

        def new(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape or (batch,), dtype=dtype, device=device)

        self.at: Tensor = new(torch.int64, 1)
        self.history: Tensor = new(torch.int64, options.steps, batch)
        self.ended: Tensor = new(torch.bool)
        self.lengths: Tensor = new(torch.int64)
        self.log_probs: Tensor = new(torch.float64)
        self.failure: Tensor = new(torch.int64)
        self.failed_at: Tensor = new(torch.int64)

    def step(self) -> None:
        """Chooses a token of every sequence and reads it; those that have ended read eos again."""
        logits = self.head(self.output)
        wide = logits.double()
        most = wide.amax(1)
        usual = (wide < torch.inf).all(1)
        failure = torch.where(usual, (most == -torch.inf) * _NO_TOKEN, _NOT_FINITE)
        fresh = (failure > 0) & (self.failure == 0) & ~self.ended
        self.failure.copy_(torch.where(fresh, failure, self.failure))
        self.failed_at.copy_(torch.where(fresh, self.at, self.failed_at))

        token = self._chosen(wide, most, logits.dtype)
        options, counts = self.options, ~self.ended
        if options.eos is not None:
            token = torch.where(self.ended, options.eos, token)
            self.ended.logical_or_(token == options.eos)
        self.history.index_copy_(0, self.at, token.unsqueeze(0))
        self.lengths.add_(counts)
        if options.return_log_probs:
            of_token = wide.gather(1, token.unsqueeze(1)).squeeze(1) - wide.logsumexp(1)
            self.log_probs.add_(torch.where(counts, of_token, 0.0))
        self.at.add_(1)

        output, states = self.read(token, self.states)
        self.output.copy_(output)
        for old, new in zip(self.states, states, strict=True):
            old.copy_(new)

    def _chosen(self, logits, most, dtype):
        """[B], from logits [B, V] in float64."""
        options = self.options
        if options.temperature == 0:
            return logits.argmax(1)
        # As torch.multinomial does for one sample of each row, which takes the largest p / noise.
        noise = torch.empty_like(logits, dtype=dtype if dtype == torch.float64 else torch.float32)
        noise.exponential_(generator=self.generator)
        weights = ((logits - most.unsqueeze(1)) / options.temperature).exp()
        if 0 < options.top_k < logits.size(1) or options.top_p < 1:
            weights = self._filtered(logits, weights)
        return (weights / noise).argmax(1)

    def _filtered(self, logits, weights):
        """Zero but for what top_k and top_p leave: of equal tokens the first are likelier."""
        order = logits.argsort(dim=1, descending=True, stable=True)
        if self.options.top_k:
            order = order[:, : self.options.top_k]
        kept = weights.gather(1, order)
        if self.options.top_p < 1:
            before = kept.cumsum(1) - kept
            enough = self.options.top_p * kept.sum(1, keepdim=True)
            beyond = (before >= enough).logical_and_(
                torch.arange(kept.size(1), device=kept.device) > 0
            )
            kept = kept.masked_fill(beyond, 0.0)
        return torch.zeros_like(weights).scatter_(1, order, kept)

    def run(self) -> None:
        """All steps, or as many as it takes until every sequence has ended."""
        if not self.output.is_cuda:
            self._repeat(self.step, self.options.steps)
            return
        with torch.cuda.device(self.output.device):
            self._run_captured()

    def _run_captured(self):
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            if self._repeat(self.step, min(_EAGER, self.options.steps)):
                graph = torch.cuda.CUDAGraph()
                if self.generator is not None:
                    graph.register_generator_state(self.generator)
                with torch.cuda.graph(graph, stream=aside):
                    self.step()
                self._repeat(graph.replay, self.options.steps - _EAGER)
        current.wait_stream(aside)

    def _repeat(self, step, count):
        """Whether some sequence goes on after so many steps."""
        may_end = self.options.eos is not None
        for i in range(1, count + 1):
            step()
            if may_end and (i % _BETWEEN_LOOKS == 0 or i == count) and self.ended.all().item():
                return False
        return count < self.options.steps

    def chosen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, n], how many of a row count [B], log p [B], on the CPU.

        Raises:
            ValueError: there were logits from which no token can be chosen.
        """
        failure, failed_at, lengths = torch.stack(
            (self.failure, self.failed_at, self.lengths)
        ).cpu()
        failed = failure.nonzero().flatten().tolist()
        if failed:
            row = min(failed, key=lambda row: int(failed_at[row]))
            what = {
                _NO_TOKEN: "are all -inf: no token can follow",
                _NOT_FINITE: "have NaN or inf among them",
            }[int(failure[row])]
            raise ValueError(
                f"generate: the logits of token {failed_at[row]} of sequence {row} {what}"
            )
        longest = int(lengths.max()) if len(lengths) else 0
        return self.history[:longest].t().cpu(), lengths, self.log_probs.cpu()
