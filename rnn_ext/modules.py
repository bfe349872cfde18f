"""`RNN`, `LSTM` and `GRU`: torch.nn's in constructor, parameters, state_dict, results and errors.

They subclass `torch.nn.RNNBase` and not torch.nn.LSTM, because torch.compile refuses every instance
of torch.nn.RNN, LSTM and GRU. Their constructors hand on what they get, as torch.nn's do, so that
wrong arguments give the same errors; modules.pyi says what a type checker should know.
"""

import inspect

import torch

from .initialization import checked_forget_bias, forget_bias_
from .layers import RecurrentLayers

__all__ = ["GRU", "LSTM", "RNN"]


def _shown_as(documented):
    """Gives a constructor the signature of ``documented``, for torch.nn.utils.skip_init, help() and
    editors. The constructor itself hands on what it gets, so that torch.nn's errors are kept."""

    def give(constructor):
        constructor.__signature__ = inspect.signature(documented)
        return constructor

    return give


class _WithoutProjection(RecurrentLayers):
    def __init__(self, *args, **kwargs):
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__(*args, **kwargs)


class RNN(_WithoutProjection):
    """Simple (Elman) recurrent layers: h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh).

    Replaces `torch.nn.RNN`: ``RNN(input_size, hidden_size, num_layers=1, nonlinearity="tanh",
    bias=True, batch_first=False, dropout=0.0, bidirectional=False, device=None, dtype=None)`` makes
    the same parameters with the same values from the same seed. `forward` has the shapes and the
    errors.

    What layers have beside torch.nn's arguments is listed in `RecurrentLayers`, and:

    Args:
        nonlinearity: f: "tanh", "relu" or, in torch.nn unknown, "sigmoid".
        recurrent_init: keyword only; None, "orthogonal" or "identity" (with relu the IRNN of Le et
            al. 2015, arXiv:1504.00941) for weight_hh at initialization.

    Source: Elman, "Finding structure in time", Cognitive Science 14, 1990.
    """

    _twin = torch.nn.RNN

    @_shown_as(
        lambda self, input_size, hidden_size, num_layers=1, nonlinearity="tanh", bias=True,
        batch_first=False, dropout=0.0, bidirectional=False, device=None, dtype=None, *,
        residual=False, weight_dropout=0.0, variational_dropout=0.0, zoneout=0.0,
        learn_initial_state=False, layer_norm=False, recurrent_init=None, checkpoint_every=None,
        save="all",
        grad_clip=None: None
    )  # fmt: skip
    def __init__(self, *args, **kwargs):
        if len(args) > 3:
            self.nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu", "sigmoid"):
            raise ValueError(
                f"Unknown nonlinearity '{self.nonlinearity}'. "
                "Select from 'tanh', 'relu' or 'sigmoid'."
            )
        # RNNBase knows only tanh and relu; sigmoid has the same parameters.
        super().__init__("RNN_RELU" if self.nonlinearity == "relu" else "RNN_TANH", *args, **kwargs)
        if self.nonlinearity == "sigmoid":
            self.mode = "RNN_SIGMOID"

    def flatten_parameters(self):
        if self.mode != "RNN_SIGMOID":  # which cuDNN has not
            super().flatten_parameters()

    @property
    def _cell(self):
        return self.mode.lower()

    @property
    def _own_extra(self):
        return "nonlinearity='sigmoid'" if self.mode == "RNN_SIGMOID" else None

    def extra_repr(self):
        text = super().extra_repr()
        return text if self._own_extra is None else f"{text}, {self._own_extra}"


