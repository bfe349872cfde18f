"""Layers with options by the NumPy reference, layer by layer, masks included."""

import numpy as np
import torch

from rnn_ext import reference
from rnn_ext.reference import random as numbers


def seed_of_next_call(seed=5):
    """Makes the next call the one with this seed, which is returned."""
    torch.manual_seed(seed)
    found = int(torch.randint(2**62, ()))
    torch.manual_seed(seed)
    return found


def keep(seed, purpose, layer, steps, rows, columns, p):
    stream = numbers.stream(purpose, layer)
    return numbers.keep(seed, stream, np.asarray(steps), np.asarray(rows), columns, p)


def expected(module, x, hx=None, lengths=None, seed=0, resets=None, restored=None):
    """(output, h_n of each layer and direction) by the reference, options included.

    ``hx`` and ``restored`` (what resets restore) are lists of the state's tensors, [rows, B, size].
    """
    x, training = x.detach().numpy(), module.training
    steps, batch = x.shape[:2]
    directions, states = 2 if module.bidirectional else 1, []
    initial, again = (
        None if given is None else [s.detach().numpy() for state in given for s in state.unbind(0)]
        for given in (hx, restored)
    )
    count = len(module._all_weights)
    for first in range(0, count, directions):
        before, outputs = x, []
        if training and (p := module.variational_dropout):
            mask = keep(
                seed, "variational_dropout", first, [0] * batch, range(batch), x.shape[2], p
            )
            x = x * mask / (1 - p)
        for k in range(first, first + directions):
            group = [None if w is None else w.detach().numpy() for w in module._weights()[k]]
            rows, width = group[1].shape
            if training and (p := module.weight_dropout):
                mask = keep(seed, "weight_dropout", k, [0] * rows, range(rows), width, p)
                group[1] = group[1] * mask / (1 - p)
            hidden = module._widths_of_groups()[k]
            hold = (module.zoneout, module.zoneout)
            if training and (p := module.zoneout):
                at = np.repeat(np.arange(steps), batch), np.tile(np.arange(batch), steps)
                hold = [
                    1.0 - keep(seed, purpose, k, *at, size, p).reshape(steps, batch, size)
                    for purpose, size in (("zoneout_h", width), ("zoneout_c", hidden))
                ]
            lstm = module._cell == "lstm"
            states_of = [
                (None, None) if g is None else (g[k], g[count + k] if lstm else None)
                for g in (initial, again)
            ]
            result = reference.forward(
                module._cell,
                x,
                *states_of[0],
                group,
                lengths=lengths,
                reverse=bool(k - first),
                zoneout=hold,
                resets=resets,
                reset_h=states_of[1][0],
                reset_c=states_of[1][1],
            )
            outputs.append(result.output)
            states.append(torch.from_numpy(result.h_n))
        x = np.concatenate(outputs, -1)
        if module.residual and first and x.shape == before.shape:
            active = (
                np.ones((steps, batch)) if lengths is None else np.arange(steps)[:, None] < lengths
            )
            x = x + before * active[..., None]
    return torch.from_numpy(x), states


def h_n(module, results):
    state = results[1][0] if module._cell == "lstm" else results[1]
    parts = state if isinstance(state, tuple) else (state,)
    return [row for part in parts for row in part.unbind(0)]


OPTIONS = {
    "residual": {"num_layers": 3, "residual": True},
    "single_bias": {"num_layers": 2, "bias": "single"},
    "weight_dropout": {"num_layers": 2, "weight_dropout": 0.4},
    "variational_dropout": {"num_layers": 2, "variational_dropout": 0.4},
    "zoneout": {"num_layers": 2, "zoneout": 0.3},
    "learned": {"num_layers": 2, "learn_initial_state": True},
    "all": {
        "num_layers": 3, "residual": True, "weight_dropout": 0.2, "variational_dropout": 0.2,
        "zoneout": 0.2, "bias": "single", "learn_initial_state": True,
    },
}  # fmt: skip


def learned(module, batch):
    if not module.learn_initial_state:
        return None
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("initial_"):
                parameter.uniform_(-1, 1)
        return [state.detach() for state in module._learned(batch)]
