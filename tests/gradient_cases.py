"""Gradients held within limits: the controls that tests run, and what the reference says."""

from cases import run_reference

from rnn_ext.control import Control

CLIPS = (0.3, ("norm", 0.4))


def control(grad_clip, **options):
    clip = grad_clip if isinstance(grad_clip, tuple) else ("value", grad_clip)
    return Control(clip=clip, **options)


def reference_gradients(case, grad_clip):
    """By name."""
    return run_reference(case, grad_clip)[1]
