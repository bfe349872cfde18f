"""What tests/test_examples.py cannot see of the examples: that what they compute is right."""

import importlib
import math
from types import SimpleNamespace

import pytest
import torch

import rnn_ext

pytestmark = pytest.mark.usefixtures("examples")


def arguments(**values):
    return SimpleNamespace(**{"cell": "gru", "layers": 1, "hidden": 12, "seed": 0} | values)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_control_has_the_same_policy_in_both_libraries(cell):
    control = importlib.import_module("control")
    policies = []
    for library in (rnn_ext, torch.nn):
        torch.manual_seed(3)
        policies.append(control.Policy(library, arguments(cell=cell)))
    generator = torch.Generator().manual_seed(5)
    seen = torch.randn(9, 4, 2, generator=generator)
    new = torch.rand(9, 4, generator=generator) < 0.3
    new[0] = False
    results = []
    for policy in policies:
        _, _, state = policy(seen, None, new)
        logit, value, _ = policy(seen, state, new)
        (logit.square().sum() + value.sum()).backward()
        gradients = [parameter.grad for parameter in policy.parameters()]
        results.append([logit, value, *gradients])
    torch.testing.assert_close(*results)


def test_control_estimates_advantages_as_their_definition():
    ppo = importlib.import_module("ppo")
    value, last = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[4.0]])
    rewards = torch.ones(3, 1)
    fallen = torch.tensor([[False], [True], [False]])
    got = ppo.estimate_advantages(value, last, rewards, fallen, fallen)
    errors = [0.05 + 0.99 * 2 - 1, 0.05 - 2, 0.05 + 0.99 * 4 - 3]
    expected = [errors[0] + 0.99 * 0.95 * errors[1], errors[1], errors[2]]
    torch.testing.assert_close(got.flatten(), torch.tensor(expected))


def test_control_resumes(run_example, tmp_path):
    pytest.importorskip("gymnasium")
    tiny = ["--window", 32, "--batch", 4, "--hidden", 8, "--checkpoint", tmp_path / "a.pt"]
    code, _, err = run_example("control", *tiny, "--steps", 3)
    assert code == 0, err
    first = torch.load(tmp_path / "a.pt", weights_only=True)["learners"]
    code, _, err = run_example("control", *tiny, "--steps", 5, "--resume")
    assert code == 0, err
    second = torch.load(tmp_path / "a.pt", weights_only=True)["learners"]
    for name in ("rnn_ext", "torch.nn"):
        assert len(second[name]["losses"]) == 5
        assert second[name]["losses"][:3] == first[name]["losses"]
    assert first["rnn_ext"]["losses"] == pytest.approx(first["torch.nn"]["losses"], abs=1e-3)
    code, _, err = run_example("control", *tiny, "--layers", 2)
    assert code == 2 and "one layer" in err


@pytest.mark.parametrize("tied", [False, True])
def test_samples_are_those_of_the_usual_loop(tied):
    language = importlib.import_module("language")
    torch.manual_seed(4)
    model = language.LanguageModel(torch.nn.LSTM, 9, 12, 2, tied).double().eval()
    torch.manual_seed(6)
    [drawn] = language.sample(model, [2, 5], 30, 0.8)
    torch.manual_seed(6)
    codes, state, expected = [2, 5], None, []
    for _ in range(30):
        logits, state = model(torch.tensor(codes).unsqueeze(1), state)
        codes = torch.softmax(logits[-1, 0] / 0.8, 0).multinomial(1).tolist()
        expected += codes
    assert drawn == expected and len(set(drawn)) > 4
    torch.manual_seed(6)
    stopped = language.sample(model, [2, 5], 30, 0.8, stop=drawn[9])
    assert stopped == [drawn[: drawn.index(drawn[9])]]
    many = language.sample(model, [2, 5], 30, 0, count=3, top_k=1000)
    assert len(many) == 3 and many[0] == many[1] == many[2] and len(many[0]) == 30


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_one_to_many_writes_on_from_what_it_is_told(cell):
    one_to_many = importlib.import_module("one_to_many")
    torch.manual_seed(2)
    model = one_to_many.Namer(getattr(rnn_ext, cell.upper()), arguments(cell=cell, layers=2), 3, 7)
    model, told = model.double(), torch.tensor([2, 0, 1, 2])
    torch.manual_seed(9)
    names = model.sample(told, 0.9)
    torch.manual_seed(9)
    state, letters = model.begin(told), [torch.zeros(1, 4, dtype=torch.int64)]
    while len(letters) <= one_to_many.LONGEST:
        logits, state = model(letters[-1], state)
        letters.append(torch.softmax(logits[0] / 0.9, -1).multinomial(1).t())
    expected = torch.cat(letters[1:]).t()
    before_the_end = (expected != one_to_many.END).int().cumprod(1)  # nothing follows it
    assert torch.equal(names, (expected * before_the_end)[:, : names.size(1)])
    assert names.unique().numel() > 4


