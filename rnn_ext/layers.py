"""What `RNN`, `LSTM` and `GRU` share: from what users pass in to the stack of layers, and back."""

from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_exporting
from torch.nn.utils.rnn import PackedSequence

from . import _C, composite, functional, onnx
from .backend import is_plain_call, uncovered
from .control import Control, checked_control
from .initialization import recurrent_
from .lengths import WithLengths
from .replacement import Replacement
from .stack import no_restoring, stack, with_restored

__all__ = ["RecurrentLayers"]


class RecurrentLayers(WithLengths, Replacement, torch.nn.RNNBase):
    """Not for use on its own.

    Three arguments of all constructors control training; outputs and states stay the same to the
    last bit. They have effect where gradients are recorded, on the CPU, in every layer and
    direction, and take no ``resets`` there. torch.compile leaves a layer that trains with them out
    of its graph, and refuses it with fullgraph=True; exported programs have none of them.

    Args:
        checkpoint_every: None or k >= 1: keep the states before every k-th step alone and run each
            k steps forward again in the backward pass. Memory grows with T / k + k instead of T,
            beside input and output; the time by that of a forward pass. Gradients are those of the
            plain layer to the last bit if k * B is a multiple of 256 (of 512 in bfloat16); k is
            rounded up to that where it then is at most 2 k. Otherwise, and for packed input, sums
            over time are taken in another order, which changes the last digits of the parameters'
            gradients (of packed input in reverse, of all).
        save: "all", or "states": keep h and c of every step, not the gates, and compute those again
            in the backward pass, of all steps at once: the last digits of gradients may change.
            Excludes ``checkpoint_every``.
        grad_clip: None; a number v: each value of dL/dh_t, of the output at t and of later steps
            together, is held in [-v, v] before it goes on to the cell and to earlier steps; or
            ("norm", v): dL/dh_t of each sequence is scaled down to the norm v where it is larger
            (Pascanu et al. 2013, arXiv:1211.5063, at every step). dL/dh_0 is not clipped.
    """

    _control: Control | None = None  # of training, where a constructor was asked for it

    def __init__(
        self,
        *args: Any,
        recurrent_init: str | None = None,
        checkpoint_every: int | None = None,
        save: str = "all",
        grad_clip: float | tuple[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self._keep_recurrent_init(recurrent_init)
        control = checked_control(self._get_name(), checkpoint_every, save, grad_clip)
        super().__init__(*args, **kwargs)
        if control is not None:
            self._control = control

    @property
    def checkpoint_every(self) -> int | None:
        return self._control and self._control.checkpoint_every

    @property
    def grad_clip(self) -> float | tuple[str, float] | None:
        return self._control and self._control.grad_clip

    @property
    def _extra(self) -> str | None:
        return self._clipping()

    def _clipping(self) -> str | None:  # torch.compile takes no super() of a property
        return None if self.grad_clip is None else f"grad_clip={self.grad_clip!r}"

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self._control is None else f"{text}, {self._control}"

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.recurrent_init is not None:
            for names in self._all_weights:
                recurrent_(getattr(self, names[1]), self.hidden_size, self.recurrent_init)

    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        lengths: Any = None,
        resets: Any = None,
        initial_state: Any = None,
    ) -> Any:
        """Runs the layers over a sequence.

        Args:
            input: [T, B, input_size], [B, T, input_size] with ``batch_first``, [T, input_size]
                without a batch, or a `torch.nn.utils.rnn.PackedSequence`.
            hx: the initial state h_0, [num_layers * directions, B, hidden_size] (no B if there is
                no batch). None: zeros.
            lengths: [B] integers in 1..T, tensor or list, in any order. Steps past a sequence's
                length are left out: ``output`` is zero there and h_n the state after the last real
                step.
            resets: bool [T, B], laid out like ``input`` without features ([N] in the order of
                ``data`` of a PackedSequence). True at step t begins a new episode there: no state
                passes between steps t - 1 and t, forward or backward in time, and no gradient. Step
                t starts from ``initial_state`` instead, and so does step t - 1 in the reverse
                direction. ``hx`` begins a sequence, unless ``resets`` is True at step 0.
            initial_state: where episodes start, in the form of ``hx``, with a batch of B or 1; it
                gets a gradient. None: zeros.

        Returns:
            ``(output, h_n)``: ``output`` laid out like ``input`` with directions * hidden_size
            features, h_n laid out like ``hx``.

        Raises:
            ValueError, RuntimeError: as torch.nn does, for rank, sizes, dtypes and devices;
                ValueError for ``lengths``, ``resets`` or ``initial_state`` that do not fit,
                TypeError for ``resets`` that are no tensor.
        """
        return self._shown(self._run(input, hx, lengths, False, resets, initial_state))

    def _shown(self, results, return_cells=False):
        """What `forward` returns of `_run`'s results, which torch.fx may have left in one node."""
        return results[:2] if isinstance(results, tuple) and not return_cells else results

    def _run(self, input, hx, lengths=None, return_cells=False, resets=None, initial_state=None):
        """(output, state, cells) of `forward`."""
        control = self._control if torch.is_grad_enabled() and not is_exporting() else None
        plain = lengths is None and not return_cells and control is None
        if plain and type(input) is Tensor and is_plain_call():
            results = self._run_plain(input, hx, resets, initial_state)
            if results is not None:
                return results
        options = {} if return_cells is False else {"return_cells": return_cells}
        given = {"lengths": lengths, "resets": resets, "initial_state": initial_state}
        node = self._as_leaf(input, hx=hx, **given, **options)
        if node is not None:
            return node
        if onnx.is_exporting():
            results = self._run_in_onnx(input, hx, lengths, return_cells, resets)
            if results is not None:
                return results
        if lengths is not None:
            return self._run_with_lengths(input, hx, lengths, return_cells, resets, initial_state)
        extra = self._extra or ("return_cells=True" if return_cells else None)
        if resets is not None:
            extra = extra or "resets"
        arranged = self._arrange(input, hx)
        if arranged is None:
            return *self._run_twin(input, hx, extra=extra), None
        x, batch_sizes, batch, states = arranged
        restored = self._checked_restored(input, batch, resets, initial_state)
        weights = self._weights()
        if control is not None and resets is not None:
            raise ValueError(
                f"{self._get_name()}: resets cannot be combined with checkpoint_every, "
                "save='states' or grad_clip where gradients are recorded; build the layer without "
                "them, or give one episode at a time"
            )
        reason = uncovered(x, (*states, *(restored or ())), weights)
        reason, run = reason or no_restoring(x, restored), None
        if control is not None:
            run = control.layer
        if reason is not None:
            if not self._must_compose(reason, extra):
                return *self._run_twin(input, hx, reason), None
            self._update_flat_weights()
            self.check_input(x, batch_sizes)
            run = composite.layer if control is None else control.composed

        h0, c0 = self._initial(x, batch, states)
        if resets is not None:
            resets = self._steps_first(input, resets)
            each = zip(*(r.unbind(0) for r in restored)) if restored else [None] * len(h0)
            packed = batch_sizes is not None
            pairs = [with_restored(*state, packed) for state in zip(h0, c0, each)]
            h0, c0 = zip(*pairs)
        output, h_n, c_n, cells = stack(
            self._cell,
            x,
            h0,
            c0,
            weights,
            2 if self.bidirectional else 1,
            dropout=self.dropout if self.training else 0.0,
            batch_sizes=batch_sizes,
            resets=resets,
            return_cells=return_cells,
            run=run,
        )
        if reason is not None:
            self._warn_composed(reason, extra)
        state = self._joined(h_n, input)
        if self._cell == "lstm":
            state = state, self._joined(c_n, input)
        return (
            self._like(input, output),
            state,
            self._like(input, cells) if return_cells else None,
        )

    def _run_plain(self, input, hx, resets, initial_state):
        """As `_run`, in one call of C++; None if the CPU kernels do not serve all of it."""
        states = () if hx is None else self._states(hx)
        restored = () if initial_state is None else self._states(initial_state)
        if states is None or restored is None or not isinstance(resets, (Tensor, NoneType)):
            return None
        parameters = self._parameters
        try:
            weights = [parameters[name] for names in self._all_weights for name in names]
        except KeyError:  # a parametrization
            return None
        directions = 2 if self.bidirectional else 1
        results = _C.run_stack(
            self._cell, input, states, weights, directions, bool(self.bias), self.proj_size > 0,
            self.batch_first, self.dropout if self.training else 0.0, resets, restored,
        )  # fmt: skip
        if results is None:
            return None
        output, h_n, c_n = results
        return output, h_n if c_n is None else (h_n, c_n), None

    def _run_in_onnx(self, input, hx, lengths, return_cells, resets):
        """As `_run`, as nodes of ONNX; None for what torch.nn is to judge or to export."""
        arranged = self._arrange(input, hx)
        if arranged is None or isinstance(input, PackedSequence):
            return None
        if return_cells:
            raise RuntimeError(
                f"{self._get_name()}: ONNX's LSTM does not give every cell state; export without "
                "return_cells"
            )
        if resets is not None:
            raise RuntimeError(
                f"{self._get_name()}: ONNX's layers know no resets; export one episode at a time"
            )
        if lengths is not None:
            lengths = self._checked_lengths(input, lengths)
        x, _, _, states = arranged
        output, state = onnx.layers(
            self._get_name(),
            self._cell,
            x,
            states,
            self._weights(),
            2 if self.bidirectional else 1,
            self.hidden_size,
            lengths=lengths,
            dropout=self.dropout if self.training else 0.0,
        )
        if input.dim() == 2:
            state = [part.squeeze(1) for part in state]
        return self._like(input, output), tuple(state) if self._cell == "lstm" else state[0], None

    def _arrange(self, input, hx):
        """(x [T, B, I] or packed rows, batch_sizes, batch, states), or None if torch.nn is to
        judge.

        States are those given, [layers and directions, B, size] in the order of the batch of x.
        """
        order = batch_sizes = None
        batched = True
        if isinstance(input, PackedSequence):
            x, batch_sizes, order, restore = input
            batch = int(batch_sizes[0]) if restore is None else restore.size(0)
            rank = 2
        elif isinstance(input, Tensor):
            x, rank = input, 3
            if input.dim() == 2:
                x = input.unsqueeze(1)
                batched = False
            elif self.batch_first and input.dim() == 3:
                x = input.transpose(0, 1)
        else:
            return None
        if x.dim() != rank or x.size(-1) != self.input_size:
            return None
        if self.proj_size and self._cell != "lstm":
            return None
        if batch_sizes is None:
            batch = x.size(1)
        states = () if hx is None else self._states(hx)
        if states is None:
            return None
        if rank == 2 and states and states[0].dim() == 3 and torch.compiler.is_compiling():
            batch = states[0].size(1)  # of batch_sizes it has no value; the kernels compare
        rows = self.num_layers * (2 if self.bidirectional else 1)
        for state, width in zip(states, (self.proj_size or self.hidden_size, self.hidden_size)):
            if state.shape != ((rows, batch, width) if batched else (rows, width)):
                return None
        if x.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        if not batched:
            states = [state.unsqueeze(1) for state in states]
        elif order is not None:
            states = [state.index_select(1, order) for state in states]
        return x, batch_sizes, batch, states

    def _initial(self, x, batch, states):
        """h_0 and c_0 of each layer and direction, as lists."""
        count = len(self._all_weights)
        no_cells = [None] * count
        if states:
            h0 = states[0].unbind(0)
            return h0, states[1].unbind(0) if len(states) > 1 else no_cells
        zeros = [x.new_zeros(batch, self.hidden_size)] * count
        if self._cell != "lstm":
            return zeros, no_cells
        return [x.new_zeros(batch, self.proj_size)] * count if self.proj_size else zeros, zeros

    def _checked_restored(self, input, batch, resets, initial_state):
        """``initial_state`` as a tuple of [layers and directions, B or 1, size] in the order of the
        batch that runs, or None; raises unless it and ``resets`` fit."""
        name = self._get_name()
        packed = isinstance(input, PackedSequence)
        x = input.data if packed else input
        if resets is not None:
            functional.check_resets(name, resets, x.shape[:-1], x.device)
        if initial_state is None:
            return None
        if resets is None:
            raise ValueError(f"{name}: initial_state is what resets restore; give resets, or hx")
        states = self._states(initial_state)
        if states is None:
            form = "a pair (h, c) of tensors" if self._cell == "lstm" else "a tensor"
            raise TypeError(
                f"{name}: initial_state must be {form}, got {type(initial_state).__name__}"
            )
        rows = len(self._all_weights)
        order = input.sorted_indices if packed else None
        restored = []
        for state, width in zip(states, (self.proj_size or self.hidden_size, self.hidden_size)):
            if not packed and input.dim() == 2 and state.dim() == 2:
                state = state.unsqueeze(1)
            if state.shape != (rows, batch, width) and state.shape != (rows, 1, width):
                raise ValueError(
                    f"{name}: initial_state must have shape [{rows}, {batch} or 1, {width}], "
                    f"got {list(state.shape)}"
                )
            functional.check_like(name, "initial_state", state, x)
            if order is not None and state.size(1) > 1:
                state = state.index_select(1, order)
            restored.append(state)
        return restored

    def _steps_first(self, input, resets):
        """``resets`` [T, B], or [N] of packed input."""
        if isinstance(input, PackedSequence):
            return resets
        if input.dim() == 2:
            return resets.unsqueeze(1)
        return resets.transpose(0, 1) if self.batch_first else resets

    def _weights(self):
        """(w_ih, w_hh, b_ih, b_hh, w_hr) of each layer and direction, None for what there is not.

        Read at every call: parametrizations, functional_call and weight dropping put other tensors
        there.
        """
        parameters = self._parameters
        groups = []
        for names in self._all_weights:
            group = [parameters[n] if n in parameters else getattr(self, n) for n in names]
            w_hr = group.pop() if self.proj_size else None
            groups.append((*group, w_hr) if self.bias else (*group, None, None, w_hr))
        return groups

    def _like(self, input, output):
        """``output`` of the stack in the layout of ``input``."""
        if isinstance(input, PackedSequence):
            return PackedSequence(output, *input[1:])
        if input.dim() == 2:
            return output.squeeze(1)
        return output.transpose(0, 1) if self.batch_first else output

    def _joined(self, states, input):
        """The states of all layers and directions in one tensor, in the order of ``input``."""
        joined = states[0].unsqueeze(0) if len(states) == 1 else torch.stack(states)
        if isinstance(input, PackedSequence):
            restore = input.unsorted_indices
            return joined if restore is None else joined.index_select(1, restore)
        return joined.squeeze(1) if input.dim() == 2 else joined
