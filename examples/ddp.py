"""char_lm.py's model, trained by several processes with DistributedDataParallel.

    torchrun --nproc-per-node 2 examples/ddp.py
    torchrun --nproc-per-node 2 examples/ddp.py --cell gru --hidden 256 --batch 64 --steps 2000

Every process reads --batch / processes streams of the text and carries their states; gradients are
averaged in each step, so the training is that of one process with all the streams. On the CPU each
process takes its share of the cores, as torchrun sets OMP_NUM_THREADS; with --device cuda each has
a GPU of its own.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import common
import torch
import torch.distributed as dist
from char_lm import CharLM, cross_entropy, cut_into_streams, detach
from common import InputError, positive
from torch.nn.parallel import DistributedDataParallel

import rnn_ext


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole = positive(int)
    parser.add_argument("--cell", choices=["rnn", "gru", "lstm"], default="lstm")
    parser.add_argument("--layers", type=whole, default=1)
    parser.add_argument("--hidden", type=whole, default=128, help="units in a layer")
    parser.add_argument("--batch", type=whole, default=32, help="streams of all processes together")
    parser.add_argument("--window", type=whole, default=64, help="characters in a step")
    parser.add_argument("--steps", type=whole, default=300)
    parser.add_argument("--lr", type=positive(float), default=3e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--text", type=Path, help="a UTF-8 file; default: Python's language help")
    return parser.parse_args(arguments)


def my_streams(args, device):
    """(vocabulary, this process's streams [N, batch / processes])."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    if args.batch % processes:
        raise InputError(f"--batch {args.batch} cannot be shared by {processes} processes equally")
    text, _ = common.read_text(args.text)
    if len(text) < args.batch * (args.window + 1):
        raise InputError(f"a text of {len(text):,} characters is too short; lower --batch")
    vocabulary, codes = common.encode(text, device)
    share = args.batch // processes
    streams = cut_into_streams(codes, args.batch)[:, rank * share : (rank + 1) * share]
    return vocabulary, streams


def train(model, streams, args):
    """Trains; yields (step, loss of this process)."""
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    windows = (len(streams) - 1) // args.window
    for step in range(args.steps):
        start = step % windows * args.window
        if start == 0:
            state = None
        logits, state = model(streams[start : start + args.window], state)
        loss = cross_entropy(logits, streams[start + 1 : start + 1 + args.window])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state = detach(state)
        yield step, loss.detach()


def main(arguments):
    args = parse(arguments)
    if "RANK" not in os.environ:
        raise InputError("start it with torchrun --nproc-per-node 2 examples/ddp.py")
    device = torch.device(args.device)
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    try:
        vocabulary, streams = my_streams(args, device)
        torch.manual_seed(args.seed)
        layer_class = getattr(rnn_ext, args.cell.upper())
        model = CharLM(layer_class, len(vocabulary), args.hidden, args.layers).to(device)
        model = DistributedDataParallel(model)
        begin = time.perf_counter()
        for step, loss in train(model, streams, args):
            if (step + 1) % max(1, args.steps // 10) == 0:
                dist.all_reduce(loss)
                if dist.get_rank() == 0:
                    speed = (step + 1) * args.batch * args.window / (time.perf_counter() - begin)
                    mean = loss.item() / dist.get_world_size()
                    print(f"step {step + 1:5}  loss {mean:.4f}  {speed:,.0f} characters/s")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(common.exit_code(main, sys.argv[1:]))