@pytest.mark.parametrize("library", [rnn_ext, torch.nn])
def test_translate_decodes(library):
    translate = importlib.import_module("translate")
    torch.manual_seed(1)
    model = translate.Speller(library, arguments(hidden=16), outputs=6)
    with torch.no_grad():
        model.readout.weight.mul_(4)  # far from uniform
    letters = translate.spell(["cat", "recurrent", "ox"], "cpu")
    phonemes = torch.randint(3, 6, (5, 3))
    told, _ = model.decode(phonemes, model.encode(letters))
    stepped, _ = model.decode_sampling(phonemes, model.encode(letters), probability=0.0)
    torch.testing.assert_close(stepped, told)

    def likelihood(numbers, word):
        end = [translate.EOS] if len(numbers) < translate.LONGEST else []
        targets = torch.tensor([*numbers, *end]).unsqueeze(1)
        inputs = torch.cat([torch.tensor([[translate.BOS]]), targets[:-1]])
        logits, _ = model.decode(inputs, model.encode(letters[:, word : word + 1]))
        logits[..., [translate.PAD, translate.BOS]] = -torch.inf
        return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).sum().item()

    greedy, wide = (translate.pronounce(model, letters, beam) for beam in (1, 5))
    for word in range(3):
        begin = torch.tensor([[translate.BOS]])
        logits = model.decode(begin, model.encode(letters[:, word : word + 1]))[0].flatten()
        first = translate.EOS + logits[translate.EOS :].argmax().item()
        assert [*greedy[word], translate.EOS][0] == first
        assert likelihood(wide[word], word) >= likelihood(greedy[word], word) - 1e-5
    assert wide != greedy


def test_error_rates():
    pronunciation = importlib.import_module("pronunciation")
    assert pronunciation.edit_distance("kitten", "sitting") == 3
    assert pronunciation.edit_distance("", "abc") == pronunciation.edit_distance("abc", "") == 3
    said, right = [[3, 4], [5]], [[[3, 4, 5], [3, 4]], [[6, 5]]]
    assert pronunciation.error_rates(said, right) == (25.0, 50.0)


def test_forecast_baselines_of_a_wave():
    earth = importlib.import_module("earth")
    series = torch.sin(2 * math.pi * torch.arange(600) / earth.LUNAR)
    args = arguments(window=40, horizon=30)
    _, future = earth.held_out(series, 400, args)
    naive, lunar, autoregression = earth.baselines(series, 400, args).values()
    for exact in (lunar, autoregression):  # it repeats after 27 days, and has a linear recurrence
        torch.testing.assert_close(exact, future, atol=2e-4, rtol=0)
    assert (naive - future).abs().mean() > 0.5


def test_forecast_lives_on_what_it_says():
    forecast = importlib.import_module("forecast")
    torch.manual_seed(0)
    model = forecast.Forecaster(rnn_ext.LSTM, arguments(), step=0.2)
    history = torch.randn(30, 3)
    days = model.forecast(history, 4)
    for said in range(4):
        whole, _ = model(torch.cat([history, days[:said]]))
        torch.testing.assert_close(days[said], whole[-1].detach())


@pytest.mark.parametrize("kind", ["rnn", "irnn", "lstm", "gru"])
def test_gradient_health_finds_what_cells_say(kind):
    flows, digits = map(importlib.import_module, ("flows", "digits"))
    torch.manual_seed(2)
    member = digits.Classifier(rnn_ext, kind, "pixels", "last", 12, 1)
    steps, labels = torch.rand(20, 6, 1), torch.randint(10, (6,))
    ours, theirs = flows.flow(member, steps, labels), flows.flow_by_cells(member, steps, labels)
    assert ours.shape == (20,) and (ours > 0).all()
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("residual", [False, True])
def test_gradient_health_goes_down_through_layers(residual):
    args, steps, labels = arguments(depth=3), torch.rand(6, 4, 1), torch.randint(10, (4,))
    found = importlib.import_module("flows").flow_through_depth(args, steps, labels, residual)
    torch.manual_seed(args.seed)
    layers, readout = rnn_ext.RNN(1, 12, 3), torch.nn.Linear(12, 10)
    below, every = list(steps), []
    for layer in range(3):
        cell = torch.nn.RNNCell(12 if layer else 1, 12)
        names = cell.state_dict()
        cell.load_state_dict({name: getattr(layers, f"{name}_l{layer}") for name in names})
        states = [cell(below[0], torch.zeros(4, 12))]
        for x in below[1:]:
            states.append(cell(x, states[-1]))
        linked = residual and layer > 0
        below = [h + x for h, x in zip(states, below)] if linked else states
        every.append(states)
    loss = torch.nn.functional.cross_entropy(readout(below[-1]), labels, reduction="sum")
    for norm, states in zip(found, every, strict=True):
        grads = torch.autograd.grad(loss, states, retain_graph=True)
        torch.testing.assert_close(norm.float(), torch.stack(grads).norm())


def test_one_to_many_reads_names_of_the_users(run_example, tmp_path):
    path = tmp_path / "names.txt"
    syllables = {"short": "ab", "long": "xyzw"}
    lines = [f"{c}\t{s}{n}{s * 2}" for c, s in syllables.items() for n in range(30)]
    path.write_text("\n".join(lines))
    options = ["--names", path, "--hidden", 8, "--steps", 10, "--batch", 16]
    code, out, err = run_example("one_to_many", *options)
    assert code == 0, err
    assert "2 categories, 54 names to train, 6 to test" in out
    for broken, sentence in (("short ab", "line 1"), ("short\tab", "give 20 or more")):
        path.write_text(broken)
        code, _, err = run_example("one_to_many", *options)
        assert code == 2 and err.count("\n") == 1 and sentence in err
