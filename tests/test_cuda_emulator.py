"""The emulator that the CUDA kernels are tested in: right kernels pass, planted bugs are found.

Everything runs in forked processes, because a bug in a kernel may well crash one.
"""

import ctypes
import re

import numpy as np
import pytest
from cuda_on_cpu import (
    KernelError,
    Kernels,
    Mutant,
    Number,
    catch,
    conformance,
    from_bits,
    isolated,
    latency,
    pointer,
    to_bits,
)

PLANTED = "tests/cuda_on_cpu/entries/planted.cu"
SEEDS = (0, 1, 2)
BUILDS = pytest.mark.parametrize("race", [False, True], ids=["plain", "race"])


def returned(x):
    """Rounded to fp16, then to bf16, and turned around three times."""
    for number in (Number.FLOAT16, Number.BFLOAT16):
        x = from_bits(to_bits(x, number), number)
    return x[:, ::-1]


# kernel: (blocks, threads, blocks in a cluster, what the second half of x must be, from the first,
# which is [blocks, threads])
KERNELS = {
    "block_barrier": (3, 96, 1, lambda x: x[:, ::-1]),
    "warp_barrier": (2, 64, 1, lambda x: x.reshape(2, 2, 32)[..., ::-1]),
    "fences": (4, 64, 1, lambda x: np.roll(x, -1, 0) + 1),
    "release_acquire": (4, 64, 1, lambda x: np.roll(x, -1, 0) + 1),
    "double_buffer": (5, 64, 1, lambda x: np.roll(x, -4, 0) + 4),
    "cluster_ring": (4, 64, 4, lambda x: np.roll(x, -1, 0)),
    "pipeline": (1, 64, 1, lambda x: np.concatenate([0 * x[:, :32], x[:, :31:-1]], 1)),
    "copies": (2, 64, 1, lambda x: x[:, ::-1]),
    "deliveries": (8, 64, 4, lambda x: np.roll(x.reshape(2, 4, 64), -1, 1)),
    "bounds": (1, 36, 1, lambda x: x[:, ::-1]),
    "initialised": (2, 64, 1, lambda x: x),
    "ordinary": (4, 64, 1, lambda x: x),
    "returned": (2, 64, 1, returned),
}

# (kernel, bug, pattern of the message). What only the race checker sees under every schedule is in
# RACES.
FAILURES = [
    ("block_barrier", 2, "different barriers: planted.cu"),
    ("block_barrier", 3, "1 threads wait for a flag"),
    ("warp_barrier", 2, "threads wait for a shuffle|lanes that are not there"),
    ("cluster_ring", 2, "shared memory of a block that has left"),
    ("cluster_ring", 3, "leaves between cluster_arrive and cluster_wait|block that has left"),
    ("pipeline", 3, "threads expect different numbers"),
    ("copies", 1, "words differ"),
    ("copies", 2, "words differ"),
    ("copies", 5, "misaligned"),
    ("bounds", 1, "of 264 bytes of shared memory"),
    ("bounds", 2, "behind the end of shared memory"),
    ("bounds", 3, "global memory"),
    ("bounds", 4, "behind the end of x"),
    ("bounds", 5, "global memory"),
    ("ordinary", 1, "deadlock: 1 threads wait for a flag"),
]
RACES = [
    ("block_barrier", 1, "shared memory"),
    ("warp_barrier", 1, "shared memory"),
    ("fences", 1, "read after write: x"),
    ("fences", 2, "read after write: x"),
    ("release_acquire", 1, "read after write: x"),
    ("release_acquire", 2, "read after write: x"),
    ("release_acquire", 3, "read after write: x"),
    ("release_acquire", 4, "read after write: x"),
    ("double_buffer", 1, "race"),
    ("double_buffer", 2, "race"),
    ("cluster_ring", 1, "race, read after write: shared memory"),
    ("pipeline", 1, "race|deadlock"),
    ("pipeline", 2, "race"),
    ("copies", 3, "race, read after write: shared memory"),
    ("copies", 4, "race, write after read: x"),
    ("deliveries", 1, "race, read after write: shared memory"),
    ("deliveries", 2, "race, read after write: shared memory"),
    ("deliveries", 3, "race, read after write: shared memory"),
    ("deliveries", 4, "race|uninitialised"),
    ("initialised", 1, "uninitialised read of shared memory"),
    ("ordinary", 2, "race, write after write: x"),
    ("returned", 1, "race, read after write: shared memory"),
    ("returned", 2, "race, read after write: shared memory"),
    ("returned", 3, "race, read after write: shared memory"),
]


def addresses(*arrays):
    return [ctypes.c_void_p(pointer(array)) for array in arrays]


def run_conformance(kernels, case, seed):
    kernels.schedule(seed, preempt=50 if seed else 0)
    words = case.inputs(case, np.random.default_rng(seed))
    given = kernels.array(words, "in")
    out = kernels.empty(case.expected(case, words).size + case.extra, np.uint32, "out")
    flags = kernels.array(np.zeros(conformance.FLAGS, np.uint32), "flags")
    name = case.name.encode()
    grid = case.blocks, case.threads, case.cluster
    kernels.call("conformance", name, *addresses(given, out, flags), *grid)
    case.check(words, out)


def run_all_conformance(kernels, case, seeds):
    for seed in seeds:
        run_conformance(kernels, case, seed)


