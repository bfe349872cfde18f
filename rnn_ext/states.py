"""From what users pass in to the tensors that a stack of layers takes, and back."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import functional

__all__ = ["WithStates"]


class WithStates:
    """Mixed into layers, float or quantized."""

    learn_initial_state: bool = False

    def _widths(self):
        """Hidden units of each layer."""
        size = self.hidden_size
        return size if isinstance(size, tuple) else (size,) * self.num_layers

    def _widths_of_groups(self):
        """Hidden units of each layer and direction."""
        directions = 2 if self.bidirectional else 1
        return [width for width in self._widths() for _ in range(directions)]

    def _state_sizes(self):
        """Rows and width of each tensor that the state consists of."""
        directions, size = 2 if self.bidirectional else 1, self.hidden_size
        if isinstance(size, tuple):
            return [(directions, width) for width in size] * (2 if self._cell == "lstm" else 1)
        rows = self.num_layers * directions
        return [(rows, self.proj_size or size), (rows, size)][: 2 if self._cell == "lstm" else 1]

    def _arrange(self, input, hx):
        """(x [T, B, I] or packed rows, batch_sizes, batch, states), or None if torch.nn is to
        judge.

        States are those given, or learned, in the form of `_state_sizes` and in the order of the
        batch of x.
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
        for state, (rows, width) in zip(states, self._state_sizes()):
            if state.shape != ((rows, batch, width) if batched else (rows, width)):
                return None
        if x.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        if not batched:
            states = [state.unsqueeze(1) for state in states]
        elif order is not None:
            states = [state.index_select(1, order) for state in states]
        if hx is None and self.learn_initial_state:
            states = self._learned(batch)
        return x, batch_sizes, batch, states

    def _initial(self, x, batch, states):
        """h_0 and c_0 of each layer and direction, as lists."""
        if states:
            return self._of_groups(states)
        count = len(self._all_weights)
        zeros = {w: x.new_zeros(batch, w) for w in {*self._widths(), self.proj_size} if w}
        c0 = [zeros[width] for width in self._widths_of_groups()]
        h0 = [zeros[self.proj_size]] * count if self.proj_size else c0
        return h0, c0 if self._cell == "lstm" else [None] * count

    def _of_groups(self, states):
        """h and c of each layer and direction, as lists, of ``states`` in the form of
        `_state_sizes`."""
        half = len(states) // 2 if self._cell == "lstm" else len(states)
        h, c = (
            [row for state in part for row in state.unbind(0)]
            for part in (states[:half], states[half:])
        )
        return h, c or [None] * len(h)

    def _states_of_layers(self, states):
        """For each kind of state, h and c, a tensor for each layer: [directions, B, width]."""
        if isinstance(self.hidden_size, tuple):
            count = self.num_layers
            return [list(states[k : k + count]) for k in range(0, len(states), count)]
        each = 2 if self.bidirectional else 1
        return [[s[k : k + each] for k in range(0, len(s), each)] for s in states]

    def _checked_restored(self, input, batch, resets, initial_state):
        """``initial_state`` in the form of `_state_sizes`, with a batch of B or 1 in the order of
        the one that runs, or None; raises unless it and ``resets`` fit."""
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
            if isinstance(self.hidden_size, tuple):
                form = form.replace("tensors", "tuples").replace("a tensor", "a tuple")
                form += " with a tensor for each layer"
            raise TypeError(
                f"{name}: initial_state must be {form}, got {type(initial_state).__name__}"
            )
        order = input.sorted_indices if packed else None
        restored = []
        for state, (rows, width) in zip(states, self._state_sizes()):
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

    def _like(self, input, output):
        """``output`` of the stack in the layout of ``input``."""
        if isinstance(input, PackedSequence):
            return PackedSequence(output, *input[1:])
        if input.dim() == 2:
            return output.squeeze(1)
        return output.transpose(0, 1) if self.batch_first else output

    def _joined(self, states, input):
        """The states of all layers and directions in one tensor, in the order of ``input``; a tuple
        with one for each layer where they have widths of their own."""
        if not isinstance(self.hidden_size, tuple):
            return self._in_order(states, input)
        each = 2 if self.bidirectional else 1
        parts = [states[k : k + each] for k in range(0, len(states), each)]
        return tuple(self._in_order(part, input) for part in parts)

    def _in_order(self, states, input):
        joined = states[0].unsqueeze(0) if len(states) == 1 else torch.stack(states)
        if isinstance(input, PackedSequence):
            restore = input.unsorted_indices
            return joined if restore is None else joined.index_select(1, restore)
        return joined.squeeze(1) if input.dim() == 2 else joined
