"""`accelerate` and `restore` on models that exist, and torch.nn's names replaced by ours."""

import copy

import pytest
import torch
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from twins import CELLS, LAYERS, assert_same

import rnn_ext


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


class Tagger(torch.nn.Module):
    """One of each, in places where models have them."""

    def __init__(self):
        super().__init__()
        nn = torch.nn
        self.encoder = nn.LSTM(4, 3, 2, bidirectional=True, batch_first=True, dropout=0.1)
        self.layers = nn.ModuleList(
            [nn.GRU(6, 3, batch_first=True), nn.RNN(3, 3, batch_first=True)]
        )
        self.cells = nn.ModuleDict({name: getattr(nn, name)(3, 3) for name in CELLS})
        self.head = nn.Linear(3, 2)
        self.shared = self.layers[1]

    def forward(self, x):
        x, _ = self.encoder(x)
        for layer in self.layers:
            x, _ = layer(x)
        x, _ = self.shared(x)
        step = x[:, -1]
        step, _ = self.cells["LSTMCell"](self.cells["GRUCell"](self.cells["RNNCell"](step)))
        return self.head(step)


def count(model, library):
    kinds = tuple(getattr(library, name) for name in LAYERS + CELLS)
    return sum(type(module) in kinds for module in model.modules())


def test_accelerate_and_restore_a_model():
    torch.manual_seed(0)
    model = Tagger().double().eval()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    before, modules = model(x), list(model.modules())
    parameters = dict(model.named_parameters())
    assert rnn_ext.accelerate(model) is model
    assert (count(model, rnn_ext), count(model, torch.nn)) == (6, 0)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert model.shared is model.layers[1]
    assert not model.encoder.training
    assert_same(model(x), before)
    assert_same(copy.deepcopy(model)(x), before)
    assert rnn_ext.accelerate(model) is model
    assert rnn_ext.restore(model) is model
    assert (count(model, rnn_ext), count(model, torch.nn)) == (0, 6)
    assert_same(model(x), before)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_a_bare_layer_keeps_everything_it_had(name):
    layer = getattr(torch.nn, name)(4, 3)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.register_buffer("note", torch.arange(3))
    weight = next(layer.parameters()).requires_grad_(False)
    layer.of_the_user = "here"
    text, keys = str(layer), list(layer.state_dict())
    same = rnn_ext.accelerate(layer)
    assert same is layer and type(layer) is getattr(rnn_ext, name)
    layer(torch.randn(2, 4) if name in CELLS else torch.randn(5, 2, 4))
    assert calls == ["before", "forward"]
    assert str(layer) == text and list(layer.state_dict()) == keys
    assert next(layer.parameters()) is weight and not weight.requires_grad
    assert layer.of_the_user == "here" and not layer.eval().training
    assert type(rnn_ext.restore(layer)) is getattr(torch.nn, name)


def test_an_optimizer_made_before_goes_on_training():
    losses = []
    for swap in (lambda model: model, rnn_ext.accelerate):
        torch.manual_seed(0)
        model = Tagger().double().eval()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        x = torch.randn(8, 5, 4, dtype=torch.float64)
        target = x.sum((1, 2)).gt(0).long()
        swap(model)
        losses.append([])
        for _ in range(10):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-8)
    assert losses[1][-1] < losses[1][0]


def test_parametrizations_survive():
    layer = torch.nn.LSTM(4, 3, dtype=torch.float64)
    parametrize.register_parametrization(layer, "weight_hh_l0", Doubled())
    torch.nn.utils.parametrizations.weight_norm(layer, "weight_ih_l0")
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    with torch.no_grad():  # torch.nn keeps the weights it computed, and copies no graph
        before, keys = layer(x), list(layer.state_dict())
    rnn_ext.accelerate(layer)
    assert isinstance(layer, rnn_ext.LSTM) and parametrize.is_parametrized(layer, "weight_hh_l0")
    assert list(layer.state_dict()) == keys
    assert_same(layer(x), before)
    assert_same(copy.deepcopy(layer)(x), before)
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    rnn_ext.restore(layer)
    assert isinstance(layer, torch.nn.LSTM) and not isinstance(layer, rnn_ext.LSTM)
    parametrize.remove_parametrizations(layer, "weight_ih_l0")
    assert type(layer) is torch.nn.LSTM
    assert_same(layer(x), before)
    assert type(rnn_ext.accelerate(layer)) is rnn_ext.LSTM


