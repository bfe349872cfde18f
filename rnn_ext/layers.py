"""What `RNN`, `LSTM` and `GRU` share: from what users pass in to the stack of layers, and back."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import _C, composite, functional, inspection, library, onnx
from .backend import is_plain_call, uncovered
from .extended import ExtendedLayers

__all__ = ["RecurrentLayers"]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class RecurrentLayers(ExtendedLayers):
    """Not for use on its own.

    Keyword arguments that RNN, LSTM and GRU have in common beside torch.nn's; all but
    ``learn_initial_state`` are attributes that may be changed later:

    Args:
        hidden_size: may be a list, a width for each layer (``num_layers`` follows; no
            ``proj_size``). hx, h_n and c_n are then tuples with a tensor for each layer,
            [directions, B, width].
        bias: may be "single": one bias vector for each layer and direction, ``bias_ih_l0``...,
            and no ``bias_hh_l0``, which counts as zero (so b_hn of the GRU does too).
        residual: from the second layer on, a layer whose input is as wide as its output adds it to
            that, as it was before dropout (Wu et al. 2016, arXiv:1609.08144). ``output`` has the
            sum, h_n the layer's own state.
        weight_dropout: probability with which an entry of weight_hh is zero, in training, for all
            steps of a call; the others are scaled by 1 / (1 - p) (DropConnect; Merity et al. 2018,
            arXiv:1708.02182).
        variational_dropout: probability with which an input of a layer is zero, in training, at all
            steps of a sequence; the others are scaled (Gal and Ghahramani 2016, arXiv:1512.05287).
            Every layer's input has a mask, also the first one's; recurrent connections have none:
            that is what ``weight_dropout`` is for.
        zoneout: probability with which a unit keeps its state of the step before, in training; in
            eval mode a unit keeps that share of it (Krueger et al. 2017, arXiv:1606.01305). Of the
            LSTM h and c, each with a mask of its own. No kernel has it yet: layers are composed of
            torch operations, with a `FallbackWarning`.
        learn_initial_state: the state where ``hx`` is None is a parameter, ``initial_h_l0`` (and
            ``initial_c_l0`` of the LSTM) of each layer and direction, zero at initialization.

    The masks of a call come from one number of torch's generator (`torch.manual_seed`); what a
    sequence gets depends on its place in the batch, not on lengths, packing or dtype.
    """

    def forward(
        self, input: Any, hx: Any = None, *, lengths: Any = None, return_gates: bool = False
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
            return_gates: add a last result, what the gates of the last layer were at every step,
                with gradients: a dict of tensors laid out like ``output``, with directions *
                hidden_size features. Of the LSTM "i", "f", "g", "o" and of the GRU "r", "z", "n",
                after their activations; of the RNN "a", the net input before f.

        Returns:
            ``(output, h_n)``: ``output`` laid out like ``input`` with directions * hidden_size
            features, h_n laid out like ``hx``.

        Raises:
            ValueError, RuntimeError: as torch.nn does, for rank, sizes, dtypes and devices;
                ValueError for ``lengths`` that do not fit.
        """
        details = () if return_gates is False else self._details(gates=return_gates)
        return self._shown(self._run(input, hx, lengths, details), details)

    def _shown(self, results, details=()):
        """What `forward` returns of `_run`'s results, which torch.fx may have left in one node."""
        if not isinstance(results, tuple):
            return results
        if not details:
            return results[:2]
        output, state, joined = results
        names = inspection.GATES[self._cell] if "gates" in details else ()
        count = len(names) + ("cells" in details)

        def part(k):
            if isinstance(joined, PackedSequence):
                return PackedSequence(joined.data.chunk(count, -1)[k], *joined[1:])
            return joined.chunk(count, -1)[k]

        shown = [part(0)] if "cells" in details else []
        if names:
            shown.append({name: part(len(shown) + k) for k, name in enumerate(names)})
        return output, state, *shown

    def _run(self, input, hx, lengths=None, details=()):
        """(output, state, what is asked for in ``details``: "cells", "gates") of `forward`.

        The last result is one tensor, laid out like output: the cells, then each gate.
        """
        hooks = self._hooks(details) if self._extended or details else None
        if lengths is None and not details and type(input) is Tensor and is_plain_call():
            results = self._run_plain(input, hx, hooks)
            if results is not None:
                return results
        options = {f"return_{name}": True for name in details}
        node = self._as_leaf(input, hx=hx, lengths=lengths, **options)
        if node is not None:
            return node
        if onnx.is_exporting():
            results = self._run_in_onnx(input, hx, lengths, details)
            if results is not None:
                return results
        if lengths is not None:
            return self._run_with_lengths(input, hx, lengths, details)
        extra = self._extra or (f"return_{details[0]}=True" if details else None)
        arranged = self._arrange(input, hx)
        if arranged is None:
            return *self._run_twin(input, hx, extra=extra), None
        x, batch_sizes, batch, states = arranged
        weights = self._weights()
        reason, run = self._unserved or uncovered(x, states, weights), None
        if reason is not None:
            if not self._must_compose(reason, extra):
                return *self._run_twin(input, hx, reason), None
            if batch_sizes is not None and torch.compiler.is_compiling():
                raise RuntimeError(
                    f"{self._get_name()} with {extra}: {reason}; torch.compile and torch.export "
                    "take no lengths and no packed input there"
                )
            self._update_flat_weights()
            self.check_input(x, batch_sizes)
            run = composite.layer
        if hooks is not None:
            weights = hooks.weights(weights)
            hooks.sequences = input.sorted_indices if isinstance(input, PackedSequence) else None

        h0, c0 = self._initial(x, batch, states)
        output, h_n, c_n, cells = functional.stack(
            self._cell,
            x,
            h0,
            c0,
            weights,
            2 if self.bidirectional else 1,
            dropout=self.dropout if self.training else 0.0,
            batch_sizes=batch_sizes,
            return_cells="cells" in details,
            run=run,
            hooks=hooks if hooks is not None and hooks.around_layers else None,
        )
        if reason is not None:
            self._warn_composed(reason, extra)
        state = self._joined(h_n, input)
        if self._cell == "lstm":
            state = state, self._joined(c_n, input)
        if "gates" in details:
            gates = hooks.recorded(self._cell)
            cells = gates if cells is None else torch.cat((cells, gates), -1)
        return self._like(input, output), state, self._like(input, cells) if details else None

    def _run_plain(self, input, hx, hooks=None):
        """As `_run`, in one call of C++; None if the CPU kernels do not serve all of it."""
        states = () if hx is None else self._states(hx)
        if states is None:
            return None
        if hooks is None:
            parameters = self._parameters
            try:
                weights = [parameters[name] for names in self._all_weights for name in names]
            except KeyError:  # a parametrization
                return None
        else:
            if hooks.around_layers or input.dim() != 3 or isinstance(self.hidden_size, tuple):
                return None
            weights = hooks.weights(self._weights())
            weights = [w for group in weights for w in group if w is not None]
            if hx is None and self.learn_initial_state:
                states = self._learned(input.size(0 if self.batch_first else 1))
        directions = 2 if self.bidirectional else 1
        results = _C.run_stack(
            self._cell, input, states, weights, directions, bool(self.bias), self.proj_size > 0,
            self.batch_first, self.dropout if self.training else 0.0,
        )  # fmt: skip
        if results is None:
            return None
        output, h_n, c_n = results
        return output, h_n if c_n is None else (h_n, c_n), None

    def _run_in_onnx(self, input, hx, lengths, details):
        """As `_run`, as nodes of ONNX; None for what torch.nn is to judge or to export."""
        arranged = self._arrange(input, hx)
        if arranged is None or isinstance(input, PackedSequence):
            return None
        name = self._get_name()
        if details:
            what = "give every cell state" if details[0] == "cells" else "show its gates"
            raise RuntimeError(
                f"{name}: ONNX's {name} does not {what}; export without return_{details[0]}"
            )
        if self.zoneout or (self.training and (self.weight_dropout or self.variational_dropout)):
            raise RuntimeError(
                f"{name}: ONNX has no zoneout, and weight_dropout and variational_dropout only as "
                "what they are in eval mode: nothing; export without zoneout, in eval mode"
            )
        if lengths is not None:
            lengths = self._checked_lengths(input, lengths)
        x, _, _, states = arranged
        output, state = onnx.layers(
            name,
            self._cell,
            x,
            self._states_of_layers(states),
            self._weights(),
            2 if self.bidirectional else 1,
            self._widths(),
            lengths=lengths,
            dropout=self.dropout if self.training else 0.0,
            hooks=self._hooks(()) if self.residual else None,
        )
        if input.dim() == 2:
            state = [[part.squeeze(1) for part in parts] for parts in state]
        widths = isinstance(self.hidden_size, tuple)
        state = [tuple(parts) if widths else torch.cat(parts) for parts in state]
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
        count = len(self._all_weights)
        no_cells = [None] * count
        if states:
            half = len(states) // 2 if self._cell == "lstm" else len(states)
            h0, c0 = (
                [row for state in part for row in state.unbind(0)]
                for part in (states[:half], states[half:])
            )
            return h0, c0 or no_cells
        zeros = {w: x.new_zeros(batch, w) for w in {*self._widths(), self.proj_size} if w}
        c0 = [zeros[width] for width in self._widths_of_groups()]
        h0 = [zeros[self.proj_size]] * count if self.proj_size else c0
        return h0, c0 if self._cell == "lstm" else no_cells

    def _weights(self):
        """(w_ih, w_hh, b_ih, b_hh, w_hr) of each layer and direction, None for what there is not.

        Read at every call: parametrizations, functional_call and weight dropping put other tensors
        there. What a "single" bias leaves out is zero.
        """
        parameters = self._parameters
        groups = []
        for names in self._all_weights:
            group = [parameters[n] if n in parameters else getattr(self, n) for n in names]
            w_hr = group.pop() if self.proj_size else None
            if self.bias == "single":
                group.append(torch.zeros_like(group[2], requires_grad=False))
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

    def _run_with_lengths(self, input, hx, lengths, details):
        name = self._get_name()
        if isinstance(input, PackedSequence):
            raise ValueError(
                f"{name}: lengths cannot be given for a PackedSequence, which has its own"
            )
        if self._arrange(input, hx) is None:
            return self._run(input, hx)
        if isinstance(lengths, Tensor) and torch._C._functorch.is_batchedtensor(lengths):
            raise ValueError(
                f"{name}: lengths must be the same for every entry of torch.func.vmap; run over "
                "all steps and leave out of the loss what lies past an entry's length"
            )
        lengths = self._checked_lengths(input, torch.as_tensor(lengths, device="cpu"))
        if torch.compiler.is_compiling():
            return self._run_gathered(input, hx, lengths, details)
        self._update_flat_weights()
        self.check_input(input, None)
        batch, steps = input.shape[:2] if self.batch_first else input.shape[1::-1]
        if batch == 0 or lengths.min() == steps == lengths.max():
            return self._run(input, hx, None, details)
        if lengths.min() < 1 or lengths.max() > steps:
            raise ValueError(
                f"{name}: lengths must be between 1 and the {steps} steps of input, "
                f"got {lengths.min()}..{lengths.max()}"
            )
        if torch._C._are_functorch_transforms_active():
            return self._run_gathered(input, hx, lengths, details)
        packed = pack_padded_sequence(input, lengths, self.batch_first, enforce_sorted=False)
        output, state, cells = self._run(packed, hx, None, details)
        output, cells = (
            None if part is None else pad_packed_sequence(part, self.batch_first, 0.0, steps)[0]
            for part in (output, cells)
        )
        return output, state, cells

    def _run_gathered(self, input, hx, lengths, details):
        """As `_run_with_lengths`, of operations that torch.compile traces and vmap takes."""
        x = input.transpose(0, 1) if self.batch_first else input
        steps, batch = x.shape[:2]
        rows, batch_sizes, *orders = library.packing(lengths, steps)
        rows, order, restore = (t.to(x.device) for t in (rows, *orders))
        packed = PackedSequence(x.flatten(0, 1).index_select(0, rows), batch_sizes, order, restore)
        output, state, cells = self._run(packed, hx, None, details)

        def padded(part):
            data = part.data
            whole = data.new_zeros(steps * batch, data.size(-1)).index_copy(0, rows, data)
            whole = whole.unflatten(0, (steps, batch))
            return whole.transpose(0, 1) if self.batch_first else whole

        return padded(output), state, padded(cells) if details else None

    def _checked_lengths(self, input, lengths):
        """``lengths`` as an int64 tensor [B]; the values are not looked at."""
        name, lengths = self._get_name(), torch.as_tensor(lengths)
        if input.dim() == 2:
            raise ValueError(f"{name}: lengths needs batched 3-D input, got 2-D input")
        batch = input.size(0 if self.batch_first else 1)
        if lengths.dtype not in _INTEGERS and lengths.numel():
            raise ValueError(f"{name}: lengths must be integers, got {lengths.dtype}")
        if lengths.shape != (batch,):
            raise ValueError(
                f"{name}: lengths must have shape [{batch}], got {list(lengths.shape)}"
            )
        return lengths.long()
