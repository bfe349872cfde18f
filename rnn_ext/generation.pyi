"""What a type checker should know of generation.py."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor

__all__ = ["Generated", "decode", "encode", "generate"]

_Tokens: TypeAlias = Tensor | Sequence[int] | Sequence[Sequence[int]]
_Lengths: TypeAlias = Tensor | Sequence[int] | None
_Module: TypeAlias = Callable[..., Any]
_Seed: TypeAlias = int | torch.Generator | None

class Options: ...

class Generated(NamedTuple):
    tokens: Tensor
    lengths: Tensor
    log_probs: Tensor

@overload
def generate(
    embedding: _Module,
    rnn: _Module,
    head: _Module,
    prefix: _Tokens,
    steps: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | None = None,
    seed: _Seed = None,
    *,
    lengths: _Lengths = None,
    hx: Any = None,
    beams: int = 1,
    length_penalty: float = 0.0,
    pad: int | None = None,
    return_log_probs: Literal[False] = False,
) -> Tensor: ...
@overload
def generate(
    embedding: _Module,
    rnn: _Module,
    head: _Module,
    prefix: _Tokens,
    steps: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | None = None,
    seed: _Seed = None,
    *,
    lengths: _Lengths = None,
    hx: Any = None,
    beams: int = 1,
    length_penalty: float = 0.0,
    pad: int | None = None,
    return_log_probs: Literal[True],
) -> Generated: ...
@overload
def generate(
    embedding: _Module,
    rnn: _Module,
    head: _Module,
    prefix: _Tokens,
    steps: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | None = None,
    seed: _Seed = None,
    *,
    lengths: _Lengths = None,
    hx: Any = None,
    beams: int = 1,
    length_penalty: float = 0.0,
    pad: int | None = None,
    return_log_probs: bool,
) -> Tensor | Generated: ...
def encode(
    embedding: _Module,
    rnn: _Module,
    source: _Tokens,
    *,
    lengths: _Lengths = None,
    hx: Any = None,
) -> Any: ...
@overload
def decode(
    embedding: _Module,
    rnn: _Module,
    head: _Module,
    state: Any,
    bos: int | Tensor | Sequence[int],
    steps: int,
    eos: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: _Seed = None,
    *,
    beams: int = 1,
    length_penalty: float = 0.0,
    pad: int | None = None,
    return_log_probs: Literal[False] = False,
) -> Tensor: ...
@overload
def decode(
    embedding: _Module,
    rnn: _Module,
    head: _Module,
    state: Any,
    bos: int | Tensor | Sequence[int],
    steps: int,
    eos: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: _Seed = None,
    *,
    beams: int = 1,
    length_penalty: float = 0.0,
    pad: int | None = None,
    return_log_probs: Literal[True],
) -> Generated: ...
@overload
def decode(
    embedding: _Module,
    rnn: _Module,
    head: _Module,
    state: Any,
    bos: int | Tensor | Sequence[int],
    steps: int,
    eos: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: _Seed = None,
    *,
    beams: int = 1,
    length_penalty: float = 0.0,
    pad: int | None = None,
    return_log_probs: bool,
) -> Tensor | Generated: ...
