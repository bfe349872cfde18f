"""Layers with the options that torch.nn has not: their constructor, parameters and states."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import functional, options
from .control import Control, checked_control
from .hooks import Hooks, StackOptions
from .initialization import recurrent_
from .normalized_options import OPTIONS, WithNormalization
from .replacement import Replacement
from .states import WithStates

__all__ = ["ExtendedLayers"]


class ExtendedLayers(WithNormalization, WithStates, Replacement, torch.nn.RNNBase):
    """Base of `RecurrentLayers`, which says what the options do.

    An option is an attribute of the layer only where it was given, so that torch.nn's layers become
    ours and back by an exchange of classes.
    """

    residual: bool = False
    weight_dropout: float = 0.0
    variational_dropout: float = 0.0
    zoneout: float = 0.0
    _extended = False  # whether any of these, or learn_initial_state, was ever set
    _option_words: tuple[str, ...] = ()  # those that are not the default, for messages
    _ratios: dict[str, tuple[int, int]] | None = None  # those that are probabilities
    _control: Control | None = None  # of training, where a constructor was asked for it
    _own_extra: str | None = None  # what makes the cell one that torch.nn has not, in words

    def __init__(
        self,
        *args: Any,
        recurrent_init: str | None = None,
        learn_initial_state: bool = False,
        layer_norm: bool = False,
        peephole: bool = False,
        checkpoint_every: int | None = None,
        save: str = "all",
        grad_clip: float | tuple[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self._keep_recurrent_init(recurrent_init)
        name = self._get_name()
        control = checked_control(name, checkpoint_every, save, grad_clip)
        for option, default in options.DEFAULTS.items():
            value = kwargs.pop(option, default)
            if value is not default:
                setattr(self, option, value)
        options.checked_option(name, "learn_initial_state", learn_initial_state)
        for option, value in zip(OPTIONS, (layer_norm, peephole)):
            if options.checked_option(name, option, value):
                setattr(self, option, True)
        named = options.named_arguments(args, kwargs)
        factory = {"device": named.get("device"), "dtype": named.get("dtype")}
        widths = options.checked_widths(name, named)
        if widths is None and named.get("bias") != "single":
            super().__init__(*args, **kwargs)
        else:
            self._init_reshaped(named, widths, factory)
        if learn_initial_state:
            kinds = "hc" if self._cell == "lstm" else "h"
            options.make_initial_states(self, kinds, factory)
            self.learn_initial_state = True
        if self._whole_rows:
            self._check_normalization(self.proj_size)
            self._make_normalization(factory)
        if control is not None:
            self._control = control
        if self.residual and not any(names[0] == names[1] for names in self._layer_widths()[1:]):
            raise ValueError(
                f"{name}: residual=True needs a second layer, or a later one, whose input is as "
                f"wide as its output; hidden_size is {self.hidden_size}, num_layers "
                f"{self.num_layers}"
            )

    def _init_reshaped(self, named, widths, factory):
        """As torch.nn's constructor, for parameters of other shapes."""
        known = {"device": "meta", "hidden_size": named.get("hidden_size")}
        if widths is not None:
            known |= {"hidden_size": max(widths), "num_layers": len(widths)}
        bias = named.get("bias", True)
        super().__init__(**named | known | {"bias": True if bias == "single" else bias})
        self.__dict__.update(_extended=True, bias=bias, hidden_size=widths or self.hidden_size)
        options.make_parameters(self, functional.gates(self._cell), factory)
        self.reset_parameters()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in options.DEFAULTS:
            value = options.checked_option(self._get_name(), name, value)
            if name == "learn_initial_state" and value and not hasattr(self, "initial_h_l0"):
                raise ValueError(
                    f"{self._get_name()}: learn_initial_state is chosen at construction"
                )
            if (
                name in OPTIONS
                and "_flat_weights" in self.__dict__
                and value != getattr(self, name)
            ):
                raise ValueError(f"{self._get_name()}: {name} is chosen at construction")
        super().__setattr__(name, value)
        if name in options.DEFAULTS:
            # torch.compile takes floats that differ between modules for symbols, and forms neither
            # text nor masks of those; text and a module's integers are constants to it.
            self.__dict__["_option_words"] = tuple(options.in_words(self))
            self.__dict__["_ratios"] = options.ratios(self)
            self.__dict__["_extended"] = True

    def _probability(self, option):
        ratio = None if self._ratios is None else self._ratios.get(option)
        return 0.0 if ratio is None else ratio[0] / ratio[1]

    @property
    def checkpoint_every(self) -> int | None:
        return self._control and self._control.checkpoint_every

    @property
    def grad_clip(self) -> float | tuple[str, float] | None:
        return self._control and self._control.grad_clip

    @property
    def _extra(self) -> str | None:
        if self._own_extra is not None:
            return self._own_extra
        if self.grad_clip is not None:
            return f"grad_clip={self.grad_clip!r}"
        return next(iter(self._all_options()), None) if self._extended else None

    @property
    def _lasting_option(self):
        """An option that inference does not go without, in words, or None."""
        only_in_training = ("weight_dropout", "variational_dropout")
        lasting = [text for text in self._all_options() if not text.startswith(only_in_training)]
        return lasting[0] if lasting else None

    def _all_options(self):
        own = [f"hidden_size={self.hidden_size}"] if isinstance(self.hidden_size, tuple) else []
        return own + ["bias='single'"] * (self.bias == "single") + list(self._option_words)

    def extra_repr(self) -> str:
        text = super().extra_repr().replace("bias=single", "bias='single'")
        control = [] if self._control is None else [str(self._control)]
        return ", ".join([text, *self._option_words, *control])

    def flatten_parameters(self) -> None:
        if isinstance(self.hidden_size, int) and self.bias != "single":  # what cuDNN takes
            super().flatten_parameters()

    def reset_parameters(self) -> None:
        if isinstance(self.hidden_size, int):
            super().reset_parameters()
        else:
            options.reset_uniform(self)
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("initial_"):
                torch.nn.init.zeros_(parameter)
        if self._whole_rows:
            self._reset_normalization()
        if self.recurrent_init is not None:
            for names, width in zip(self._all_weights, self._widths_of_groups()):
                recurrent_(getattr(self, names[1]), width, self.recurrent_init)

    def _layer_widths(self):
        """Features of each layer's input and output."""
        directions = 2 if self.bidirectional else 1
        outputs = [directions * (self.proj_size or width) for width in self._widths()]
        return list(zip([self.input_size, *outputs], outputs))

    def _options(self):
        return StackOptions(
            self.training,
            self.residual,
            self._probability("weight_dropout"),
            self._probability("variational_dropout"),
            self._probability("zoneout"),
        )

    def _hooks(self, details):
        directions = 2 if self.bidirectional else 1
        return Hooks(directions, self._options(), gates="gates" in details)

    def _states(self, hx):
        if not isinstance(self.hidden_size, tuple):
            return super()._states(hx)
        pair = self._cell == "lstm"
        if not isinstance(hx, (tuple, list)) or (pair and len(hx) != 2):
            return None
        kinds = hx if pair else (hx,)
        for states in kinds:
            if not isinstance(states, (tuple, list)) or len(states) != self.num_layers:
                return None
        flat = tuple(state for states in kinds for state in states)
        return flat if all(isinstance(state, Tensor) for state in flat) else None

    def _learned(self, batch):
        """The states that are parameters, as `_states` gives those of ``batch`` sequences."""
        parameters, directions = self._parameters, 2 if self.bidirectional else 1
        kinds = []
        for kind in "hc" if self._cell == "lstm" else "h":
            names = [
                f"initial_{kind}_l{layer}{suffix}"
                for layer in range(self.num_layers)
                for suffix in ("", "_reverse")[:directions]
            ]
            kinds.append([parameters[n] if n in parameters else getattr(self, n) for n in names])
        if isinstance(self.hidden_size, tuple):
            each = range(0, self.num_layers * directions, directions)
            kinds = [states[k : k + directions] for states in kinds for k in each]
        return [torch.stack(states).unsqueeze(1).expand(-1, batch, -1) for states in kinds]

    def _run_twin(self, input, hx, *reason, **options):
        if isinstance(self.hidden_size, tuple):
            self._refuse(input, hx)
        return super()._run_twin(input, hx, *reason, **options)

    def _refuse(self, input, hx):
        """Raises for what layers with widths of their own do not take."""
        if isinstance(input, PackedSequence):
            self.check_input(input.data, input.batch_sizes)
        elif isinstance(input, Tensor) and input.dim() in (2, 3):
            self.check_input(input if input.dim() == 3 else input.unsqueeze(1), None)
        else:
            raise RuntimeError(
                f"{self._get_name()}: input must be a 2-D or 3-D tensor or a PackedSequence"
            )
        rows = 2 if self.bidirectional else 1
        each = ", ".join(f"[{rows}, B, {width}]" for width in self.hidden_size)
        what = "a tuple with a tensor for each layer"
        if self._cell == "lstm":
            what = f"a pair (h_0, c_0), each {what}"
        raise RuntimeError(f"{self._get_name()}: hx must be {what}: {each} (no B without a batch)")
