"""Options of layers that torch.nn has not, against the NumPy reference."""

import pytest
import torch
from kinds import KINDS, make, random, squares
from options_by_numpy import OPTIONS, expected, h_n, learned, seed_of_next_call
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from twins import assert_same, tensors

import rnn_ext
from rnn_ext import composite, reference

each_kind = pytest.mark.parametrize("kind", KINDS)
T, B = 5, 3
LENGTHS = [3, 5, 1]


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "both_ways"])
@pytest.mark.parametrize("option", OPTIONS)
@each_kind
def test_options_follow_the_reference(kind, option, bidirectional):
    module = make(kind, 2, 3, bidirectional=bidirectional, **OPTIONS[option])
    x, hx = random(T, B, 2), learned(module, B)
    for training in (True, False):
        module.train(training)
        for lengths in (None, LENGTHS):
            seed = seed_of_next_call()
            output, states = expected(module, x, hx, lengths, seed)
            results = module(x, lengths=lengths)
            assert_same(results[0], output)
            assert_same(h_n(module, results), states)
    seed_of_next_call()
    assert_same(module(x.expand(T, B, 2), lengths=torch.tensor([T] * B)), module.eval()(x))
    assert_same(module(x[:, 0]), [part.squeeze(1) for part in tensors(module(x[:, :1]))])


@pytest.mark.parametrize("option", ["weight_dropout", "zoneout", "all"])
def test_every_way_to_give_a_batch_has_the_same_masks(option):
    module = make("lstm", 2, 3, bidirectional=True, **OPTIONS[option])
    x = random(T, B, 2)
    found = []
    for packed in (False, True):
        seed_of_next_call()
        given = pack_padded_sequence(x, LENGTHS, enforce_sorted=False) if packed else x
        output, state = module(given) if packed else module(x, lengths=LENGTHS)
        found.append([pad_packed_sequence(output)[0] if packed else output, *state])
    assert_same(*found)
    seed_of_next_call()
    with rnn_ext.use_backend("reference"):
        assert_same(list(tensors(module(x, lengths=LENGTHS))), found[0])
    seed_of_next_call()
    module.batch_first = True
    assert_same(module(x.transpose(0, 1), lengths=LENGTHS)[0], found[0][0].transpose(0, 1))


@pytest.mark.filterwarnings("ignore:.*no kernel:rnn_ext.FallbackWarning")
@pytest.mark.parametrize("option", [name for name in OPTIONS if name != "learned"])
def test_gradients(option):
    module = make("lstm_projected", 2, 3, **OPTIONS[option])
    x = random(3, 2, 2, requires_grad=True)

    def run(x, *_):
        seed_of_next_call()
        return tuple(tensors(module(x)))

    assert torch.autograd.gradcheck(run, (x, *module.parameters()))
    assert torch.autograd.gradgradcheck(
        lambda x: squares(run(x)), (x[:2, :1].detach().requires_grad_(),)
    )
    loss = squares(run(x))
    first = torch.autograd.grad(loss, x, retain_graph=True)
    assert_same(first, torch.autograd.grad(loss, x))


