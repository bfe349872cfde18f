"""Measures how long blocks of the GPU take to meet and to pass data on (entries/latency.cu).

`make gpu STAGE=conformance` prints the table; the benchmarks take constants of their model from it.
"""

import ctypes

import numpy as np

from .arrays import pointer
from .kernels import KernelError

SOURCE = "tests/cuda_on_cpu/entries/latency.cu"
THREADS = 256
FLAG_STRIDE = 32  # words


class Args(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_void_p), ("data", ctypes.c_void_p)]
    _fields_ += [(name, ctypes.c_int) for name in ("rounds", "bytes", "group")]


class DeviceLimits(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("major", "minor", "sm_count", "registers_per_sm")),
        *(
            (name, ctypes.c_int)
            for name in ("shared_per_sm", "shared_per_block", "shared_reserved")
        ),
        *((name, ctypes.c_int) for name in ("threads_per_sm", "blocks_per_sm", "l2_bytes")),
        *((name, ctypes.c_int) for name in ("cluster_size",)),
        ("cooperative", ctypes.c_bool),
    ]


def limits(kernels):
    """What device_limits says, as a dict."""
    result = DeviceLimits()
    kernels.call("limits", result)
    return {name: getattr(result, name) for name, _ in DeviceLimits._fields_}


def microseconds(kernels, name, blocks, *, cluster=1, kilobytes=0, group=1, rounds=2000):
    """Time of one round; NaN if the GPU cannot launch it."""
    shared = kilobytes * 1024
    flags = kernels.array(np.zeros((blocks + 1) * FLAG_STRIDE, np.uint32), "flags")
    data = kernels.array(np.ones(max(shared, 16), np.uint8), "data")
    args = Args(pointer(flags), pointer(data), rounds, shared, group)
    result = ctypes.c_float()
    grid = blocks, THREADS, cluster, shared
    try:
        kernels.call("latency", name.encode(), args, *grid, ctypes.byref(result))
    except KernelError:
        return float("nan")
    return result.value * 1e3 / rounds


def measure(kernels, rounds=2000):
    """{what: number}; microseconds unless the name says otherwise."""
    sizes = limits(kernels)
    blocks = sizes["sm_count"]
    table = {"block barrier": microseconds(kernels, "block_barriers", blocks, rounds=rounds)}
    clusters = [n for n in (2, 4, 8, 16) if n <= sizes["cluster_size"]]
    for n in clusters:
        time = microseconds(kernels, "cluster_barriers", blocks // n * n, cluster=n, rounds=rounds)
        table[f"cluster barrier, {n} blocks"] = time
    table["grid barrier"] = microseconds(kernels, "grid_barriers", blocks, rounds=rounds)
    for group in (8, 16, 32, 64, blocks):
        if group <= blocks:
            launched = blocks // group * group
            time = microseconds(kernels, "flag_rounds", launched, group=group, rounds=rounds)
            table[f"flags, groups of {group} blocks"] = time
    for kilobytes in (8, 32, 96):
        time = microseconds(kernels, "gather", blocks, kilobytes=kilobytes, rounds=rounds)
        table[f"gather {kilobytes} KB from L2, KB/us of a block"] = kilobytes / max(time, 1e-9)
    for n in clusters:
        for kilobytes in (8, 32):
            place = {"cluster": n, "kilobytes": kilobytes, "rounds": rounds}
            time = microseconds(kernels, "push", blocks // n * n, **place)
            table[f"push {kilobytes} KB round a cluster of {n} and meet"] = time
    for n in clusters:
        held = ctypes.c_int()
        kernels.call("resident", n, THREADS, 200 * 1024, ctypes.byref(held))
        table[f"blocks resident in clusters of {n}, 200 KB each (number)"] = held.value
    return table
