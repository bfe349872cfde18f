"""Bugs planted in the step-wise CUDA kernels, which test_cuda_step_kernels.py must see."""

import pytest
from cuda_on_cpu import WANTED, Mutant, Number, build_ahead, catch
from step_cases import SOURCES, Case, Run

pytestmark = pytest.mark.skipif(WANTED, reason="only the emulator has this")
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
        "step.cuh",
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
            case = Case(kind, kind != cell, layout, reverse, **options)
            Run(kernels, case, Number.FLOAT64).check()

    catch(mutant_of(file, name, cell, old, new), SOURCES, run)
