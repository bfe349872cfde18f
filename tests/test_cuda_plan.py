"""Which CUDA kernel is chosen for which shape and GPU: csrc/cuda/plan.cpp, compiled by itself."""

import ctypes
import itertools
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CELLS = ("rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm", "gru", "gru_reset_before")
NUMBERS = ("bf16", "fp16", "tf32", "tf32x3", "fp64")
BYTES = {"bf16": 2, "fp16": 2, "tf32": 4, "tf32x3": 4}


class Limits(ctypes.Structure):
    """csrc/cuda/device_limits.h"""

    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            "major",
            "minor",
            "sm_count",
            "registers_per_sm",
            "shared_per_sm",
            "shared_per_block",
            "shared_reserved",
            "threads_per_sm",
            "blocks_per_sm",
            "l2_bytes",
            "cluster_size",
        )
    ] + [("cooperative", ctypes.c_bool)]


def gpu(capability, sm_count, shared_kb, cluster_size, threads=2048, blocks=32, l2_mb=50):
    shared = shared_kb * 1024
    return Limits(
        *capability,
        sm_count,
        65536,
        shared,
        shared - 1024,
        1024,
        threads,
        blocks,
        l2_mb << 20,
        cluster_size,
        True,
    )


# From NVIDIA's data sheets and the compute capability tables of the CUDA programming guide.
GPUS = {
    "A100": gpu((8, 0), 108, 164, 1, l2_mb=40),
    "H100": gpu((9, 0), 132, 228, 16),
    "H200": gpu((9, 0), 132, 228, 16),
    "B200": gpu((10, 0), 148, 228, 16, l2_mb=126),
    "RTX 4050 Laptop": gpu((8, 9), 20, 100, 1, threads=1536, blocks=24, l2_mb=12),
}


class Plan(ctypes.Structure):
    _fields_ = [
        *[
            (name, ctypes.c_int)
            for name in (
                "persistent",
                "groups",
                "blocks",
                "cluster",
                "units",
                "rows",
                "tiles",
                "register_bytes",
                "weight_bytes",
                "shared_bytes",
            )
        ],
        ("workspace_bytes", ctypes.c_int64),
        ("kernel", ctypes.c_char * 32),
        ("reason", ctypes.c_char * 256),
    ]

    @property
    def text(self):
        return self.reason.decode()


@pytest.fixture(scope="session")
def choose(tmp_path_factory):
    """choose(cell, numbers, T, B, H, gpu, directions=1, projected=False, backward=False) -> Plan"""
    library = tmp_path_factory.mktemp("plan") / "plan.so"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    sources = [ROOT / "csrc/cuda/plan.cpp", ROOT / "tests/cuda_plan_entry.cpp"]
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).choose_plan
    function.argtypes = (
        [ctypes.c_int] * 2 + [ctypes.c_int64] * 3 + [ctypes.c_int] * 3 + [ctypes.c_void_p] * 2
    )

    def call(
        cell, numbers, steps, batch, hidden, limits, directions=1, projected=False, backward=False
    ):
        plan = Plan()
        limits = GPUS[limits] if isinstance(limits, str) else limits
        function(
            CELLS.index(cell),
            NUMBERS.index(numbers),
            steps,
            batch,
            hidden,
            directions,
            projected,
            backward,
            ctypes.addressof(limits),
            ctypes.addressof(plan),
        )
        return plan

    return call


def check(plan, numbers, batch, hidden, gates, limits, directions, backward):
    """What must hold for every plan: it fits, no block waits for one that is not there."""
    if not plan.persistent:
        assert plan.kernel == b"cuda-step"
        assert plan.text.startswith("step-wise: ")
        assert plan.groups == plan.blocks == plan.shared_bytes == plan.workspace_bytes == 0
        return
    assert plan.kernel == b"cuda-persistent"
    assert plan.text.startswith("persistent: ")
    assert plan.shared_bytes <= limits.shared_per_block
    assert plan.register_bytes <= 128 * 1024
    if plan.cluster:
        assert plan.blocks <= max(limits.cluster_size, 1)
        assert plan.blocks & (plan.blocks - 1) == 0
        assert plan.blocks <= limits.sm_count
        assert plan.workspace_bytes == 0
    else:
        # A block fills a multiprocessor, so this many are resident at once.
        assert directions * plan.groups * plan.blocks <= limits.sm_count
        assert limits.cooperative
    assert plan.units in (16, 32)
    assert plan.units * plan.blocks >= hidden
    assert plan.rows % 8 == 0
    assert plan.rows > 0
    assert plan.rows * plan.tiles >= batch
    assert plan.rows * (plan.tiles - 1) < batch
    assert 1 <= plan.groups <= plan.tiles
    held = plan.blocks * (plan.register_bytes + plan.weight_bytes)
    assert held >= gates * hidden * hidden * BYTES[numbers]


