"""The three modules of a recurrent language model, and the loops that run them for `generate`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from . import _C
from .backend import current, is_plain_call, uncovered, warn_once
from .layers import RecurrentLayers
from .modules import GRU, LSTM, RNN
from .quantization import QuantizedLayers
from .swap import accelerate, own_class
from .token_loop import TokenLoop

if TYPE_CHECKING:
    from .generation import Options

__all__ = ["Model", "checked_tokens", "first_tensor", "map_state", "with_batch"]

# Options that a step of inference goes without.
_WITHOUT_EFFECT = ("weight_dropout", "variational_dropout", "learn_initial_state")
_CELLS = ("rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm", "gru", "gru_reset_before")


class Model:
    """The three modules, and which loop runs them."""

    def __init__(self, name: str, embedding: Any, rnn: Any, head: Any) -> None:
        self.name: str = name
        modules = {"embedding": embedding, "rnn": rnn, "head": head}
        for key, module in list(modules.items())[: 2 if name == "encode" else 3]:
            if not callable(module):
                raise TypeError(f"{name}: {key} must be a module, got {type(module).__name__}")
        self.embedding: Any = embedding
        self.rnn: Any = _in_evaluation(rnn)
        self.head: Any = head
        if head is not None and getattr(rnn, "bidirectional", False):
            raise ValueError(
                f"{name}: rnn has two directions, but the second one reads what is not yet written"
            )
        self._check_sizes()

    def _check_sizes(self):
        def size(module, attribute):
            value = getattr(module, attribute, None)
            return value if isinstance(value, int) else None

        given, taken = size(self.embedding, "embedding_dim"), size(self.rnn, "input_size")
        if None not in (given, taken) and given != taken:
            raise ValueError(
                f"{self.name}: embedding gives {given} features, but rnn takes {taken}"
            )
        given = size(self.rnn, "proj_size") or size(self.rnn, "hidden_size")
        taken = size(self.head, "in_features")
        if None not in (given, taken) and given != taken:
            raise ValueError(f"{self.name}: rnn gives {given} features, but head takes {taken}")
        known, tokens = size(self.embedding, "num_embeddings"), size(self.head, "out_features")
        if None not in (known, tokens) and tokens > known:
            raise ValueError(
                f"{self.name}: head chooses among {tokens} tokens, but embedding has {known}"
            )

    def read(self, tokens: Tensor, lengths: Tensor | None, hx: Any) -> tuple[Tensor, Any]:
        """(output [B, features] after the last token of each row, the state)."""
        first = getattr(self.rnn, "batch_first", False)
        x = self.embedding(tokens)
        x = x if first else x.transpose(0, 1)
        if lengths is None:
            output, state = self.rnn(x, hx)[:2]
            return output[:, -1] if first else output[-1], state
        last = lengths.to(tokens.device) - 1
        if isinstance(self.rnn, (RNN, LSTM, GRU, QuantizedLayers)):
            output, state = self.rnn(x, hx, lengths=lengths)
        elif isinstance(self.rnn, torch.nn.RNNBase):
            packed = pack_padded_sequence(x, lengths.cpu(), first, enforce_sorted=False)
            output, state = self.rnn(packed, hx)
            output, _ = pad_packed_sequence(output, first)
        else:
            raise ValueError(
                f"{self.name}: lengths needs RNN, LSTM or GRU layers; give prefixes of one length"
            )
        rows = torch.arange(len(last), device=last.device)
        return output[rows, last] if first else output[last, rows], state

    def run(
        self, options: "Options", output: Tensor | None, state: Any, tokens: Tensor | None
    ) -> _C.TokenChoice | TokenLoop:
        """Chooses all tokens; ``tokens`` [B] are read first where there is no ``output``."""
        if options.beams > 1:
            repeated = [
                None if part is None else part.repeat_interleave(options.beams, 0)
                for part in (output, tokens)
            ]
            output, tokens = repeated
            state = map_state(lambda part: part.repeat_interleave(options.beams, 1), state)
        obstacle = self._obstacle(state)
        if obstacle is None:
            states = self.rnn._states(state)
            if states is None:
                form = "a pair (h, c)" if self.rnn._cell == "lstm" else "a tensor"
                raise TypeError(f"{self.name}: the state of {type(self.rnn).__name__} is {form}")
            h, c, head = states[0], states[1] if len(states) > 1 else None, self.head
            choice = options.choice(h.size(1) // options.beams, head.out_features)
            _C.generate(
                self.rnn._cell, self.embedding.weight, self.rnn._weights(), head.weight, head.bias,
                choice, h, c, tokens,
            )  # fmt: skip
            return choice
        if (tokens if output is None else output).is_cuda:
            obstacle = self._obstacle_on_cuda(options, state)
            if obstacle is None:
                loop = self._token_loop(options, output, state, tokens)
                loop.run()
                return loop
        if current() == "auto":
            warn_once(f"{self.name}: a loop in Python serves instead of one call: {obstacle}")
        return self._loop(options, output, state, tokens)

    def _token_loop(self, options, output, state, tokens):
        """What is captured on CUDA; on other devices its steps run one by one."""
        options.check_eos(self.head.out_features)
        pair = isinstance(state, (tuple, list))
        first = getattr(self.rnn, "batch_first", False)

        def read(tokens, states):
            x = self.embedding(tokens.unsqueeze(1))
            x, hx = x if first else x.transpose(0, 1), states if pair else states[0]
            output, new = self.rnn(x, hx)[:2]
            return output[:, -1] if first else output[-1], new if pair else (new,)

        states = tuple(state) if pair else (state,)
        if output is None:
            output, states = read(tokens, states)
        device = output.device
        owned = [part.clone(memory_format=torch.contiguous_format) for part in (output, *states)]
        generator = options.generator(device)
        return TokenLoop(options, read, self.head, owned[0], tuple(owned[1:]), generator)

    def _loop(self, options, output, state, tokens):
        first, choice = getattr(self.rnn, "batch_first", False), None
        while True:
            if tokens is not None:
                x = self.embedding(tokens.unsqueeze(1))
                output, state = self.rnn(x if first else x.transpose(0, 1), state)[:2]
                output = output[:, -1] if first else output[-1]
            logits = self.head(output)
            if choice is None:
                choice = options.choice(logits.size(0) // options.beams, logits.size(-1))
            chosen = choice.choose(logits)
            if chosen is None:
                return choice
            tokens = chosen[0].to(logits.device)
            if chosen[1] is not None:
                parents = chosen[1].to(logits.device)
                state = map_state(lambda part: part.index_select(1, parents), state)  # noqa: B023

    def _obstacle(self, state):
        """Why the loop of C++ does not run this (a phrase), or None."""
        if current() not in ("auto", "cpu"):
            return f"use_backend({current()!r}) is active"
        return self._unusual(state) or self._uncovered(state, "cpu")

    def _obstacle_on_cuda(self, options, state):
        """Why no step of this is captured (a phrase), or None."""
        if current() != "auto" and not current().startswith("cuda"):
            return f"use_backend({current()!r}) is active"
        if options.beams > 1:
            return "beam search runs on the host"
        if isinstance(options.seed, torch.Generator) and options.seed.device.type == "cpu":
            return "seed is a generator on the CPU"
        if isinstance(self.rnn, QuantizedLayers):
            return "quantized layers are for the CPU"
        return self._unusual(state) or self._uncovered(state, "cuda")

    def _unusual(self, state):
        """What keeps a loop of ours from running these modules in this place, or None."""
        if not is_plain_call() if current() == "auto" else torch._C._is_any_autocast_enabled():
            return "autocast, a transform of torch.func or a tracer is active"
        for key, module, known in (
            ("embedding", self.embedding, torch.nn.Embedding),
            ("head", self.head, torch.nn.Linear),
            ("rnn", self.rnn, (RNN, LSTM, GRU, QuantizedLayers)),
        ):
            classes = known if isinstance(known, tuple) else (known,)
            if not isinstance(module, torch.nn.Module) or own_class(module) not in classes:
                return f"{key} is a {type(module).__name__}"
            if module._forward_hooks or module._forward_pre_hooks:
                return f"{key} has forward hooks"
        if self.embedding.max_norm is not None:
            return "embedding has a max_norm"
        if self.rnn._cell not in _CELLS:
            return f"there is no such loop for {self.rnn._cell}"
        if isinstance(self.rnn, RecurrentLayers):
            for option in self.rnn._all_options():
                if not option.startswith(_WITHOUT_EFFECT):
                    return f"rnn has {option}"
        return None

    def _uncovered(self, state, device):
        """Why the kernels of this device do not take the weights and the state, or None."""
        weight = self.embedding.weight
        others = [self.head.weight, self.head.bias, *(state if type(state) is tuple else (state,))]
        groups = () if isinstance(self.rnn, QuantizedLayers) else self.rnn._weights()
        for tensor in (weight, *others, *(tensor for group in groups for tensor in group)):
            if tensor is not None and type(tensor) not in (Tensor, torch.nn.Parameter):
                return f"a weight or state is a {type(tensor).__name__}"
            if tensor is not None and tensor.device.type != device:
                kind = "the CPU" if device == "cpu" else "CUDA"
                return f"it is for {kind}, not for device {tensor.device.type!r}"
        if not groups and weight.dtype != torch.float32:
            return "a quantized rnn computes in float32"
        return uncovered(weight, others, groups)


def _in_evaluation(rnn):
    """A module on the attributes of ``rnn`` that is one of ours and drops nothing out; ``rnn``
    itself where it is of another class."""
    if not isinstance(rnn, torch.nn.RNNBase):
        return rnn
    same = object.__new__(type(rnn))
    same.__dict__.update(rnn.__dict__)
    accelerate(same)
    if own_class(same) in (RNN, LSTM, GRU):
        same.training = False
        return same
    return rnn


def checked_tokens(
    name: str, key: str, embedding: Any, tokens: Any, lengths: Any
) -> tuple[Tensor, Tensor | None, bool]:
    """(tokens int64 [B, P], lengths int64 [B] on the CPU or None, whether there is a batch)."""
    if not isinstance(tokens, Tensor):
        try:
            tokens = torch.as_tensor(tokens)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{name}: {key} must be a tensor or rows of one length ({error}); pad shorter rows "
                "and give lengths"
            ) from None
    if tokens.dim() not in (1, 2) or tokens.size(-1) == 0:
        raise ValueError(
            f"{name}: {key} must be [B, P] or [P] with at least one token, got {list(tokens.shape)}"
        )
    if tokens.dtype == torch.bool or tokens.is_floating_point() or tokens.is_complex():
        raise ValueError(f"{name}: {key} must hold integers, got {tokens.dtype}")
    batched = tokens.dim() == 2
    tokens = (tokens if batched else tokens.unsqueeze(0)).long()
    if lengths is not None:
        lengths = torch.as_tensor(lengths, device="cpu")
        integers = not (lengths.dtype == torch.bool or lengths.is_floating_point())
        if not integers or lengths.shape != (tokens.size(0),):
            raise ValueError(f"{name}: lengths must be {tokens.size(0)} integers, got {lengths}")
        lengths = lengths.long()
        if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= tokens.size(1):
            raise ValueError(
                f"{name}: lengths must be between 1 and {tokens.size(1)}, the width of {key}, got "
                f"{lengths.min()}..{lengths.max()}"
            )
        past = torch.arange(tokens.size(1)) >= lengths[:, None]
        tokens = tokens.masked_fill(past.to(tokens.device), 0)
    known = getattr(embedding, "num_embeddings", None)
    if isinstance(known, int) and tokens.numel():
        low, high = tokens.min(), tokens.max()
        if low < 0 or high >= known:
            raise ValueError(
                f"{name}: {key} has token {low if low < 0 else high}, but embedding has tokens 0 "
                f"to {known - 1}"
            )
    return tokens, lengths, batched


def map_state(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """``state`` with every tensor replaced by ``function`` of it."""
    if isinstance(state, (tuple, list)):
        return tuple(map_state(function, part) for part in state)
    return function(state)


def first_tensor(state: Any) -> Tensor:
    """The first tensor of a state."""
    while isinstance(state, (tuple, list)) and state:
        state = state[0]
    if not isinstance(state, Tensor):
        raise TypeError(f"decode: state must be what rnn takes, got {type(state).__name__}")
    return state


def with_batch(state: Any) -> Any:
    """A state without a batch as that of a batch of one; None stays None."""
    return None if state is None else map_state(lambda part: part.unsqueeze(1), state)
