"""`JordanRNN`: a network that is fed its own output."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear

from . import functional
from .backend import current, warn_once
from .signatures import Device

__all__ = ["JordanRNN"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda a: a,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "softmax": lambda a: torch.softmax(a, -1),
}
_OF_HIDDEN = ("tanh", "relu", "sigmoid")
_OF_OUTPUT = ("identity", "tanh", "sigmoid", "softmax")

# Operations of a step on the CPU that take as long as calling torch's for it from Python.
_CALLS = 1e6

# Each as p tanh(q a) + r, where there are such numbers.
_BY_TANH = {"tanh": (1.0, 1.0, 0.0), "sigmoid": (0.5, 0.5, 0.5)}


class JordanRNN(torch.nn.Module):
    """A recurrent network whose memory is its own output (Jordan 1986).

    h_t = f(W x_t + U o_{t-1} + b);  o_t = g(V h_t + c)

    Three ways to run it. *Teacher forcing* feeds the target y_{t-1} in place of o_{t-1}; then no
    step waits for another, and all are computed at once. *Free running* feeds the network its
    output, as in use. A *mixture* chooses for each step and sequence (scheduled sampling, Bengio et
    al. 2015, arXiv:1506.03099). Gradients go through whatever was fed: through o_{t-1} to all steps
    before, or into the target, if it wants one.

    >>> import torch, rnn_ext
    >>> jordan = rnn_ext.JordanRNN(3, 16, 2)
    >>> x, y = torch.randn(50, 8, 3), torch.randn(50, 8, 2)
    >>> forced, _ = jordan(x, y)
    >>> free, o_n = jordan(x)
    >>> mixed, _ = jordan(x, y, teacher_forcing=0.75)
    >>> further, _ = jordan(torch.randn(10, 8, 3), o_0=o_n)

    ``o_0`` is what a stream carries on: ``tbptt(lambda x, o=None: jordan(x, o_0=o), ...)``.

    Parameters, which start uniform in +-1 / sqrt(H): ``weight_ih`` W [H, I], ``weight_oh`` U
    [H, O], ``bias_h`` b [H], ``weight_ho`` V [O, H], ``bias_o`` c [O].

    Free running is one kernel call. With g = identity it is an Elman network with recurrent weights
    U V and input weights (W, U), fed c, or the target where its state is cut; with f and g among
    tanh and sigmoid, one of twice the steps that turns (h, o) over. Both multiply wider matrices
    than V and U; on the CPU, where that costs a million operations a step more, a loop over torch
    operations is faster and runs instead. Other pairs have that loop alone, with a
    `FallbackWarning`. Teacher forcing needs none.

    Args:
        input_size, hidden_size, output_size: I, H and O.
        nonlinearity: f: "tanh", "relu" or "sigmoid".
        output_nonlinearity: g: "identity", "tanh", "sigmoid" or "softmax".
        bias: False: no b and c.
        batch_first: input, targets and output are [B, T, ...].

    Source: Jordan, "Attractor dynamics and parallelism in a connectionist sequential machine",
    Proc. 8th Conf. of the Cognitive Science Society, 1986.
    """

    input_size: int
    hidden_size: int
    output_size: int
    nonlinearity: str
    output_nonlinearity: str
    bias: bool
    batch_first: bool
    weight_ih: Parameter
    weight_oh: Parameter
    weight_ho: Parameter
    bias_h: Parameter | None
    bias_o: Parameter | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        nonlinearity: str = "tanh",
        output_nonlinearity: str = "identity",
        bias: bool = True,
        batch_first: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"input": input_size, "hidden": hidden_size, "output": output_size}
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"JordanRNN: {name}_size must be an int, got {size!r}")
            if size < 1:
                raise ValueError(f"JordanRNN: {name}_size must be at least 1, got {size}")
        _check_choice("nonlinearity", nonlinearity, _OF_HIDDEN)
        _check_choice("output_nonlinearity", output_nonlinearity, _OF_OUTPUT)
        self.input_size, self.hidden_size, self.output_size = input_size, hidden_size, output_size
        self.nonlinearity, self.output_nonlinearity = nonlinearity, output_nonlinearity
        self.bias, self.batch_first = bias, batch_first

        def new(*shape: int) -> Parameter:
            return Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight_ih = new(hidden_size, input_size)
        self.weight_oh = new(hidden_size, output_size)
        self.weight_ho = new(output_size, hidden_size)
        self.register_parameter("bias_h", new(hidden_size) if bias else None)
        self.register_parameter("bias_o", new(output_size) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}, {self.output_size}"
        text += f", nonlinearity={self.nonlinearity!r}"
        if self.output_nonlinearity != "identity":
            text += f", output_nonlinearity={self.output_nonlinearity!r}"
        text += "" if self.bias else ", bias=False"
        return text + (", batch_first=True" if self.batch_first else "")

    def forward(
        self,
        input: Tensor,
        targets: Tensor | None = None,
        teacher_forcing: float | Tensor = 1.0,
        *,
        o_0: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs the network over a sequence.

        Args:
            input: [T, B, I], [B, T, I] with ``batch_first``, or [T, I] without a batch.
            targets: y, laid out like ``input`` with O features. None: free running.
            teacher_forcing: with ``targets``, how often they are fed: 1 always, 0 never, else with
                this probability, drawn for each step and sequence; or a bool tensor laid out like
                ``input`` without features, True where step t is fed y_{t-1}. The first step is fed
                ``o_0`` in any case.
            o_0: what the first step is fed, [B, O] ([O] without a batch). None: zeros.
            generator: of the draws, on the device of ``input``. None: torch's own, which
                ``torch.manual_seed`` seeds.

        Returns:
            ``(output, o_n)``: every o_t, laid out like ``input`` with O features, and the last,
            [B, O] or [O], with which a free running network goes on as ``o_0``. Where the teacher
            goes on, give the last target.

        Raises:
            TypeError, ValueError: arguments that do not fit.
        """
        self._check(input, targets, teacher_forcing, o_0)
        batched = input.dim() == 3
        time_first = self._time_first
        x, y = time_first(input), None if targets is None else time_first(targets)
        first = x.new_zeros(x.size(1), self.output_size) if o_0 is None else o_0
        first = first if batched or o_0 is None else first.unsqueeze(0)
        forced = None
        if isinstance(teacher_forcing, Tensor):
            forced = teacher_forcing.unsqueeze(1) if not batched else teacher_forcing
            forced = forced.transpose(0, 1) if batched and self.batch_first else forced
        elif y is not None and teacher_forcing < 1:
            if teacher_forcing > 0:
                draws = torch.rand(x.shape[:2], device=x.device, generator=generator)
                forced = draws < teacher_forcing
            else:
                y = None
        if y is not None and forced is None:
            output = self._all_forced(x, y, first)
        else:
            output = self._in_a_loop(x, y, first, forced)
        o_n = output[-1]
        if not batched:
            return output.squeeze(1), o_n.squeeze(0)
        return output.transpose(0, 1) if self.batch_first else output, o_n

    def _time_first(self, value):
        if value.dim() == 2:
            return value.unsqueeze(1)
        return value.transpose(0, 1) if self.batch_first else value

    def _all_forced(self, x, y, first):
        fed = torch.cat((first.unsqueeze(0), y[:-1]))
        a = linear(x, self.weight_ih, self.bias_h) + linear(fed, self.weight_oh)
        h = _ACTIVATIONS[self.nonlinearity](a)
        return _ACTIVATIONS[self.output_nonlinearity](linear(h, self.weight_ho, self.bias_o))

    def _in_a_loop(self, x, y, first, forced):
        f, g, backend = self.nonlinearity, self.output_nonlinearity, current()
        if g == "identity" or (f in _BY_TANH and g in _BY_TANH):
            run = self._as_elman if g == "identity" else self._in_turn
            if backend == "auto" and self._wide(x):
                run = self._composed
            return run(x, y, first, forced)
        if backend not in ("auto", "reference"):
            raise RuntimeError(
                f"JordanRNN: the backend {backend!r} cannot run this: {f} with {g} has no kernel"
            )
        if backend == "auto":
            warn_once(
                f"JordanRNN: free running {f} with {g} has no kernel; composed of torch operations "
                "instead"
            )
        return self._composed(x, y, first, forced)

    def _wide(self, x):
        """Whether the kernels' products cost more than they save."""
        if torch.compiler.is_compiling() or not x.is_cpu:
            return False
        h, o = self.hidden_size, self.output_size
        product = h * h if self.output_nonlinearity == "identity" else 2 * (h + o) ** 2
        return 2 * x.size(1) * (product - 2 * h * o) > _CALLS

    def _as_elman(self, x, y, first, forced):
        # h_t = f(W x_t + U c + b + U V h_{t-1}), as o_{t-1} = V h_{t-1} + c
        w_hh = self.weight_oh @ self.weight_ho
        otherwise = first.new_zeros(()) if self.bias_o is None else self.bias_o
        h = self._elman(
            torch.cat((x, _fed(x, y, first, forced, otherwise)), -1),
            torch.cat((self.weight_ih, self.weight_oh), 1),
            w_hh,
            self.bias_h,
            self.nonlinearity,
            forced,
        )
        return linear(h, self.weight_ho, self.bias_o)

    def _in_turn(self, x, y, first, forced):
        """An Elman network of (h, o) whose steps make h and o in turn. Its other half is a network
        that makes them the other way about; nobody reads it, and it is bounded."""
        (p, q, r), (p_o, q_o, r_o) = _BY_TANH[self.nonlinearity], _BY_TANH[self.output_nonlinearity]
        w, u, v = self.weight_ih, self.weight_oh, self.weight_ho
        # The bias feeds r_o at every step, so a step that starts anew is fed that much less.
        fed = _fed(x, y, first, forced, first.new_zeros(()), r_o)
        columns = torch.cat((x, fed), -1)
        hidden, outputs = self.hidden_size, self.output_size
        w_ih = torch.cat((q * torch.cat((w, u), 1), w.new_zeros(outputs, columns.size(-1))))
        w_hh = torch.cat(
            (
                torch.cat((w.new_zeros(hidden, hidden), q * p_o * u), 1),
                torch.cat((q_o * p * v, w.new_zeros(outputs, outputs)), 1),
            )
        )
        b, c = q * r_o * u.sum(1), q_o * r * v.sum(1)
        if self.bias_h is not None:
            b, c = b + q * self.bias_h, c + q_o * self.bias_o
        if forced is not None:
            forced = torch.stack((forced, torch.zeros_like(forced)), 1).flatten(0, 1)
        columns = columns.repeat_interleave(2, 0)
        states = self._elman(columns, w_ih, w_hh, torch.cat((b, c)), "tanh", forced)
        return p_o * states[1::2, :, hidden:] + r_o

    def _elman(self, x, w_ih, w_hh, bias, nonlinearity, resets):
        b_hh = None if bias is None else torch.zeros_like(bias)
        return functional.rnn(
            x, None, w_ih, w_hh, bias, b_hh, nonlinearity=nonlinearity, resets=resets
        )[0]

    def _composed(self, x, y, first, forced):
        f, g = _ACTIVATIONS[self.nonlinearity], _ACTIVATIONS[self.output_nonlinearity]
        o, outputs = first, []
        for t, a in enumerate(linear(x, self.weight_ih, self.bias_h)):
            if t and forced is not None:
                o = torch.where(forced[t].unsqueeze(-1), y[t - 1], o)
            o = g(linear(f(a + linear(o, self.weight_oh)), self.weight_ho, self.bias_o))
            outputs.append(o)
        return torch.stack(outputs)

    def _check(self, input, targets, teacher_forcing, o_0):
        given: dict[str, Any] = {"input": input, "targets": targets, "o_0": o_0}
        for name, value in given.items():
            if value is None and name != "input":
                continue
            if not isinstance(value, Tensor):
                raise TypeError(f"JordanRNN: {name} must be a tensor, got {type(value).__name__}")
            weight = self.weight_ih
            if value.device != weight.device:
                raise ValueError(
                    f"JordanRNN: {name} is on {value.device} but the weights are on "
                    f"{weight.device}; move one of them"
                )
            if value.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
                raise TypeError(
                    f"JordanRNN: {name} is {value.dtype} but the weights are {weight.dtype}; "
                    "convert one of them"
                )
        if input.dim() not in (2, 3) or input.size(-1) != self.input_size:
            layout = "[B, T, I]" if self.batch_first else "[T, B, I]"
            raise ValueError(
                f"JordanRNN: input must be {layout} or [T, I] with I = {self.input_size}, got "
                f"{list(input.shape)}"
            )
        batched = input.dim() == 3
        if input.size(1 if batched and self.batch_first else 0) == 0:
            raise ValueError("JordanRNN: input must have at least one time step")
        shapes = {"targets": (*input.shape[:-1], self.output_size)}
        shapes["o_0"] = (input.size(0 if self.batch_first else 1),) if batched else ()
        shapes["o_0"] += (self.output_size,)
        for name, shape in shapes.items():
            value = given[name]
            if value is not None and value.shape != torch.Size(shape):
                raise ValueError(
                    f"JordanRNN: {name} must be {list(shape)}, got {list(value.shape)}"
                )
        if isinstance(teacher_forcing, Tensor):
            if targets is None:
                raise ValueError("JordanRNN: teacher_forcing says where targets are fed; give them")
            if teacher_forcing.dtype != torch.bool or teacher_forcing.shape != input.shape[:-1]:
                raise ValueError(
                    f"JordanRNN: teacher_forcing must be bool {list(input.shape[:-1])}, got "
                    f"{teacher_forcing.dtype} {list(teacher_forcing.shape)}"
                )
        elif isinstance(teacher_forcing, bool) or not isinstance(teacher_forcing, (int, float)):
            raise TypeError(
                "JordanRNN: teacher_forcing must be a number or a bool tensor, got "
                f"{teacher_forcing!r}"
            )
        elif not 0 <= teacher_forcing <= 1:
            raise ValueError(f"JordanRNN: teacher_forcing must be in [0, 1], got {teacher_forcing}")


def _check_choice(name, value, known):
    if value not in known:
        raise ValueError(f"JordanRNN: {name} must be one of {', '.join(known)}, got {value!r}")


def _fed(x, y, first, forced, otherwise, less=0.0):
    """What the network is fed from outside, [T, B, O]: o_0 and targets, ``less`` so much, where it
    starts anew, else ``otherwise``."""
    rest = otherwise.expand(x.size(0) - 1, *first.shape)
    if forced is not None:
        rest = torch.where(forced[1:].unsqueeze(-1), y[:-1] - less, rest)
    return torch.cat(((first - less).unsqueeze(0), rest))
