"""Constructor options of the layers that torch.nn has not: checks, and the parameters they need."""

import math
import numbers
from typing import Any

import torch
from torch.nn import Parameter

__all__ = [
    "DEFAULTS",
    "checked_option",
    "checked_widths",
    "in_words",
    "make_initial_states",
    "make_parameters",
    "named_arguments",
    "ratios",
    "reset_uniform",
]

# In the order of the repr. A layer has as attributes what is not the default.
DEFAULTS: dict[str, bool | float] = {
    "residual": False,
    "weight_dropout": 0.0,
    "variational_dropout": 0.0,
    "zoneout": 0.0,
    "learn_initial_state": False,
    "layer_norm": False,
    "peephole": False,
}
_POSITIONS = (
    "mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout",
    "bidirectional", "proj_size", "device", "dtype",
)  # fmt: skip


def checked_option(name: str, option: str, value: Any) -> Any:
    """``value`` if the option takes it; ``name`` of the layer starts the message."""
    if isinstance(DEFAULTS[option], bool):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: {option} must be True or False, got {value!r}")
        return value
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: {option} must be a number, got {value!r}")
    if not 0 <= value < 1:
        raise ValueError(
            f"{name}: {option} is a probability of at least 0 and below 1, got {value!r}"
        )
    return float(value)


def named_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of torch.nn.RNNBase by name; as many as there are names for."""
    return dict(zip(_POSITIONS, args)) | kwargs


def checked_widths(name: str, arguments: dict[str, Any]) -> tuple[int, ...] | None:
    """The width of each layer where ``hidden_size`` is a list, else None."""
    sizes = arguments.get("hidden_size")
    if not isinstance(sizes, (list, tuple)):
        return None
    if not sizes or not all(isinstance(s, int) and not isinstance(s, bool) for s in sizes):
        raise TypeError(f"{name}: hidden_size must be an int or a list of ints, got {sizes!r}")
    if min(sizes) < 1:
        raise ValueError(f"{name}: every entry of hidden_size must be positive, got {list(sizes)}")
    if arguments.get("num_layers", len(sizes)) != len(sizes):
        raise ValueError(
            f"{name}: hidden_size has {len(sizes)} entries, a width for each layer, but num_layers "
            f"is {arguments['num_layers']}; leave num_layers out"
        )
    if arguments.get("proj_size"):
        raise ValueError(f"{name}: proj_size needs one hidden_size for all layers, not a list")
    return tuple(sizes)


def make_parameters(layers: Any, gates: int, factory: dict[str, Any]) -> None:
    """Gives ``layers`` the parameters of its widths and biases, without values, in place of those
    it has."""
    layers._parameters.clear()
    layers._all_weights, layers._flat_weights_names = [], []
    directions = 2 if layers.bidirectional else 1
    inputs = layers.input_size
    for layer, width in enumerate(layers._widths()):
        output = layers.proj_size or width
        for suffix in ("", "_reverse")[:directions]:
            shapes = {"weight_ih": (gates * width, inputs), "weight_hh": (gates * width, output)}
            if layers.bias:
                shapes["bias_ih"] = (gates * width,)
            if layers.bias is True:
                shapes["bias_hh"] = (gates * width,)
            if layers.proj_size:
                shapes["weight_hr"] = (output, width)
            names = [f"{kind}_l{layer}{suffix}" for kind in shapes]
            for name, shape in zip(names, shapes.values()):
                setattr(layers, name, Parameter(torch.empty(shape, **factory)))
            layers._all_weights.append(names)
            layers._flat_weights_names.extend(names)
        inputs = output * directions
    layers._init_flat_weights()


def make_initial_states(layers: Any, kinds: str, factory: dict[str, Any]) -> None:
    """Adds initial_h_l0 and, with ``kinds`` "hc", initial_c_l0 of each layer and direction."""
    directions = 2 if layers.bidirectional else 1
    for layer, width in enumerate(layers._widths()):
        for suffix in ("", "_reverse")[:directions]:
            for kind in kinds:
                size = layers.proj_size or width if kind == "h" else width
                value = Parameter(torch.zeros(size, **factory))
                layers.register_parameter(f"initial_{kind}_l{layer}{suffix}", value)


def reset_uniform(layers: Any) -> None:
    """torch.nn's initialization where layers have widths of their own: U(-s, s), s = width^-1/2."""
    directions = 2 if layers.bidirectional else 1
    for k, names in enumerate(layers._all_weights):
        bound = 1 / math.sqrt(layers._widths()[k // directions])
        for name in names:
            torch.nn.init.uniform_(getattr(layers, name), -bound, bound)


def in_words(layers: Any) -> list[str]:
    """The options that ``layers`` has, as its constructor takes them."""
    own = layers.__dict__
    return [
        f"{option}={own[option]!r}"
        for option, default in DEFAULTS.items()
        if own.get(option, default) != default
    ]


def ratios(layers: Any) -> dict[str, tuple[int, int]]:
    """The probabilities of ``layers`` that are not zero, as exact fractions."""
    own = layers.__dict__
    return {
        option: own[option].as_integer_ratio()
        for option, default in DEFAULTS.items()
        if isinstance(default, float) and own.get(option)
    }
