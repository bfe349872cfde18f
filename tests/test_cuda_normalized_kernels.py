"""The CUDA kernels of layer normalisation and peepholes: guarded memory, races, planted bugs."""

from dataclasses import replace

import pytest
from cuda_on_cpu import WANTED, Kernels, Mutant, build_ahead, catch
from normalized_step_cases import SOURCES, Case, Run
from step_cases import CELLS

CASES = [Case(cell) for cell in CELLS]
CASES += [Case("lstm", normalized=False, peephole=True), Case("lstm", peephole=True)]
CASES += [Case("lstm", grad_clip=("norm", 1.0)), Case("gru_reset_before", grad_clip=0.3)]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.mark.parametrize("seed", [0, 1])
@each_case
def test_results_without_races(case, seed):
    kernels = Kernels(SOURCES, race=True)
    kernels.schedule(seed=seed)
    Run(kernels, case).check()


@pytest.mark.parametrize("zoneout", ["masks", "share"])
@each_case
def test_states_that_are_held(case, zoneout):
    Run(Kernels(SOURCES, race=True), replace(case, zoneout=zoneout)).check()


@pytest.mark.parametrize("hidden", [1, 3, 700])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru", "gru_reset_before"])
def test_few_units_and_many(cell, hidden):
    Run(Kernels(SOURCES), Case(cell, counts=(2, 1), hidden=hidden, peephole=cell == "lstm")).check()


ROWS, FORWARD, BACKWARD = (f"normalized_{n}" for n in ("rows.cuh", "forward.cu", "backward.cu"))
MUTANTS = [
    (
        "a sum overwritten while it is read",
        "lstm",
        ROWS,
        "  __syncthreads();                                  // the sum before has been read\n",
        "",
    ),
    ("a sum read before it is there", "lstm", ROWS, "value;\n  __syncthreads();\n", "value;\n"),
    ("a warp left out", "gru", ROWS, "int warp = 0;", "int warp = 1;"),
    ("units left out", "gru", ROWS, "i < count; i +=", "i + 1 < count; i +="),
    ("no epsilon", "rnn_tanh", ROWS, "variance + static_cast<R>(kNormEpsilon)", "variance"),
    ("mean not taken off", "rnn_tanh", FORWARD, "side.at(at) - side.m.mean", "side.at(at)"),
    (
        "reset keeps the product",
        "rnn_tanh",
        FORWARD,
        "reset ? p.restored_product : p.product",
        "p.product",
    ),
    (
        "reset keeps c",
        "lstm",
        FORWARD,
        "if (reset) return p.restored.c",
        "if (false) return p.restored.c",
    ),
    (
        "scale of the wrong group",
        "gru",
        FORWARD,
        "row * groups + group",
        "row * groups + 0 * group",
    ),
    (
        "wrong gate kept",
        "lstm",
        FORWARD,
        "row.keep(1, unit, gates.f)",
        "row.keep(1, unit, gates.i)",
    ),
    (
        "delta read before it is there",
        "lstm",
        BACKWARD,
        "    __syncthreads();  // delta is there\n",
        "",
    ),
    (
        "scale left out",
        "gru",
        BACKWARD,
        "hat(i) * lost.along) * scale;\n      store",
        "hat(i) * lost.along) * (scale / scale);\n      store",
    ),
    (
        "cell's scale left out",
        "lstm",
        BACKWARD,
        "hat(unit) * lost.along) * m.scale;",
        "hat(unit) * lost.along);",
    ),
    (
        "reset passes dc on",
        "lstm",
        BACKWARD,
        "row.passed_on(unit, dc_prev + kept, p.restored_sums.c)",
        "dc_prev + kept",
    ),
    (
        "reset passes the carry on",
        "gru",
        BACKWARD,
        "if (!reset) return gradient;",
        "return gradient;",
    ),
    (
        "restored state's delta kept once",
        "gru",
        BACKWARD,
        "add<R>(p.restored_sums.delta",
        "store<R>(p.restored_sums.delta",
    ),
    (
        "dL/dh0 not kept",
        "gru",
        BACKWARD,
        "store<Real<S>>(p.carry, row.state(unit), row",
        "(void)(row",
    ),
    ("h0 instead of the previous h", "gru", BACKWARD, "has_previous ? p.h_before : p.h0", "p.h0"),
    (
        "hidden side of n from the input's",
        "gru",
        BACKWARD,
        "load<R>(p.extra, row.state(column - 2 * hidden))",
        "row.delta(0, column)",
    ),
    (
        "c overwritten before it is held",
        "lstm",
        FORWARD,
        "if (!p.zoneout.on) row.keep_c(unit, c);",
        "row.keep_c(unit, c);",
    ),
    (
        "a c that is held normalised",
        "lstm",
        BACKWARD,
        "if (!p.zoneout.on) return load<R>(p.cells, row.state(unit));",
        "if (unit >= 0) return load<R>(p.cells, row.state(unit));",
    ),
    (
        "a held h for what the cell made",
        "rnn_tanh",
        BACKWARD,
        "vjp(made(row, unit)",
        "vjp(load<S>(row.p.h, row.state(unit))",
    ),
    (
        "gradient of a held h lost",
        "gru",
        BACKWARD,
        "carry + dh.held);\n      row",
        "carry);\n      row",
    ),
    (
        "gradient of a held h twice",
        "lstm",
        BACKWARD,
        "return {dh - kept, kept};",
        "return {dh, kept};",
    ),
    ("gradient of a held c lost", "lstm", BACKWARD, "dc_prev + kept,", "dc_prev,"),
    ("norm of one thread's units", "lstm", BACKWARD, "sqrt(block_sum(squares))", "sqrt(squares)"),
    ("norm that clips nothing", "gru", BACKWARD, "return dh * factor;", "return dh;"),
]


def mutant_of(name, cell, file, old, new):
    return Mutant(name, f"csrc/cuda/{file}", old, new)


@pytest.fixture(scope="module")
def built_ahead(request):
    items = [item for item in request.session.items if item.path == request.path]
    given = [item.callspec.params for item in items if hasattr(item, "callspec")]
    mutants = [mutant_of(**g) for g in given if "old" in g]
    build_ahead({"sources": SOURCES, "race": True, "mutant": mutant} for mutant in mutants)


@pytest.mark.skipif(WANTED, reason="only the emulator has this")
@pytest.mark.usefixtures("built_ahead")
@pytest.mark.parametrize(
    "name, cell, file, old, new", MUTANTS, ids=[m[0].replace(" ", "-") for m in MUTANTS]
)
def test_a_planted_bug_is_caught(name, cell, file, old, new):
    def run(kernels):
        case = Case(cell, grad_clip=("norm", 1.0) if name.startswith("norm") else None)
        Run(kernels, case).check()
        Run(kernels, replace(case, zoneout="share" if cell == "rnn_tanh" else "masks")).check()

    catch(mutant_of(name, cell, file, old, new), SOURCES, run)
