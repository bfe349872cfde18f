"""Two processes that share a training compute what one does: DistributedDataParallel, FSDP2
(fully_shard) and torch.distributed.checkpoint, over gloo on the CPU, under torchrun."""

import os
import pathlib
import re
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


EXAMPLE = pathlib.Path(__file__).parent.parent / "examples/char_lm.py"


def run_example(folder, name, *launch):
    """The training losses of our model and the held-out perplexity that the example printed."""
    tiny = "--hidden 12 --batch 4 --window 16 --steps 40 --no-compare --length 10".split()
    files = ["--checkpoint", folder / f"{name}.pt", "--plot", folder / f"{name}.png"]
    done = subprocess.run(
        [sys.executable, *launch, EXAMPLE, *tiny, *files],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    [printed] = re.findall(r"^held-out perplexity +([\d.]+)$", done.stdout, re.MULTILINE)
    saved = torch.load(folder / f"{name}.pt", weights_only=True)
    return saved["learners"]["rnn_ext"], float(printed)


def test_the_example_computes_the_same_with_one_process_and_two(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    one, perplexity = run_example(tmp_path, "one")
    two, shared = run_example(
        tmp_path, "two", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    )
    assert one["losses"] == pytest.approx(two["losses"], abs=2e-4)
    assert len(one["losses"]) == 40 and one["losses"][-1] < one["losses"][0]
    assert perplexity == pytest.approx(shared, rel=2e-4)
    for ours, gathered in zip(one["state"], two["state"], strict=True):
        torch.testing.assert_close(ours, gathered, rtol=1e-3, atol=1e-4)  # of all the streams
