"""Small recurrent language models, and the loop that people write for them."""

import torch

import rnn_ext

VOCABULARY = 23


def language_model(layers, vocabulary=VOCABULARY, sharpness=6.0):
    """(embedding, rnn, head) around ``layers``; ``sharpness`` keeps the next token from being
    anyone's guess."""
    weight = next(layers.parameters())
    output = getattr(layers, "proj_size", 0) or layers.hidden_size
    embedding = torch.nn.Embedding(vocabulary, layers.input_size, dtype=weight.dtype)
    head = torch.nn.Linear(output, vocabulary, dtype=weight.dtype)
    with torch.no_grad():
        head.weight *= sharpness
    return embedding, layers, head


def prefixes(batch, steps, vocabulary=VOCABULARY):
    return torch.randint(vocabulary, (batch, steps))


def likeliest(logits):
    return logits.argmax(-1, keepdim=True)


def drawn(temperature=1.0, top_k=None, top_p=None, generator=None):
    """How people draw a token [B, 1] from logits [B, V]."""

    def draw(logits):
        logits = logits / temperature
        if top_k is not None:
            smallest = logits.topk(top_k).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        if top_p is not None:
            p, order = logits.softmax(-1).sort(-1, descending=True)
            above = p.cumsum(-1) - p
            drop = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, above >= top_p)
            logits = logits.masked_fill(drop, -torch.inf)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)

    return draw


@torch.no_grad()
def usual_loop(embedding, rnn, head, prefix, steps, choose, state=None):
    """prefix [B, P] and ``steps`` tokens of ``choose``, [B, P + steps]; rnn is not batch_first."""
    tokens, output = prefix, None
    for _ in range(steps):
        output, state = rnn(embedding(prefix.t()), state)
        prefix = choose(head(output[-1]))
        tokens = torch.cat((tokens, prefix), 1)
    return tokens


@torch.no_grad()
def log_probs_of(embedding, rnn, head, tokens, start):
    """log p of each token from column ``start`` on, [B, n], read in one go."""
    output, _ = rnn(embedding(tokens[:, :-1].t()))
    log_p = head(output).double().log_softmax(-1)[start - 1 :]
    return log_p.gather(-1, tokens.t()[start:, :, None]).squeeze(-1).t()


def logits_after(embedding, rnn, head, prefix):
    """What `reference.beam_search` asks of a model: the logits after ``prefix`` [P] and more."""

    @torch.no_grad()
    def after(tokens):
        whole = torch.cat((prefix, torch.tensor(tokens, dtype=torch.int64)))
        return head(rnn(embedding(whole.unsqueeze(1)))[0][-1, 0]).numpy()

    return after


def ours(name, *args, **options):
    return getattr(rnn_ext, name)(*args, dtype=torch.float64, **options)
