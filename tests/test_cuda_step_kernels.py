"""The step-wise CUDA kernels on guarded memory, under the race checker, and with planted bugs."""

import mmap

import numpy as np
import pytest
from cuda_on_cpu import (
    WANTED,
    KernelError,
    Kernels,
    Mutant,
    Number,
    build_ahead,
    catch,
    from_bits,
    pointer,
    to_bits,
)
from step_cases import CELLS, SOURCES, STORAGE, Case, Run, Sums

VARIANTS = [(cell, False) for cell in CELLS] + [("lstm", True)]
variants = pytest.mark.parametrize("cell, projected", VARIANTS, ids=[*CELLS, "lstm_projected"])


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("layout", ["padded", "lengths", "packed"])
@variants
def test_results_in_float64_without_races(cell, projected, layout, reverse):
    kernels = Kernels(SOURCES, race=True)
    kernels.schedule(seed=1)
    Run(kernels, Case(cell, projected, layout, reverse, restored=reverse), Number.FLOAT64).check()


@pytest.mark.parametrize("number", STORAGE, ids=lambda number: number.name)
@variants
def test_every_number_format(cell, projected, number):
    Run(Kernels(SOURCES), Case(cell, projected, "packed", clip="value"), number).check()
    Run(Kernels(SOURCES), Case(cell, projected, "lengths", True, restored=True), number).check()


@pytest.mark.parametrize("clip", ["value", "norm"])
@pytest.mark.parametrize("number", [Number.FLOAT32, Number.BFLOAT16], ids=lambda n: n.name)
@variants
def test_clipped_gradients(cell, projected, number, clip):
    Run(Kernels(SOURCES), Case(cell, projected, "lengths", hidden=150, clip=clip), number).check()


@variants
def test_clipped_norms_in_float64_without_races(cell, projected):
    kernels = Kernels(SOURCES, race=True)
    kernels.schedule(seed=2)
    Run(kernels, Case(cell, projected, "packed", clip="norm"), Number.FLOAT64).check()


@pytest.mark.parametrize("zoneout", ["masks", "share"])
@pytest.mark.parametrize("number", STORAGE, ids=lambda number: number.name)
@variants
def test_states_that_are_held(cell, projected, number, zoneout):
    kernels = Kernels(SOURCES, race=number is Number.FLOAT64)
    for options in ({"layout": "packed", "restored": True}, {"layout": "lengths", "reverse": True}):
        clip = "norm" if options["layout"] == "lengths" else None
        Run(kernels, Case(cell, projected, **options, clip=clip, zoneout=zoneout), number).check()


