"""The persistent CUDA kernels, run by the emulator of tests/cuda_on_cpu, against rnn_ext.reference.

Every case runs forward, then backward from what forward saved, with h, the cells, delta, and the
gradients of the initial state compared to a float64 loop. Arrays start as NaN and end at a page
that faults.
"""

from dataclasses import replace

import numpy as np
import pytest
from cuda_on_cpu import WANTED, KernelError, build_ahead, isolated
from persistent_cases import SOURCE, Case, Run, kernel_flags, kernels_of, run

FULL = [
    ("lstm", "Tf32x3"),
    ("gru", "Tf32x3"),
    ("rnn_tanh", "Tf32x3"),
    ("lstm", "bf16"),
    ("gru", "bf16"),
    ("gru_reset_before", "Tf32x3"),
    ("gru_reset_before", "bf16"),
]
SOME = [
    ("rnn_relu", "Tf32x3"),
    ("rnn_sigmoid", "bf16"),
    ("lstm", "fp16"),
    ("lstm", "Tf32"),
    ("gru", "fp16"),
    ("gru_reset_before", "fp16"),
    ("gru_reset_before", "Tf32"),
]

SMALL = [
    Case(),
    Case(cluster=True, limit=0.5),
    Case(layout="lengths", resets=True, restored=True, reverse=True, bias=False, batch=9),
    Case(
        directions=2,
        layout="packed",
        resets=True,
        units=32,
        hidden=33,
        optional=False,
        cluster=True,
    ),
]
WIDE = [
    Case(steps=1, batch=1, hidden=1),
    Case(steps=1, batch=1, hidden=17, cluster=True),
    Case(steps=4, batch=9, hidden=40),
    Case(steps=4, batch=9, hidden=40, cluster=True),
    # groups with several tiles each, both directions, ragged rows
    Case(steps=4, batch=21, hidden=33, groups=2, directions=2, layout="lengths", resets=True),
    Case(
        steps=4,
        batch=21,
        hidden=33,
        groups=2,
        directions=2,
        layout="packed",
        resets=True,
        restored=True,
        cluster=True,
    ),
    # tiles of several passes, the last one short
    Case(steps=2, batch=37, hidden=20, rows=24, layout="lengths", resets=True, limit=0.5),
    Case(
        steps=2, batch=21, hidden=50, rows=24, units=32, layout="packed", reverse=True, cluster=True
    ),
    # a block without units of its own
    Case(steps=2, batch=2, hidden=36, cluster=True),
]


def name(case):
    """What is not as it is by default."""
    given = {k: v for k, v in vars(case).items() if v != getattr(Case(), k)}
    return ",".join(f"{k}={v}" for k, v in given.items()) or "default"


def parameters(pairs, cases):
    """One test for each cell, number format and case."""
    return pytest.mark.parametrize(
        "numbers, case",
        [
            pytest.param(numbers, replace(case, cell=cell), id=f"{cell}-{numbers}-{name(case)}")
            for cell, numbers in pairs
            for case in cases
        ],
    )


@pytest.fixture(autouse=True, scope="module")
def _build(request):
    items = [item for item in request.session.items if item.path == request.path]
    given = [item.callspec.params for item in items if hasattr(item, "callspec")]
    kinds = {(g["case"].cell, g["numbers"]) for g in given if "numbers" in g}
    if not WANTED:
        flags = [kernel_flags(*kind) for kind in sorted(kinds)]
        build_ahead({"sources": [SOURCE], "flags": f} for f in flags)


def check(case, numbers, seeds=((0, 0),)):
    kernels = kernels_of(case.cell, numbers)

    def all_schedules():
        for seed, preempt in seeds:
            kernels.schedule(seed, preempt)
            run(kernels, case, numbers)

    isolated(all_schedules)


@parameters(FULL + SOME, SMALL)
def test_small(case, numbers):
    check(case, numbers, seeds=[(0, 0), (1, 0)])


@parameters(FULL, WIDE)
def test_every_arrangement(case, numbers):
    check(case, numbers)


@parameters(FULL[3:], [WIDE[4], WIDE[5]])
def test_schedules(case, numbers):
    check(case, numbers, seeds=[(seed, 0) for seed in range(1, 7)])


@pytest.mark.parametrize(
    "cell, hidden, cluster",
    [
        # Of 17 chunks of U a warp has 3 and keeps 2 in registers; backward 9 of 68, and keeps 8.
        ("lstm", 272, False),
        ("lstm", 272, True),
        # Of 33 it has 5 and keeps 2; backward it reads 10 of two planes, 8 ahead. 32 in a cluster.
        ("gru_reset_before", 528, False),
        ("gru_reset_before", 500, True),
    ],
)
def test_weights_beyond_the_registers(cell, hidden, cluster):
    check(Case(cell, steps=2, batch=2, hidden=hidden, units=32, cluster=cluster), "Tf32x3")


def test_h_may_replace_the_input_of_an_elman_network():
    check(Case("rnn_tanh", in_place=True, optional=False, layout="lengths"), "Tf32x3")


RACES = [
    Case(hidden=36, steps=2),
    Case(hidden=20, steps=2, cluster=True),
    Case(steps=2, batch=9, hidden=20, layout="lengths", resets=True, directions=2),
    Case(steps=2, batch=18, rows=24, layout="packed", resets=True, restored=True, cluster=True),
]


RACING = [
    ("lstm", "bf16"),
    ("gru", "Tf32x3"),
    ("rnn_tanh", "bf16"),
    ("gru_reset_before", "bf16"),
]


@parameters(RACING, RACES)
def test_nothing_races(case, numbers):
    kernels = kernels_of(case.cell, numbers, "-DONE_UNIT_TILE", race=True)

    def all_schedules():
        for schedule in [(0, 0), (1, 0), (2, 60)]:
            kernels.schedule(*schedule)
            run(kernels, case, numbers)

    isolated(all_schedules)


def test_every_schedule_gives_the_same_bits():
    case = Case("gru", steps=3, batch=20, hidden=40, groups=2, directions=2, resets=True)
    kernels = kernels_of(case.cell, "bf16")

    def results(seed):
        kernels.schedule(seed)
        done = Run(kernels, case, "bf16")
        done.check()
        return [own[key].copy() for own in done.buffers for key in ("h", "h_n", "delta", "carry")]

    first = isolated(results, 0)
    for seed in (1, 2, 3):
        for a, b in zip(first, isolated(results, seed), strict=True):
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


def test_a_launch_that_would_hang_is_refused():
    kernels = kernels_of("lstm", "bf16")

    def launch():
        kernels.device(sm_count=2, shared_per_block=100 * 1024, cluster_size=1)
        with pytest.raises(KernelError, match=r"its \d+ blocks have to run together"):
            run(kernels, Case(hidden=400, steps=1), "bf16")
        with pytest.raises(KernelError, match="clusters of 2 blocks"):
            run(kernels, Case(cluster=True), "bf16")

    isolated(launch)
