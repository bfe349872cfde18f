"""`RNNCell`, `LSTMCell` and `GRUCell`: one step, run as a sequence of one. Subclasses of torch.nn's
cells.

As in the layers, torch.nn's own forward refuses, or serves with a `FallbackWarning`, what the
kernels do not take. ``input`` is [B, input_size] or [input_size], states are [B, hidden_size] or
[hidden_size].
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _C, composite, onnx
from .backend import is_plain_call, uncovered
from .initialization import checked_forget_bias, forget_bias_, recurrent_
from .replacement import Replacement
from .signatures import CellCall, Device, LSTMCellCall
from .stack import stack

__all__ = ["GRUCell", "LSTMCell", "OneStep", "RNNCell"]

_ELMAN = {"tanh": "rnn_tanh", "relu": "rnn_relu", "sigmoid": "rnn_sigmoid"}
_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class OneStep(Replacement):
    """Mixed into torch.nn's cells; not for use on its own."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.recurrent_init is not None:
            recurrent_(self.weight_hh, self.hidden_size, self.recurrent_init)

    def forward(self, input: Any, hx: Any = None) -> Any:
        """One step from state ``hx`` (None: zeros) to the new state, which is returned.

        Raises:
            ValueError, RuntimeError: as torch.nn's cell does.
        """
        if type(input) is Tensor and is_plain_call():
            new = self._run_plain(input, hx)
            if new is not None:
                return new
        node = self._as_leaf(input, hx=hx)
        if node is not None:
            return node
        states = self._arrange(input, hx)
        if states is None:
            return self._run_twin(input, hx)
        batched = input.dim() == 2
        x = input.unsqueeze(0) if batched else input[None, None]
        weights = self._weights()
        if onnx.is_exporting():
            return self._run_in_onnx(x, states, weights, batched)
        reason, run = uncovered(x, states, [weights]), None
        if reason is not None:
            if not self._must_compose(reason, self._extra):
                return self._run_twin(input, hx, reason)
            run = composite.layer
        if not states:
            states = (x.new_zeros(x.size(1), self.hidden_size),) * 2
        elif not batched:
            states = tuple(state.unsqueeze(0) for state in states)
        c0 = states[1] if self._cell == "lstm" else None
        _, (h,), (c,), _ = stack(self._cell, x, [states[0]], [c0], [weights], fused=False, run=run)
        if reason is not None:
            self._warn_composed(reason, self._extra)
        if not batched:
            h, c = h.squeeze(0), None if c is None else c.squeeze(0)
        return h if c is None else (h, c)

    def _run_plain(self, input, hx):
        """The new state in one call of C++; None if the CPU kernels do not serve all of it."""
        states = () if hx is None else self._states(hx)
        cell = self._cell
        if states is None or cell is None:
            return None
        parameters = self._parameters
        try:
            weights = [parameters[name] for name in (_NAMES if self.bias else _NAMES[:2])]
        except KeyError:  # a parametrization
            return None
        results = _C.run_cell(cell, input, states, weights, bool(self.bias))
        if results is None:
            return None
        _, h, c = results
        return h if c is None else (h, c)

    def _run_in_onnx(self, x, states, weights, batched):
        states = [[state[None] if batched else state[None, None]] for state in states]
        name, widths = self._get_name(), [self.hidden_size]
        _, states = onnx.layers(name, self._cell, x, states, [weights], 1, widths)
        new = [state.squeeze(0) if batched else state[0, 0] for (state,) in states]
        return tuple(new) if self._cell == "lstm" else new[0]

    def _arrange(self, input, hx):
        """The states given, as a tuple; None if torch.nn is to judge."""
        # torch.nn's cells, unlike its layers, may have no hidden units.
        if not isinstance(input, Tensor) or self._cell is None or self.hidden_size == 0:
            return None
        shape = input.shape
        if len(shape) not in (1, 2) or shape[-1] != self.input_size:
            return None
        if hx is None:
            return ()
        states = self._states(hx)
        if states is not None:
            expected = (*shape[:-1], self.hidden_size)
            for state in states:
                if state.shape != expected:
                    return None
        return states

    def _weights(self):
        """(w_ih, w_hh, b_ih, b_hh, None), read at every call as in the layers."""
        parameters = self._parameters
        return (*[parameters[n] if n in parameters else getattr(self, n) for n in _NAMES], None)


