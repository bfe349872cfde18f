from collections.abc import Sequence
from typing import Literal

import torch

from .layers import RecurrentLayers
from .signatures import Device, LayerCall, LSTMCall

__all__ = ["GRU", "LSTM", "RNN"]

class RNN(RecurrentLayers):
    nonlinearity: str
    forward: LayerCall
    __call__: LayerCall
    def __init__(
        self,
        input_size: int,
        hidden_size: int | Sequence[int],
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool | Literal["single"] = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,  # RNNBase has proj_size here, torch.nn's RNN and GRU take no device by position either
        device: Device = None,
        dtype: torch.dtype | None = None,
        residual: bool = False,
        weight_dropout: float = 0.0,
        variational_dropout: float = 0.0,
        zoneout: float = 0.0,
        learn_initial_state: bool = False,
        layer_norm: bool = False,
        recurrent_init: str | None = None,
        checkpoint_every: int | None = None,
        save: str = "all",
        grad_clip: float | tuple[str, float] | None = None,
    ) -> None: ...

class LSTM(RecurrentLayers):
    forget_bias: float | None
    forward: LSTMCall
    __call__: LSTMCall
    def __init__(
        self,
        input_size: int,
        hidden_size: int | Sequence[int],
        num_layers: int = 1,
        bias: bool | Literal["single"] = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        forget_bias: float | None = None,
        peephole: bool = False,
        residual: bool = False,
        weight_dropout: float = 0.0,
        variational_dropout: float = 0.0,
        zoneout: float = 0.0,
        learn_initial_state: bool = False,
        layer_norm: bool = False,
        recurrent_init: str | None = None,
        checkpoint_every: int | None = None,
        save: str = "all",
        grad_clip: float | tuple[str, float] | None = None,
    ) -> None: ...

class GRU(RecurrentLayers):
    reset_after: bool
    forward: LayerCall
    __call__: LayerCall
    def __init__(
        self,
        input_size: int,
        hidden_size: int | Sequence[int],
        num_layers: int = 1,
        bias: bool | Literal["single"] = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,  # RNNBase has proj_size here, torch.nn's RNN and GRU take no device by position either
        device: Device = None,
        dtype: torch.dtype | None = None,
        reset_after: bool = True,
        residual: bool = False,
        weight_dropout: float = 0.0,
        variational_dropout: float = 0.0,
        zoneout: float = 0.0,
        learn_initial_state: bool = False,
        layer_norm: bool = False,
        recurrent_init: str | None = None,
        checkpoint_every: int | None = None,
        save: str = "all",
        grad_clip: float | tuple[str, float] | None = None,
    ) -> None: ...
