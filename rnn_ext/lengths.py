"""``lengths=`` of a padded batch: packed, run and padded again."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import functional, library

__all__ = ["WithLengths"]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class WithLengths:
    """Mixed into layers, whose ``_run`` it calls."""

    def _run_with_lengths(self, input, hx, lengths, details, resets=None, initial_state=None):
        name = self._get_name()
        if isinstance(input, PackedSequence):
            raise ValueError(
                f"{name}: lengths cannot be given for a PackedSequence, which has its own"
            )
        if self._arrange(input, hx) is None:
            return self._run(input, hx)
        if resets is not None:
            functional.check_resets(name, resets, input.shape[:-1], input.device)
        if isinstance(lengths, Tensor) and torch._C._functorch.is_batchedtensor(lengths):
            raise ValueError(
                f"{name}: lengths must be the same for every entry of torch.func.vmap; run over "
                "all steps and leave out of the loss what lies past an entry's length"
            )
        lengths = self._checked_lengths(input, torch.as_tensor(lengths, device="cpu"))
        if torch.compiler.is_compiling():
            return self._run_gathered(input, hx, lengths, details, resets, initial_state)
        self._update_flat_weights()
        self.check_input(input, None)
        batch, steps = input.shape[:2] if self.batch_first else input.shape[1::-1]
        if batch == 0 or lengths.min() == steps == lengths.max():
            return self._run(input, hx, None, details, resets, initial_state)
        if lengths.min() < 1 or lengths.max() > steps:
            raise ValueError(
                f"{name}: lengths must be between 1 and the {steps} steps of input, "
                f"got {lengths.min()}..{lengths.max()}"
            )
        if torch._C._are_functorch_transforms_active():
            return self._run_gathered(input, hx, lengths, details, resets, initial_state)

        def packed(padded):
            return pack_padded_sequence(padded, lengths, self.batch_first, enforce_sorted=False)

        if resets is not None:
            resets = packed(resets).data
        output, state, cells = self._run(packed(input), hx, None, details, resets, initial_state)
        output, cells = (
            None if part is None else pad_packed_sequence(part, self.batch_first, 0.0, steps)[0]
            for part in (output, cells)
        )
        return output, state, cells

    def _run_gathered(self, input, hx, lengths, details, resets, initial_state):
        """As `_run_with_lengths`, of operations that torch.compile traces and vmap takes."""
        x = input.transpose(0, 1) if self.batch_first else input
        steps, batch = x.shape[:2]
        rows, batch_sizes, *orders = library.packing(lengths, steps)
        rows, order, restore = (t.to(x.device) for t in (rows, *orders))
        packed = PackedSequence(x.flatten(0, 1).index_select(0, rows), batch_sizes, order, restore)
        if resets is not None:
            resets = self._steps_first(input, resets).flatten().index_select(0, rows)
        output, state, cells = self._run(packed, hx, None, details, resets, initial_state)

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
