"""What stands in for a class of torch.nn has in common, layer or cell."""

import copy
from typing import Any

from torch import Tensor
from torch.fx import Proxy
from torch.fx.proxy import TraceError

from .backend import current, warn_once
from .initialization import checked_recurrent_init

__all__ = ["Replacement"]


class Replacement:
    """Mixed into a module whose ``_twin`` of torch.nn runs on the same attributes.

    Input that the kernels do not take goes through the twin's forward. If that refuses it, the
    error is torch's own; if it serves it, a `FallbackWarning` says so.
    """

    _twin: type
    _cell: str  # name of the cell, as rnn_ext.ops knows it
    _extra = None  # what the twin has no equivalent of, in words
    recurrent_init: str | None = None

    def _keep_recurrent_init(self, kind):
        """To be called before the constructor of torch.nn, which initializes."""
        if checked_recurrent_init(self._get_name(), kind) is not None:
            self.recurrent_init = kind

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.recurrent_init is not None:
            text += f", recurrent_init={self.recurrent_init!r}"
        return text

    def _states(self, hx):
        """``hx`` as a tuple of tensors, None if it is something else."""
        if self._cell != "lstm":
            return (hx,) if isinstance(hx, Tensor) else None
        pair = isinstance(hx, (tuple, list)) and len(hx) == 2
        return (
            tuple(hx) if pair and isinstance(hx[0], Tensor) and isinstance(hx[1], Tensor) else None
        )

    def _must_compose(self, reason, extra):
        """Whether torch operations serve what no kernel takes (says ``reason``), not the twin."""
        backend = current()
        if backend not in ("auto", "reference"):
            name = self._get_name()
            raise RuntimeError(f"{name}: the backend {backend!r} cannot run this: {reason}")
        return extra is not None or backend == "reference"

    def _warn_composed(self, reason, extra, more=""):
        if current() == "auto":
            warn_once(
                f"{self._get_name()} with {extra}: {reason}; composed of torch operations instead"
                + more
            )

    def _run_twin(self, input, hx, reason="it takes this input, rnn_ext does not", extra=None):
        result = self._twin.forward(self, input, hx)
        extra = extra or self._extra
        if extra is not None:
            raise RuntimeError(f"{self._get_name()} with {extra} cannot take this input")
        warn_once(f"{self._get_name()}: torch.nn's kernel serves instead: {reason}")
        return result

    def _details(self, **asked):
        """What is asked for, by name; what torch.fx traces may be."""
        return tuple(k for k, want in asked.items() if isinstance(want, Proxy) or want)

    def _as_leaf(self, input, **arguments):
        """A call node if torch.fx traces ``input`` or the state, otherwise None.

        torch.fx treats torch.nn's modules as leaves, and only those.
        """
        hx = arguments["hx"]
        state = hx[0] if isinstance(hx, (tuple, list)) and hx else hx
        if isinstance(input, Proxy):
            tracer = input.tracer
        elif isinstance(state, Proxy):
            tracer = state.tracer
        else:
            return None
        path = tracer.path_of_module(self)
        if not path:
            raise TraceError(
                f"{self._get_name()} is a leaf in the graphs of torch.fx; "
                "trace a module that holds it"
            )
        given = {name: value for name, value in arguments.items() if value is not None}
        return tracer.create_proxy("call_module", path, (input,), given)

    def __prepare_scriptable__(self) -> Any:
        """What torch.jit.script compiles: the twin, with the same parameters."""
        if self._extra is not None:
            raise RuntimeError(f"{self._get_name()} with {self._extra} cannot be scripted")
        warn_once(
            f"{self._get_name()}: torch.jit.script puts torch.nn's in its place, in the scripted "
            "model and in the original; rnn_ext.accelerate(original) undoes that"
        )
        twin = copy.copy(self)
        twin.__class__ = self._twin
        return twin
