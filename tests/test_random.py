"""Masks: Philox as published, and the same bits from C++, torch operations and NumPy."""

import numpy as np
import pytest
import torch

import rnn_ext
from rnn_ext import random
from rnn_ext.reference import random as truth

SEED = 0x299F31D0_082EFA98
STEPS, ROWS = torch.tensor([0, 1, 5, 2**31]), torch.tensor([3, 0, 2**32 - 1, 7])


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    """The known answers that come with its authors' library, Random123."""
    found = truth.philox(counter, key[0] | key[1] << 32)
    assert " ".join(f"{word:08x}" for word in found) == words


def expected(columns, p, kept, stream=9):
    return truth.keep(SEED, stream, STEPS, ROWS, columns, p) * kept


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("columns", [1, 4, 63, 64, 65, 300])
def test_the_kernel_fills_what_numpy_does(columns, threads, isa):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        like = torch.empty(0, dtype=dtype)
        mask = random.mask(torch.tensor(SEED), 9, STEPS, ROWS, columns, 0.3, 2.0, like)
        assert mask.dtype == dtype
        np.testing.assert_array_equal(mask.double(), expected(columns, 0.3, 2.0))
    like = torch.empty(0, dtype=torch.bool)
    chosen = random.mask(torch.tensor(SEED), 9, STEPS, ROWS, columns, 0.3, 1.0, like)
    np.testing.assert_array_equal(chosen, truth.keep(SEED, 9, STEPS, ROWS, columns, 0.3))


def test_threads_do_not_change_a_bit():
    rows, found = torch.arange(3000), []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(
            random.mask(torch.tensor(SEED), 0, rows % 7, rows, 70, 0.5, 1.0, torch.empty(0))
        )
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_torch_operations_fill_the_same():
    """What runs on other devices, under torch.func and in compiled models."""

    def fill(x):
        return (x * random.mask(torch.tensor(SEED), 9, STEPS, ROWS, 10, 0.3, 2.0, x)).sum()

    found = torch.func.grad(fill)(torch.ones(4, 10, dtype=torch.float64))
    np.testing.assert_array_equal(found, expected(10, 0.3, 2.0))
    like = torch.empty(0, dtype=torch.bool)
    chosen = torch.func.vmap(
        lambda x: x * random.mask(torch.tensor(SEED), 9, STEPS, ROWS, 10, 0.3, 1.0, like),
        randomness="same",
    )(torch.ones(2, 1))
    np.testing.assert_array_equal(chosen[1], truth.keep(SEED, 9, STEPS, ROWS, 10, 0.3))
    seed = torch.tensor(SEED)
    compiled = torch.compile(
        lambda x: random.mask(seed, 9, STEPS, ROWS, 10, 0.3, 2.0, x), backend="eager"
    )
    np.testing.assert_array_equal(compiled(torch.ones(1)), expected(10, 0.3, 2.0))


def test_masks_have_their_probability_and_are_their_own():
    rows = torch.arange(400)
    masks = {
        (purpose, layer): truth.keep(
            SEED, truth.stream(purpose, layer), rows * 0, rows, 100, 0.25
        ).astype(float)
        for purpose in random.STREAMS
        for layer in range(3)
    }
    for key, mask in masks.items():
        assert abs(mask.mean() - 0.75) < 5 * (0.25 * 0.75 / mask.size) ** 0.5, key
        for other, theirs in masks.items():
            if other != key:
                assert abs(np.corrcoef(mask.ravel(), theirs.ravel())[0, 1]) < 0.03
    assert truth.threshold(0.0) == 0 and truth.threshold(1 - 1e-12) == 2**32 - 1


def test_torch_manual_seed_governs_them():
    layer = rnn_ext.GRU(3, 4, 2, weight_dropout=0.5, variational_dropout=0.5)
    x = torch.randn(5, 2, 3)
    torch.manual_seed(3)
    first, second = layer(x)[0], layer(x)[0]
    following = torch.rand(1)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(first, layer(x)[0]) and torch.equal(second, layer(x)[0])
    assert torch.equal(following, torch.rand(1))
    torch.manual_seed(3)  # one number for each call
    torch.randint(2**62, ()), torch.randint(2**62, ())
    assert torch.equal(following, torch.rand(1))
    before = torch.get_rng_state()
    layer.eval()(x)
    assert torch.equal(before, torch.get_rng_state())


def test_entries_of_vmap_share_masks_or_are_refused():
    layer = rnn_ext.RNN(3, 4, weight_dropout=0.5)
    x = torch.randn(2, 5, 1, 3)
    torch.manual_seed(0)
    found = torch.func.vmap(lambda x: layer(x)[0], randomness="same")(x)
    for k in range(2):
        torch.manual_seed(0)
        torch.testing.assert_close(found[k], layer(x[k])[0])
    with pytest.raises(RuntimeError, match="use randomness='same'"):
        torch.func.vmap(lambda x: layer(x)[0], randomness="different")(x)


def test_the_operator_passes_the_checks_of_torch():
    steps, rows = torch.tensor([0, 2, 1]), torch.tensor([4, 0, 3])
    given = (torch.tensor(7), 3, steps, rows, 6, truth.threshold(0.25), 0.0, 2.0, torch.float64)
    torch.library.opcheck(torch.ops.rnn_ext.random_mask.default, given)
    expected = truth.keep(7, 3, steps, rows, 6, 0.25) * 2.0
    assert torch.equal(torch.ops.rnn_ext.random_mask(*given), torch.from_numpy(expected))
