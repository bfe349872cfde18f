"""The CPU kernels as a whole: choice of instruction set and plan, threads, operators."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from cases import CELLS, make_case, run, run_ours

import rnn_ext
from rnn_ext import _C, ops


def import_with(isa):
    return subprocess.run(
        [sys.executable, "-c", "import rnn_ext; print(rnn_ext._C.cpu_isa())"],
        env=os.environ | {"RNN_EXT_ISA": isa},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("isa", _C.cpu_isas())
def test_environment_forces_an_instruction_set(isa):
    assert import_with(isa).stdout.strip() == isa


def test_unknown_instruction_set_is_an_error_that_lists_the_available():
    error = import_with("avx1024").stderr
    assert "'avx1024' is not available" in error
    assert all(isa in error for isa in _C.cpu_isas())
    with pytest.raises(ValueError, match="avx1024"):
        _C.set_cpu_isa("avx1024")


def test_best_instruction_set_is_the_default():
    assert import_with("").stdout.strip() == _C.cpu_isas()[0]


def plan(batch, hidden, steps=100, inputs=64, cell="lstm", directions=1):
    return _C.plan_cpu(cell, "float32", steps, batch, inputs, hidden, hidden, directions)


@pytest.mark.parametrize("threads", [4], indirect=True)
def test_plan_follows_the_shape(threads):
    assert plan(256, 64)["split"] == "rows"
    assert plan(4, 320)["split"] == "columns"
    assert plan(256, 2048)["split"] == "columns"  # the weights do not stay in one core's cache
    assert plan(64, 8)["split"] == "rows"
    assert plan(1, 8)["threads"] == 1
    assert plan(1, 256, steps=1)["packed"] is False
    assert plan(1, 256)["packed"] is True
    assert all(plan(b, h)["reason"] for b in (1, 7, 300) for h in (1, 40, 2000))


@pytest.fixture
def whole_pieces():
    """The backward pass goes through the rows in pieces of the length that users get."""
    _C.shorten_pieces(False)
    yield
    _C.shorten_pieces(True)


def test_pieces_of_the_backward_walk_are_long_where_they_are_cheap(whole_pieces):
    pieces = {cell: plan(64, 256, cell=cell)["piece_rows"] for cell in ("rnn_tanh", "gru", "lstm")}
    assert pieces == {"rnn_tanh": 1024, "gru": 768, "lstm": 1024}
    assert plan(64, 1024, inputs=1024)["piece_rows"] == 2048  # weights larger than a cache
    assert plan(64, 8, cell="rnn_tanh")["piece_rows"] == 32768  # short rows


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_pieces_do_not_change_a_bit_of_the_gradients(whole_pieces, cell, ragged):
    """Of 2,100 rows or fewer, in one piece, some, and as many as there can be."""
    for shape in ((30, 70, 9, 100), (2100, 1, 5, 40)):
        case = make_case(cell, shape, ragged=ragged and shape[1] > 1).to(torch.float32)
        gradients = run_ours(case)[1]
        _C.shorten_pieces(True)
        short = run_ours(case)[1]
        _C.shorten_pieces(False)
        assert all(torch.equal(short[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("threads", [1], indirect=True)
def test_one_thread_is_never_split(threads):
    assert plan(256, 512)["threads"] == 1 and plan(256, 512)["split"] == "none"


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_two_directions_run_side_by_side_when_one_cannot_fill_the_cores(threads):
    both = plan(1, 64, directions=2)
    assert both["threads"] == 1 and both["reason"] == "both directions side by side"
    assert plan(64, 512, directions=2) == plan(64, 512)
    assert plan(1, 8, steps=1, directions=2)["reason"] == "too little work for a team of threads"


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("threads", [2], indirect=True)
def test_side_by_side_gives_the_bits_of_one_thread(threads, kind, save):
    torch.manual_seed(5)
    module = getattr(rnn_ext, kind)(40, 50, bidirectional=True)
    x = torch.randn(60, 2, 40, requires_grad=save)
    assert "side by side" in str(rnn_ext.explain(module, x))

    def run():
        output, state = module(x)
        states = state if isinstance(state, tuple) else (state,)
        if not save:
            return [output, *states]
        wanted = [x, *module.parameters()]
        loss = sum(t.square().sum() for t in (output, *states))
        return [output.detach(), *torch.autograd.grad(loss, wanted)]

    with torch.set_grad_enabled(save):
        together = run()
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(together, run()))


@pytest.mark.parametrize("cell", CELLS)
def test_many_python_threads_at_once(cell):
    cases = [make_case(cell, (8, 5, 12, 90), seed=seed).to(torch.float32) for seed in range(4)]
    expected = [run_ours(case) for case in cases]
    failures = []

    def work(i):
        for _ in range(8):
            for ours, alone in zip(run_ours(cases[i]), expected[i]):
                failures.extend((i, n) for n in alone if not torch.equal(ours[n], alone[n]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_other_threads_run_while_a_kernel_does():
    case = make_case("lstm", (300, 32, 64, 256)).to(torch.float32)
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(None)
            done.wait(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    before = len(ticks)
    for _ in range(3):
        ops.layer("lstm", *case.tensors)
        during, before = len(ticks) - before, len(ticks)
        if during > 1:
            break
    done.set()
    ticker.join()
    assert during > 1


@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_every_time(cell):
    case = make_case(cell, (30, 6, 24, 100)).to(torch.float32)
    first = run_ours(case)
    for _ in range(3):
        for ours, again in zip(first, run_ours(case)):
            assert all(torch.equal(ours[n], again[n]) for n in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_fake_kernel_knows_what_is_saved(isa, cell, dtype):
    case = make_case(cell, (3, 2, 4, 6)).to(dtype)
    arguments = (case.cell, case.tensors[0], case.tensors[1:], None, False)
    operator = torch.ops.rnn_ext.layer_forward.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operator_and_function_agree(isa, cell, dtype):
    case = make_case(cell, (5, 4, 6, 19), ragged=True, reverse=True).to(dtype)

    def operator(cell, *tensors, batch_sizes, reverse):
        input, *direction = tensors
        return rnn_ext.library.layer(cell, input, [direction], batch_sizes, reverse, True)[0]

    for ours, theirs in zip(run_ours(case), run(operator, case)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"input": torch.zeros(3, 2, 5)}, "expected w_ih of shape"),
        ({"h0": torch.zeros(3, 6)}, "expected h0 of shape"),
        ({"h0": torch.zeros(2, 6, dtype=torch.float64)}, "h0 has dtype Double"),
        ({"c0": None}, "c0 belongs to the LSTM"),
        ({"b_ih": None}, "both biases or neither"),
        ({"w_hh": torch.zeros(23, 6)}, "w_hh must be"),
        ({"input": torch.zeros(3, 2, 4).half()}, "use float32, float64 or bfloat16"),
        ({"batch_sizes": torch.tensor([2, 2])}, "input must have 2 dimensions"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else None,
)
def test_kernels_refuse_what_does_not_fit(changes, message):
    case = make_case("lstm", (3, 2, 4, 6)).to(torch.float32)
    names = ("input", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
    given = dict(zip(names, case.tensors)) | {"batch_sizes": None} | changes
    batch_sizes = given.pop("batch_sizes")
    with pytest.raises(RuntimeError, match=message):
        ops.layer("lstm", *given.values(), batch_sizes=batch_sizes)
