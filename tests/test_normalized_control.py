"""Checkpoints, recomputed gates, clipped and watched gradients beside layer_norm and peephole."""

import numpy as np
import pytest
import torch
from cases import ALL_NAMES, VARIANTS, run, run_reference, with_resets, with_zoneout
from gradient_cases import CLIPS, control, reference_gradients
from normalized_cases import KINDS, OPTIONS, make, make_normalized, run_ours
from tolerance import error
from twins import assert_same, forget_warnings, gradients, tensors

import rnn_ext
from rnn_ext import gradient_flow, reference
from rnn_ext.control import Control

MODES = ({"checkpoint_every": 3}, {"checkpoint_every": 1}, {"save": "states"})
every_kind = pytest.mark.parametrize("kind", KINDS)
every_mode = pytest.mark.parametrize("mode", MODES, ids=str)
clips = pytest.mark.parametrize("grad_clip", CLIPS, ids=str)
a_few = pytest.mark.parametrize("kind", ["rnn_relu", "lstm_peephole", "gru", "gru_reset_before"])
LAYERS = ("RNN", "LSTM-both", "GRU", "GRU-before")


@pytest.fixture(autouse=True)
def _fresh():
    forget_warnings()


@pytest.mark.parametrize("zoneout", [False, True], ids=["plain", "zoneout"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@every_kind
def test_checkpoints_keep_every_bit(kind, dtype, reverse, zoneout):
    """k * B a multiple of the rows that are summed at a time; the last stretch is shorter."""
    every = 64 if dtype == torch.bfloat16 else 32
    case = make_normalized(kind, (75, 8, 6, 17), reverse=reverse)
    case = (with_zoneout(case) if zoneout else case).to(dtype)
    expected, d_expected = run_ours(case)
    found, d_found = run(Control(checkpoint_every=every).layer, case)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(d_found[name], d_expected[name]) for name in d_expected)


@pytest.mark.parametrize("mode", [*MODES, {"checkpoint_every": 32}], ids=str)
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_both_directions(name, threads, mode):
    steps = 100 if mode.get("checkpoint_every") == 32 else 12
    options = {"num_layers": 2, "bidirectional": True}
    plain, ours = make(name, 24, 40, **options), make(name, 24, 40, **options, **mode)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(steps, 8, 24, requires_grad=True)
    expected, found = plain(x), ours(x)
    assert all(map(torch.equal, tensors(found), tensors(expected)))
    pairs = zip(gradients(ours, found, x), gradients(plain, expected, x), strict=True)
    if steps == 100:
        assert all(torch.equal(a, b) for a, b in pairs)
    else:
        assert all(error(a, b.double()) <= 5e-5 for a, b in pairs)


@pytest.mark.parametrize("zoneout", [None, "masks", 0.375])
@every_mode
@every_kind
def test_gradients_follow_the_reference(kind, mode, zoneout):
    """Also those of every cell state, of the last states and of what resets restore."""
    for variant in ("padded", "ragged_reverse"):
        case = make_normalized(kind, (7, 4, 3, 5), **VARIANTS[variant])
        case = with_resets(case, restored=True) if variant == "ragged_reverse" else case
        if zoneout is not None:
            case = with_zoneout(case, None if zoneout == "masks" else zoneout)
        found, d_found = run(Control(**mode).layer, case)
        for ours, truth in zip((found, d_found), run_reference(case), strict=True):
            for name in truth:
                assert error(ours[name], truth[name]) <= 1e-10, name


@every_mode
@a_few
def test_bfloat16_and_every_instruction_set(isa, kind, mode):
    case = make_normalized(kind, (20, 3, 4, 20)).to(torch.bfloat16)
    expected, d_expected = run_ours(case)
    found, d_found = run(Control(**mode).layer, case)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(error(d_found[name], d_expected[name].double()) <= 0.01 for name in d_expected)


@clips
@pytest.mark.parametrize("variant", ["padded", "ragged_reverse"])
@every_kind
def test_clipped_gradients_follow_the_reference(kind, variant, grad_clip):
    case = make_normalized(kind, (6, 4, 3, 5), **VARIANTS[variant])
    truth, plain = reference_gradients(case, grad_clip), reference_gradients(case, None)
    assert not torch.allclose(truth["w_hh"], plain["w_hh"], rtol=1e-3)  # the limit is felt
    how = control(grad_clip)
    for layer in (how.layer, how.composed, control(grad_clip, checkpoint_every=2).layer):
        _, found = run(layer, case)
        for name, value in truth.items():
            assert_same(found[name], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@clips
@a_few
def test_clipping_on_every_instruction_set(isa, kind, grad_clip, dtype):
    case = make_normalized(kind, (5, 3, 4, 19)).to(dtype)
    _, expected = run(control(grad_clip).composed, case)
    _, found = run(control(grad_clip).layer, case)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    assert all(error(found[name], expected[name].double()) <= tolerance for name in expected)


@every_kind
def test_a_limit_that_is_never_reached_changes_no_bit(kind):
    case = with_zoneout(make_normalized(kind, (6, 4, 3, 5))).to(torch.float32)
    _, expected = run_ours(case)
    for grad_clip in (1e6, ("norm", 1e6)):
        _, found = run(control(grad_clip).layer, case)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("mode", [{}, *MODES], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_gradient_flow_follows_the_reference(name, mode):
    layer = make(name, 3, 6, grad_clip=0.2, zoneout=0.3, **mode).double().eval()
    x, upstream = (torch.randn(7, 2, n, dtype=torch.float64) for n in (3, 6))
    resets = torch.zeros(7, 2, dtype=torch.bool)
    resets[4, 1] = True
    with rnn_ext.use_backend("cpu"):  # which refuses what it cannot run
        flow = gradient_flow(layer, x, upstream=upstream, resets=resets)
    weights = [None if w is None else w.detach().numpy() for w in layer._weights()[0]]
    result = reference.forward(
        layer._cell, x.numpy(), None, None, weights, resets=resets.numpy(), zoneout=(0.3, 0.3)
    )
    dh = reference.hidden_gradients(result, upstream.numpy(), grad_clip=0.2)
    assert_same(flow.per_sample[0, 0], torch.from_numpy(np.linalg.norm(dh, axis=-1)))


@pytest.mark.parametrize("name", LAYERS)
def test_less_is_kept(name):
    def kept(**mode):
        layer, seen = make(name, 16, 32, **mode), {}
        x = torch.randn(256, 4, 16)
        held = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}

        def pack(t):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output, _ = layer(x)
        held.add(output.untyped_storage().data_ptr())
        return sum(size for where, size in seen.items() if where not in held)

    states, row = (2 if "LSTM" in name else 1), 4 * 32 * 4
    initial = row  # the zeros that h_0 and c_0 are
    assert kept(checkpoint_every=64) == initial + 3 * row * states
    assert kept(save="states") == initial + 256 * row * (states - 1)
    assert kept() > 3 * 256 * row


@pytest.mark.filterwarnings("ignore:rnn_ext. gradients of gradients have no kernel")
@pytest.mark.parametrize("mode", [{"checkpoint_every": 2}, {"save": "states", "grad_clip": 0.3}])
@pytest.mark.parametrize("name", ["RNN", "LSTM-both"])
def test_gradients_of_gradients(name, mode):
    layer = make(name, 2, 4, **mode).double()
    x = torch.randn(5, 2, 2, dtype=torch.float64, requires_grad=True)

    def second():
        (first,) = torch.autograd.grad((layer(x)[0] * 0.7).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, *layer.parameters()))

    found = second()
    with rnn_ext.use_backend("reference"):
        assert_same(found, second())


@every_mode
def test_only_the_gradients_that_are_asked_for(mode):
    case = make_normalized("lstm_peephole", (8, 2, 3, 4))
    _, expected = run_ours(case)
    for i, name in enumerate(ALL_NAMES):
        if case.tensors[i] is None:
            continue
        leaves = [None if t is None else t.clone() for t in case.tensors]
        leaves[i].requires_grad_()
        results = Control(**mode).layer(case.cell, *leaves)
        (found,) = torch.autograd.grad(results, leaves[i], case.upstream)
        assert_same(found, expected[name])
