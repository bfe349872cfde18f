"""Bugs planted in the persistent kernels, each of which the emulator must notice.

A test that passes says nothing about bugs it cannot see, so every kind of mistake that such kernels
invite is made here once: missing barriers, flags without release or acquire, stale halves of the
double buffer, wrong fragments, rows that have ended, resets that leak.
"""

from dataclasses import replace

import pytest
from cuda_on_cpu import Mutant, build_ahead, catch
from persistent_cases import SOURCE, Case, kernel_flags, run

# Two groups with flags, two tiles each, the last short; one cluster whose tile takes two passes.
FLAGS = Case("lstm", steps=3, batch=19, hidden=40, groups=2, layout="lengths", resets=True)
CLUSTER = Case(
    "gru",
    steps=3,
    batch=19,
    hidden=40,
    rows=24,
    cluster=True,
    layout="packed",
    resets=True,
    restored=True,
    limit=0.7,
)
# Two exchanges a step.
TWICE_FLAGS = replace(FLAGS, cell="gru_reset_before")
TWICE_CLUSTER = replace(CLUSTER, cell="gru_reset_before")

LAYOUT, PRODUCT, EXCHANGE = (
    "persistent_layout.h",
    "persistent_product.cuh",
    "persistent_exchange.cuh",
)
BLOCK, CELLS, LAUNCH = "persistent_block.cuh", "persistent_cells.cuh", "persistent_launch.h"
FORWARD, BACKWARD = "persistent_forward.cuh", "persistent_backward.cuh"
TWICE_FORWARD = "persistent_reset_before_forward.cuh"
TWICE_BACKWARD = "persistent_reset_before_backward.cuh"

