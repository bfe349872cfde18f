"""The numbers of a case: the same weights, input and upstream gradient for every library."""

from dataclasses import dataclass, replace

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from . import language
from .cases import Case
from .layer_norm import LayerNormLoop, gains

CLASSES = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}


@dataclass
class Problem:
    """One case with one cell. ``weights`` is a state_dict of torch.nn; ``upstream`` has the shape
    of the output, or of its data if that is packed. ``resets``: bool [T, B] or None."""

    case: Case
    cell: str
    weights: dict
    input: torch.Tensor | PackedSequence
    state: torch.Tensor | tuple | None
    upstream: torch.Tensor
    resets: torch.Tensor | None = None

    def module(self, library, **options):
        """A layer of ``library`` (torch.nn or rnn_ext) with these weights and ``options``."""
        case = self.case
        if self.resets is not None and library is torch.nn:
            return CellLoop(self)
        if case.layer_norm and library is torch.nn:
            return LayerNormLoop(self.weights)
        options |= {"layer_norm": True} if case.layer_norm else {}
        module = getattr(library, CLASSES[self.cell])(
            case.inputs, case.hidden, case.layers, bidirectional=case.bidirectional, **options
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
        return replace(
            self,
            weights=weights,
            input=convert(self.input),
            state=state,
            upstream=convert(self.upstream),
        )


class CellLoop(torch.nn.Module):
    """A layer with resets as users of torch.nn write it, with the names of the layer's weights."""

    def __init__(self, problem):
        super().__init__()
        case, self.lstm = problem.case, problem.cell == "lstm"
        self.hidden = case.hidden
        kind = getattr(torch.nn, f"{CLASSES[problem.cell]}Cell")
        self.cell = kind(case.inputs, case.hidden, dtype=problem.upstream.dtype)
        weights = {n.removesuffix("_l0"): w for n, w in problem.weights.items()}
        self.cell.load_state_dict(weights)

    def named_parameters(self):
        return [(f"{name}_l0", p) for name, p in self.cell.named_parameters()]

    def forward(self, input, state, resets):
        if state is None:
            zeros = input.new_zeros(input.size(1), self.hidden)
            state = (zeros, zeros) if self.lstm else (zeros,)
        else:
            state = [s[0] for s in as_tuple(state)]
        outputs = []
        for x, kept in zip(input.unbind(0), (~resets).unsqueeze(-1).to(input.dtype).unbind(0)):
            state = tuple(s * kept for s in state)
            state = as_tuple(self.cell(x, state if self.lstm else state[0]))
            outputs.append(state[0])
        state = tuple(s.unsqueeze(0) for s in state)
        return torch.stack(outputs), state if self.lstm else state[0]


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
        resets = torch.rand(case.steps, case.batch) < case.resets if case.resets else None
        weights = twin.state_dict()
        if case.layer_norm:
            weights |= {name: gain.to(dtype) for name, gain in gains(case.hidden).items()}
    if case.ragged:
        input = pack_padded_sequence(input, case.lengths())
    return Problem(case, cell, weights, input, state, upstream, resets)


def calls(problem, module, training):
    """(call, results): what is timed, and what makes named tensors of the value it returns.

    Training is forward and backward, with gradients of the input and of every parameter.
    """
    if problem.case.vocabulary:
        return language.calls(problem, module)
    input, state = problem.input, problem.state
    options = {} if problem.resets is None else {"resets": problem.resets}
    if not training:
        module.eval()
        return lambda: module(input, state, **options), lambda value: dict(
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
        output = data(module(input, state, **options)[0])
        return output, torch.autograd.grad(output, wanted, upstream)

    def results(value):
        gradients = {f"gradient of {name}": g for name, g in zip(leaves, value[1])}
        return {"output": value[0].detach(), **gradients}

    return call, results


def data(sequence):
    return sequence.data if isinstance(sequence, PackedSequence) else sequence


def as_tuple(state):
    return state if isinstance(state, tuple) else (state,)
