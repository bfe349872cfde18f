"""What torch.nn does on the CPU when asked for a feature, found out by asking: one function each.

A probe returns None where torch.nn does it, words where it does it with a catch, and raises where
it does not.
"""

import copy
import io
import pickle
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import torch
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

STEPS = 20
LAYERS = ("RNN", "LSTM", "GRU")


def layer_of(kind, **options):
    return getattr(torch.nn, kind)(4, 3, **options)


def sequence(*, dtype=torch.float32):
    return torch.randn(STEPS, 2, 4, dtype=dtype)


def each(probe):
    """A probe of one kind of layer as a probe of all three: the answers, if they differ by kind."""

    def all_kinds():
        answers = {}
        for kind in LAYERS:
            said = answer(lambda kind=kind: probe(kind)).replace(f"{kind}.forward", "forward")
            answers.setdefault(said, []).append(kind)
        if len(answers) == 1:
            return next(iter(answers))
        return "; ".join(f"{', '.join(kinds)}: {said}" for said, kinds in answers.items())

    return all_kinds


def answer(probe):
    """What a cell of the table says."""
    try:
        said = probe()
    except ImportError:
        raise  # something is missing here, which says nothing of torch.nn
    except Exception as error:
        words = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        words = words if len(words) <= 90 else words[:87].rsplit(" ", 1)[0] + "..."
        return f"no: {type(error).__name__}: {words}"
    return said or "yes"


class Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


@each
def fused(kind):
    with torch.no_grad(), Count() as count:
        layer_of(kind)(sequence())
    return f"no: {count.calls} operators for {STEPS} steps" if count.calls > STEPS else None


@each
def double_backward(kind):
    layer, x = layer_of(kind), sequence().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
    gradient.square().sum().backward()


@each
def eval_backward(kind):
    layer_of(kind).eval()(sequence())[0].sum().backward()


@each
def forward_mode(kind):
    layer, x = layer_of(kind), sequence()
    torch.func.jvp(lambda x: layer(x)[0], (x,), (torch.randn_like(x),))


@each
def per_sample_gradients(kind):
    layer = layer_of(kind)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,))[0].square().sum()

    x = sequence()
    found = torch.func.vmap(torch.func.grad(loss), (None, 1))(parameters, x)
    alone = torch.func.grad(loss)(parameters, x[:, 1])
    wrong = [name for name in alone if not torch.allclose(found[name][1], alone[name], atol=1e-5)]
    return f"no: wrong {', '.join(wrong)}" if wrong else None


@each
def compiled(kind):
    torch._dynamo.reset()
    torch.compile(layer_of(kind), fullgraph=True, backend="eager")(sequence())


@each
def exported(kind):
    torch.export.export(layer_of(kind), (sequence(),))


@each
def fx(kind):
    torch.fx.symbolic_trace(torch.nn.Sequential(layer_of(kind)))


@each
def traced(kind):
    torch.jit.trace(layer_of(kind), (sequence(),), check_trace=False)


@each
def scripted(kind):
    torch.jit.script(layer_of(kind))


def in_dtype(dtype):
    return each(lambda kind: layer_of(kind, dtype=dtype)(sequence(dtype=dtype))[0].sum().backward())


float64, bfloat16, float16 = map(in_dtype, (torch.float64, torch.bfloat16, torch.float16))


@each
def autocast(kind):
    with torch.autocast("cpu", torch.bfloat16):
        layer_of(kind)(sequence())[0].float().sum().backward()


@each
def packed(kind):
    layer_of(kind)(pack_padded_sequence(sequence(), [STEPS, 3]))


@each
def lengths(kind):
    layer_of(kind)(sequence(), lengths=[STEPS, 3])


def original_gru():
    torch.nn.GRU(4, 3, reset_after=False)


def sigmoid():
    torch.nn.RNN(4, 3, nonlinearity="sigmoid")


def all_cell_states():
    torch.nn.LSTM(4, 3)(sequence(), return_cells=True)


def projection():
    torch.nn.LSTM(4, 3, proj_size=2)(sequence())[0].sum().backward()


@each
def checkpoint_every(kind):
    layer_of(kind, checkpoint_every=2)


@each
def grad_clip(kind):
    layer_of(kind, grad_clip=1.0)


@each
def recurrent_init(kind):
    layer_of(kind, recurrent_init="orthogonal")


def forget_bias():
    torch.nn.LSTM(4, 3, forget_bias=1.0)


@each
def pickled(kind):
    layer = copy.deepcopy(pickle.loads(pickle.dumps(layer_of(kind))))
    torch.save(layer, io.BytesIO())
    layer(sequence())


@each
def parametrized(kind):
    torch.nn.utils.parametrizations.weight_norm(layer := layer_of(kind), "weight_hh_l0")
    layer(sequence())[0].sum().backward()


@each
def functional_call(kind):
    layer = layer_of(kind)
    halved = {name: p.detach() / 2 for name, p in layer.named_parameters()}
    torch.func.functional_call(layer, halved, (sequence(),))


@each
def meta(kind):
    layer_of(kind, device="meta").to_empty(device="cpu")(sequence())


@each
def same_bits(kind):
    layer, x = layer_of(kind), sequence()
    if not torch.equal(layer(x)[0], layer(x)[0]):
        return "no: results differ"
    return None


@each
def inference_mode(kind):
    with torch.inference_mode():
        layer_of(kind)(sequence())