class RNNCell(OneStep, torch.nn.RNNCell):
    """One step of `rnn_ext.RNN`: h' = f(W_ih x + b_ih + W_hh h + b_hh). Replaces
    `torch.nn.RNNCell`.

    ``RNNCell(input_size, hidden_size, bias=True, nonlinearity="tanh", device=None, dtype=None)``,
    nonlinearity "tanh", "relu" or "sigmoid"; keyword only ``recurrent_init`` as of the layer.
    """

    _twin = torch.nn.RNNCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_init: str | None = None,
    ) -> None:
        self._keep_recurrent_init(recurrent_init)
        super().__init__(input_size, hidden_size, bias, nonlinearity, device, dtype)

    if TYPE_CHECKING:
        forward: CellCall
        __call__: CellCall

    @property
    def _cell(self):
        return _ELMAN.get(self.nonlinearity)  # torch.nn complains of others when called

    @property
    def _extra(self):
        return "nonlinearity='sigmoid'" if self.nonlinearity == "sigmoid" else None

    def _run_twin(self, input, hx, *args):
        if self.nonlinearity == "sigmoid":
            # torch.nn refuses the name before it looks at the input; what is wrong is the input.
            tanh_cell = copy.copy(self)
            tanh_cell.nonlinearity = "tanh"
            self._twin.forward(tanh_cell, input, hx)
        return super()._run_twin(input, hx, *args)


class LSTMCell(OneStep, torch.nn.LSTMCell):
    """One step of `rnn_ext.LSTM`: ``(h', c')`` from ``hx = (h, c)``. Replaces `torch.nn.LSTMCell`.

    ``LSTMCell(input_size, hidden_size, bias=True, device=None, dtype=None)``; keyword only
    ``forget_bias`` and ``recurrent_init`` as of the layer.
    """

    _twin = torch.nn.LSTMCell
    _cell = "lstm"
    forget_bias: float | None = None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        forget_bias: float | None = None,
        recurrent_init: str | None = None,
    ) -> None:
        self._keep_recurrent_init(recurrent_init)
        forget_bias = checked_forget_bias("LSTMCell", forget_bias)
        if forget_bias is not None:
            self.forget_bias = forget_bias
        super().__init__(input_size, hidden_size, bias, device, dtype)

    if TYPE_CHECKING:
        forward: LSTMCellCall
        __call__: LSTMCellCall

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.forget_bias is not None:
            forget_bias_("LSTMCell", self.bias_ih, self.bias_hh, self.hidden_size, self.forget_bias)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.forget_bias is None else f"{text}, forget_bias={self.forget_bias}"


class GRUCell(OneStep, torch.nn.GRUCell):
    """One step of `rnn_ext.GRU`. Replaces `torch.nn.GRUCell`.

    ``GRUCell(input_size, hidden_size, bias=True, device=None, dtype=None)``; keyword only
    ``reset_after`` and ``recurrent_init`` as of the layer.
    """

    _twin = torch.nn.GRUCell
    reset_after: bool = True

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
        recurrent_init: str | None = None,
    ) -> None:
        self._keep_recurrent_init(recurrent_init)
        if not isinstance(reset_after, bool):
            raise TypeError(f"GRUCell: reset_after must be True or False, got {reset_after!r}")
        if not reset_after:
            self.reset_after = False
        super().__init__(input_size, hidden_size, bias, device, dtype)

    if TYPE_CHECKING:
        forward: CellCall
        __call__: CellCall

    @property
    def _cell(self):
        return "gru" if self.reset_after else "gru_reset_before"

    @property
    def _extra(self):
        return None if self.reset_after else "reset_after=False"

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self._extra is None else f"{text}, {self._extra}"
