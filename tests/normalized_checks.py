"""What is asked of a layer with layer normalisation or peepholes, whichever kernels run it."""

from functools import cache

import torch
from cases import SHAPES as ALL_SHAPES
from cases import run_reference, with_resets, with_zoneout
from normalized_cases import make_normalized, reordered, run_loop, run_ours
from tolerance import FORWARD, GRADIENT, error

# Two values or one, normalised, say nothing of what they were, and so does the product of a single
# input: no gradient but rounding is left.
SHAPES = ((1, 1, 3, 4), *(shape for shape in ALL_SHAPES if shape[3] > 2))


@cache
def expected(kind, shape, dtype, restored=None, zoneout=None, **options):
    """The case, the truth, and how far from it a loop of torch operations is in this dtype.

    ``restored``: None for no resets; ``zoneout``: "masks", a share, or None.

    What is normalised is a difference, in which the error of one order of the sums is a matter of
    luck: of each result and gradient it is the largest error in eight orders of the hidden units.
    """
    case = make_normalized(kind, shape, **options)
    if restored is not None:
        case = with_resets(case, restored=restored)
    if zoneout is not None:
        case = with_zoneout(case, None if zoneout == "masks" else zoneout)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(shape[3], generator=generator) for _ in range(7)]
    found = []
    for each in (case, *(reordered(case, order) for order in orders)):
        truths, loops = run_reference(each), run_loop(each.to(dtype))
        errors = [
            {name: error(theirs[name], truth[name]) for name in truth}
            for truth, theirs in zip(truths, loops, strict=True)
        ]
        found.append((each, truths, errors))
    floors = [
        {name: max(errors[k][name] for *_, errors in found) for name in found[0][2][k]}
        for k in range(2)
    ]
    return *found[0][:2], floors


def check(kind, shape, dtype, restored=None, zoneout=None, **options):
    case, truths, floors = expected(kind, shape, dtype, restored, zoneout, **options)
    eps = torch.finfo(dtype).eps
    least = 4 * eps if dtype == torch.float64 else eps  # as tolerance.assert_as_exact has it
    for ours, truth, floor, factor in zip(
        run_ours(case.to(dtype)), truths, floors, (FORWARD, GRADIENT), strict=True
    ):
        assert ours.keys() == truth.keys()
        for name in truth:
            assert ours[name].dtype == dtype and ours[name].shape == truth[name].shape, name
            assert error(ours[name], truth[name]) <= factor * max(floor[name], least) + eps, name
