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
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,  # RNNBase has proj_size here, torch.nn's RNN and GRU take no device by position either
        device: Device = None,
        dtype: torch.dtype | None = None,
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
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        forget_bias: float | None = None,
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
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,  # RNNBase has proj_size here, torch.nn's RNN and GRU take no device by position either
        device: Device = None,
        dtype: torch.dtype | None = None,
        reset_after: bool = True,
        recurrent_init: str | None = None,
        checkpoint_every: int | None = None,
        save: str = "all",
        grad_clip: float | tuple[str, float] | None = None,
    ) -> None: ...
