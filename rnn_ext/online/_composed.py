"""The influence of every parameter on the state in torch operations: for modules on CUDA.

As `_influence`, and with the same results: exact, a step is one batched product with the H P
numbers of each sequence (LSTM: two), for which torch calls cuBLAS; diagonal (SnAp-1), operations
element by element. On the CPU the kernels of csrc/cpu/rtrl.h are many times as fast.
"""

import torch
from torch import Tensor

from ._influence import Carried
from ._layer import Layer, Status
from ._linearized import Linearized, linearize, nets

__all__ = ["Composed"]


class Composed(Carried):
    """influence: exact [B, H, P], diagonal [B, P]; columns by net, unit and operand value."""

    keeps = ("h", "c", "influence", "influence_c")

    def __init__(self, layer: Layer, batch: int, diagonal: bool) -> None:
        self.layer, self.diagonal = layer, diagonal
        w_hh, bias = layer.weights()[1:3]
        ones, inputs, hidden = int(bias is not None), layer.input_size, layer.hidden_size
        self.nets = nets(layer.cell)
        self.lengths = [
            (0 if net.ih is None else inputs) + ones + (0 if net.hh is None else hidden)
            for net in self.nets
        ]
        self.h = w_hh.new_zeros(batch, hidden)
        self.influence = w_hh.new_zeros(
            batch, *(() if diagonal else (hidden,)), hidden * sum(self.lengths)
        )
        lstm = layer.cell == "lstm"
        self.c = torch.zeros_like(self.h) if lstm else None
        self.influence_c = torch.zeros_like(self.influence) if lstm else None
        self.other = None if diagonal else torch.empty_like(self.influence)

    @torch.no_grad()
    def step(self, x: Tensor, mask: Tensor | None) -> tuple[int, Tensor | None]:
        """A step's `Status`, and h where it is DONE."""
        mask = None if mask is None else mask.to(x.device)
        h, c = self.h, self.c
        if mask is not None:
            h, c = (None if t is None else t.masked_fill(mask[:, None], 0.0) for t in (h, c))
        new = linearize(self.layer.cell, x, h, c, self.layer.weights(), self.diagonal)
        states = [new.h] if new.c is None else [new.h, new.c]
        questions = [torch.isfinite(x).all(), torch.isfinite(torch.stack(states)).all()]
        if mask is not None:
            questions.append(mask.any())
        input_is, state_is, *any_reset = torch.stack(questions).tolist()  # the device waits once
        if not input_is:
            return Status.INPUT_NOT_FINITE, None
        if any_reset == [True]:
            self.reset(mask)
        if not state_is:
            return Status.NOT_FINITE, None
        if self.diagonal:
            self._carry_diagonal(new)
        else:
            self._carry(new)
        self.h, self.c = new.h, new.c
        return Status.DONE, new.h.clone()

    def _carry(self, new: Linearized) -> None:
        m, m_c, other = self.influence, self.influence_c, self.other
        if m_c is None:
            torch.bmm(new.jacobian, m, out=other)
        else:
            m_c.mul_(new.keep.unsqueeze(2)).baddbmm_(new.jacobian_c, m)
            torch.mul(m_c, new.through.unsqueeze(2), out=other).baddbmm_(new.jacobian, m)
            self._add_immediate(m_c, new, new.slopes_c)
        self._add_immediate(other, new, new.slopes)
        self.influence, self.other = other, m

    def _add_immediate(self, m, new, slopes):
        for k, part in enumerate(self._parts(m)):
            if k == 0 and new.spread is not None:
                part.addcmul_(new.spread.unsqueeze(3), new.operands[k][:, None, None])
            else:  # a unit's own row: [B, L, H]
                own = part.diagonal(dim1=1, dim2=2)
                own.addcmul_(new.operands[k].unsqueeze(2), slopes[k].unsqueeze(1))

    def _carry_diagonal(self, new: Linearized) -> None:
        parts = self._parts(self.influence)
        parts_c = [None] * len(parts) if self.influence_c is None else self._parts(self.influence_c)
        by_h = new.jacobian
        if new.c is not None:
            by_h = by_h + new.through * new.jacobian_c
        for k, (m, m_c, operand) in enumerate(zip(parts, parts_c, new.operands)):
            immediate = operand.unsqueeze(1)
            if m_c is None or k == 3:  # in one step the gate o does not touch c
                m.mul_(by_h.unsqueeze(2))
            else:
                m_c.mul_(new.keep.unsqueeze(2))
                m_c.addcmul_(new.jacobian_c.unsqueeze(2), m)
                m.mul_(new.jacobian.unsqueeze(2)).addcmul_(new.through.unsqueeze(2), m_c)
                m_c.addcmul_(new.slopes_c[k].unsqueeze(2), immediate)
            m.addcmul_(new.slopes[k].unsqueeze(2), immediate)

    def _parts(self, t):
        """Of each net, [..., units, operand values]."""
        hidden = self.layer.hidden_size
        parts = t.split([hidden * length for length in self.lengths], -1)
        return [part.unflatten(-1, (hidden, -1)) for part in parts]

    @torch.no_grad()
    def accumulate(self, d_h: Tensor) -> int:
        """Adds to the gradients of the parameters; returns a `Status`."""
        if self.diagonal:
            parts = self._parts(self.influence)
            found = [torch.einsum("bh,bhl->hl", d_h, part) for part in parts]
        else:
            found = self._parts(d_h.flatten() @ self.influence.flatten(0, 1))
        if not bool(torch.isfinite(torch.cat([part.flatten() for part in found])).all()):
            return Status.NOT_FINITE
        self.layer.add_gradients(self._gradients(found))
        return Status.DONE

    def _gradients(self, found):
        """Of the weights there are; h' is the last of an operand that has x, else the first."""
        layer = self.layer
        hidden = layer.hidden_size
        gradients = [None if w is None else torch.empty_like(w) for w in layer.weights()]
        w_ih, w_hh, b_ih, b_hh = gradients
        for net, part in zip(self.nets, found):
            if net.ih is not None:
                rows = slice(net.ih * hidden, (net.ih + 1) * hidden)
                w_ih[rows] = part[:, : layer.input_size]
                if b_ih is not None:
                    b_ih[rows] = part[:, layer.input_size]
            if net.hh is not None:
                rows = slice(net.hh * hidden, (net.hh + 1) * hidden)
                w_hh[rows] = part[:, :hidden] if net.ih is None else part[:, -hidden:]
                if b_hh is not None:
                    b_hh[rows] = part[:, hidden if net.ih is None else layer.input_size]
        return gradients

    def bytes(self) -> int:
        parts = (self.h, self.c, self.influence, self.influence_c, self.other)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)
