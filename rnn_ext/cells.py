"""`RNNCell`, `LSTMCell` and `GRUCell`: one step, run as a sequence of one. Subclasses of torch.nn's cells.

As in the layers, torch.nn's own forward refuses, or serves with a `FallbackWarning`, what the kernels do not
take. ``input`` is [B, input_size] or [input_size], states are [B, hidden_size] or [hidden_size].
"""

import copy

import torch
from torch import Tensor
from torch.fx import Proxy

from . import composite, functional
from .backends import current, uncovered, warn_once
from .initialization import checked_forget_bias, checked_recurrent_init, forget_bias_, recurrent_


class _OneStep:
    """Mixed into torch.nn's cells."""

    _twin: type  # the class of torch.nn that this one replaces
    _cell: str  # name of the cell, as rnn_ext.ops knows it
    _extra = None  # what torch.nn's cell has no equivalent of, in words
    recurrent_init = None

    def __init__(self, *args, recurrent_init=None, **kwargs):
        if checked_recurrent_init(self._get_name(), recurrent_init) is not None:
            self.recurrent_init = recurrent_init
        super().__init__(*args, **kwargs)

    def reset_parameters(self):
        super().reset_parameters()
        if self.recurrent_init is not None:
            recurrent_(self.weight_hh, self.hidden_size, self.recurrent_init)

    def extra_repr(self):
        text = super().extra_repr()
        if self.recurrent_init is not None:
            text += f", recurrent_init={self.recurrent_init!r}"
        return text

    def forward(self, input, hx=None):
        """One step from state ``hx`` (None: zeros) to the new state, which is returned.

        Raises:
            ValueError, RuntimeError: as torch.nn's cell does.
        """
        if isinstance(input, Proxy):  # torch.fx treats torch.nn's cells as leaves, and so these
            path = input.tracer.path_of_module(self)
            return input.tracer.create_proxy("call_module", path, (input, hx), {})
        states = self._arrange(input, hx)
        if states is None:
            return self._run_twin(input, hx, "it takes this input, rnn_ext does not")
        batched = input.dim() == 2
        x = input.unsqueeze(0) if batched else input[None, None]
        weights = self._weights()
        reason = uncovered([x, *states, *[w for w in weights if w is not None]])
        run = None
        if reason is not None:
            name, backend = self._get_name(), current()
            if backend not in ("auto", "reference"):
                raise RuntimeError(f"{name}: the backend {backend!r} cannot run this: {reason}")
            if backend == "auto":
                if self._extra is None:
                    return self._run_twin(input, hx, reason)
                warn_once(
                    f"{name} with {self._extra}: {reason}; composed of torch operations instead"
                )
            run = composite.layer
        if not states:
            states = [x.new_zeros(x.size(1), self.hidden_size)] * 2
        elif not batched:
            states = [state.unsqueeze(0) for state in states]
        c0 = states[-1] if self._cell == "lstm" else None
        _, (h,), (c,), _ = functional.stack(
            self._cell, x, [states[0]], [c0], [weights], fused=False, run=run
        )
        if not batched:
            h, c = h.squeeze(0), None if c is None else c.squeeze(0)
        return h if c is None else (h, c)

    def _arrange(self, input, hx):
        """The states given, as a tuple; None if torch.nn is to judge."""
        if not isinstance(input, Tensor) or input.dim() not in (1, 2):
            return None
        if input.size(-1) != self.input_size:
            return None
        states = () if hx is None else self._states(hx)
        if states is not None:
            expected = (*input.shape[:-1], self.hidden_size)
            for state in states:
                if state.shape != expected:
                    return None
        return states

    def _weights(self):
        return self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, None

    def _states(self, hx):
        """``hx`` as a tuple of tensors, None if it is something else."""
        return (hx,) if isinstance(hx, Tensor) else None

    def _run_twin(self, input, hx, reason):
        """torch.nn's forward on this module: its errors are the errors, its results come with a warning."""
        result = self._twin.forward(self, input, hx)
        if self._extra is not None:
            raise RuntimeError(f"{self._get_name()} with {self._extra}: cannot run this: {reason}")
        warn_once(f"{self._get_name()}: torch.nn's kernel serves instead: {reason}")
        return result


class RNNCell(_OneStep, torch.nn.RNNCell):
    """One step of `rnn_ext.RNN`: h' = f(W_ih x + b_ih + W_hh h + b_hh). Replaces `torch.nn.RNNCell`.

    ``RNNCell(input_size, hidden_size, bias=True, nonlinearity="tanh", device=None, dtype=None)``, nonlinearity
    "tanh", "relu" or "sigmoid"; keyword only ``recurrent_init`` as of the layer.
    """

    _twin = torch.nn.RNNCell

    @property
    def _cell(self):
        return f"rnn_{self.nonlinearity}"

    @property
    def _extra(self):
        return "nonlinearity='sigmoid'" if self.nonlinearity == "sigmoid" else None

    def _arrange(self, input, hx):
        known = self.nonlinearity in ("tanh", "relu", "sigmoid")
        return super()._arrange(input, hx) if known else None

    def _run_twin(self, input, hx, reason):
        if self.nonlinearity == "sigmoid":
            # torch.nn refuses the name before it looks at the input; what is wrong is the input.
            tanh_cell = copy.copy(self)
            tanh_cell.nonlinearity = "tanh"
            self._twin.forward(tanh_cell, input, hx)
        return super()._run_twin(input, hx, reason)


class LSTMCell(_OneStep, torch.nn.LSTMCell):
    """One step of `rnn_ext.LSTM`: ``(h', c')`` from ``hx = (h, c)``. Replaces `torch.nn.LSTMCell`.

    ``LSTMCell(input_size, hidden_size, bias=True, device=None, dtype=None)``; keyword only ``forget_bias`` and
    ``recurrent_init`` as of the layer.
    """

    _twin = torch.nn.LSTMCell
    _cell = "lstm"
    forget_bias = None

    def __init__(self, *args, forget_bias=None, **kwargs):
        forget_bias = checked_forget_bias("LSTMCell", forget_bias)
        if forget_bias is not None:
            self.forget_bias = forget_bias
        super().__init__(*args, **kwargs)

    def reset_parameters(self):
        super().reset_parameters()
        if self.forget_bias is not None:
            forget_bias_("LSTMCell", self.bias_ih, self.bias_hh, self.hidden_size, self.forget_bias)

    def extra_repr(self):
        text = super().extra_repr()
        return text if self.forget_bias is None else f"{text}, forget_bias={self.forget_bias}"

    def _states(self, hx):
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            return None
        return tuple(hx) if all(isinstance(state, Tensor) for state in hx) else None


class GRUCell(_OneStep, torch.nn.GRUCell):
    """One step of `rnn_ext.GRU`. Replaces `torch.nn.GRUCell`.

    ``GRUCell(input_size, hidden_size, bias=True, device=None, dtype=None)``; keyword only ``reset_after`` and
    ``recurrent_init`` as of the layer.
    """

    _twin = torch.nn.GRUCell
    reset_after = True

    def __init__(self, *args, reset_after=True, **kwargs):
        if not isinstance(reset_after, bool):
            raise TypeError(f"GRUCell: reset_after must be True or False, got {reset_after!r}")
        if not reset_after:
            self.reset_after = False
        super().__init__(*args, **kwargs)

    @property
    def _cell(self):
        return "gru" if self.reset_after else "gru_reset_before"

    @property
    def _extra(self):
        return None if self.reset_after else "reset_after=False"

    def extra_repr(self):
        text = super().extra_repr()
        return text if self._extra is None else f"{text}, {self._extra}"