MUTANTS = [
    # the product
    (
        "words of a fragment swapped",
        FLAGS,
        PRODUCT,
        "{half ? b[n].z : b[n].x, half ? b[n].w : b[n].y}",
        "{half ? b[n].w : b[n].x, half ? b[n].z : b[n].y}",
    ),
    (
        "wrong lane reads a chunk of U",
        FLAGS,
        PRODUCT,
        "kChunkBytes + lane_ % 4 * 16)",
        "kChunkBytes + lane_ / 8 * 16)",
    ),
    (
        "wrong row of a fragment",
        FLAGS,
        PRODUCT,
        "m * 16 + half * 8 + lane_ / 4",
        "m * 16 + half * 8 + lane_ % 8",
    ),
    (
        "sums in the wrong column",
        FLAGS,
        PRODUCT,
        "(n * 8 + i % 2) * stride_",
        "(n * 8 + i / 2) * stride_",
    ),
    (
        "a warp's sum left out",
        FLAGS,
        PRODUCT,
        "for (int w = 1; w < kWarps; w++)",
        "for (int w = 2; w < kWarps; w++)",
    ),
    ("U read past its last column", CLUSTER, PRODUCT, "row && k + i < columns ?", "row ?"),
    # flags
    (
        "waits for one publication too few",
        FLAGS,
        EXCHANGE,
        "return count >= published;",
        "return count + 1 >= published;",
    ),
    (
        "waits for one publication too many",
        FLAGS,
        EXCHANGE,
        "return count >= published;",
        "return count > published;",
    ),
    (
        "waits for too few blocks",
        FLAGS,
        EXCHANGE,
        "kChunkBytes + layout.produced_bytes - 1;",
        "kChunkBytes;",
    ),
    ("no acquire", FLAGS, "platform.h", "value = load_acquire(flag)", "value = load_relaxed(flag)"),
    (
        "no release",
        FLAGS,
        EXCHANGE,
        "add_release(flags_ + block_, 1)",
        "atomicAdd(flags_ + block_, 1u)",
    ),
    (
        "lanes do not meet after polling",
        FLAGS,
        BLOCK,
        "  __syncwarp();  // what one lane",
        "  // what one lane",
    ),
    (
        "not double-buffered",
        FLAGS,
        EXCHANGE,
        "operand_ + published_ % 2 * half_bytes_ + row * row_bytes_ + own",
        "operand_ + row * row_bytes_ + own",
    ),
    (
        "reads the half that is being written",
        FLAGS,
        EXCHANGE,
        "static_cast<int>((published_ - 1) % 2) * half_bytes_",
        "static_cast<int>(published_ % 2) * half_bytes_",
    ),
    (
        "copies not waited for",
        FLAGS,
        EXCHANGE,
        "copy_async_wait<ring - 1>();",
        "copy_async_wait<ring>();",
    ),
    (
        "last chunk not fetched",
        FLAGS,
        EXCHANGE,
        "if (c < planes * share_.count) {",
        "if (c + 1 < planes * share_.count) {",
    ),
    (
        "flags not reset",
        FLAGS,
        LAUNCH,
        "if (plan.workspace_bytes)",
        "if (plan.workspace_bytes < 0)",
    ),
    # clusters
    (
        "no barrier after clearing",
        CLUSTER,
        EXCHANGE,
        "    cluster_barrier();\n",
        "    __syncthreads();\n",
    ),
    (
        "no wait for the cluster",
        CLUSTER,
        EXCHANGE,
        "    __syncwarp();\n    cluster_wait();",
        "    __syncthreads();",
    ),
    (
        "operand not cleared",
        CLUSTER,
        EXCHANGE,
        "words[i] = make_uint4(0, 0, 0, 0);",
        "(void)words[i].x;",
    ),
    ("a peer left out", CLUSTER, EXCHANGE, "i < pieces * blocks_;", "i < pieces * (blocks_ - 1);"),
    (
        "second pass over the first",
        CLUSTER,
        EXCHANGE,
        "(row + piece / row_pieces)",
        "(row * 0 + piece / row_pieces)",
    ),
    # forward
    (
        "no barrier before the cell",
        FLAGS,
        FORWARD,
        "pass, tiling.rows);\n        __syncthreads();",
        "pass, tiling.rows);",
    ),
    (
        "no barrier after the cell",
        CLUSTER,
        FORWARD,
        "        __syncthreads();\n        if (!last) {",
        "        if (!last) {",
    ),
    (
        "no barrier between the passes of h0",
        CLUSTER,
        FORWARD,
        "kRows));\n      __syncthreads();",
        "kRows));",
    ),
    ("reset keeps the state", FLAGS, FORWARD, "if (item.reset) item.state = {0, 0};", ""),
    ("reset keeps the product", FLAGS, FORWARD, "item.reset ? 0 : sums.read(", "sums.read("),
    ("a row goes on one step too long", FLAGS, BLOCK, "t < lengths_[row]", "t <= lengths_[row]"),
    (
        "lengths read before they are there",
        FLAGS,
        BLOCK,
        "    }\n    __syncthreads();\n  }",
        "    }\n  }",
    ),
    ("groups take each other's tiles", FLAGS, FORWARD, "tile += tiling.groups", "tile += 1"),
    ("bias of the wrong gate", CLUSTER, FORWARD, "g == Cell::kGates - 1 ?", "g == 0 ?"),
    # backward
    (
        "no barrier before the cell's gradient",
        FLAGS,
        BACKWARD,
        "        }\n        __syncthreads();\n\n",
        "        }\n\n",
    ),
    (
        "product of another sequence's restored state",
        CLUSTER,
        FORWARD,
        "(sequence * Cell::kGates + g) * hidden",
        "((sequence + 1) % 2 * Cell::kGates + g) * hidden",
    ),
    ("reset passes the carry on", FLAGS, BACKWARD, "    carry = dc = 0;\n", ""),
    (
        "gradient of a restored state kept once",
        CLUSTER,
        BACKWARD,
        "d_h[at] += carry;",
        "d_h[at] = carry;",
    ),
    (
        "a restored h left out of the gradient of U",
        CLUSTER,
        BACKWARD,
        "h_prev = read_at<T>(d.restored.h, sequence * hidden + unit);",
        "h_prev = read_at<T>(d.h0, sequence * hidden + unit);",
    ),
    ("reset passes delta on", FLAGS, BACKWARD, "item.reset ? 0 : item.delta[b]", "item.delta[b]"),
    (
        "the previous row of this step",
        FLAGS,
        BACKWARD,
        "rows.begin(rows.before(t)) + sequence",
        "rows.begin(t) + sequence",
    ),
    ("nothing reaches h0", FLAGS, BACKWARD, "step >= -1; step--", "step >= 0; step--"),
    (
        "gradient of a dead row forgotten",
        FLAGS,
        BACKWARD,
        "carry_state[at] = carry;\n          if",
        "if (item.alive) carry_state[at] = carry;\n          if",
    ),
    (
        "values clipped above alone",
        CLUSTER,
        BACKWARD,
        "dh < -limit ? -limit : dh, carry",
        "dh, carry",
    ),
    ("delta at the wrong gate", CLUSTER, CELLS, "return (d + 2) % 3;", "return d;"),
    # two exchanges a step
    (
        "the reset state not waited for",
        TWICE_FLAGS,
        TWICE_FORWARD,
        "if (pass == 0) exchange.wait();\n        multiply_pass<unit_tiles,",
        "multiply_pass<unit_tiles,",
    ),
    (
        "weights of the other phase",
        TWICE_FLAGS,
        TWICE_FORWARD,
        "multiply_pass<unit_tiles, kRows, 2 * unit_tiles>",
        "multiply_pass<unit_tiles, kRows, unit_tiles>",
    ),
    (
        "no barrier between the phases",
        TWICE_FLAGS,
        TWICE_FORWARD,
        "        __syncthreads();\n        exchange.pass_on(",
        "        exchange.pass_on(",
    ),
    (
        "reset forgotten in the second phase",
        TWICE_FLAGS,
        TWICE_FORWARD,
        "if (item.reset) h_state[at] = h_prev;",
        "",
    ),
    (
        "the reset state of rows that take no part left as it was",
        TWICE_FLAGS,
        TWICE_FORWARD,
        "if (p.save && (item.alive || (mine && rows.padded()))) {",
        "if (p.save && item.alive) {",
    ),
    (
        "delta of n not waited for",
        TWICE_FLAGS,
        TWICE_BACKWARD,
        "if (pass == 0) exchange.wait();\n        multiply_pass<unit_tiles, kRows, 2 * unit_tiles>",
        "multiply_pass<unit_tiles, kRows, 2 * unit_tiles>",
    ),
    (
        "weights of the other plane",
        TWICE_FLAGS,
        PRODUCT,
        "held_[c][first_tile + p * count + m]",
        "held_[c][first_tile + m]",
    ),
    (
        "planes over each other",
        TWICE_FLAGS,
        EXCHANGE,
        "(to + plane * plane_bytes_)",
        "(to + plane * 0)",
    ),
    (
        "second plane not passed on",
        TWICE_CLUSTER,
        TWICE_BACKWARD,
        "for (int plane = 0; plane < 2; plane++)\n          exchange.pass_on(",
        "for (int plane = 0; plane < 1; plane++)\n          exchange.pass_on(",
    ),
    (
        "restored state gets the carry of its step alone",
        TWICE_CLUSTER,
        TWICE_BACKWARD,
        "d_h[sequence * hidden + unit] += carry;",
        "d_h[sequence * hidden + unit] = carry;",
    ),
    (
        "reset passes delta of r and z on",
        TWICE_CLUSTER,
        TWICE_BACKWARD,
        "item.reset ? 0 : delta[plane]",
        "delta[plane]",
    ),
]