def test_the_initial_state_learns():
    module = make("lstm", 2, 3, bidirectional=True, learn_initial_state=True, proj_size=2)
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters() if n.startswith("initial")}
    assert shapes == {
        "initial_h_l0": (2,), "initial_c_l0": (3,),
        "initial_h_l0_reverse": (2,), "initial_c_l0_reverse": (3,),
    }  # fmt: skip
    assert not any(module.state_dict()[name].any() for name in shapes)
    h, c = learned(module, B)
    x = random(T, B, 2)
    h, c = (s.clone().requires_grad_() for s in (h, c))
    results = module(x)
    assert_same(results, module(x, (h, c)))
    given = torch.autograd.grad(squares(module(x, (h, c))), (h, c))
    own = torch.autograd.grad(squares(results), [getattr(module, name) for name in shapes])
    summed = [
        part.sum(0) for rows in zip(*given) for part in (rows[0][None].sum(1), rows[1][None].sum(1))
    ]
    assert_same(list(own), summed)
    module.reset_parameters()
    assert not any(module.state_dict()[name].any() for name in shapes)
    plain = make("gru", 2, 3)
    torch.manual_seed(0)
    reference_state = make("gru", 2, 3).state_dict()
    torch.manual_seed(0)
    extended = make("gru", 2, 3, learn_initial_state=True).state_dict()
    assert plain.state_dict().keys() == extended.keys() - {"initial_h_l0"}
    assert all(torch.equal(extended[name], value) for name, value in reference_state.items())


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", [name for name in KINDS if name != "lstm_projected"])
def test_a_width_for_each_layer(kind, bidirectional):
    widths = [3, 5, 5]
    module = make(kind, 2, widths, bidirectional=bidirectional, residual=True)
    ways = 1 + bidirectional
    assert module.hidden_size == (3, 5, 5) and module.num_layers == 3
    assert module.weight_hh_l1.shape[1] == 5 and module.weight_ih_l1.shape[1] == 3 * ways
    lstm = kind == "lstm"
    hx = tuple(random(ways, B, width) for width in widths)
    cx = tuple(random(ways, B, width) for width in widths)
    x = random(T, B, 2)
    results = module(x, (hx, cx) if lstm else hx)
    output, states = expected(module, x, [*hx, *cx] if lstm else hx)
    assert_same(results[0], output)
    assert_same(h_n(module, results), states)
    h = results[1][0] if lstm else results[1]
    assert [tuple(part.shape) for part in h] == [(ways, B, width) for width in widths]
    again = module(x, results[1])  # what it returns, it takes
    assert again[0].shape == (T, B, 5 * ways)
    assert_same(module(x, list(results[1])), again)
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    assert_same(h_n(module, module(packed)), h_n(module, module(x, lengths=LENGTHS)))
    alone = tuple(part[:, 0] for part in hx), tuple(part[:, 0] for part in cx)
    unbatched = module(x[:, 0], alone if lstm else alone[0])
    assert_same(unbatched[0], output[:, 0])
    module(x)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_widths_combine_with_initializations():
    layer = rnn_ext.LSTM(2, [3, 5], bidirectional=True, forget_bias=1, recurrent_init="identity")
    for suffix, width in (("l0", 3), ("l1", 5), ("l1_reverse", 5)):
        blocks = getattr(layer, f"weight_hh_{suffix}").detach().split(width)
        assert all(torch.equal(block, torch.eye(width)) for block in blocks)
        bias = getattr(layer, f"bias_ih_{suffix}").detach()
        assert (bias[width : 2 * width] == 1).all()
        assert bias[:width].abs().max() <= width**-0.5
    single = rnn_ext.LSTM(2, (3, 5), bias="single", forget_bias=2)
    assert (single.bias_ih_l1[5:10] == 2).all()
    assert not any(name.startswith("bias_hh") for name in single.state_dict())


