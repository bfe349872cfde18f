"""What test_distributed.py runs on two processes; each case writes what rank 0 holds at its end.

torchrun --nproc-per-node 2 tests/distributed_cases.py FOLDER
"""

import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rnn_ext

STEPS, BATCH = 3, 4


class Model(torch.nn.Module):
    def __init__(self, library):
        super().__init__()
        torch.manual_seed(0)
        self.first = library.LSTM(6, 10, 2, bidirectional=True, batch_first=True)
        self.second = library.GRU(20, 9, batch_first=True)
        self.cell = library.LSTMCell(9, 7)
        self.head = torch.nn.Linear(7, 3)

    def forward(self, x):
        x, _ = self.first(x)
        x, _ = self.second(x)
        h, _ = self.cell(x[:, -1], (x[:, 0, :7], x[:, 1, :7]))
        return self.head(h)


def batches():
    """[step] of (input, target) for both processes together."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(BATCH, 5, 6, generator=generator), torch.randn(BATCH, 3, generator=generator))
        for _ in range(STEPS)
    ]


def mine(batch):
    rank, share = dist.get_rank(), BATCH // dist.get_world_size()
    return [part[rank * share : (rank + 1) * share] for part in batch]


def train(model, data):
    """Trains; returns the gradients of the last step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for x, target in data:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), target).backward()
        optimizer.step()
    return gradients(model)


def whole(named):
    """Tensors without DistributedDataParallel's prefix, gathered where they are sharded."""
    return {
        name.removeprefix("module."): t.full_tensor() if hasattr(t, "full_tensor") else t.detach()
        for name, t in named.items()
        if t is not None
    }


def trained(model, data):
    grads = whole(train(model, data))
    return {"grads": grads, "parameters": whole(dict(model.named_parameters()))}


def ddp(folder):
    return trained(DistributedDataParallel(Model(rnn_ext)), map(mine, batches()))


def ddp_unused(folder):
    """A layer takes no part, and gradients are views of the buckets."""
    model = Model(rnn_ext)
    model.unused = rnn_ext.GRU(3, 3)
    model = DistributedDataParallel(
        model, find_unused_parameters=True, gradient_as_bucket_view=True
    )
    result = trained(model, map(mine, batches()))
    del model.module.unused
    kept = dict(model.module.named_parameters())
    return {part: {name: tensors[name] for name in kept} for part, tensors in result.items()}


def ddp_micro_batches(folder):
    """Gradients of two micro-batches, exchanged once."""
    model = DistributedDataParallel(Model(rnn_ext))
    x, target = mine(batches()[0])
    with model.no_sync():
        torch.nn.functional.mse_loss(model(x[:1]), target[:1]).backward()
    torch.nn.functional.mse_loss(model(x[1:]), target[1:]).backward()
    return {"grads": {name: g / 2 for name, g in whole(gradients(model)).items()}}


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def fully_sharded():
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    model = Model(rnn_ext)
    for layer in (model.first, model.second, model.cell, model):
        fully_shard(layer, mesh=mesh)
    return model


def fsdp(folder):
    model = fully_sharded()
    assert all(hasattr(p, "full_tensor") for p in model.parameters())
    result = trained(model, map(mine, batches()))
    with torch.no_grad():
        result["output"] = {"": model(batches()[0][0])}
    return result


def fsdp_checkpoint(folder):
    """A sharded model saved by both processes, loaded sharded and by a model of one process."""
    model = fully_sharded()
    train(model, map(mine, batches()))
    path = os.path.join(folder, "sharded")
    dcp.save(get_model_state_dict(model), checkpoint_id=path)
    fresh = fully_sharded()
    weights = get_model_state_dict(fresh)
    dcp.load(weights, checkpoint_id=path)
    set_model_state_dict(fresh, weights)
    alone = Model(torch.nn)
    weights = alone.state_dict()
    dcp.load(weights, checkpoint_id=path)
    alone.load_state_dict(weights)
    x = batches()[0][0]
    with torch.no_grad():
        outputs = [m(x) for m in (model, fresh, alone)]
    return {
        "output": dict(zip(("trained", "sharded", "alone"), outputs)),
        "parameters": whole(dict(fresh.named_parameters())),
    }


def ddp_checkpoint(folder):
    model = DistributedDataParallel(Model(rnn_ext))
    train(model, map(mine, batches()))
    path = os.path.join(folder, "replicated")
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=path)
    fresh = Model(torch.nn)
    weights = {"model": fresh.state_dict()}
    dcp.load(weights, checkpoint_id=path)
    fresh.load_state_dict(weights["model"])
    return {"parameters": whole(dict(fresh.named_parameters()))}


CASES = (ddp, ddp_unused, ddp_micro_batches, ddp_checkpoint, fsdp, fsdp_checkpoint)


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case in CASES:
        result = failure = None
        try:
            result = case(folder)
        except Exception:  # of either process it fails the test, and the other cases go on
            failure = traceback.format_exc()
        failures = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
        if dist.get_rank() == 0:
            text = "\n".join(filter(None, failures))
            torch.save(text or result, Path(folder) / f"{case.__name__}.pt")
    dist.barrier()  # neither leaves while the other still works
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