@each
def empty_batch(kind):
    layer_of(kind)(torch.randn(STEPS, 0, 4))


def typed_calls():
    _, result = get_args(torch.nn.Module.__annotations__["__call__"])
    return "no: a call gives Any" if result is Any else None


@each
def quantized(kind):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = torch.nn.Sequential(layer_of(kind))
        kinds = {type(model[0])}
        smaller = torch.ao.quantization.quantize_dynamic(model, kinds, torch.qint8)
    if type(smaller[0]) in kinds:
        return "no: quantize_dynamic leaves it in float32"
    smaller(sequence())
    deprecated = any(issubclass(w.category, DeprecationWarning) for w in caught)
    return "int8, quantize_dynamic" + (" (deprecated)" if deprecated else "")


@each
def second_backward(kind):
    layer, x = layer_of(kind), sequence().requires_grad_()
    loss = layer(x)[0].square().sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    return None if torch.equal(first, second) else "no: another result"


@each
def nan_comes_through(kind):
    x = sequence()
    x[1, 0, 0] = float("nan")
    output = layer_of(kind)(x)[0]
    right = output[1:, 0].isnan().all() and not output[:, 1].isnan().any()
    return None if right else "no: it is lost"


@each
def strided(kind):
    layer, x = layer_of(kind), torch.randn(2, 8, STEPS).permute(2, 0, 1)[..., ::2]
    right = torch.allclose(layer(x)[0], layer(x.contiguous())[0], atol=1e-6)
    return None if right else "no: another result"


@each
def frozen(kind):
    layer = layer_of(kind)
    layer.weight_hh_l0.requires_grad_(False)
    layer(sequence())[0].sum().backward()
    return "no: it has a gradient" if layer.weight_hh_l0.grad is not None else None


@each
def threads(kind):
    layer, x = layer_of(kind), sequence()
    expected = layer(x)[0]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: layer(x)[0], range(8)))
    return None if all(torch.equal(result, expected) for result in results) else "no: wrong"


@each
def any_threads(kind):
    layer, x = getattr(torch.nn, kind)(32, 64, bidirectional=True), torch.randn(STEPS, 16, 32)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(layer(x)[0])
    finally:
        torch.set_num_threads(before)
    return None if torch.equal(*results) else "no: other bits"


@each
def third_derivative(kind):
    layer, x = layer_of(kind), sequence().requires_grad_()
    value = layer(x)[0].square().sum()
    for _ in range(3):
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        value = gradient.square().sum()


@each
def vmap_input(kind):
    layer, x = layer_of(kind), torch.randn(3, STEPS, 2, 4)
    found = torch.func.vmap(lambda x: layer(x)[0])(x)
    right = torch.allclose(found[1], layer(x[1])[0], atol=1e-6)
    return None if right else "no: another result"


@each
def batched_gradients(kind):
    layer, x = layer_of(kind), sequence().requires_grad_()
    output = layer(x)[0]
    upstream = torch.randn(3, *output.shape)
    torch.autograd.grad(output, x, upstream, is_grads_batched=True)


@each
def compiled_packed(kind):
    torch._dynamo.reset()
    packed = pack_padded_sequence(sequence(), [STEPS, 3])
    torch.compile(layer_of(kind), fullgraph=True, backend="eager")(packed)


@each
def aot_inductor(kind):
    exported = torch.export.export(layer_of(kind).eval(), (sequence(),))
    with tempfile.TemporaryDirectory() as folder:
        package = torch._inductor.aoti_compile_and_package(
            exported, package_path=f"{folder}/layer.pt2"
        )
        torch._inductor.aoti_load_package(package)(sequence())


@each
def onnx_nodes(kind):
    program = torch.onnx.export(layer_of(kind), (sequence(),), dynamo=True, verbose=False)
    nodes = [node.op_type for node in program.model_proto.graph.node]
    return None if kind in nodes else f"no: {len(nodes)} nodes for {STEPS} steps, none {kind}"


@each
def grad_scaler(kind):
    layer, scaler = layer_of(kind), torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(layer.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer(sequence())[0].float().sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)


@each
def deterministic_algorithms(kind):
    torch.use_deterministic_algorithms(True)
    try:
        layer_of(kind)(sequence())[0].sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


@each
def tied(kind):
    layer = layer_of(kind, bidirectional=True)
    layer.weight_hh_l0_reverse = layer.weight_hh_l0
    layer(sequence())[0].sum().backward()


@each
def weight_drop(kind):
    layer = layer_of(kind)
    raw = torch.nn.Parameter(layer.weight_hh_l0.detach())
    del layer._parameters["weight_hh_l0"]
    layer.weight_hh_l0 = raw * 2
    layer(sequence())[0].sum().backward()
    return None if raw.grad is not None else "no: it has no gradient"


@each
def averaged(kind):
    model = torch.optim.swa_utils.AveragedModel(layer := layer_of(kind))
    model.update_parameters(layer)
    model(sequence())


@each
def skip_init(kind):
    torch.nn.utils.skip_init(getattr(torch.nn, kind), 4, 3)(sequence())


@each
def weights_only(kind):
    layer = layer_of(kind)
    torch.save(layer, file := io.BytesIO())
    file.seek(0)
    with torch.serialization.safe_globals([type(layer)]):
        torch.load(file, weights_only=True)
