"""Two processes that share a training compute what one does: DistributedDataParallel, FSDP2
(fully_shard) and torch.distributed.checkpoint, over gloo on the CPU, under torchrun."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest
import torch
from twins import assert_same

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

from distributed_cases import CASES, Model, batches, gradients, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    program = pathlib.Path(__file__).with_name("distributed_cases.py")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*run, program, folder],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def alone():
    """What one process computes from the batches of both, with torch.nn."""
    model = Model(torch.nn)
    x, target = batches()[0]
    torch.nn.functional.mse_loss(model(x), target).backward()
    first = {name: grad.clone() for name, grad in gradients(model).items()}
    model = Model(torch.nn)
    grads = train(model, batches())
    with torch.no_grad():
        output = model(batches()[0][0])
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {"first": first, "grads": grads, "parameters": parameters, "output": output}


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_two_processes_are_one(case, folder, alone):
    result = torch.load(folder / f"{case}.pt", weights_only=True)
    assert not isinstance(result, str), result
    for part, tensors in result.items():
        if part == "output":
            for output in tensors.values():
                assert_same(output, alone["output"])
            continue
        expected = alone["first" if case == "ddp_micro_batches" else part]
        assert tensors.keys() == expected.keys()
        for name in expected:
            assert_same(tensors[name], expected[name])
        start = dict(Model(torch.nn).named_parameters())
        if part == "parameters":
            assert not any(torch.equal(tensors[name], start[name]) for name in start)


EXAMPLE = pathlib.Path(__file__).parent.parent / "examples/ddp.py"


def run_example(launch, **environment):
    tiny = "--hidden 12 --batch 4 --window 16 --steps 20".split()
    done = subprocess.run(
        [sys.executable, *launch, EXAMPLE, *tiny],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return [float(line.split()[3]) for line in done.stdout.splitlines()]


def test_the_example_computes_the_same_with_one_process_and_two():
    pytest.importorskip("matplotlib")  # which char_lm.py imports
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    one = run_example([], **alone)
    two = run_example("-m torch.distributed.run --standalone --nproc-per-node 2".split())
    # Both clip the same averaged gradient; what is printed has four digits.
    assert one == pytest.approx(two, abs=2e-4)
    assert len(one) == 10 and one[-1] < one[0]


def test_the_example_says_how_to_start_it():
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    done = subprocess.run(
        [sys.executable, EXAMPLE], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2 and "start it with torchrun" in done.stderr