def failures(kernels, name, bug, seeds):
    """What went wrong under each schedule, "" where nothing did."""
    messages = []
    for seed in seeds:
        try:
            run_planted(kernels, name, bug, seed)
            messages.append("")
        except AssertionError as error:
            messages.append(str(error))
    return messages


def run_planted(kernels, name, bug, seed):
    blocks, threads, cluster, expected = KERNELS[name]
    kernels.schedule(seed)
    values = np.random.default_rng(seed).integers(1, 1000, (blocks, threads)) * 4
    x = kernels.empty((2, blocks, threads), np.float32, "x")
    x[0] = values
    kernels.initialise(x)
    flags = kernels.array(np.zeros(64, np.uint32), "flags")
    shared_bytes = {"block_barrier": 384, "deliveries": 384, "bounds": 264, "returned": 768}
    grid = blocks, threads, cluster, shared_bytes.get(name, 256)
    kernels.call("planted", name.encode(), *addresses(x, flags), bug, *grid)
    wrong = x[1] != expected(np.float32(values)).reshape(blocks, threads)
    assert not wrong.any(), f"{wrong.sum()} words differ"


@BUILDS
@pytest.mark.parametrize("case", conformance.CASES, ids=lambda case: case.title)
def test_every_primitive_does_what_platform_h_says(case, race):
    kernels = Kernels([conformance.SOURCE], race=race)
    isolated(run_all_conformance, kernels, case, SEEDS)


@BUILDS
@pytest.mark.parametrize("name", KERNELS)
def test_a_right_kernel_passes(name, race):
    kernels = Kernels([PLANTED], race=race)
    assert isolated(failures, kernels, name, 0, range(6)) == [""] * 6


@BUILDS
@pytest.mark.parametrize("name, bug, message", FAILURES)
def test_a_bug_is_reported(name, bug, message, race):
    kernels = Kernels([PLANTED], race=race)
    for found in isolated(failures, kernels, name, bug, SEEDS):
        assert re.search("race" if race and "race" in found else message, found)


@pytest.mark.parametrize("name, bug, message", RACES)
def test_a_race_is_found_under_every_schedule(name, bug, message):
    kernels = Kernels([PLANTED], race=True)
    for found in isolated(failures, kernels, name, bug, SEEDS):
        assert re.search(message, found) and "planted.cu:" in found


def test_random_schedules_find_some_races_without_the_checker():
    kernels = Kernels([PLANTED])
    found = [any(isolated(failures, kernels, name, bug, range(8))) for name, bug, _ in RACES]
    assert sum(found) >= len(RACES) // 3


def test_the_same_seed_gives_the_same_schedule():
    kernels = Kernels([conformance.SOURCE])
    case = next(case for case in conformance.CASES if case.name == "rounds")

    def switches(seed):
        before = kernels.switches
        run_conformance(kernels, case, seed)
        return kernels.switches - before

    assert switches(5) == switches(5)
    assert len({switches(seed) for seed in range(6)}) > 1


def test_a_launch_that_cannot_be_resident_is_refused():
    kernels = Kernels([PLANTED])
    kernels.device(sm_count=1, shared_per_block=1024, cluster_size=8)
    for blocks, threads, cluster, shared_bytes, message in [
        (4, 1024, 1, 0, "its 4 blocks have to run together, and this GPU holds 2"),
        (1, 32, 1, 2048, "it needs 2048 bytes of shared memory, and this GPU has 1024"),
        (16, 32, 16, 0, "it needs clusters of 16 blocks, and this GPU has at most 8"),
    ]:
        with pytest.raises(KernelError, match=message):
            arguments = blocks, threads, cluster, shared_bytes
            kernels.call("planted", b"fences", *addresses(None, None), 0, *arguments)
    kernels.device()
    kernels.call("planted", b"fences", *addresses(None, None), 0, 0, 32, 1, 0)  # nothing to do


@pytest.mark.parametrize(
    "old, new",
    [
        ("kSense - (members - 1) : 1u", "kSense - members : 1u"),
        ("add_acq_rel(word,", "atomicAdd(word,"),
    ],
)
def test_a_mutant_is_planted_and_caught(old, new):
    mutant = Mutant("group_barrier", "csrc/cuda/platform.h", old, new)
    assert catch(mutant, [PLANTED], lambda kernels: run_planted(kernels, "double_buffer", 0, 0))


def test_a_mutant_that_nothing_notices_is_an_error():
    mutant = Mutant("harmless", "csrc/cuda/platform.h", "reusable.", "usable again.")
    with pytest.raises(AssertionError, match="not caught"):
        catch(mutant, [PLANTED], lambda kernels: run_planted(kernels, "double_buffer", 0, 0))
    with pytest.raises(RuntimeError, match="0 times, not once"):
        catch(mutant._replace(old="no such text"), [PLANTED], lambda kernels: None)


def test_the_measurements_of_latencies_end():
    kernels = Kernels([latency.SOURCE])
    kernels.device(sm_count=16, shared_per_block=227 * 1024, cluster_size=8)
    table = isolated(latency.measure, kernels, 2)
    kernels.device()
    assert "cluster barrier, 8 blocks" in table and "cluster barrier, 16 blocks" not in table
    assert table["blocks resident in clusters of 8, 200 KB each (number)"] == 16
    assert all(value >= 0 for value in table.values())  # not NaN: everything could be launched
