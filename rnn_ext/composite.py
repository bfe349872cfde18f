"""Every cell out of differentiable torch operations: any device, any dtype, gradients of any order.

The time loop runs in Python, so this is the slow path. It is the backend ``"reference"``, the
recompute behind second-order gradients, and what serves where no kernel does. Results are those of
``ops.layer``.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import normalization
from .zoneout import Zoneout

__all__ = ["STEPS", "layer"]

_ACTIVATIONS = {"rnn_tanh": torch.tanh, "rnn_relu": torch.relu, "rnn_sigmoid": torch.sigmoid}


def _elman_step(activation):
    # h' = f(W x + b_x + U h + b_h)
    def step(wx, h, c, w_hh, b_hh, w_hr):
        return activation(wx + linear(h, w_hh, b_hh)), None

    return step


def _lstm_step(wx, h, c, w_hh, b_hh, w_hr):
    # i,f,o = s(a)   g = tanh(a)   a = W x + b_x + U h + b_h      order i,f,g,o
    # c' = f c + i g               h' = o tanh(c'), projected by w_hr if there is one
    i, f, g, o = (wx + linear(h, w_hh, b_hh)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if w_hr is None else linear(h, w_hr)), c


def _gru_step(wx, h, c, w_hh, b_hh, w_hr):
    # r,z = s(a)   n = tanh(W_n x + b_xn + r (U_n h + b_hn))      order r,z,n
    # h' = (1 - z) n + z h
    xr, xz, xn = wx.chunk(3, -1)
    hr, hz, hn = linear(h, w_hh, b_hh).chunk(3, -1)
    z = torch.sigmoid(xz + hz)
    n = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
    return (1 - z) * n + z * h, None


def _gru_reset_before_step(wx, h, c, w_hh, b_hh, w_hr):
    # r,z = s(a)   n = tanh(W_n x + b_xn + U_n (r h) + b_hn)      order r,z,n
    # h' = (1 - z) n + z h
    size = h.size(-1)
    b_rz, b_n = (None, None) if b_hh is None else (b_hh[: 2 * size], b_hh[2 * size :])
    r, z = torch.sigmoid(wx[..., : 2 * size] + linear(h, w_hh[: 2 * size], b_rz)).chunk(2, -1)
    n = torch.tanh(wx[..., 2 * size :] + linear(r * h, w_hh[2 * size :], b_n))
    return (1 - z) * n + z * h, None


STEPS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    name: _elman_step(activation) for name, activation in _ACTIVATIONS.items()
} | {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "gru_reset_before": _gru_reset_before_step,
}


def layer(
    cell: str,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None = None,
    *extras: Tensor | None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    resets: Tensor | None = None,
    return_cells: bool = True,
    watch: Callable[[Tensor], Tensor] | None = None,
    zoneout: Zoneout | None = None,
) -> tuple[Tensor | None, ...]:
    """One layer in one direction; arguments and results as of ``ops.layer``.

    ``extras`` are the five tensors of layer normalisation and peepholes, as ``normalization`` has
    them, or none.

    float16 and bfloat16 are computed in float32 and rounded at the end, as the kernels do it.
    ``watch`` gets every h_t and returns what stands for it from then on.
    """
    dtype = input.dtype
    if dtype in (torch.float16, torch.bfloat16):
        input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr = (
            None if tensor is None else tensor.float()
            for tensor in (input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
        )
        extras = tuple(None if tensor is None else tensor.float() for tensor in extras)
    if all(tensor is None for tensor in extras):
        step, projected = STEPS[cell], linear(input, w_ih, b_ih)
    else:
        step = normalization.step(cell, extras)
        projected = normalization.net(cell, input, w_ih, b_ih, extras[0])
    steps = projected.unbind(0) if batch_sizes is None else projected.split(batch_sizes.tolist())
    inputs = steps[::-1] if reverse else steps
    if zoneout is not None:
        step = _holding(step)
        holds = [_by_step(hold, input.dtype, batch_sizes, len(steps)) for hold in zoneout]
        inputs = list(zip(inputs, *(hold[::-1] if reverse else hold for hold in holds)))
    if watch is not None:
        step = _watched(step, watch)
    restored = None
    if resets is not None:
        cuts = resets.unsqueeze(-1)
        cuts = cuts.unbind(0) if batch_sizes is None else cuts.split(batch_sizes.tolist())
        h0, c0, restored = _split_states(h0, c0, steps[0].size(0))
        # A reset parts step t from t - 1, so that the walk back meets it on entering t - 1.
        restored = (cuts if not reverse else (None, *cuts[:0:-1]), *restored)
    outputs, cells, h_n, c_n = _over_time(step, inputs, h0, c0, (w_hh, b_hh, w_hr), restored)
    if reverse:
        outputs.reverse()
        cells.reverse()
    join = torch.stack if batch_sizes is None else torch.cat
    all_cells = join(cells) if return_cells and c0 is not None else None
    results = join(outputs), h_n, c_n, all_cells
    return tuple(None if result is None else result.to(dtype) for result in results)


def _watched(step, watch):
    def watched(wx, *state_and_weights):
        h, c = step(wx, *state_and_weights)
        return watch(h), c

    return watched


def _holding(step):
    """``step`` with zoneout: the new state is held back where, or as far as, the input says.

    h' = z_h h + (1 - z_h) o tanh(c~)   c' = z_c c + (1 - z_c) c~      c~ is the plain step's c'
    """

    def zoned(inputs, h, c, *weights):
        wx, hold_h, hold_c = inputs
        new_h, new_c = step(wx, h, c, *weights)
        new_h = hold_h * h + (1 - hold_h) * new_h
        return new_h, None if c is None else hold_c * c + (1 - hold_c) * new_c

    return zoned


def _by_step(hold, dtype, batch_sizes, steps):
    if hold is None or hold.dim() == 0:
        return [hold] * steps
    hold = hold.to(dtype)
    return hold.unbind(0) if batch_sizes is None else hold.split(batch_sizes.tolist())


def _split_states(h0, c0, batch):
    """h0 and c0 without, and the pair of, what resets restore: their second half, or zeros."""
    if h0.size(0) == batch:
        return h0, c0, (h0.new_zeros(h0.shape), None if c0 is None else c0.new_zeros(c0.shape))
    no_cells = None if c0 is None else c0[batch:]
    return h0[:batch], None if c0 is None else c0[:batch], (h0[batch:], no_cells)


def _over_time(step, inputs, h0, c0, weights, restored=None):
    """Runs ``step`` over ``inputs``, each of which has as many rows as sequences are alive then; an
    input may be a tuple that begins with the tensor that has these rows.

    ``restored``, if given: for each step which rows start afresh, as far as there are such rows (or
    None), and the h and c that they start from.
    """
    sizes = [(wx[0] if isinstance(wx, tuple) else wx).size(0) for wx in inputs]
    rows = sizes[0]
    h, c = h0[:rows], None if c0 is None else c0[:rows]
    outputs, cells, ended = [], [], []
    for i, (wx, size) in enumerate(zip(inputs, sizes)):
        before, rows = rows, size
        if rows < before:
            ended.append((h[rows:], None if c is None else c[rows:]))
            h, c = h[:rows], None if c is None else c[:rows]
        elif rows > before:  # backwards in time, longer sequences come first and shorter ones join
            h = torch.cat((h, h0[before:rows]))
            c = None if c is None else torch.cat((c, c0[before:rows]))
        if restored is not None and restored[0][i] is not None:
            h, c = _restored(restored[0][i], h, c, *restored[1:])
        h, c = step(wx, h, c, *weights)
        outputs.append(h)
        cells.append(c)
    if ended:
        h = torch.cat([h] + [part for part, _ in reversed(ended)])
        c = None if c is None else torch.cat([c] + [part for _, part in reversed(ended)])
    return outputs, cells, h, c


def _restored(cut, h, c, restored_h, restored_c):
    """The state that is carried into a step, of which the first rows may be cut."""
    rows = cut.size(0)

    def one(state, other):
        new = torch.where(cut, other[:rows], state[:rows])
        return new if rows == state.size(0) else torch.cat((new, state[rows:]))

    return one(h, restored_h), None if c is None else one(c, restored_c)
