"""What `RNN`, `LSTM` and `GRU` share: from what users pass in to the stack of layers, and back."""

from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_exporting
from torch.nn.utils.rnn import PackedSequence

from . import _C, composite, inspection, normalized, onnx
from .backend import is_plain_call, uncovered
from .extended import ExtendedLayers
from .lengths import WithLengths
from .stack import stack, with_restored

__all__ = ["RecurrentLayers"]


class RecurrentLayers(WithLengths, ExtendedLayers):
    """Not for use on its own.

    Keyword arguments that RNN, LSTM and GRU have in common beside torch.nn's. ``residual``, the
    dropouts and ``zoneout`` are attributes that may be changed later. The last three control
    training; outputs and states stay the same, on the CPU to the last bit. They have effect where
    gradients are recorded, in every layer and direction. torch.compile leaves a layer that trains
    with them out of its graph, and refuses it with fullgraph=True; exported programs have none.

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
            LSTM h and c, each with a mask of its own. On CUDA the kernels are step-wise.
        layer_norm: normalises the gates' net inputs, W_ih x_t and W_hh h_{t-1} apart, each with a
            gain, and of the LSTM the cell that the output sees, with gain and bias (Ba et al. 2016,
            arXiv:1607.06450): parameters ``weight_layer_norm_ih_l0``, ``..._hh_l0``,
            ``..._cell_l0`` and ``bias_layer_norm_cell_l0``. Of the GRU, r and z are normalised
            together and n alone. For life; no ``proj_size``. On CUDA the kernels are step-wise.
        learn_initial_state: the state where ``hx`` is None is a parameter, ``initial_h_l0`` (and
            ``initial_c_l0`` of the LSTM) of each layer and direction, zero at initialization. It
            is where sequences begin; where ``resets`` begin an episode, ``initial_state`` is.
        checkpoint_every: None or k >= 1: keep the states before every k-th step alone and run each
            k steps forward again in the backward pass. Memory grows with T / k + k instead of T,
            beside input and output; the time by that of a forward pass. On the CPU gradients are
            those of the plain layer to the last bit if k * B is a multiple of 256 (of 512 in
            bfloat16); k is rounded up to that where it then is at most 2 k. Otherwise, for packed
            input and on CUDA, sums over time are taken in another order, which changes the last
            digits of the parameters' gradients (of packed input in reverse, of all).
        save: "all", or "states": keep h and c of every step, not the gates, and compute those again
            in the backward pass, of all steps at once: the last digits of gradients may change.
            Excludes ``checkpoint_every``.
        grad_clip: None; a number v: each value of dL/dh_t, of the output at t and of later steps
            together, is held in [-v, v] before it goes on to the cell and to earlier steps; or
            ("norm", v): dL/dh_t of each sequence is scaled down to the norm v where it is larger
            (Pascanu et al. 2013, arXiv:1211.5063, at every step). dL/dh_0 is not clipped.

    The masks of a call come from one number of torch's generator (`torch.manual_seed`); what a
    sequence gets depends on its place in the batch, not on lengths, packing or dtype.
    """

    def forward(
        self,
        input: Any,
        hx: Any = None,
        # torch.onnx's exporter that traces passes every default by position and takes None as one,
        # but no bool. Types (signatures.py) have these as keywords.
        lengths: Any = None,
        resets: Any = None,
        initial_state: Any = None,
        return_gates: bool | None = None,
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
            return_gates: add a last result, what the gates of the last layer were at every step,
                with gradients: a dict of tensors laid out like ``output``, with directions *
                hidden_size features. Of the LSTM "i", "f", "g", "o" and of the GRU "r", "z", "n",
                after their activations; of the RNN "a", the net input before f.

        Returns:
            ``(output, h_n)``: ``output`` laid out like ``input`` with directions * hidden_size
            features, h_n laid out like ``hx``.

        Raises:
            ValueError, RuntimeError: as torch.nn does, for rank, sizes, dtypes and devices;
                ValueError for ``lengths``, ``resets`` or ``initial_state`` that do not fit,
                TypeError for ``resets`` that are no tensor.
        """
        details = () if return_gates is None else self._details(gates=return_gates)
        results = self._run(input, hx, lengths, details, resets, initial_state)
        return self._shown(results, details)

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

    def _run(self, input, hx, lengths=None, details=(), resets=None, initial_state=None):
        """(output, state, what is asked for in ``details``: "cells", "gates") of `forward`.

        The last result is one tensor, laid out like output: the cells, then each gate.
        """
        control = self._control if torch.is_grad_enabled() and not is_exporting() else None
        plain = lengths is None and not details and control is None
        if plain and type(input) is Tensor and is_plain_call():
            results = self._run_plain(input, hx, resets, initial_state)
            if results is not None:
                return results
        hooks = self._hooks(details) if self._extended or details else None
        options = {f"return_{name}": True for name in details}
        given = {"lengths": lengths, "resets": resets, "initial_state": initial_state}
        node = self._as_leaf(input, hx=hx, **given, **options)
        if node is not None:
            return node
        if onnx.is_exporting():
            results = self._run_in_onnx(input, hx, lengths, details, resets)
            if results is not None:
                return results
        if lengths is not None:
            return self._run_with_lengths(input, hx, lengths, details, resets, initial_state)
        extra = self._extra or (f"return_{details[0]}=True" if details else None)
        if resets is not None:
            extra = extra or "resets"
        arranged = self._arrange(input, hx)
        if arranged is None:
            return *self._run_twin(input, hx, extra=extra), None
        x, batch_sizes, batch, states = arranged
        restored = self._checked_restored(input, batch, resets, initial_state)
        weights = self._weights()
        reason = uncovered(x, (*states, *(restored or ())), weights)
        run = None
        if self._whole_rows:
            reason, run = reason or normalized.uncovered(x), normalized.layer
        if control is not None:
            run = control.layer
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
            run = composite.layer if control is None else control.composed
        if hooks is not None:
            weights = hooks.weights(weights)
            hooks.batch = batch
            hooks.sequences = input.sorted_indices if isinstance(input, PackedSequence) else None

        h0, c0 = self._initial(x, batch, states)
        if resets is not None:
            resets = self._steps_first(input, resets)
            each = zip(*self._of_groups(restored)) if restored else [None] * len(h0)
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
            return_cells="cells" in details,
            run=run,
            hooks=hooks if hooks is not None and hooks.around_layers else None,
        )
        if reason is not None:
            kept = control is not None and control.keeps_less
            more = f", which keep everything in spite of {control}" if kept else ""
            self._warn_composed(reason, extra, more)
        state = self._joined(h_n, input)
        if self._cell == "lstm":
            state = state, self._joined(c_n, input)
        if "gates" in details:
            gates = hooks.recorded(self._cell)
            cells = gates if cells is None else torch.cat((cells, gates), -1)
        return self._like(input, output), state, self._like(input, cells) if details else None

    def _run_plain(self, input, hx, resets, initial_state):
        """As `_run`, in one call of C++; None if it does not serve all of it."""
        if self._whole_rows:
            return None
        states = () if hx is None else self._states(hx)
        restored = () if initial_state is None else self._states(initial_state)
        if states is None or restored is None or not isinstance(resets, (Tensor, NoneType)):
            return None
        options = None
        if not self._extended:
            parameters = self._parameters
            try:
                weights = [parameters[name] for names in self._all_weights for name in names]
            except KeyError:  # a parametrization
                return None
        else:
            if input.dim() != 3 or isinstance(self.hidden_size, tuple):
                return None
            options = self._options()
            weights = [w for group in self._weights() for w in group if w is not None]
            if hx is None and self.learn_initial_state:
                states = self._learned(input.size(0 if self.batch_first else 1))
        directions = 2 if self.bidirectional else 1
        results = _C.run_stack(
            self._cell, input, states, weights, directions, bool(self.bias), self.proj_size > 0,
            self.batch_first, self.dropout if self.training else 0.0, resets, restored, options,
        )  # fmt: skip
        if results is None:
            return None
        output, h_n, c_n = results
        return output, h_n if c_n is None else (h_n, c_n), None

    def _run_in_onnx(self, input, hx, lengths, details, resets):
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
        if resets is not None:
            raise RuntimeError(
                f"{name}: ONNX's layers know no resets; export one episode at a time"
            )
        if self.layer_norm:
            raise RuntimeError(
                f"{name}: ONNX's layers have no layer_norm=True; export a layer without it"
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

    def _weights(self):
        """(w_ih, w_hh, b_ih, b_hh, w_hr) of each layer and direction, None for what there is not;
        with ``layer_norm`` or ``peephole`` five more, as of `normalized.layer`.

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
        return self._with_extras(groups) if self._whole_rows else groups
