"""Several processes that train one model, as torchrun starts them; alone, this does nothing."""

import contextlib
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


@contextlib.contextmanager
def joined(device):
    """with joined(device) as device: every process of torchrun together; each has its device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        with contextlib.ExitStack() as quiet:
            if rank():  # the first one speaks for all
                quiet.enter_context(contextlib.redirect_stdout(open(os.devnull, "w")))
            yield device
    finally:
        dist.destroy_process_group()


def count():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def share(model):
    """The same module, which averages its gradients over the processes as they are computed."""
    return DistributedDataParallel(model) if count() > 1 else model


def mean(loss):
    """The mean of a tensor over the processes."""
    if count() > 1:
        loss = loss.detach().clone()
        dist.all_reduce(loss)
        loss /= count()
    return loss


def anywhere(flag):
    """Whether flag is true in any process; all of them must ask."""
    if count() > 1:
        found = torch.tensor(float(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        flag = bool(found)
    return flag


def columns(codes):
    """This process's part of codes [T, batch]; batch is a multiple of count()."""
    return codes.chunk(count(), dim=1)[rank()]


def gathered(state):
    """The states [layers, batch, ...] of all processes side by side; tuples of them, or None."""
    if count() == 1 or state is None:
        return state
    if isinstance(state, tuple):
        return tuple(map(gathered, state))
    parts = [torch.empty_like(state) for _ in range(count())]
    dist.all_gather(parts, state.contiguous())
    return torch.cat(parts, dim=1)


def part(state):
    """This process's part of what `gathered` returned."""
    if count() == 1 or state is None:
        return state
    if isinstance(state, tuple):
        return tuple(map(part, state))
    return state.chunk(count(), dim=1)[rank()].contiguous()
