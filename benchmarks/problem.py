"""The numbers of a case: the same weights, input and upstream gradient for every library."""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .cases import Case

CLASSES = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}


@dataclass
class Problem:
    """One case with one cell. ``weights`` is a state_dict of torch.nn; ``upstream`` has the shape
    of the output, or of its data if that is packed."""

    case: Case
    cell: str
    weights: dict
    input: torch.Tensor | PackedSequence
    state: torch.Tensor | tuple | None
    upstream: torch.Tensor

    def module(self, library):
        """A layer of ``library`` (torch.nn or rnn_ext) with these weights."""
        case = self.case
        module = getattr(library, CLASSES[self.cell])(
            case.inputs, case.hidden, case.layers, bidirectional=case.bidirectional
        )
        module.to(self.upstream.dtype).load_state_dict(self.weights)
        return module

    def to(self, dtype):
        """The same numbers in another dtype."""
        convert = lambda t: t.to(dtype)  # noqa: E731
        weights = {name: convert(weight) for name, weight in self.weights.items()}
        state = self.state
        if state is not None:
            state = tuple(map(convert, state)) if self.cell == "lstm" else convert(state)
        return Problem(
            self.case, self.cell, weights, convert(self.input), state, convert(self.upstream)
        )


def make_problem(case, cell, seed=0):
    """Random numbers, representable in the case's dtype. torch's own random state is left alone."""
    dtype = getattr(torch, case.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin = getattr(torch.nn, CLASSES[cell])(
            case.inputs, case.hidden, case.layers, bidirectional=case.bidirectional
        ).to(dtype)
        input = torch.randn(case.steps, case.batch, case.inputs).to(dtype)
        rows = (case.tokens(),) if case.ragged else (case.steps, case.batch)
        upstream = torch.randn(*rows, case.hidden * case.directions).to(dtype)
        state = None
        if case.stateful:
            size = (case.layers * case.directions, case.batch, case.hidden)
            state = torch.rand(2, *size).mul(2).sub(1).to(dtype).unbind()
            state = tuple(state) if cell == "lstm" else state[0]
    if case.ragged:
        input = pack_padded_sequence(input, case.lengths())
    return Problem(case, cell, twin.state_dict(), input, state, upstream)


def calls(problem, module, training):
    """(call, results): what is timed, and what makes named tensors of the value it returns.

    Training is forward and backward, with gradients of the input and of every parameter.
    """
    input, state = problem.input, problem.state
    if not training:
        module.eval()
        return lambda: module(input, state), lambda value: dict(
            zip(("output", "h_n", "c_n"), (data(value[0]), *as_tuple(value[1])))
        )

    x = data(input).detach().requires_grad_()
    if isinstance(input, PackedSequence):
        input = PackedSequence(x, *input[1:])
    else:
        input = x
    leaves = {"input": x, **dict(module.named_parameters())}
    wanted, upstream = list(leaves.values()), problem.upstream

    def call():
        output = data(module(input, state)[0])
        return output, torch.autograd.grad(output, wanted, upstream)

    def results(value):
        gradients = {f"gradient of {name}": g for name, g in zip(leaves, value[1])}
        return {"output": value[0].detach(), **gradients}

    return call, results


def data(sequence):
    return sequence.data if isinstance(sequence, PackedSequence) else sequence


def as_tuple(state):
    return state if isinstance(state, tuple) else (state,)
