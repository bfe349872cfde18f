"""The libraries that are compared. Each prepares a call on a Problem, or says why it cannot."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_packed_sequence

import rnn_ext

from .problem import as_tuple, calls

OURS, TORCH = "rnn_ext", "torch.nn"
OPTIONS = {  # of our layers in training, named as what they are
    "zoneout": {"zoneout": 0.1},
    "weight dropout": {"weight_dropout": 0.2},
    "reset before the product": {"reset_after": False},  # of the GRU
}
UNROLLED_AT_MOST = 16  # steps, times layers, times directions: compiling takes seconds for each


class Unavailable(Exception):
    """Why a library cannot run a case, in a few words."""


@dataclass
class Runner:
    """``call()`` is what is timed; ``results(value)`` names the tensors in what it returns."""

    call: Callable
    results: Callable


def ours(problem, training):
    """Raises Unavailable where our own kernels would not run."""
    module = problem.module(rnn_ext)
    for step in rnn_ext.explain(module, problem.input, problem.state).steps:
        if step.kernel != "cpu":
            raise Unavailable(f"not our kernel but {step.kernel}: {step.reason}")
    return Runner(*calls(problem, module, training))


def torch_nn(problem, training):
    return Runner(*calls(problem, problem.module(torch.nn), training))


def obstacle(name, case, cell, training):
    """Why the peer ``name`` cannot run a case (a phrase), or None; whether it is installed is not
    asked."""
    if case.resets and name != TORCH:
        return f"{name} knows no resets"
    if case.vocabulary and name != TORCH:
        return f"{name} has no loop that generates tokens"
    if case.group == "online" and name != TORCH:
        return f"{name} has no online learning"
    if case.layer_norm and name != TORCH:
        return f"{name} knows no layer normalisation"
    if name == "torch.compile":
        if case.ragged:
            return "torch.compile breaks at a PackedSequence"
        if case.steps * case.layers * case.directions > UNROLLED_AT_MOST:
            if cell == "lstm" and not training:
                return "torch.compile keeps the LSTM as the one call that torch.nn makes"
            return f"torch.compile unrolls more than {UNROLLED_AT_MOST} steps, which takes minutes"
    if name == "onnxruntime":
        if training:
            return "onnxruntime does not train"
        if case.dtype != "float32":
            return f"onnxruntime has no {case.dtype} kernel"
    return None


def compiled(problem, training):
    """torch.compile of torch.nn's layer. Its default refuses the class and runs it as it is, so the
    switch that lets it in is set here."""
    torch._dynamo.reset()
    # The module stays as it is (names, eval); what is compiled is its call.
    module = problem.module(torch.nn)
    with torch._dynamo.config.patch(allow_rnn=True):
        module.compile()
        runner = Runner(*calls(problem, module, training))
        with torch.inference_mode(not training):
            runner.call()
    return runner


def onnxruntime(problem, training):
    """The operator RNN, GRU or LSTM of ONNX in onnxruntime's CPU provider."""
    case = problem.case
    try:
        import onnxruntime as engine

        from .onnx_model import layers
    except ImportError as error:
        raise Unavailable(
            f"no onnxruntime: pip install onnx onnxruntime ({error.name} is missing)"
        ) from None
    options = engine.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    # Its threads may spin within a run, but not on into the next library's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = engine.InferenceSession(
        layers(problem).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = problem.input
    if case.ragged:
        x = pad_packed_sequence(x)[0]
    size = (case.layers * case.directions, case.batch, case.hidden)
    states = as_tuple(problem.state) if problem.state is not None else (torch.zeros(size),) * 2
    feeds = {"input": x.numpy(), "h_0": states[0].numpy()}
    if problem.cell == "lstm":
        feeds["c_0"] = states[1].numpy()
    if case.ragged:
        feeds["lengths"] = np.array(case.lengths(), dtype=np.int32)

    def results(value):
        output, *states = map(torch.from_numpy, value)
        if case.ragged:
            rows = [output[t, : sum(n > t for n in case.lengths())] for t in range(case.steps)]
            output = torch.cat(rows)
        return dict(zip(("output", "h_n", "c_n"), (output, *states)))

    return Runner(lambda: session.run(None, feeds), results)


PEERS = {TORCH: torch_nn, "torch.compile": compiled, "onnxruntime": onnxruntime}
QUICK = (TORCH, "onnxruntime")  # compiling takes longer than everything else together


def prepare(name, problem, training):
    """The Runner of the peer ``name``. Raises Unavailable."""
    if reason := obstacle(name, problem.case, problem.cell, training):
        raise Unavailable(reason)
    return PEERS[name](problem, training)


def one_direction(problem):
    """The forward direction alone of a bidirectional layer."""
    case, hidden = problem.case, problem.case.hidden
    weights = {n: w for n, w in problem.weights.items() if not n.endswith("_reverse")}
    upstream = problem.upstream[..., :hidden].contiguous()
    state = problem.state
    if state is not None:
        state = tuple(s[:1] for s in state) if isinstance(state, tuple) else state[:1]
    return replace(
        problem,
        case=replace(case, bidirectional=False),
        weights=weights,
        state=state,
        upstream=upstream,
    )


def without_resets(problem):
    return replace(problem, case=replace(problem.case, resets=0.0), resets=None)


def options_of(case, cell):
    """The names of `OPTIONS` that are measured with a case."""
    known = [name for name in OPTIONS if cell == "gru" or "reset_after" not in OPTIONS[name]]
    return known if case.options else []


def with_option(problem, name):
    """A training step of ours with an option."""
    return Runner(*calls(problem, problem.module(rnn_ext, **OPTIONS[name]), training=True))


def quantized(problem, kind):
    """Ours with weights stored as ``kind``, for inference."""
    module = problem.module(rnn_ext)
    module.eval()
    module = rnn_ext.quantize_weights(module, kind) or module
    return Runner(*calls(problem, module, training=False))


def quantizable(case, training):
    """The ways in which the weights of a case are also stored: where reading them is the time."""
    reads_most = case.batch == 1 and case.hidden >= 1024 and case.dtype == "float32"
    offered = hasattr(rnn_ext, "quantize_weights")
    return ("bf16", "int8") if offered and reads_most and not training else ()
