"""How far a result may be from the float64 truth: little farther than torch.nn's."""

import torch

FORWARD, GRADIENT = 2, 3


def error(actual, truth):
    """Largest deviation from ``truth``, relative to its largest entry; NaN if there is one."""
    if truth.numel() == 0:
        return 0.0
    scale = truth.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return ((actual.double() - truth).abs().max() / scale).item()


def assert_as_exact(name, ours, theirs, truth, factor):
    """``ours`` is within ``factor`` times the error of ``theirs`` (same dtype), plus one rounding.

    Where theirs is exact by luck, as it often is for a single number, it counts as one rounding.
    In float64 it counts as four, because there the truth is itself a float64 computation and
    carries roundings of its own.
    """
    assert ours.dtype == theirs.dtype and ours.shape == truth.shape, name
    ours_error, floor = error(ours, truth), error(theirs, truth)
    eps = torch.finfo(ours.dtype).eps
    least = 4 * eps if ours.dtype == torch.float64 else eps
    tolerance = factor * max(floor, least) + eps
    assert ours_error <= tolerance, f"{name}: error {ours_error:.3g}, torch's is {floor:.3g}"
