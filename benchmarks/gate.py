"""Nothing is timed before its results are right."""

import torch

FACTOR = 4  # times torch.nn's own error in the same dtype
PEER = 1e-3  # another library may trade accuracy for speed, but must compute the same thing
ROUNDED = {"bf16": 2e-2, "int8": 5e-2}  # weights stored with fewer bits, on purpose
# In float64 torch.nn is itself the truth, and roundings of many steps differ.
FLOAT64 = 1e-11


class Wrong(Exception):
    """Which result is off, and by how much."""


def error(actual, truth):
    """Largest deviation relative to the largest entry; NaN if there is one."""
    if actual.shape != truth.shape:
        raise Wrong(f"has shape {list(actual.shape)}, should be {list(truth.shape)}")
    truth = truth.double()
    scale = truth.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return ((actual.double() - truth).abs().max() / scale).item()


def errors(results, truth):
    """The error of each result that ``truth`` has too; results is what a Runner names."""
    missing = truth.keys() - results.keys()
    if missing:
        raise Wrong(f"{min(missing)} is missing")
    found = {}
    for name, value in truth.items():
        try:
            found[name] = error(results[name], value)
        except Wrong as wrong:
            raise Wrong(f"{name} {wrong}") from None
    return found


def check_ours(ours, floor, dtype):
    """``ours`` and ``floor``, the errors of torch.nn in the same dtype, are dicts of errors.
    Returns the largest of ours. Raises Wrong."""
    eps = torch.finfo(dtype).eps
    for name, value in ours.items():
        tolerance = FLOAT64 if dtype == torch.float64 else FACTOR * max(floor[name], 2 * eps)
        if not value <= tolerance:  # so that NaN is wrong too
            raise Wrong(f"{name} is off by {value:.2g}, torch.nn by {floor[name]:.2g}")
    return max(ours.values())


def check_peer(theirs, dtype, kind=None):
    """Returns the largest error. ``kind``: how weights are stored, of `ROUNDED`. Raises Wrong."""
    tolerance = ROUNDED[kind] if kind else max(PEER, 8 * torch.finfo(dtype).eps)
    for name, value in theirs.items():
        if not value <= tolerance:
            raise Wrong(f"{name} is off by {value:.2g}")
    return max(theirs.values())