class LSTM(RecurrentLayers):
    """Long short-term memory layers, with optional projection.

    i, f, o = s(a);  g = tanh(a);  a = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh;
    c_t = f c_{t-1} + i g;  h_t = o tanh(c_t), with ``proj_size`` h_t = W_hr (o tanh(c_t)).

    Replaces `torch.nn.LSTM`: ``LSTM(input_size, hidden_size, num_layers=1, bias=True,
    batch_first=False, dropout=0.0, bidirectional=False, proj_size=0, device=None, dtype=None)``
    makes the same parameters with the same values from the same seed. `forward` has the shapes and
    the errors.

    What layers have beside torch.nn's arguments is listed in `RecurrentLayers`, and:

    Args:
        forget_bias: keyword only; a number makes it the forget gate's bias at initialization (b_ih
            + b_hh) in every layer and direction. 1 is usual (Jozefowicz et al. 2015). ValueError
            with bias=False.
        peephole: keyword only; True lets the gates look at the cell, i and f at c_{t-1} and o at
            c_t, each unit at its own (Gers and Schmidhuber 2000): i = s(a_i + p_i c_{t-1}) and so
            on, with ``weight_peephole_l0`` [3 * hidden_size] of i, f, o. For life; no
            ``proj_size``; served as ``layer_norm`` is.
        recurrent_init: keyword only; None, "orthogonal" or "identity" for each gate's block of
            weight_hh at initialization.

    Sources: Hochreiter and Schmidhuber 1997; Gers et al. 2000 (forget gate); Sak et al. 2014,
    arXiv:1402.1128 (projection).
    """

    _twin = torch.nn.LSTM
    _cell = "lstm"
    forget_bias = None

    # Borrowed, as torch.nn.LSTM is no base class: its forward, which _run_twin calls, needs them.
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    check_forward_args = torch.nn.LSTM.check_forward_args
    permute_hidden = torch.nn.LSTM.permute_hidden

    @_shown_as(
        lambda self, input_size, hidden_size, num_layers=1, bias=True, batch_first=False,
        dropout=0.0, bidirectional=False, proj_size=0, device=None, dtype=None, *,
        forget_bias=None, peephole=False,
        residual=False, weight_dropout=0.0, variational_dropout=0.0, zoneout=0.0,
        learn_initial_state=False, layer_norm=False, recurrent_init=None, checkpoint_every=None,
        save="all",
        grad_clip=None: None
    )  # fmt: skip
    def __init__(self, *args, forget_bias=None, **kwargs):
        forget_bias = checked_forget_bias("LSTM", forget_bias)
        if forget_bias is not None:
            self.forget_bias = forget_bias
        super().__init__("LSTM", *args, **kwargs)

    def reset_parameters(self):
        super().reset_parameters()
        if self.forget_bias is not None:
            for group, width in zip(self._weights(), self._widths_of_groups()):
                forget_bias_("LSTM", *group[2:4], width, self.forget_bias)

    def extra_repr(self):
        text = super().extra_repr()
        return text if self.forget_bias is None else f"{text}, forget_bias={self.forget_bias}"

    def forward(
        self,
        input,
        hx=None,
        lengths=None,
        resets=None,
        initial_state=None,
        return_cells=None,
        return_gates=None,
    ):
        """Runs the layers over a sequence.

        Args:
            input, lengths, resets, return_gates: as of `RecurrentLayers.forward`.
            initial_state: where episodes start, a pair in the form of ``hx``, its batch B or 1.
            hx: the pair ``(h_0, c_0)``, [num_layers * directions, B, proj_size or hidden_size] and
                [num_layers * directions, B, hidden_size] (no B if there is no batch). None: zeros.
            return_cells: add a third result, every c_t of the last layer laid out like ``output``
                with directions * hidden_size features.

        Returns:
            ``(output, (h_n, c_n))``, and then cells and gates where they are asked for.

        Raises:
            ValueError, RuntimeError: as `RecurrentLayers.forward`.
        """
        details = ()
        if return_cells is not None or return_gates is not None:
            details = self._details(cells=return_cells, gates=return_gates)
        results = self._run(input, hx, lengths, details, resets, initial_state)
        return self._shown(results, details)


class GRU(_WithoutProjection):
    """Gated recurrent unit layers.

    r, z = s(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh);  h_t = (1 - z) n + z h_{t-1}, with the
    candidate n below.

    Replaces `torch.nn.GRU`: ``GRU(input_size, hidden_size, num_layers=1, bias=True,
    batch_first=False, dropout=0.0, bidirectional=False, device=None, dtype=None)`` makes the same
    parameters with the same values from the same seed. `forward` has the shapes and the errors.

    What layers have beside torch.nn's arguments is listed in `RecurrentLayers`, and:

    Args:
        reset_after: keyword only. True, as torch.nn and cuDNN: n = tanh(W_n x_t + b_in + r (U_n
            h_{t-1} + b_hn)). False, the original: n = tanh(W_n x_t + b_in + U_n (r h_{t-1}) +
            b_hn). Textbooks that write h_t = (1 - z') h_{t-1} + z' n have z' = 1 - z: flip the sign
            of the z rows of weights and biases to convert.
        recurrent_init: keyword only; None, "orthogonal" or "identity" for each gate's block of
            weight_hh at initialization.

    Source: Cho et al. 2014, arXiv:1406.1078.
    """

    _twin = torch.nn.GRU
    reset_after = True

    @_shown_as(
        lambda self, input_size, hidden_size, num_layers=1, bias=True, batch_first=False,
        dropout=0.0, bidirectional=False, device=None, dtype=None, *, reset_after=True,
        residual=False, weight_dropout=0.0, variational_dropout=0.0, zoneout=0.0,
        learn_initial_state=False, layer_norm=False, recurrent_init=None, checkpoint_every=None,
        save="all",
        grad_clip=None: None
    )  # fmt: skip
    def __init__(self, *args, reset_after=True, **kwargs):
        if not isinstance(reset_after, bool):
            raise TypeError(f"GRU: reset_after must be True or False, got {reset_after!r}")
        if not reset_after:
            self.reset_after = False
        super().__init__("GRU", *args, **kwargs)

    @property
    def _cell(self):
        return "gru" if self.reset_after else "gru_reset_before"

    @property
    def _own_extra(self):
        return None if self.reset_after else "reset_after=False"

    def extra_repr(self):
        text = super().extra_repr()
        return text if self._own_extra is None else f"{text}, {self._own_extra}"