@pytest.mark.parametrize("name", GPUS)
def test_every_plan_fits_its_gpu(choose, name):
    sizes = itertools.product(
        CELLS,
        NUMBERS,
        (1, 3, 8, 16, 33, 128, 4096),
        (1, 17, 64, 256, 500, 768, 1024, 1760, 2048, 4096),
        (1, 2),
        (False, True),
    )
    persistent = 0
    for cell, numbers, batch, hidden, directions, backward in sizes:
        plan = choose(cell, numbers, 50, batch, hidden, name, directions, backward=backward)
        gates = {"lstm": 4}.get(cell, 3 if cell.startswith("gru") else 1)
        check(plan, numbers, batch, hidden, gates, GPUS[name], directions, backward)
        persistent += plan.persistent
    assert persistent > 100


@pytest.mark.parametrize("name", ["H100", "H200", "B200", "A100"])
@pytest.mark.parametrize("backward", [False, True])
def test_the_shapes_of_cudnn_and_flashrnn_are_persistent(choose, name, backward):
    for cell, numbers, batch, hidden in [
        ("lstm", "fp16", 16, 1024),
        ("lstm", "bf16", 16, 768),
        ("gru", "bf16", 32, 1024),
        ("rnn_tanh", "bf16", 32, 1760),
        ("lstm", "tf32", 8, 512),
        ("lstm", "bf16", 1, 1536),
        ("gru", "tf32x3", 5, 300),
        ("gru_reset_before", "bf16", 32, 1024),
        ("gru_reset_before", "tf32x3", 5, 300),
    ]:
        plan = choose(cell, numbers, 100, batch, hidden, name, backward=backward)
        assert plan.persistent, f"{cell} {numbers} B={batch} H={hidden}: {plan.text}"


def test_a_group_that_fits_a_cluster_is_one(choose):
    plan = choose("lstm", "bf16", 64, 64, 256, "H200")
    assert plan.cluster
    assert plan.groups > 1
    assert not choose("lstm", "bf16", 64, 64, 256, "A100").cluster  # it has none
    assert not choose("lstm", "bf16", 64, 16, 1024, "H200").cluster  # too many blocks for one


def test_directions_share_the_gpu(choose):
    one = choose("lstm", "bf16", 100, 64, 1024, "H200", directions=1)
    two = choose("lstm", "bf16", 100, 64, 1024, "H200", directions=2)
    assert one.persistent
    assert two.persistent
    assert two.groups * two.blocks * 2 <= 132
    assert two.groups < one.groups


@pytest.mark.parametrize(
    "arguments, options, reason",
    [
        (("lstm", "bf16", 50, 16, 4096, "H200"), {}, "the recurrent weights do not fit on chip"),
        (
            ("lstm", "bf16", 50, 16, 2048, "RTX 4050 Laptop"),
            {},
            "the recurrent weights do not fit on chip",
        ),
        (
            ("lstm", "bf16", 50, 65536, 1024, "H200"),
            {},
            "the batch is large enough for one product a step",
        ),
        (("lstm", "fp64", 50, 16, 512, "H200"), {}, "tensor cores have no float64 fit for it"),
        (
            ("lstm", "bf16", 50, 16, 512, "H200"),
            {"projected": True},
            "a projected LSTM multiplies twice a step",
        ),
        (
            ("gru_reset_before", "bf16", 50, 16, 4096, "H200"),
            {"backward": True},
            "the recurrent weights do not fit on chip",
        ),
        (
            ("gru", "bf16", 50, 16, 512, gpu((7, 5), 40, 64, 1)),
            {},
            "this GPU is older than compute capability 8.0",
        ),
        (("gru", "bf16", 50, 0, 512, "H200"), {}, "there is nothing to compute"),
        (("gru", "bf16", 1 << 40, 4, 512, "H200"), {}, "the layer is too large"),
    ],
)
def test_the_reason_names_what_is_in_the_way(choose, arguments, options, reason):
    plan = choose(*arguments, **options)
    assert not plan.persistent
    assert plan.text == f"step-wise: {reason}"


def test_a_gpu_without_cooperative_launch_gets_no_flags(choose):
    limits = gpu((8, 0), 108, 164, 1)
    limits.cooperative = False
    assert not choose("lstm", "bf16", 50, 16, 512, limits).persistent
    assert choose("lstm", "bf16", 50, 16, 16, limits).persistent  # one block waits for nobody


def test_the_text_of_a_plan(choose):
    assert choose("lstm", "bf16", 1024, 16, 768, "H200").text == (
        "persistent: 2 groups of 48 blocks, 8 rows at a time, weights in registers"
    )
    assert "KB of shared memory" in choose("lstm", "bf16", 100, 8, 2048, "H200").text
