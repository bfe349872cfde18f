"""`quantize_weights`: weights of fewer bits, for inference on the CPU where reading them is the
time."""

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from . import _C, functional, library, onnx
from .backend import is_plain_call
from .lengths import WithLengths
from .modules import GRU, LSTM, RNN
from .replacement import Replacement
from .stack import stack
from .states import WithStates

__all__ = ["KINDS", "QuantizedLayers", "pack", "quantize_weights", "unpack"]

Model = TypeVar("Model", bound=torch.nn.Module)

KINDS = ("bf16", "int8")
_STRIP = 16  # units that lie side by side in packed weights


def quantize_weights(model: Model, kind: str) -> Model:
    """Stores the weight matrices of every RNN, LSTM and GRU in ``model`` in fewer bits, in place;
    returns ``model``.

    For inference in small batches on the CPU: a step of one sequence takes as long as reading the
    weights. The modules stay the same objects and become `QuantizedLayers`, whose forward takes and
    returns float32 as before. Their float weights are gone: quantize a `copy.deepcopy` to keep
    them. Biases, states and sums stay float32. Cells (`LSTMCell`, ...), layers of classes derived
    from ours and torch.nn's layers (see `accelerate`) are left alone. Safe to call twice.

    ``"bf16"`` keeps 8 significant bits of each weight: half the memory, a relative error of at most
    2^-9 in a weight. ``"int8"`` keeps round(127 w / max|w|) of each row (unit and gate): a quarter
    of the memory, an error of at most max|w| / 254. docs/performance.md has the speed and the error
    of whole layers.

    Args:
        model: any `torch.nn.Module`, also a bare layer of ours; its layers in float32 on the CPU.
        kind: "bf16" or "int8".

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``kind`` is unknown, there is nothing to quantize, or a layer (named) cannot be
            quantized; nothing was changed.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"quantize_weights: model must be a torch.nn.Module, got {type(model).__name__}"
        )
    if kind not in KINDS:
        raise ValueError(f"quantize_weights: kind must be 'bf16' or 'int8', got {kind!r}")
    layers = []
    for name, module in model.named_modules():
        own = type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)
        if own in (RNN, LSTM, GRU):
            _check_quantizable(name or "the model", module)
            layers.append(module)
        elif own is QuantizedLayers:
            layers.append(module)
            if module.kind != kind:
                raise ValueError(
                    f"quantize_weights: {name or 'the model'} has {module.kind} weights already; "
                    "quantize a float32 model"
                )
    if not layers:
        raise ValueError(
            "quantize_weights: the model has no RNN, LSTM or GRU of rnn_ext; "
            "rnn_ext.accelerate(model) replaces torch.nn's"
        )
    for layer in layers:
        if type(layer) is not QuantizedLayers:
            QuantizedLayers._take_over(layer, kind)
    return model


def _check_quantizable(name, layer):
    reason = None
    if parametrize.is_parametrized(layer):
        reason = "is parametrized; remove that with torch.nn.utils.parametrize first"
    for key, weight in layer.named_parameters():
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            reason = f"has {key} in {weight.dtype} on {weight.device}; call .float().cpu() first"
        elif not weight.isfinite().all():
            reason = f"has an entry of {key} that is not finite"
    if layer._lasting_option is not None:
        reason = f"has {layer._lasting_option}, which quantized layers have not"
    if not reason and len(list(layer.parameters())) != sum(map(len, layer._all_weights)):
        reason = "has weights that are no parameters of its own"
    if reason:
        raise ValueError(f"quantize_weights: {name} ({layer._get_name()}) {reason}")


def pack(weight: Tensor, gates: int, kind: str) -> tuple[Tensor, Tensor | None]:
    """``weight`` [gates * units, depth] in float32 as the kernels read it.

    Returns:
        The matrix, [panels, depth / per, blocks, gates, 16, per], padded with zeros: bfloat16 with
        per = 2, or uint8 (value + 128) with per = 4; and the scale of each row, [panels, blocks,
        gates, 16], None for bfloat16.
    """
    scales = None
    if kind == "int8":
        largest = weight.abs().amax(1)
        scales = largest / 127
        # Divides by what is multiplied with later; a row of (nearly) nothing stays zero.
        weight = (weight / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round()
        weight = weight.clamp(-127, 127)
    blocks, per = (2 if gates == 1 else 1), (4 if kind == "int8" else 2)
    units, depth = weight.size(0) // gates, weight.size(1)
    panels, groups = -(-units // (blocks * _STRIP)), -(-depth // per)
    padded = weight.new_zeros(gates, panels * blocks * _STRIP, groups * per)
    padded[:, :units, :depth] = weight.view(gates, units, depth)
    packed = padded.view(gates, panels, blocks, _STRIP, groups, per).permute(1, 4, 2, 0, 3, 5)
    if kind == "bf16":
        return packed.bfloat16().contiguous(), None
    packed_scales = weight.new_zeros(gates, panels * blocks * _STRIP)
    packed_scales[:, :units] = scales.view(gates, units)
    packed_scales = packed_scales.view(gates, panels, blocks, _STRIP).permute(1, 2, 0, 3)
    return (packed + 128).to(torch.uint8).contiguous(), packed_scales.contiguous()


def unpack(packed: Tensor, scales: Tensor | None, units: int, depth: int) -> Tensor:
    """What `pack` stored, as the float32 weight [gates * units, depth] that is computed with."""
    values = packed.float()
    if scales is not None:
        values = (values - 128) * scales[:, None, ..., None]
    panels, groups, blocks, gates, strip, per = values.shape
    rows = values.permute(3, 0, 2, 4, 1, 5).reshape(gates, panels * blocks * strip, groups * per)
    return rows[:, :units, :depth].reshape(gates * units, depth)


class QuantizedLayers(WithLengths, WithStates, torch.nn.Module):
    """RNN, LSTM or GRU layers with weights of fewer bits: what `quantize_weights` makes of them.

    For inference on the CPU: float32 in and out, no gradients, no dropout. The buffers have the
    names of the parameters they replace, with ``_scale`` and, for the second recurrent product of
    ``GRU(reset_after=False)``, ``_n`` appended; they do not depend on the machine. A state_dict
    loads into a module quantized the same way. `dequantized` gives the weights that are computed
    with.
    """

    _states = Replacement._states
    _as_leaf = Replacement._as_leaf

    kind: str
    float_bytes: int
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    bidirectional: bool
    proj_size: int
    _all_weights: list[list[str]]

    def __init__(self) -> None:
        raise TypeError("QuantizedLayers: made by rnn_ext.quantize_weights, not by its constructor")

    @classmethod
    def _take_over(cls, layer, kind):
        """Turns ``layer`` itself into one of this class."""
        weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}
        kept = {
            "kind": kind,
            "float_bytes": sum(4 * weight.numel() for weight in weights.values()),
            "_description": layer.extra_repr(),
            "_float_name": layer._get_name(),
            "_cell": layer._cell,
        }
        for name in (
            "input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional",
            "proj_size", "_all_weights",
        ):  # fmt: skip
            kept[name] = getattr(layer, name)
        own = torch.nn.Module().__dict__.keys()
        for attribute in [key for key in layer.__dict__ if key not in own]:
            del layer.__dict__[attribute]
        layer._parameters.clear()
        layer.__class__ = cls
        layer.__dict__.update(kept)
        gates = functional.gates(layer._cell)
        with torch.no_grad():
            for name, weight in weights.items():
                if name.startswith("bias"):
                    layer.register_buffer(name, weight.clone())
                elif name.startswith("weight_hr"):
                    layer._store(name, weight, 1)
                elif name.startswith("weight_hh") and layer._cell == "gru_reset_before":
                    rows = 2 * layer.hidden_size
                    layer._store(name, weight[:rows], 2)
                    layer._store(f"{name}_n", weight[rows:], 1)
                else:
                    layer._store(name, weight, gates)

    def _store(self, name, weight, gates):
        packed, scales = pack(weight, gates, self.kind)
        self.register_buffer(name, packed)
        if scales is not None:
            self.register_buffer(f"{name}_scale", scales)

    def dequantized(self) -> dict[str, Tensor]:
        """The weights in float32 under the names and in the shapes of the float layer's
        state_dict."""
        buffers, weights = self._buffers, {}
        output = self.proj_size or self.hidden_size
        for k, names in enumerate(self._all_weights):
            first = k < (2 if self.bidirectional else 1)
            inputs = self.input_size if first else output * (2 if self.bidirectional else 1)
            for name in names:
                if name.startswith("bias"):
                    weights[name] = buffers[name].clone()
                    continue
                projection = name.startswith("weight_hr")
                depth = inputs if name.startswith("weight_ih") else output
                units = output if projection else self.hidden_size
                depth = self.hidden_size if projection else depth
                parts = [name, f"{name}_n"] if f"{name}_n" in buffers else [name]
                weights[name] = torch.cat(
                    [unpack(buffers[p], buffers.get(f"{p}_scale"), units, depth) for p in parts]
                )
        return weights

    def _weights(self):
        """The tensors of `_C.quantized_layer` for each layer and direction."""
        buffers, groups = self._buffers, []
        for names in self._all_weights:
            ih, hh = names[:2]
            second = names[-1] if self.proj_size else f"{hh}_n"
            matrices = ih, hh, second
            groups.append(
                (
                    *(buffers.get(name) for name in matrices),
                    *(buffers.get(f"{name}_scale") for name in matrices),
                    *(map(buffers.get, names[2:4]) if self.bias else (None, None)),
                )
            )
        return groups

    def forward(
        self,
        input: Any,
        hx: Any = None,
        lengths: Any = None,
        resets: Any = None,
        initial_state: Any = None,
        return_cells: bool | None = None,
        return_gates: bool | None = None,
    ) -> Any:
        """As the float layer's, in float32 on the CPU.

        Raises:
            RuntimeError: gradients are asked for, dtypes, devices or sizes do not fit, or
                torch.jit.trace is recording.
            ValueError: ``lengths`` do not fit; ``return_cells``, ``return_gates``, ``resets`` or
                ``initial_state``, which its kernels do not know.
        """
        asked = {"return_cells": return_cells or None, "return_gates": return_gates or None}
        extras = asked | {"resets": resets}
        for name, value in (extras | {"initial_state": initial_state}).items():
            if value is not None:
                raise ValueError(f"{self._get_name()}: {name} needs the float32 layer")
        node = self._as_leaf(input, hx=hx, lengths=lengths)
        if node is not None:
            return node
        if lengths is not None:
            return self._run_with_lengths(input, hx, lengths, ())[:2]
        return self._run(input, hx)[:2]

    def _run(self, input, hx, lengths=None, details=(), resets=None, initial_state=None):
        if type(input) is Tensor and is_plain_call():
            results = self._run_plain(input, hx)
            if results is not None:
                return results
        name = self._get_name()
        if onnx.is_exporting():
            raise RuntimeError(
                f"{name}: ONNX has no such weights; export the float layer and quantize the result"
            )
        if torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"{name}: torch.jit.trace and torch.func do not see its kernels; use the float "
                "layer"
            )
        arranged = self._arrange(input, hx)
        if arranged is None:
            self._refuse(input, hx)
        x, batch_sizes, batch, states = arranged
        for tensor in (x, *states):
            if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
                raise RuntimeError(
                    f"{name}: takes float32 tensors on the CPU, got {tensor.dtype} on "
                    f"{tensor.device}; convert them, or use the float layer"
                )
            if tensor.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(
                    f"{name}: weights of fewer bits are for inference and give no gradients; call "
                    "it under torch.no_grad(), or train the float layer and quantize that"
                )
        h0, c0 = self._initial(x, batch, states)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            output, h_n, c_n, _ = stack(
                self._cell, x, h0, c0, self._weights(), 2 if self.bidirectional else 1,
                batch_sizes=batch_sizes, run=_run_layer,
            )  # fmt: skip
        state = self._joined(h_n, input)
        if self._cell == "lstm":
            state = state, self._joined(c_n, input)
        return self._like(input, output), state, None

    def _run_plain(self, input, hx):
        """As `_run`, all layers in one call; None for what that does not take."""
        states = () if hx is None else self._states(hx)
        if states is None or not input.dim() or input.shape[-1] != self.input_size:
            return None
        directions = 2 if self.bidirectional else 1
        results = _C.quantized_stack(
            self._cell, input, states, self._weights(), directions, self.hidden_size,
            self.proj_size or self.hidden_size, self.batch_first,
        )  # fmt: skip
        if results is None:
            return None
        output, h_n, c_n = results
        return output, h_n if c_n is None else (h_n, c_n), None

    def _refuse(self, input, hx):
        """Raises for input that is not of the shape or kind of a float layer's."""
        rows = self.num_layers * (2 if self.bidirectional else 1)
        shapes = (
            {"input": input.data.shape if isinstance(input, PackedSequence) else input.shape}
            if isinstance(input, (Tensor, PackedSequence))
            else {"input": type(input).__name__}
        )
        if hx is not None:
            states = self._states(hx)
            shapes["hx"] = type(hx).__name__ if states is None else [s.shape for s in states]
        given = ", ".join(f"{key} {value}" for key, value in shapes.items())
        raise RuntimeError(
            f"{self._get_name()}: cannot take this: {given}; input has {self.input_size} features "
            f"in 3 dimensions (2 without a batch), and hx {rows} states of "
            f"{self.proj_size or self.hidden_size} units"
            + (f" in a pair with {self.hidden_size} units" if self._cell == "lstm" else "")
        )

    def _update_flat_weights(self):
        pass

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Raises RuntimeError unless ``input`` has the features."""
        if input.size(-1) != self.input_size:
            self._refuse(input, None)

    def flatten_parameters(self) -> None:
        """Nothing: for code that calls it on every recurrent layer."""

    def _apply(self, fn, recurse=True):
        probe = fn(torch.zeros(1))
        if probe.dtype != torch.float32 or probe.device.type != "cpu":
            raise RuntimeError(
                f"{self._get_name()}: stays on the CPU with float32 biases, it cannot be converted "
                f"to {probe.dtype} on {probe.device}; convert the float layer"
            )

        def kept(tensor):
            converted = fn(tensor)
            return converted if converted.dtype == tensor.dtype else tensor

        return super()._apply(kept, recurse)

    def _get_name(self):
        return f"Quantized{self._float_name}"

    def extra_repr(self) -> str:
        size = sum(t.numel() * t.element_size() for t in self._buffers.values())
        return (
            f"{self._description}, {self.kind} weights: {_in_words(size)} instead of "
            f"{_in_words(self.float_bytes)}"
        )


def _run_layer(cell, x, h0, c0, *tensors, batch_sizes, reverse, resets, return_cells):
    """As `rnn_ext.ops.layer`, with the tensors of `QuantizedLayers._weights`."""
    compiling = torch.compiler.is_compiling()
    run = library.quantized_layer if compiling else _C.quantized_layer
    return *run(cell, x, h0, c0, tensors, batch_sizes, reverse), None


def _in_words(size):
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
