"""The compiled part (csrc/ops/bindings.cpp): kernels and what is known of them. Not public."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

_Optional: TypeAlias = Tensor | None
_Wanted: TypeAlias = Sequence[bool]
_Zoneout: TypeAlias = tuple[Tensor, _Optional] | None

built_for_torch: str
compiler: str
cuda_architectures: str

def layer_forward(
    cell: str,
    input: Tensor,
    h0: Tensor,
    c0: _Optional,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: _Optional,
    b_hh: _Optional,
    w_hr: _Optional,
    batch_sizes: _Optional,
    reverse: bool,
    resets: _Optional,
    zoneout: _Zoneout,
    save: bool,
    backend: str,
    /,
) -> tuple[Any, ...]: ...
def layer_backward(
    cell: str,
    input: Tensor,
    h0: Tensor,
    c0: _Optional,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: _Optional,
    b_hh: _Optional,
    w_hr: _Optional,
    batch_sizes: _Optional,
    reverse: bool,
    resets: _Optional,
    zoneout: _Zoneout,
    states: Tensor,
    cells: _Optional,
    gates: _Optional,
    middle: _Optional,
    isa: str,
    d_output: _Optional,
    d_h_n: _Optional,
    d_c_n: _Optional,
    d_cells: _Optional,
    wanted: _Wanted,
    groups: int,
    backend: str,
    /,
) -> list[_Optional]: ...
def parted_rows(
    cell: str,
    tensors: Sequence[_Optional],
    batch_sizes: _Optional,
    reverse: bool,
    resets: Tensor,
    /,
) -> Tensor: ...
def partial_forward(
    cell: str,
    tensors: Sequence[_Optional],
    batch_sizes: _Optional,
    reverse: bool,
    parted: _Optional,
    zoneout: _Zoneout,
    keep_gates: bool,
    planned: tuple[int, int],
    backend: str,
    /,
) -> tuple[Any, ...]: ...
def partial_backward(
    cell: str,
    tensors: Sequence[_Optional],
    batch_sizes: _Optional,
    reverse: bool,
    parted: _Optional,
    zoneout: _Zoneout,
    kept: Sequence[_Optional],
    isa: str,
    upstream: Sequence[_Optional],
    wanted: Sequence[bool],
    planned: tuple[int, int],
    sums: Sequence[_Optional],
    clip: str,
    limit: float,
    dh_norms: _Optional,
    backend: str,
    /,
) -> list[_Optional]: ...
def both_forward(
    cell: str,
    input: Tensor,
    tensors: Sequence[Sequence[_Optional]],
    batch_sizes: _Optional,
    resets: _Optional,
    zoneout: Sequence[_Zoneout],
    save: bool,
    backend: str,
    /,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]: ...
def both_backward(
    cell: str,
    input: Tensor,
    tensors: Sequence[Sequence[_Optional]],
    batch_sizes: _Optional,
    resets: _Optional,
    zoneout: Sequence[_Zoneout],
    kept: Sequence[Sequence[_Optional]],
    isa: str,
    upstream: Sequence[Sequence[_Optional]],
    wanted: Sequence[_Wanted],
    backend: str,
    /,
) -> list[list[_Optional]]: ...
def run_stack(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    directions: int,
    bias: bool,
    projected: bool,
    batch_first: bool,
    dropout: float,
    resets: _Optional,
    restored: Sequence[Tensor],
    options: tuple[bool, bool, float, float, float] | None,  # hooks.StackOptions
    /,
) -> tuple[Tensor, Tensor, Tensor | None] | None: ...
def run_cell(
    cell: str, input: Tensor, hx: Sequence[Tensor], weights: Sequence[Tensor], bias: bool, /
) -> tuple[Tensor, Tensor, Tensor | None] | None: ...
def set_general_backward(function: Callable[..., Any], /) -> None: ...
def quantized_layer(
    cell: str,
    input: Tensor,
    h0: Tensor,
    c0: _Optional,
    tensors: Sequence[_Optional],
    batch_sizes: _Optional,
    reverse: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor | None]: ...
def quantized_stack(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor],
    tensors: Sequence[Sequence[_Optional]],
    directions: int,
    hidden: int,
    output: int,
    batch_first: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor | None] | None: ...

# The pending steps of an exact influence, the first that counts of each sequence, how many.
_Pending: TypeAlias = tuple[Tensor, Tensor, int] | None
rtrl_pending_steps: int  # at most

def rtrl_influence(
    cell: str, weights: Sequence[_Optional], batch: int, diagonal: bool, /
) -> tuple[Tensor, _Optional]: ...
def rtrl_step(
    cell: str,
    weights: Sequence[_Optional],
    x: Tensor,
    reset: _Optional,
    h: Tensor,
    c: _Optional,
    influence: Tensor,
    pending: _Pending,
    /,
) -> tuple[int, _Optional]: ...
def rtrl_advance(
    cell: str, weights: Sequence[_Optional], influence: Tensor, pending: _Pending, /
) -> None: ...
def rtrl_accumulate(
    cell: str,
    weights: Sequence[_Optional],
    d_h: Tensor,
    influence: Tensor,
    pending: _Pending,
    /,
) -> int: ...
def random_mask(
    seed: int,
    stream: int,
    steps: Tensor,
    rows: Tensor,
    columns: int,
    threshold: int,
    dropped: float,
    kept: float,
    like: Tensor,
    /,
) -> Tensor: ...

class TokenChoice:
    def __init__(
        self,
        batch: int,
        tokens: int,
        steps: int,
        temperature: float,
        top_k: int,
        top_p: float,
        eos: int,
        log_probs: bool,
        beams: int,
        length_penalty: float,
        generator: torch.Generator | None,
        /,
    ) -> None: ...
    def choose(self, logits: Tensor, /) -> tuple[Tensor, _Optional] | None: ...
    def chosen(self) -> tuple[Tensor, Tensor, Tensor]: ...

def generate(
    cell: str,
    embedding: Tensor,
    layers: Sequence[Sequence[_Optional]],
    head: Tensor,
    head_bias: _Optional,
    choice: TokenChoice,
    h: Tensor,
    c: _Optional,
    first: _Optional,
    /,
) -> None: ...
def normalized_forward(
    cell: str,
    tensors: Sequence[_Optional],
    extras: Sequence[_Optional],
    batch_sizes: _Optional,
    reverse: bool,
    resets: _Optional,
    zoneout: _Zoneout,
    save: bool,
    /,
) -> tuple[Any, ...]: ...
def normalized_backward(
    cell: str,
    tensors: Sequence[_Optional],
    extras: Sequence[_Optional],
    batch_sizes: _Optional,
    reverse: bool,
    resets: _Optional,
    zoneout: _Zoneout,
    kept: Sequence[_Optional],
    isa: str,
    upstream: Sequence[_Optional],
    wanted: Sequence[bool],
    /,
) -> list[_Optional]: ...
def record_width(cell: str, hidden: int, normalized: bool, real_bytes: int, /) -> int: ...
def plan_rows(
    cell: str, dtype: str, steps: int, batch: int, input: int, hidden: int, /
) -> dict[str, Any]: ...
def gates_width(cell: str, hidden: int, real_bytes: int, /) -> int: ...
def plan_cpu(
    cell: str,
    dtype: str,
    steps: int,
    batch: int,
    input: int,
    hidden: int,
    output: int,
    directions: int,
    /,
) -> dict[str, Any]: ...
def cpu_isas() -> list[str]: ...
def cpu_isa() -> str: ...
def set_cpu_isa(name: str, /) -> None: ...
def cpu_multiplies_bfloat16() -> bool: ...
def cuda_unavailable() -> str: ...

class CudaDeviceLimits:
    major: int
    minor: int
    sm_count: int
    registers_per_sm: int
    shared_per_sm: int
    shared_per_block: int
    shared_reserved: int
    threads_per_sm: int
    blocks_per_sm: int
    l2_bytes: int
    cluster_size: int
    cooperative: bool
    def __init__(self) -> None: ...

def cuda_device_limits(device: int, /) -> CudaDeviceLimits: ...
def plan_cuda(
    cell: str,
    dtype: torch.dtype,
    steps: int,
    batch: int,
    hidden: int,
    directions: int,
    projected: bool,
    norms: bool,
    zoneout: bool,
    backend: str,
    limits: CudaDeviceLimits,
    /,
) -> tuple[tuple[str, str], tuple[str, str]]: ...
def poison_scratch(on: bool, /) -> None: ...
def shorten_pieces(on: bool, /) -> None: ...
