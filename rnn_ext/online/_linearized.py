"""One step of a cell and its derivatives, in torch operations: what RTRL carries forward.

Parameters are ordered as in csrc/cpu/rtrl_problem.h: by net, a kind of net input whose operand is
the same for all units.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["Linearized", "Net", "linearize", "nets"]


@dataclass(frozen=True)
class Net:
    """Rows of W, or None, and of U, or None, in units of H rows."""

    ih: int | None
    hh: int | None


@dataclass(frozen=True)
class Linearized:
    """h, c: [B, H], the new state (c: LSTM). operands: [B, L] of each net. slopes: [B, H] of each
    net, dh/da by way of c too; slopes_c: dc/da. jacobian: [B, H, H], dh/dh' (LSTM: past c);
    jacobian_c: dc/dh'. keep: dc/dc'; through: dh/dc. spread: reset-before GRU, [B, H, H], dh_i/da_j
    of gate r, in place of its slopes."""

    h: Tensor
    operands: Sequence[Tensor]
    slopes: Sequence[Tensor]
    jacobian: Tensor
    c: Tensor | None = None
    slopes_c: Sequence[Tensor] = ()
    jacobian_c: Tensor | None = None
    keep: Tensor | None = None
    through: Tensor | None = None
    spread: Tensor | None = None


Weights = Sequence[Tensor | None]


def nets(cell: str) -> tuple[Net, ...]:
    if cell == "gru":
        return Net(0, 0), Net(1, 1), Net(2, None), Net(None, 2)
    count = {"lstm": 4, "gru_reset_before": 3}.get(cell, 1)
    return tuple(Net(gate, gate) for gate in range(count))


def linearize(
    cell: str, x: Tensor, h: Tensor, c: Tensor | None, weights: Weights, diagonal: bool
) -> Linearized:
    """Of x [B, I] and the state h, c [B, H] before the step; weights w_ih, w_hh, b_ih, b_hh.

    ``diagonal``: only the diagonals of the Jacobians, [B, H].
    """
    return _CELLS[cell](_Products(x, h, weights, diagonal), h, c)


class _Products:
    """W x + b, U h' + b', operands and sums of rows of U."""

    def __init__(self, x: Tensor, h: Tensor, weights: Weights, diagonal: bool) -> None:
        w_ih, self.w_hh, b_ih, self.b_hh = weights
        self.input = linear(x, w_ih, b_ih)
        self.diagonal, self.hidden = diagonal, h.size(1)
        one = [] if b_ih is None else [torch.ones_like(x[:, :1])]
        self.of_input, self.of_hidden = torch.cat((x, *one), 1), torch.cat((h, *one), 1)
        self.before = self.of_input

    def operand(self, last: Tensor) -> Tensor:
        """[x, 1, last]"""
        return torch.cat((self.before, last), 1)

    def recurrent(self, h: Tensor, first: int = 0, count: int | None = None) -> Tensor:
        end = None if count is None else (first + count) * self.hidden
        rows = slice(first * self.hidden, end)
        return linear(h, self.w_hh[rows], None if self.b_hh is None else self.b_hh[rows])

    def block(self, gate: int) -> Tensor:
        return self.w_hh[gate * self.hidden : (gate + 1) * self.hidden]

    def through(self, *slopes: tuple[int, Tensor]) -> Tensor:
        """sum of diag(slope) U_gate"""
        found = None
        for gate, slope in slopes:
            block = self.block(gate)
            part = slope * block.diagonal() if self.diagonal else slope.unsqueeze(2) * block
            found = part if found is None else found.add_(part)
        return found

    def add_diagonal(self, jacobian: Tensor, values: Tensor) -> Tensor:
        part = jacobian if self.diagonal else jacobian.diagonal(dim1=1, dim2=2)
        part.add_(values)
        return jacobian


def _elman(activation, derivative):
    def cell(of, h, c):
        new = activation(of.input + of.recurrent(h))
        slope = derivative(new)
        return Linearized(new, [of.operand(h)], [slope], of.through((0, slope)))

    return cell


def _lstm(of, h, c):
    i, f, g, o = (of.input + of.recurrent(h)).chunk(4, 1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c_new = f * c + i * g
    tanh_c = torch.tanh(c_new)
    through = o * (1 - tanh_c**2)
    slopes_c = [g * i * (1 - i), c * f * (1 - f), i * (1 - g**2), torch.zeros_like(o)]
    of_o = tanh_c * o * (1 - o)
    return Linearized(
        o * tanh_c,
        [of.operand(h)] * 4,
        [*(through * slope for slope in slopes_c[:3]), of_o],
        of.through((3, of_o)),
        c_new,
        slopes_c,
        of.through(*enumerate(slopes_c[:3])),
        f,
        through,
    )


def _gru(of, h, c):
    hidden_r, hidden_z, q = of.recurrent(h).chunk(3, 1)
    input_r, input_z, input_n = of.input.chunk(3, 1)
    r, z = torch.sigmoid(input_r + hidden_r), torch.sigmoid(input_z + hidden_z)
    n = torch.tanh(input_n + r * q)
    of_n, of_z = (1 - z) * (1 - n**2), (h - n) * z * (1 - z)
    of_r, of_q = of_n * q * r * (1 - r), of_n * r
    jacobian = of.add_diagonal(of.through((0, of_r), (1, of_z), (2, of_q)), z)
    both = of.operand(h)
    operands = [both, both, of.of_input, of.of_hidden]
    return Linearized((1 - z) * n + z * h, operands, [of_r, of_z, of_n, of_q], jacobian)


def _gru_reset_before(of, h, c):
    input_r, input_z, input_n = of.input.chunk(3, 1)
    hidden_r, hidden_z = of.recurrent(h, 0, 2).chunk(2, 1)
    r, z = torch.sigmoid(input_r + hidden_r), torch.sigmoid(input_z + hidden_z)
    n = torch.tanh(input_n + of.recurrent(r * h, 2))
    of_n, of_z = (1 - z) * (1 - n**2), (h - n) * z * (1 - z)
    of_r = h * r * (1 - r)  # of r h', which all units read
    from_reset = of_n.unsqueeze(2) * of.block(2)
    reset = of.add_diagonal(of.through((0, of_r)), r)
    jacobian = of.add_diagonal(of.through((1, of_z)).baddbmm_(from_reset, reset), z)
    return Linearized(
        (1 - z) * n + z * h,
        [of.operand(h), of.operand(h), of.operand(r * h)],
        [of_r, of_z, of_n],
        jacobian,
        spread=from_reset * of_r.unsqueeze(1),
    )


_CELLS: dict[str, Callable[..., Linearized]] = {
    "rnn_tanh": _elman(torch.tanh, lambda h: 1 - h**2),
    "rnn_relu": _elman(torch.relu, lambda h: (h > 0).to(h.dtype)),
    "rnn_sigmoid": _elman(torch.sigmoid, lambda h: h * (1 - h)),
    "lstm": _lstm,
    "gru": _gru,
    "gru_reset_before": _gru_reset_before,
}