@pytest.mark.parametrize("rows", [0, 1, 7, 256, 257, 700, 256 * 256 + 1])
def test_column_sums(rows):
    kernels = Kernels(SOURCES)
    values = np.random.default_rng(0).normal(size=(rows, 5))
    matrix = kernels.array(np.pad(values, ((0, 0), (0, 2)), constant_values=np.nan))
    chunks = -(-rows // 256)
    scratch = kernels.empty((chunks + -(-chunks // 256), 5), np.float64)
    sums = kernels.empty(5, np.float64)
    kernels.call("run_column_sums", 1, Sums(rows, 5, 7, *map(pointer, (matrix, scratch, sums))))
    assert np.abs(sums - values.sum(0)).max() <= 1e-12 * max(1, rows)


def test_column_sums_do_not_swamp_small_numbers():
    """Eight lines and chunks of 256 rows add up like a tree: 16-bit numbers keep their sum."""
    kernels, rows = Kernels(SOURCES), 40_000
    matrix = kernels.array(to_bits(np.full((rows, 1), 0.001), Number.FLOAT16))
    scratch, sums = kernels.empty((200, 1), np.float32), kernels.empty(1, np.float16)
    kernels.call("run_column_sums", 2, Sums(rows, 1, 1, *map(pointer, (matrix, scratch, sums))))
    exact = rows * from_bits(matrix, Number.FLOAT16)[0, 0]
    assert abs(float(sums[0]) - exact) <= exact * 2**-11


emulated_only = pytest.mark.skipif(WANTED, reason="only the emulator has this")


@emulated_only
def test_offsets_beyond_32_bits():
    """Two rows 2**31 + 2 elements apart, in memory that is not there until it is written to."""
    stride = 2**31 + 2
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # in Python 3.13
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = np.frombuffer(mmap.mmap(-1, 2 * (stride + 3), flags=flags), np.float16)
    memory[:3], memory[stride:] = (1, 2, 3), (10, 20, 30)
    kernels = Kernels(SOURCES)
    sums = kernels.empty(3, np.float16)
    args = Sums(2, 3, stride, memory.ctypes.data, None, pointer(sums))
    kernels.call("run_column_sums", 2, args)
    assert sums.tolist() == [11, 22, 33]


@emulated_only
def test_a_launch_that_cannot_be_is_an_error():
    kernels = Kernels(SOURCES)
    kernels.device(shared_per_block=1024)
    matrix, sums = kernels.array(np.ones((2, 3))), kernels.empty(3, np.float64)
    args = Sums(2, 3, 3, pointer(matrix), None, pointer(sums))
    with pytest.raises(KernelError, match="column_sums: it needs 2048 bytes of shared memory"):
        kernels.call("run_column_sums", 1, args)


FORWARD, BACKWARD = "step_forward.cu", "step_backward.cu"
MUTANTS = [
    (
        "step.cuh",
        "a row goes on one step too long",
        "lstm",
        "step < lengths[row]",
        "step <= lengths[row]",
    ),
    (
        "step.cuh",
        "last units left out",
        "lstm",
        "(units + kTileUnits - 1) / kTileUnits)",
        "units / kTileUnits)",
    ),
    (
        "step.cuh",
        "wrong row",
        "gru",
        "row_tile * kTileRows + threadIdx.x / kTileUnits",
        "row_tile * kTileRows",
    ),
    (
        FORWARD,
        "a row too many",
        "lstm",
        "at.row >= p.rows.count || at.unit >= p.hidden",
        "at.row > p.rows.count || at.unit >= p.hidden",
    ),
    (FORWARD, "a unit too many", "gru", "at.unit >= p.hidden", "at.unit > p.hidden"),
    (
        FORWARD,
        "reset keeps the product",
        "rnn_tanh",
        "return reset ? p.restored_product : p.product;",
        "return p.product;",
    ),
    (
        FORWARD,
        "reset keeps h",
        "gru",
        "if (reset) return p.restored.h",
        "if (false) return p.restored.h",
    ),
    (
        FORWARD,
        "reset keeps c",
        "lstm",
        "const R c_prev = at.previous_c();",
        "const R c_prev = load<R>(p.c_state, at.state);",
    ),
    (
        FORWARD,
        "a bias left out",
        "gru_reset_before",
        "return p.b_hh ? a + load",
        "return p.b_hh && gate < 0 ? a + load",
    ),
    (FORWARD, "wrong gate saved", "lstm", "at.save(1, 4, gates.f)", "at.save(1, 4, gates.i)"),
    (
        FORWARD,
        "saved after activation",
        "gru_reset_before",
        "at.save(1, 3, z);",
        "at.save(1, 3, Math<R>::sigmoid(z));",
    ),
    (
        FORWARD,
        "what a dead row leaves is not cleared",
        "rnn_tanh",
        "if (p.h) store<S>(p.h, state, 0);",
        "",
    ),
    (FORWARD, "the state is not advanced", "lstm", "store<S>(p.h_state, state, h);\n    if", "if"),
    (
        BACKWARD,
        "reset passes the product on",
        "rnn_tanh",
        "is_reset(p.next, row) ? R(0)",
        "is_reset(p.next, row) && row < 0 ? R(0)",
    ),
    (
        BACKWARD,
        "reset passes the carry on",
        "gru",
        "if (!reset) return gradient;",
        "return gradient;",
    ),
    (
        BACKWARD,
        "gradient of a restored state lost",
        "gru",
        "add<R>(restored_sum, state, gradient);",
        "(void)restored_sum;",
    ),
    (
        BACKWARD,
        "delta of a restored state at the wrong gate",
        "gru",
        "at.end_delta(2, 3, delta_hidden_n);",
        "at.end_delta(2, 3, delta.n);",
    ),
    (
        BACKWARD,
        "a restored h left out of the gradient of U",
        "rnn_tanh",
        "if (reset) return p.restored.h ?",
        "if (reset) return p.restored.h == p.h0 ?",
    ),
    (
        FORWARD,
        "a restored c left out",
        "lstm",
        "p.restored.c ? load",
        "p.restored.c == p.b_ih ? load",
    ),
    (
        BACKWARD,
        "reset passes dc on",
        "lstm",
        "at.passed_on(dc_prev + kept, p.restored_sums.c)",
        "dc_prev + kept",
    ),
    (
        BACKWARD,
        "carry not added",
        "gru",
        "carries || p.zoneout.on ? through_product",
        "p.zoneout.on ? through_product",
    ),
    (
        BACKWARD,
        "gradient of h_n lost",
        "lstm",
        "if (!continues) return load<R>(p.carry, at);",
        "if (!continues) return 0;",
    ),
    (
        BACKWARD,
        "dL/dh0 not kept",
        "lstm",
        "store<R>(p.carry, state, from_later_steps<S, Cell::carries>(p, true, at.row, state));",
        "(void)state;",
    ),
    (
        BACKWARD,
        "values clipped below alone",
        "lstm",
        "return dh > limit ? limit : dh < -limit",
        "return dh < -limit",
    ),
    (
        BACKWARD,
        "a row of another norm",
        "gru",
        "load<R>(p.norms, row)",
        "load<R>(p.norms, 0 * row)",
    ),
    (
        BACKWARD,
        "norm without the carry",
        "gru",
        "carries ? norms_kernel<S, true> :",
        "!carries ? norms_kernel<S, true> :",
    ),
    (
        BACKWARD,
        "no barrier in the sum of squares",
        "gru",
        "    sums[threadIdx.x] = sum;\n    __syncthreads();\n",
        "    sums[threadIdx.x] = sum;\n",
    ),
    (
        BACKWARD,
        "units left out of the norm",
        "gru",
        "active && unit < p.output; unit +=",
        "active && unit < p.output / 2; unit +=",
    ),
    (BACKWARD, "h0 instead of the previous h", "gru", "has_previous ? p.h_before : p.h0", "p.h0"),
    (
        BACKWARD,
        "c0 instead of the previous c",
        "lstm",
        "has_previous ? p.cells_before : p.c0",
        "p.c0",
    ),
    (
        BACKWARD,
        "delta of a dead row not cleared",
        "rnn_tanh",
        "  leave_out<S, Cell::deltas>(p, at.row, at.unit);\n}\n\n// Phase 1",
        "}\n\n// Phase 1",
    ),
    (
        BACKWARD,
        "delta of the wrong gate",
        "gru",
        "at.store_delta(1, 4, delta.r)",
        "at.store_delta(1, 4, delta.z)",
    ),
    (
        "step.cuh",
        "one mask for all rows",
        "gru",
        "static_cast<R>(hold.units[at])",
        "static_cast<R>(hold.units[at % 2])",
    ),
    (
        FORWARD,
        "what is held is let go",
        "lstm",
        "return z * before + (1 - z) * made;",
        "return z * made + (1 - z) * before;",
    ),
    (
        FORWARD,
        "a reset is held back",
        "lstm_projected",
        "is_reset(p.rows, at.row) ? p.restored_h",
        "is_reset(p.rows, at.row) && at.row < 0 ? p.restored_h",
    ),
    (
        BACKWARD,
        "the share of h for what the cell made",
        "rnn_tanh",
        "at.p.middle ? at.p.middle : at.p.h",
        "at.p.h",
    ),
    (BACKWARD, "the c that is held", "lstm", "c = made;", "(void)made;"),
    (
        BACKWARD,
        "gradient of a held c lost",
        "lstm",
        "passed_on(dc_prev + kept",
        "passed_on(dc_prev",
    ),
    (
        BACKWARD,
        "gradient of a held h lost",
        "rnn_tanh",
        "place.store_carry(carry + kept)",
        "place.store_carry(carry)",
    ),
    (
        BACKWARD,
        "gradient of a held h twice",
        "gru",
        "run<0>(place, dh - kept)",
        "run<0>(place, dh)",
    ),
    (
        BACKWARD,
        "gradient of a held h not read",
        "lstm",
        "carries || p.zoneout.on ? through_product",
        "carries ? through_product",
    ),
    ("column_sums.cu", "no barrier before the sum", "rnn_tanh", "  __syncthreads();\n", ""),
    ("column_sums.cu", "a line left out", "rnn_tanh", "int line = 1;", "int line = 2;"),
]


def mutant_of(file, name, cell, old, new):
    return Mutant(name, f"csrc/cuda/{file}", old, new)


@pytest.fixture(scope="module")
def built_ahead(request):
    items = [item for item in request.session.items if item.path == request.path]
    given = [item.callspec.params for item in items if hasattr(item, "callspec")]
    mutants = [mutant_of(**g) for g in given if "old" in g]
    build_ahead({"sources": SOURCES, "race": True, "mutant": mutant} for mutant in mutants)


@emulated_only
@pytest.mark.usefixtures("built_ahead")
@pytest.mark.parametrize(
    "file, name, cell, old, new", MUTANTS, ids=[m[1].replace(" ", "-") for m in MUTANTS]
)
def test_a_planted_bug_is_caught(file, name, cell, old, new):
    def run(kernels):
        kind = cell.removesuffix("_projected")
        clip = (kind == "lstm" and "value") or (kind == "gru" and "norm")
        held = "share" if kind == "rnn_tanh" else "masks"
        for layout, reverse, zoneout in (("packed", False, None), ("lengths", True, held)):
            options = {"restored": reverse, "clip": clip or None, "zoneout": zoneout}
            Run(
                kernels, Case(kind, kind != cell, layout, reverse, **options), Number.FLOAT64
            ).check()

    catch(mutant_of(file, name, cell, old, new), SOURCES, run)
