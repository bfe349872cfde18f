"""Programs of others, each a function of ``change``, which may exchange the layers of its model.

Each returns the tensors that it computes, and how many seconds its work took.
"""

import time

import torch


def recurrent_ppo(change):
    """sb3-contrib's RecurrentPPO trains on CartPole: rollouts one step at a time, then updates."""
    from sb3_contrib import RecurrentPPO

    options = {"lstm_hidden_size": 64, "n_lstm_layers": 1, "net_arch": [32]}
    model = RecurrentPPO(
        "MlpLstmPolicy", "CartPole-v1", n_steps=128, batch_size=64, n_epochs=2, seed=0,
        device="cpu", policy_kwargs=options,
    )  # fmt: skip
    change(model.policy)
    start = time.perf_counter()
    model.learn(256)
    seconds = time.perf_counter() - start
    observations = torch.linspace(-1, 1, 40).view(10, 4).numpy()
    state, actions = None, []
    for observation in observations:
        action, state = model.predict(observation, state=state, deterministic=True)
        actions.append(float(action))
    return [
        *model.policy.parameters(),
        *map(torch.from_numpy, state),
        torch.tensor(actions),
    ], seconds


def speech_denoiser(change):
    """denoiser's Demucs enhances a recording as a whole, then as a stream of frames."""
    from denoiser.demucs import Demucs, DemucsStreamer

    torch.manual_seed(0)
    model = Demucs(hidden=24, depth=4, causal=True).eval()
    change(model)
    recording = torch.randn(1, 16_000)
    with torch.no_grad():
        whole = model(recording[None])
        start = time.perf_counter()
        streamer = DemucsStreamer(model, num_frames=1)
        stream = torch.cat([streamer.feed(recording), streamer.flush()], -1)
    return [whole, stream], time.perf_counter() - start


def speech_denoiser_training(change):
    """The same model, with a two-way LSTM, trained for a few steps."""
    from denoiser.demucs import Demucs

    torch.manual_seed(0)
    model = Demucs(hidden=16, depth=4, causal=False)
    change(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    clean = torch.randn(2, 1, 8_000)
    start = time.perf_counter()
    for _ in range(3):
        optimizer.zero_grad()
        loss = (model(clean + 0.1 * torch.randn(clean.shape)) - clean).abs().mean()
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    return [loss, *(p.grad for p in model.parameters()), *model.parameters()], seconds


def stanza_highway_lstm(change):
    """The encoder of stanza's taggers and parsers, trained on ragged sentences with dropout."""
    from stanza.models.common.hlstm import HighwayLSTM

    torch.manual_seed(0)
    options = {"batch_first": True, "bidirectional": True, "dropout": 0.3, "pad": True}
    model = HighwayLSTM(50, 100, num_layers=2, highway_func=torch.tanh, **options)
    change(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    words, lengths = torch.randn(16, 30, 50), list(range(30, 14, -1))
    start = time.perf_counter()
    for _ in range(5):
        optimizer.zero_grad()
        output, (h, c) = model(words, lengths)
        loss = output.square().mean() + h.mean() + c.square().mean()
        loss.backward()
        optimizer.step()
    return [output, h, c, *model.parameters()], time.perf_counter() - start


def stanza_lemmatizer(change):
    """stanza's sequence-to-sequence lemmatizer: an LSTM over characters, and LSTMCells with
    attention that write the lemma; trained, then decoded greedily."""
    from stanza.models.common.seq2seq_model import Seq2SeqModel

    torch.manual_seed(0)
    model = Seq2SeqModel(
        {
            "vocab_size": 40, "emb_dim": 32, "hidden_dim": 64, "num_layers": 2, "dropout": 0.2,
            "max_dec_len": 12, "attn_type": "soft",
        }
    )  # fmt: skip
    change(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    lengths = torch.tensor([12, 11, 9, 9, 7, 5, 4, 2])
    mask = torch.arange(12)[None] >= lengths[:, None]  # True where there is no character
    source = torch.randint(4, 40, (8, 12)).masked_fill(mask, 0)
    start = time.perf_counter()
    for _ in range(5):
        optimizer.zero_grad()
        logits, _ = model(source, mask, source)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), source.flatten())
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        written, _ = model.predict_greedy(source, mask)
    seconds = time.perf_counter() - start
    characters = torch.zeros(8, 13)
    for row, text in zip(characters, written):
        row[: len(text)] = torch.tensor(text, dtype=torch.float32)
    return [logits, *model.parameters(), characters], seconds


PROGRAMS = [
    recurrent_ppo, speech_denoiser, speech_denoiser_training, stanza_highway_lstm,
    stanza_lemmatizer,
]  # fmt: skip