def test_one_bias_has_the_speed_and_results_of_two():
    single, plain = make("gru", 2, 3, bias="single"), make("gru", 2, 3)
    plain.load_state_dict(single.state_dict() | {"bias_hh_l0": torch.zeros(9)})
    x = random(T, B, 2)
    assert_same(single(x), plain(x))
    assert list(single.state_dict()) == ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0"]
    kernel = rnn_ext.explain(single.float(), x.float()).steps[0].kernel
    assert kernel == "cpu"


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "both_ways"])
@each_kind
def test_gates(kind, bidirectional):
    module = make(kind, 2, 3, num_layers=2, bidirectional=bidirectional)
    x = random(T, B, 2)
    for lengths in (None, LENGTHS):
        output, state, gates = module(x, lengths=lengths, return_gates=True)
        assert_same((output, state), module(x, lengths=lengths))
        names = {"l": "ifgo", "g": "rzn", "r": "a"}[kind[0]]
        assert "".join(gates) == names
        for direction in range(1 + bidirectional):
            k = direction - 1 - bidirectional
            weights = [None if w is None else w.detach().numpy() for w in module._weights()[k]]
            # the last layer alone, on what the one before gave it
            first = make(kind, 2, 3, bidirectional=bidirectional)
            first.load_state_dict({n: p for n, p in module.state_dict().items() if "_l0" in n})
            inner = first(x, lengths=lengths)[0].detach().numpy()
            result = reference.forward(
                module._cell, inner, None, None, weights, lengths=lengths, reverse=bool(direction)
            )
            part = slice(3 * direction, 3 * direction + 3)
            for t, rows, record in result.tape.steps:
                for name in names if names != "a" else ():
                    found = gates[name][t, rows, part]
                    assert_same(found, torch.from_numpy(getattr(record, name)))
                if names == "a":
                    f = reference.cells.ACTIVATIONS[kind[4:]]
                    a = gates["a"][t, rows, part].detach().numpy()
                    assert_same(torch.from_numpy(f(a)), torch.from_numpy(record.h))
        if lengths:
            assert not any(gate[1:, 2].any() for gate in gates.values())
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    assert_same(
        [pad_packed_sequence(gate)[0] for gate in module(packed, return_gates=True)[2].values()],
        list(gates.values()),
    )


def test_gates_beside_cells_and_with_gradients():
    module = make("lstm_projected", 2, 3, bidirectional=True, batch_first=True)
    x = random(2, 3, 2, requires_grad=True)
    output, state, cells, gates = module(x, return_cells=True, return_gates=True)
    assert_same((output, state, cells), module(x, return_cells=True))
    assert all(gate.shape == cells.shape for gate in gates.values())
    i, f, g = (gates[name] for name in "ifg")
    forward = slice(0, 3)
    before = torch.cat((torch.zeros(2, 1, 3), cells[:, :-1, forward]), 1)
    assert_same((f * 1)[..., forward] * before + (i * g)[..., forward], cells[..., forward])
    assert torch.autograd.gradcheck(
        lambda x, *_: tuple(module(x, return_gates=True)[2].values()), (x, *module.parameters())
    )
    assert_same(module(x[0], return_gates=True)[2]["o"], gates["o"][0])
    narrow = make("gru", 2, 3).bfloat16()
    assert narrow(x.bfloat16(), return_gates=True)[2]["z"].dtype == torch.bfloat16


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("cell", reference.CELLS)
def test_gradients_of_zoneout_in_numpy(cell, ragged, reverse):
    lstm, gates = cell == "lstm", reference.CELLS[cell].gates
    sizes = torch.tensor([3, 2, 2, 1]) if ragged else None
    rows = (8,) if ragged else (4, 3)
    leaves = [random(*rows, 2), random(3, 3), random(3, 3) if lstm else None]
    leaves += [random(gates * 3, 2), random(gates * 3, 3), random(gates * 3), random(gates * 3)]
    leaves = [None if t is None else t.requires_grad_() for t in leaves]
    hold = torch.rand(*rows, 3, dtype=torch.float64), (torch.rand(*rows, 3) < 0.5).double()
    results = composite.layer(cell, *leaves, batch_sizes=sizes, reverse=reverse, zoneout=hold)
    results = [r for r in results if r is not None]
    upstream = [torch.randn_like(r) for r in results]
    x, h0, c0, *weights = (None if t is None else t.detach().numpy() for t in leaves)
    truth = reference.forward(
        cell, x, h0, c0, [*weights, None], batch_sizes=sizes, reverse=reverse,
        zoneout=[h.numpy() for h in hold],
    )  # fmt: skip
    found = [truth.output, truth.h_n, truth.c_n, truth.cells]
    assert_same(results, [torch.from_numpy(r) for r in found if r is not None])
    gradients = reference.backward(truth, *(d.numpy() for d in upstream))
    expected = torch.autograd.grad(results, [t for t in leaves if t is not None], upstream)
    ours = [getattr(gradients, n) for n in ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh")]
    assert_same([torch.from_numpy(g) for g in ours if g is not None], list(expected))
