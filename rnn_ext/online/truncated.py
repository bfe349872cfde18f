"""`tbptt`: backpropagation through windows of a stream, with the state carried from one to the
next."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = ["Window", "tbptt"]


@dataclass
class Window:
    """What `tbptt` yields for k steps; ``output, state = window`` takes the first two.

    ``output`` and ``state``, that of the window's last step, are the module's, part of the graph.
    The state that stands here when the next window is asked for is carried on, detached; assign to
    change it. ``steps`` is a slice: which steps of the stream these are. ``targets`` are of these
    steps, ``loss`` is what the loss function returned, detached; each None if there is none.
    """

    output: Any
    state: Any
    steps: slice
    targets: Tensor | None = None
    loss: Tensor | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.output, self.state))


def tbptt(
    module: Callable[..., Any],
    stream: Tensor | Iterable[Any],
    k: int,
    loss: Callable[..., Tensor] | None = None,
    *,
    targets: Tensor | None = None,
    hx: Any = None,
    resets: Tensor | None = None,
    batch_first: bool | None = None,
) -> Iterator[Window]:
    """Truncated backpropagation through time: windows of k steps, between which the state is
    carried on and the graph is cut.

    Yields a `Window` for every k steps; the last one may be shorter. Gradients go back to the start
    of a window and no farther, and memory is that of one window. With k no less than the length of
    the stream this is backpropagation through time, to the last bit.

    >>> import torch, rnn_ext
    >>> rnn, head = rnn_ext.GRU(3, 8), torch.nn.Linear(8, 1)
    >>> optimizer = torch.optim.SGD([*rnn.parameters(), *head.parameters()], 0.1)
    >>> x, y = torch.randn(100, 4, 3), torch.randn(100, 4, 1)
    >>> for window in rnn_ext.online.tbptt(rnn, x, 20, targets=y):
    ...     loss = (head(window.output) - window.targets).square().mean()
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     optimizer.step()

    With ``loss``, the backward pass is done when a window is yielded:

    >>> def loss(output, targets):
    ...     return (head(output) - targets).square().mean()
    >>> for window in rnn_ext.online.tbptt(rnn, x, 20, loss, targets=y):
    ...     optimizer.step()
    ...     optimizer.zero_grad()

    Args:
        module: called as ``module(input, state)``, returns ``(output, state)``: a layer of rnn_ext
            or torch.nn in one direction, or a model of the same form. The first window gets ``hx``.
        stream: the input of all steps, [T, B, ...] ([B, T, ...] with ``batch_first``, and for a
            layer also [T, input_size]); or, if it has no end or does not fit into memory, anything
            that gives one step after the other: tensors x_t, or tuples ``(x_t, target_t)`` or
            ``(x_t, target_t, reset_t)``. Steps are stacked where the time dimension would be.
        k: steps in a window.
        loss: called with the window's output, and with its targets if there are any; returns a
            scalar, on which ``backward()`` is called. Gradients add up as always.
        targets: laid out like ``stream``; in a window, those of its steps.
        hx: the initial state, whatever ``module`` takes. None: its own default.
        resets: bool, laid out like ``stream`` without features, for modules that take ``resets=``
            as rnn_ext's layers do: True begins a new episode at that step.
        batch_first: where time is; None: what ``module.batch_first`` says, else False.

    Raises:
        TypeError: module, stream, targets or resets that are of no use here.
        ValueError: k below 1, an empty stream, lengths that differ, a bidirectional layer.
    """
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"tbptt: k must be an int, got {k!r}")
    if k < 1:
        raise ValueError(f"tbptt: k must be at least 1, got {k}")
    if loss is not None and not callable(loss):
        raise TypeError(f"tbptt: loss must be a function, got {type(loss).__name__}")
    _check_module(module)
    if isinstance(stream, PackedSequence):
        raise TypeError(
            "tbptt: a PackedSequence has no windows of equal batch; pad it, and leave what is past "
            "the end of a sequence out of the loss"
        )
    first = getattr(module, "batch_first", False) if batch_first is None else batch_first
    if not isinstance(stream, Tensor):
        if targets is not None or resets is not None:
            raise TypeError(
                "tbptt: a stream that gives single steps gives their targets and resets too, in "
                "tuples (x_t, target_t) or (x_t, target_t, reset_t)"
            )
        if not isinstance(stream, Iterable):
            raise TypeError(
                f"tbptt: stream must be a tensor or give steps, got {type(stream).__name__}"
            )
        parts = _collected(stream, k, first, isinstance(module, torch.nn.RNNBase))
        return _windows(module, parts, loss, hx)
    time = 1 if first else 0
    if isinstance(module, torch.nn.RNNBase) and stream.dim() == 2:
        time = 0
    if stream.dim() <= time:
        raise ValueError(f"tbptt: stream has no time dimension, its shape is {list(stream.shape)}")
    if stream.size(time) == 0:
        raise ValueError("tbptt: the stream has no steps")
    for name, given in (("targets", targets), ("resets", resets)):
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(f"tbptt: {name} must be a tensor, got {type(given).__name__}")
        if given is not None and (
            given.dim() <= time or given.shape[: time + 1] != stream.shape[: time + 1]
        ):
            raise ValueError(
                f"tbptt: {name} must be laid out like stream, {list(stream.shape)}, got "
                f"{list(given.shape)}"
            )
    if resets is not None:
        _check_takes_resets(module)
    each = ((None,) if t is None else t.split(k, time) for t in (stream, targets, resets))
    return _windows(module, _aligned(*each, k, stream.size(time)), loss, hx)


def _check_module(module):
    kind = type(module).__name__
    if not callable(module):
        raise TypeError(f"tbptt: module must be a layer or a model, got {kind}")
    if isinstance(module, torch.nn.RNNCellBase):
        raise TypeError(
            f"tbptt: {kind} takes one step a call; give the layer {kind.removesuffix('Cell')}"
        )
    if getattr(module, "bidirectional", False):
        raise ValueError(
            f"tbptt: {kind} is bidirectional; its backward direction starts at the end of the "
            "stream, which a window has not seen"
        )


def _check_takes_resets(module):
    if isinstance(module, (torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU)):
        raise TypeError(
            f"tbptt: torch.nn.{type(module).__name__} knows no resets; call "
            "rnn_ext.accelerate(module) first"
        )
    found = inspect.signature(getattr(module, "forward", module)).parameters.values()
    if not any(p.name == "resets" or p.kind is p.VAR_KEYWORD for p in found):
        raise TypeError(f"tbptt: {type(module).__name__} takes no resets=; add it to its forward")


def _aligned(stream, targets, resets, k, length):
    """(x, targets, resets, steps) of each window."""
    for i, x in enumerate(stream):
        others = (part[i if len(part) > 1 else 0] for part in (targets, resets))
        yield x, *others, slice(i * k, min((i + 1) * k, length))


def _collected(stream, k, batch_first, layer):
    """As `_aligned`, of a stream that gives single steps."""
    stream, start, width = iter(stream), 0, None
    while steps := list(islice(stream, k)):
        steps = [step if isinstance(step, (tuple, list)) else (step,) for step in steps]
        for at, step in enumerate(steps, start):
            width = width or len(step)
            tensors = all(isinstance(part, Tensor) for part in step)
            if not 1 <= len(step) <= 3 or len(step) != width or not tensors:
                raise TypeError(
                    "tbptt: a step must be a tensor x_t, or always a tuple (x_t, target_t) or "
                    f"(x_t, target_t, reset_t) of tensors; not so at step {at}"
                )
        alone = layer and steps[0][0].dim() == 1
        parts = [torch.stack(part, int(batch_first and not alone)) for part in zip(*steps)]
        yield *parts, *[None] * (3 - width), slice(start, start + len(steps))
        start += len(steps)


def _windows(module, parts, loss, state):
    checked = False
    for x, targets, resets, steps in parts:
        if resets is not None and not checked:
            _check_takes_resets(module)
            checked = True
        given = () if state is None else (state,)
        options = {} if resets is None else {"resets": resets}
        results = module(x, *given, **options)
        if not isinstance(results, tuple) or len(results) != 2:
            raise TypeError(
                f"tbptt: {type(module).__name__} must return (output, state), got "
                f"{type(results).__name__}"
            )
        window = Window(*results, steps, targets)
        if loss is not None:
            value = loss(window.output) if targets is None else loss(window.output, targets)
            if not isinstance(value, Tensor) or value.dim():
                shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"tbptt: loss must return a scalar tensor, got {shape}")
            value.backward()
            window.loss = value.detach()
        del results
        yield window
        state = _detached(window.state)
        del window


def _detached(state):
    if isinstance(state, Tensor):
        return state.detach()
    if isinstance(state, dict):
        return {name: _detached(part) for name, part in state.items()}
    if isinstance(state, (tuple, list)):
        parts = [_detached(part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    return state
