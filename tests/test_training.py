"""A seeded training run follows torch.nn's trajectory."""

import pytest
import torch

import rnn_ext


def losses(library, name, options, steps=25):
    torch.manual_seed(3)
    layer = getattr(library, name)(12, 40, **options)
    width = (2 if options.get("bidirectional") else 1) * (options.get("proj_size") or 40)
    head = torch.nn.Linear(width, 5)
    parameters = [*layer.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    data = torch.Generator().manual_seed(7)
    inputs = torch.randn(4, 15, 8, 12, generator=data)
    targets = torch.randint(0, 5, (4, 15, 8), generator=data)
    history, state = [], None
    for step in range(steps):
        output, state = layer(inputs[step % 4], state)
        state = tuple(s.detach() for s in state) if name == "LSTM" else state.detach()
        loss = torch.nn.functional.cross_entropy(
            head(output).flatten(0, 1), targets[step % 4].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        history.append(loss.item())
    return torch.tensor(history)


@pytest.mark.parametrize(
    "name, options",
    [
        ("RNN", {}),
        ("RNN", {"nonlinearity": "relu", "num_layers": 2}),
        ("LSTM", {}),
        ("LSTM", {"num_layers": 2, "bidirectional": True, "dropout": 0.2}),
        ("GRU", {}),
        ("GRU", {"num_layers": 2, "bidirectional": True}),
    ],
    ids=str,
)
def test_training_follows_torch(name, options):
    ours, theirs = losses(rnn_ext, name, options), losses(torch.nn, name, options)
    assert theirs[-4:].mean() < theirs[:4].mean()
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