def flags_of(case):
    exchange = "-DONLY_CLUSTER" if case.cluster else "-DONLY_FLAGS"
    return kernel_flags(case.cell, "bf16", "-DONE_UNIT_TILE", exchange)


def mutant_of(name, case, file, old, new):
    return Mutant(name, f"csrc/cuda/{file}", old, new)


@pytest.fixture(autouse=True, scope="module")
def _build(request):
    given = [item.callspec.params for item in request.session.items if item.path == request.path]
    build_ahead(
        {"sources": [SOURCE], "race": True, "flags": flags_of(g["case"]), "mutant": mutant_of(**g)}
        for g in given
        if "old" in g
    )


@pytest.mark.parametrize(
    "name, case, file, old, new", MUTANTS, ids=[m[0].replace(" ", "-") for m in MUTANTS]
)
def test_a_planted_bug_is_caught(name, case, file, old, new):
    mutant = mutant_of(name, case, file, old, new)
    catch(mutant, [SOURCE], lambda kernels: run(kernels, case, "bf16"), flags=flags_of(case))


@pytest.mark.parametrize("case", [FLAGS, CLUSTER], ids=["flags", "cluster"])
def test_without_a_bug_nothing_is_caught(case):
    nothing = Mutant("none", f"csrc/cuda/{BLOCK}", "#pragma once\n", "#pragma once\n//\n")
    with pytest.raises(AssertionError, match="was not caught"):
        catch(nothing, [SOURCE], lambda kernels: run(kernels, case, "bf16"), flags=flags_of(case))
