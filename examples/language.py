"""The language model of the examples: the network, its training, sampling from it."""

import math

import distributed
import torch
from corpora import BOS, PAD
from torch import nn
from training import Learner, Score

import rnn_ext

IGNORED = -100  # cross_entropy leaves targets of this value out


class LanguageModel(nn.Module):
    """Tokens in, logits of the next token out. layer_class: rnn_ext.LSTM, nn.LSTM, ...

    tied: the readout uses the embedding's weights. dropout acts on embeddings and outputs; kind is
    element (any number), locked (the same units at every step of a window, Gal and Ghahramani 2016)
    or token (whole embeddings; outputs by element).
    """

    def __init__(
        self, layer_class, symbols, hidden, layers, tied=False, dropout=0.0, kind="element"
    ):
        super().__init__()
        self.embedding = nn.Embedding(symbols, hidden)
        self.recurrent = layer_class(hidden, hidden, layers)
        self.readout = nn.Linear(hidden, symbols)
        if tied:
            nn.init.normal_(self.embedding.weight, std=hidden**-0.5)
            self.readout.weight = self.embedding.weight
        self.scale = hidden**0.5 if tied else 1.0  # of what the layer reads
        self.dropout, self.kind = dropout, kind

    def drop(self, x, kind):  # [T, B, H]
        if not (self.training and self.dropout):
            return x
        steps, batch, units = x.shape
        shape = {"element": x.shape, "locked": (1, batch, units), "token": (steps, batch, 1)}[kind]
        kept = 1 - self.dropout
        return x * x.new_empty(shape).bernoulli_(kept) / kept

    def forward(self, codes, state=None):  # codes [T, B] -> logits [T, B, symbols]
        embedded = self.drop(self.scale * self.embedding(codes), self.kind)
        hidden, state = self.recurrent(embedded, state)
        outputs = "element" if self.kind == "token" else self.kind
        return self.readout(self.drop(hidden, outputs)), state


def detach(state):
    return tuple(map(detach, state)) if isinstance(state, tuple) else state.detach()


def cross_entropy(logits, targets, **options):
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), **options)


def perplexity(loss):
    return math.exp(min(loss, 700))  # a float ends there


class LanguageLearner(Learner):
    """Carries the state from window to window; options are those of every Learner.

    special: the codes begin with corpora.SPECIALS, of which <pad> and <bos> are never predicted.
    """

    def __init__(self, model, args, windows, held_out_windows, unit, special=False, **options):
        super().__init__(model, args, **options)
        self.shared, self.special = distributed.share(model), special
        self.windows, self.held_out_windows = windows, held_out_windows
        self.SCORES = (
            Score("held-out perplexity", ".4f", perplexity),
            Score(f"held-out bits per {unit}", ".4f", lambda loss: loss / math.log(2)),
        )

    def targets(self, targets):
        if not self.special:
            return targets
        return targets.masked_fill((targets == PAD) | (targets == BOS), IGNORED)

    def train_step(self, step):
        inputs, targets, fresh = self.windows(step)
        inputs, targets = distributed.columns(inputs), distributed.columns(self.targets(targets))
        logits, state = self.shared(inputs, None if fresh else self.state)
        loss = cross_entropy(logits, targets, ignore_index=IGNORED)
        self.state = detach(state)
        self.descend(loss)
        return distributed.mean(loss).item()

    def evaluate(self):
        """Mean loss over the held-out windows, read from end to end with the state carried on."""
        total, predicted, state = 0.0, 0, None
        for step in range(len(self.held_out_windows)):
            inputs, targets, fresh = self.held_out_windows(step)
            targets = self.targets(targets)
            logits, state = self.model(inputs, None if fresh else state)
            total += cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED).item()
            predicted += (targets != IGNORED).sum().item()
        return total / predicted

    def state_dict(self):
        return super().state_dict() | {"state": distributed.gathered(self.state)}

    def load_state_dict(self, saved):
        super().load_state_dict(saved | {"state": distributed.part(saved["state"])})


@torch.no_grad()
def sample(model, codes, length, temperature, count=1, top_k=None, stop=None):
    """count continuations of codes by at most length tokens, as lists.

    Drawn from softmax(logits / temperature), with top_k only among the likeliest k; temperature 0
    takes the likeliest. The token stop ends one, and is left out.
    """
    embedding = model.embedding
    if model.scale != 1:
        embedding = nn.Embedding.from_pretrained(model.scale * embedding.weight)
    prefix = torch.tensor([list(codes)] * count, device=embedding.weight.device)
    written = rnn_ext.generate(
        embedding, model.recurrent, model.readout, prefix, length, temperature, top_k, eos=stop
    )
    rows = written[:, prefix.size(1) :].tolist()
    return [row[: row.index(stop)] if stop in row else row for row in rows]
