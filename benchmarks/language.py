"""A language model that generates: `rnn_ext.generate`, and the loop that people write instead."""

import copy

import torch

import rnn_ext

TEMPERATURE, SEED = 0.8, 1


class LanguageModel(torch.nn.Module):
    """``layers`` between an embedding and a head with the same weights for every library."""

    def __init__(self, layers, case, dtype):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            # Drawn in float32, so that they are the same numbers in every dtype.
            self.embedding = torch.nn.Embedding(case.vocabulary, case.inputs).to(dtype)
            self.head = torch.nn.Linear(case.hidden, case.vocabulary).to(dtype)
            self.prefix = torch.randint(case.vocabulary, (case.batch, 4))
        self.layers, self.steps = layers, case.steps

    def in_one_call(self):
        return rnn_ext.generate(
            self.embedding, self.layers, self.head, self.prefix, self.steps, TEMPERATURE, seed=SEED
        )

    def in_a_loop(self):
        generator = torch.Generator().manual_seed(SEED)
        tokens, state, given = [self.prefix], None, self.prefix
        for _ in range(self.steps):
            output, state = self.layers(self.embedding(given.t()), state)
            p = torch.softmax(self.head(output[-1]) / TEMPERATURE, -1)
            given = torch.multinomial(p, 1, generator=generator)
            tokens.append(given)
        return torch.cat(tokens, 1)


def calls(problem, module):
    """(call, results). Tokens are compared in float64: in float32 rounding might choose others."""
    model = LanguageModel(module.eval(), problem.case, problem.upstream.dtype)
    ours = isinstance(module, (rnn_ext.RNN, rnn_ext.LSTM, rnn_ext.GRU))

    def call_of(model):
        return model.in_one_call if ours else model.in_a_loop

    def results(_):
        return {"tokens": call_of(copy.deepcopy(model).double())()}

    return call_of(model), results
