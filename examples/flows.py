"""What gradient_health.py looks at: the norm of dL/dh_t, with rnn_ext and with torch.nn's cells."""

import statistics
import time

import digits
import torch
from torch import nn

import rnn_ext

REPEATS = 9  # of what is timed


def read(member, states, labels):
    return nn.functional.cross_entropy(member.readout(states[-1]), labels, reduction="sum")


def flows_of_layers(member, steps, labels):
    """||dL/dh_t|| [layers, T], in passing: one forward and one backward pass."""
    return rnn_ext.gradient_flow(
        member.recurrent, steps, loss_fn=lambda states, _: read(member, states, labels)
    ).norms[:, 0]


def flow(member, steps, labels):  # -> [T]
    return flows_of_layers(member, steps, labels)[0]


def flow_by_cells(member, steps, labels):
    """The same from a cell of torch.nn that is called step by step, each of its states kept."""
    layer = member.recurrent
    kind, _, nonlinearity = layer.mode.partition("_")
    options = {"nonlinearity": nonlinearity.lower()} if nonlinearity else {}
    cell = getattr(nn, f"{kind}Cell")(1, layer.hidden_size, **options).to(steps.device)
    cell.load_state_dict({name: getattr(layer, f"{name}_l0") for name in cell.state_dict()})
    states, state = [], None
    for x in steps:
        state = cell(x, state)
        states.append(state[0] if kind == "LSTM" else state)
    return torch.stack(torch.autograd.grad(read(member, states, labels), states)).norm(dim=(1, 2))


def exploding_flow(args, steps, labels, grad_clip):
    torch.manual_seed(args.seed)
    member = digits.Classifier(rnn_ext, "irnn", "pixels", "last", args.hidden, 1)
    layer = rnn_ext.RNN(1, args.hidden, nonlinearity="relu", grad_clip=grad_clip)
    layer.load_state_dict(member.recurrent.state_dict())
    nn.init.eye_(layer.weight_hh_l0).data.mul_(args.gain)
    member.recurrent = layer
    return flow(member.to(steps.device), steps, labels)


def flow_through_depth(args, steps, labels, residual):
    """The norm of dL/dh over all steps, of each layer [depth]."""
    torch.manual_seed(args.seed)
    member = nn.Module()
    member.recurrent = rnn_ext.RNN(1, args.hidden, args.depth, residual=residual)
    member.readout = nn.Linear(args.hidden, 10)
    return flows_of_layers(member.to(steps.device), steps, labels).norm(dim=1)


def compare(members, steps, labels):
    """{name: (flow, relative difference from the loop's, seconds, the loop's seconds)}."""
    found = {}
    for name, member in members.items():
        results, seconds = [], []
        for function in (flow, flow_by_cells):
            times = []
            for _ in range(REPEATS):
                start = time.perf_counter()
                result = function(member, steps, labels)
                times.append(time.perf_counter() - start)
            results.append(result.double().cpu())
            seconds.append(statistics.median(times))
        ours, theirs = results
        found[name] = ours, ((ours - theirs).norm() / theirs.norm()).item(), *seconds
    return found
