"""torch's own module database, the one its test suite runs over torch.nn, run over our classes."""

import copy
import importlib
import pickle
import warnings

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_unflatten
from twins import CELLS, LAYERS, assert_same, gradients, tensors, torch_nn_warnings_ignored

import rnn_ext

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    database = importlib.import_module("torch.testing._internal.common_modules")
# Importing that froze torch.backends' switches for the process, which other tests set.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True

INFOS = {
    info.module_cls.__name__: info
    for info in database.module_db
    if info.module_cls in [getattr(torch.nn, name) for name in LAYERS + CELLS]
}


def samples(name, dtype=torch.float64, requires_grad=False, training=True):
    """(constructor arguments, forward arguments, reference function) of each sample of ``name``."""
    info = INFOS[name]
    assert dtype in info.supported_dtypes("cpu")
    options = {"with_packed_sequence": True} if name in ("RNN", "GRU") else {}
    made = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training, **options
    )
    for sample in made:
        construction, forward = sample.constructor_input, sample.forward_input
        yield (construction.args, construction.kwargs), forward, sample.reference_fn


def make(cls, construction, dtype):
    args, kwargs = construction
    torch.manual_seed(0)
    return cls(*args, **{**kwargs, "dtype": dtype})


@pytest.fixture(autouse=True)
def _torch_nn_may_warn():
    with torch_nn_warnings_ignored():
        yield


def test_the_database_has_our_six():
    assert sorted(INFOS) == sorted(LAYERS + CELLS)


@pytest.mark.parametrize(
    ("dtype", "training"),
    [(torch.float64, True), (torch.float64, False), (torch.float32, True)],
    ids=str,
)
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_forward_and_gradients(name, dtype, training):
    for construction, forward, reference in samples(name, dtype, True, training):
        ours = make(getattr(rnn_ext, name), construction, dtype).train(training)
        theirs = make(getattr(torch.nn, name), construction, dtype).train(training)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        our_results = ours(*forward.args, **forward.kwargs)
        their_results = theirs(*forward.args, **forward.kwargs)
        assert_same(our_results, their_results)
        leaves = [leaf for leaf in tensors(forward.args) if leaf.is_leaf and leaf.requires_grad]
        assert_same(
            gradients(ours, our_results, *leaves), gradients(theirs, their_results, *leaves)
        )
        if not any(isinstance(argument, PackedSequence) for argument in forward.args):
            # What the database itself compares with: the batch of one.
            assert_same(our_results, reference(ours, *forward.args, **forward.kwargs))


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_pickle_repr_and_state_dict(name):
    for construction, forward, _ in samples(name):
        ours = make(getattr(rnn_ext, name), construction, torch.float64)
        theirs = make(getattr(torch.nn, name), construction, torch.float64)
        assert repr(ours) == repr(theirs)
        assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
            (k, v.shape) for k, v in theirs.state_dict().items()
        ]
        assert_same(list(ours.parameters()), list(theirs.parameters()))
        results = ours(*forward.args, **forward.kwargs)
        for twin in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
            assert_same(twin(*forward.args, **forward.kwargs), results)


@pytest.mark.filterwarnings("ignore::rnn_ext.FallbackWarning")  # of gradients of gradients
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_gradcheck(name):
    for number, (construction, forward, _) in enumerate(samples(name, requires_grad=True)):
        if any(isinstance(argument, PackedSequence) for argument in forward.args):
            continue  # held against torch.nn above
        module = make(getattr(rnn_ext, name), construction, torch.float64)
        leaves, structure = tree_flatten(forward.args)

        def run(*flat, module=module, structure=structure):
            args = tree_unflatten(flat[: structure.num_leaves], structure)
            return tuple(tensors(module(*args)))

        inputs = (*leaves, *module.parameters())
        assert torch.autograd.gradcheck(run, inputs, fast_mode=number % 4 > 0)
        if number % 4 == 0:
            assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_conversions(name):
    for construction, forward, _ in samples(name):
        module = make(getattr(rnn_ext, name), construction, torch.float64)
        results = module(*forward.args, **forward.kwargs)
        module.float().double()
        for twin, result in zip(
            tensors(module(*forward.args, **forward.kwargs)), tensors(results), strict=True
        ):
            torch.testing.assert_close(twin, result, rtol=1e-5, atol=1e-5)
        module.to("meta")
        assert all(parameter.is_meta for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_errors(name, dtype):
    info = INFOS[name]
    cls = getattr(rnn_ext, name)
    cases = info.module_error_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=True
    )
    assert cases
    for case in cases:
        construction = case.module_error_input.constructor_input
        construct = lambda c=construction: cls(*c.args, **c.kwargs)  # noqa: E731
        if case.error_on == database.ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(case.error_type, match=case.error_regex):
                construct()
        else:
            module = construct().to(dtype)
            forward = case.module_error_input.forward_input
            with pytest.raises(case.error_type, match=case.error_regex):
                module(*forward.args, **forward.kwargs)