def test_classes_of_users_are_left_alone():
    class Mine(torch.nn.LSTM):
        pass

    model = torch.nn.Sequential(Mine(4, 3))
    rnn_ext.accelerate(model)
    assert type(model[0]) is Mine


def test_restore_refuses_what_torch_nn_cannot_do_and_changes_nothing():
    model = torch.nn.ModuleDict(
        {
            "fine": rnn_ext.LSTM(4, 3, forget_bias=1.0, recurrent_init="orthogonal"),
            "original": rnn_ext.GRU(4, 3, reset_after=False),
        }
    )
    with pytest.raises(ValueError, match="restore: original is a GRU with reset_after=False"):
        rnn_ext.restore(model)
    assert type(model["fine"]) is rnn_ext.LSTM
    with pytest.raises(ValueError, match="restore: the model is a RNN with nonlinearity='sigmoid'"):
        rnn_ext.restore(rnn_ext.RNN(4, 3, nonlinearity="sigmoid"))
    with pytest.raises(ValueError, match="RNNCell with nonlinearity='sigmoid'"):
        rnn_ext.restore(rnn_ext.RNNCell(4, 3, nonlinearity="sigmoid"))
    restored = rnn_ext.restore(model["fine"])
    assert type(restored) is torch.nn.LSTM and str(restored) == "LSTM(4, 3)"
    assert "forget_bias" not in restored.__dict__


def test_what_is_no_module_is_refused():
    for function in (rnn_ext.accelerate, rnn_ext.restore):
        with pytest.raises(
            TypeError, match=f"{function.__name__}: model must be a torch.nn.Module"
        ):
            function([torch.nn.LSTM(4, 3)])


@pytest.fixture
def torch_nn_is_ours(monkeypatch):
    for name in LAYERS + CELLS:
        monkeypatch.setattr(torch.nn, name, getattr(rnn_ext, name))


def program():
    """A program that knows only torch.nn: ragged batches through a stack, decoded step by step."""
    torch.manual_seed(0)
    nn = torch.nn
    embedding = nn.Embedding(11, 4, dtype=torch.float64)
    encoder = nn.LSTM(4, 6, num_layers=2, bidirectional=True, dropout=0.2, dtype=torch.float64)
    bridge, decoder = nn.Linear(12, 5).double(), nn.GRUCell(4, 5, dtype=torch.float64)
    reader = nn.RNN(5, 5, nonlinearity="relu", batch_first=True, dtype=torch.float64)
    head = nn.Linear(5, 11).double()
    model = nn.ModuleList([embedding, encoder, bridge, decoder, reader, head])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.randint(11, (7, 3))
    losses = []
    for _ in range(5):
        packed = pack_padded_sequence(embedding(tokens), [4, 7, 2], enforce_sorted=False)
        output, (h_n, _) = encoder(packed)
        hidden = torch.tanh(bridge(torch.cat([h_n[-2], h_n[-1]], -1)))
        hidden = hidden + pad_packed_sequence(output)[0].mean()
        steps = []
        for token in tokens:
            hidden = decoder(embedding(token), hidden)
            steps.append(hidden)
        read, _ = reader(torch.stack(steps, 1))
        loss = nn.functional.cross_entropy(head(read).transpose(1, 2), tokens.T)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, str(model), model


def test_a_program_that_knows_only_torch_nn(request):
    theirs, text, _ = program()
    request.getfixturevalue("torch_nn_is_ours")
    ours, our_text, model = program()
    assert sum(type(module).__module__.startswith("rnn_ext") for module in model) == 3
    assert ours == pytest.approx(theirs, rel=1e-9)
    assert our_text == text


def test_accelerate_and_errors_once_torch_nn_is_ours(request):
    layer, half = torch.nn.GRU(4, 3), torch.nn.LSTMCell(4, 3).half()
    request.getfixturevalue("torch_nn_is_ours")
    assert type(rnn_ext.accelerate(layer)) is rnn_ext.GRU
    with pytest.raises(RuntimeError, match=r"input\.size"):
        layer(torch.randn(5, 2, 9))
    with pytest.raises(RuntimeError, match="inconsistent input_size"):
        rnn_ext.accelerate(half)(torch.randn(2, 9).half())
    assert type(rnn_ext.restore(layer)).__module__ == "torch.nn.modules.rnn"
