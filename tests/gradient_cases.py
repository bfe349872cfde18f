"""Gradients held within limits: the controls that tests run, and what the reference says."""

import torch
from cases import NAMES

from rnn_ext import reference
from rnn_ext.control import Control

CLIPS = (0.3, ("norm", 0.4))


def control(grad_clip, **options):
    clip = grad_clip if isinstance(grad_clip, tuple) else ("value", grad_clip)
    return Control(clip=clip, **options)


def reference_gradients(case, grad_clip):
    """By name."""
    x, h0, c0, *weights = (None if t is None else t.numpy() for t in case.tensors)
    sizes = None if case.batch_sizes is None else case.batch_sizes.numpy()
    result = reference.forward(
        case.cell, x, h0, c0, weights, batch_sizes=sizes, reverse=case.reverse
    )
    upstream = (None if d is None else d.numpy() for d in case.upstream)
    found = reference.backward(result, *upstream, grad_clip=grad_clip)
    by_name = {name: getattr(found, "x" if name == "input" else name) for name in NAMES}
    return {n: torch.as_tensor(g) for n, g in by_name.items() if g is not None}
