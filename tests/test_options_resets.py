"""Options of layers where episodes begin inside a sequence."""

from itertools import pairwise

import pytest
import torch
from kinds import KINDS, make, random, squares
from options_by_numpy import OPTIONS, expected, h_n, learned, seed_of_next_call
from torch.nn.utils.rnn import pack_padded_sequence
from twins import assert_same, tensors

import rnn_ext

T, B = 6, 3
LENGTHS = [4, 6, 1]
WIDTHS = {"hidden": [3, 4, 4], "residual": True, "weight_dropout": 0.3}
WITHOUT_ZONEOUT = {**OPTIONS["all"], "zoneout": 0.0}
both_ways = pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "both_ways"])


def random_resets():
    resets = torch.rand(T, B) < 0.4
    resets[2, 0] = resets[3, 1] = True
    return resets


def random_state(module, batch):
    """In the form of hx, and as a list of its tensors."""
    flat = [random(rows, batch, width) for rows, width in module._state_sizes()]
    kinds = [flat] if module._cell != "lstm" else [flat[: len(flat) // 2], flat[len(flat) // 2 :]]
    if not isinstance(module.hidden_size, tuple):
        kinds = [kind[0] for kind in kinds]
    return (tuple(kinds) if module._cell == "lstm" else kinds[0]), flat


def every_row(module, state, batch):
    """``state`` as the reference takes it: rows of all layers, [rows, B, size]."""
    return None if state is None else [s.expand(-1, batch, -1) for s in state]


@both_ways
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", ["rnn_relu", "lstm_projected", "gru", "gru_reset_before"])
def test_options_and_resets_follow_the_reference(kind, option, bidirectional):
    module = make(kind, 2, 3, bidirectional=bidirectional, **OPTIONS[option])
    x, resets, hx = random(T, B, 2), random_resets(), learned(module, B)
    for training, lengths, batch in ((True, None, None), (True, LENGTHS, B), (False, None, 1)):
        module.train(training)
        initial, flat = (None, None) if batch is None else random_state(module, batch)
        seed = seed_of_next_call()
        output, states = expected(
            module, x, hx, lengths, seed, resets.numpy(), every_row(module, flat, B)
        )
        results = module(x, lengths=lengths, resets=resets, initial_state=initial)
        assert_same(results[0], output)
        assert_same(h_n(module, results), states)


@both_ways
@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm", "gru"])
def test_widths_and_resets_follow_the_reference(kind, bidirectional):
    module = make(kind, 2, bidirectional=bidirectional, **WIDTHS)
    x, resets = random(T, B, 2), random_resets()
    for batch, lengths in ((B, None), (1, LENGTHS)):
        hx, first = random_state(module, B)
        initial, again = random_state(module, batch)
        seed = seed_of_next_call()
        again = every_row(module, again, B)
        output, states = expected(module, x, first, lengths, seed, resets.numpy(), again)
        results = module(x, hx, lengths=lengths, resets=resets, initial_state=initial)
        assert_same(results[0], output)
        assert_same(h_n(module, results), states)
    alone = module.eval()(x[:, 0], resets=resets[:, 0])
    assert_same(alone[0], module(x, resets=resets)[0][:, 0])


@pytest.mark.filterwarnings("ignore:.*no kernel:rnn_ext.FallbackWarning")
@pytest.mark.parametrize("option", ["all", "without_zoneout", "widths"])
def test_gradients(option):
    options = OPTIONS | {"without_zoneout": WITHOUT_ZONEOUT, "widths": WIDTHS}
    module = make("lstm", 2, **{"hidden": 2} | options[option])
    x, resets = random(4, 2, 2, requires_grad=True), torch.rand(4, 2) < 0.5
    initial, flat = random_state(module, 1)
    leaves = [x, *(s.requires_grad_() for s in flat)]

    def run(x, *_):
        seed_of_next_call()
        return tuple(tensors(module(x, resets=resets, initial_state=initial)))

    assert torch.autograd.gradcheck(run, (*leaves, *module.parameters()))
    small = x[:, :1].detach().requires_grad_()
    resets = resets[:, :1]
    assert torch.autograd.gradgradcheck(lambda x: squares(run(x)), (small,))


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_serve_every_option(kind):
    x, resets = random(T, B, 2, requires_grad=True), random_resets()
    served = OPTIONS | {"without_zoneout": WITHOUT_ZONEOUT}
    if kind != "lstm_projected":
        served["widths"] = WIDTHS
    for options in served.values():
        module = make(kind, 2, bidirectional=True, **{"hidden": 3} | options)
        assert {step.kernel for step in rnn_ext.explain(module, x).steps} == {"cpu"}
        with rnn_ext.use_backend("cpu"):  # which refuses what it cannot run
            output = module(x, lengths=LENGTHS, resets=resets, return_gates=True)[0]
            output.sum().backward()
            module(x, resets=resets)


def test_a_reset_goes_to_zeros_and_not_to_the_learned_state():
    module = make("lstm", 2, 3, learn_initial_state=True, bias="single")
    x, all_of_them = random(T, B, 2), torch.ones(T, B, dtype=torch.bool)
    hx = learned(module, B)
    results = module(x, resets=all_of_them)
    zeros = [torch.zeros_like(state) for state in hx]
    assert_same(results, module(x, zeros, resets=all_of_them))
    found = torch.autograd.grad(squares(results), [module.initial_h_l0, module.initial_c_l0])
    assert not any(gradient.any() for gradient in found)
    # what the learned state is for has to be said
    named = tuple(getattr(module, f"initial_{k}_l0")[None, None] for k in "hc")
    results = module(x, resets=all_of_them, initial_state=named)
    rows = module(x.flatten(0, 1)[None], lengths=[1] * (T * B))[0]
    assert_same(results[0], rows.view(T, B, 3))
    assert torch.autograd.grad(squares(results), module.initial_h_l0)[0].all()


def gates_by_episode(module, x, resets, initial, length):
    """The gates of one sequence, [T, ...] of each, from a run of each of its episodes alone."""
    begins = sorted({0, *resets[:length].nonzero().flatten().tolist(), length})
    parts = []
    for begin, end in pairwise(begins):
        parts.append(module(x[begin:end, None], initial, return_gates=True)[2])
    return {name: torch.cat([part[name] for part in parts])[:, 0] for name in parts[0]}


@both_ways
@pytest.mark.parametrize("kind", KINDS)
def test_gates_know_of_resets(kind, bidirectional):
    module = make(kind, 2, 3, num_layers=2, bidirectional=bidirectional)
    x, resets = random(T, B, 2), random_resets()
    hx, _ = random_state(module, 1)
    everywhere = hx if isinstance(hx, tuple) else (hx,)
    first = [state.expand(-1, B, -1) for state in everywhere]
    first = tuple(first) if isinstance(hx, tuple) else first[0]
    for lengths in (None, LENGTHS):
        given = {"resets": resets, "initial_state": hx, "return_gates": True}
        found = module(x, first, lengths=lengths, **given)[2]
        for b in range(B):
            length = T if lengths is None else lengths[b]
            alone = gates_by_episode(module, x[:, b], resets[:, b], hx, length)
            assert_same({name: gate[:length, b] for name, gate in found.items()}, alone)
            assert not any(gate[length:, b].any() for gate in found.values())
        zeros = module(x, lengths=lengths, resets=resets, return_gates=True)[2]
        none = torch.utils._pytree.tree_map(torch.zeros_like, hx)
        again = module(x, lengths=lengths, **{**given, "initial_state": none})[2]
        assert_same(zeros, again)
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    rows = pack_padded_sequence(resets, LENGTHS, enforce_sorted=False).data
    gates = module(packed, first, resets=rows, initial_state=hx, return_gates=True)[2]
    padded = pack_padded_sequence(torch.stack(list(found.values()), -1), LENGTHS, False, False)
    assert_same(torch.stack([gate.data for gate in gates.values()], -1), padded.data)


def test_gates_of_zoneout_start_from_what_a_reset_restores():
    module = make("gru", 2, 3, zoneout=0.4).eval()
    x, resets = random(T, 1, 2), random_resets()[:, :1]
    hx, _ = random_state(module, 1)
    found = module(x, hx, resets=resets, initial_state=hx, return_gates=True)[2]
    assert_same(
        {name: gate[:, 0] for name, gate in found.items()},
        gates_by_episode(module, x[:, 0], resets[:, 0], hx, T),
    )


@pytest.mark.parametrize(
    "options", [OPTIONS["all"], {**WIDTHS, "bidirectional": True}], ids=["all", "widths"]
)
def test_compile_without_a_graph_break(options):
    torch._dynamo.reset()
    x, resets = random(T, B, 2), random_resets()
    module = make("lstm", 2, **{"hidden": 3} | options)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    initial, _ = random_state(module, B)
    given = {"resets": resets, "initial_state": initial, "return_gates": True}
    for lengths in (None, torch.tensor(LENGTHS))[module.bidirectional :]:
        torch.manual_seed(3)
        found = compiled(x, lengths=lengths, **given)
        torch.manual_seed(3)
        assert_same(found, module(x, lengths=lengths, **given))


@pytest.mark.filterwarnings("ignore:rnn_ext. resets that differ:rnn_ext.FallbackWarning")
def test_under_the_transforms_of_torch_func():
    module = make("lstm", 2, bidirectional=True, **WIDTHS)
    x, resets = random(2, T, B, 2), torch.stack((random_resets(), random_resets()))

    def loss(x, resets):
        return squares(module(x, resets=resets, return_gates=True))

    expected = []
    for k in range(2):
        torch.manual_seed(4)
        leaf = x[k].clone().requires_grad_()
        expected.append(torch.autograd.grad(loss(leaf, resets[k]), leaf)[0])
    torch.manual_seed(4)
    assert_same(torch.func.grad(loss)(x[0], resets[0]), expected[0])
    torch.manual_seed(4)
    found = torch.func.vmap(torch.func.grad(loss), randomness="same")(x, resets)
    assert_same(found, torch.stack(expected))


def test_a_state_that_does_not_fit_the_widths_is_named():
    module = make("lstm", 2, [3, 4])
    x, resets = random(T, B, 2), random_resets()
    h, c = [random(1, B, 3), random(1, B, 4)], [random(1, B, 3), random(1, B, 4)]
    with pytest.raises(TypeError, match=r"initial_state must be a pair .* tensor for each layer"):
        module(x, resets=resets, initial_state=(random(2, B, 3), random(2, B, 3)))
    with pytest.raises(ValueError, match=r"initial_state must have shape \[1, 3 or 1, 4\], got"):
        module(x, resets=resets, initial_state=(h, c[:1] * 2))
