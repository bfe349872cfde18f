"""Programs with several processes, each run by test_concurrency.py in an interpreter of its own.

python tests/processes.py fork
"""

import os
import select
import sys
import threading
import warnings

import torch
from torch.utils.data import DataLoader, Dataset

import rnn_ext


def large_layer():
    """(layer, input) with work enough for a team of two threads."""
    torch.manual_seed(0)
    layer, x = rnn_ext.LSTM(16, 256, 2), torch.randn(20, 8, 16)
    assert rnn_ext.explain(layer, x).steps[0].threads == 2
    return layer, x


def gradients(layer, x):
    return torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))


def in_a_fork(work):
    """Runs ``work()`` in a forked child, which must end within a minute without an error."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of the threads
        pid = os.fork()
    if pid == 0:
        try:
            work()
            os.write(writer, b"done")
        finally:
            os._exit(0)
    ready, _, _ = select.select([reader], [], [], 60)
    if not ready:
        os.kill(pid, 9)
    os.waitpid(pid, 0)
    assert ready, "the child hangs"
    assert os.read(reader, 100) == b"done", "the child failed"


def fork():
    """Parent and child go on with teams of two threads, several times over."""
    layer, x = large_layer()
    with torch.no_grad():
        expected = layer(x)[0]
    expected_gradients = gradients(layer, x)
    large = torch.randn(1_000_000)
    sums = large.exp()

    def work():
        assert torch.get_num_threads() == 2
        with torch.no_grad():
            assert torch.equal(layer(x)[0], expected)
        for ours, theirs in zip(gradients(layer, x), expected_gradients, strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(large.exp(), sums)

    for _ in range(2):
        in_a_fork(work)
        work()
    in_a_fork(lambda: in_a_fork(work))


def fork_in_a_thread():
    """The thread that forks is another than the one that has computed, or has a team too."""
    layer, x = large_layer()
    with torch.no_grad():
        expected = layer(x)[0]

    def work():
        with torch.no_grad():
            assert torch.equal(layer(x)[0], expected)

    failures = []

    def body(compute_first):
        try:
            if compute_first:
                work()
            in_a_fork(work)
        except BaseException as failure:
            failures.append(failure)

    for compute_first in (False, True):
        thread = threading.Thread(target=body, args=(compute_first,))
        thread.start()
        thread.join()
    work()
    if failures:
        raise failures[0]


class Features(Dataset):
    """Makes its samples with a layer, in the worker."""

    def __init__(self, layer, x):
        self.layer, self.x = layer, x

    def __len__(self):
        return 4

    def __getitem__(self, k):
        with torch.no_grad():
            return self.layer(self.x * (k + 1))[0]


def load(context, workers):
    layer, x = large_layer()
    data = Features(layer, x)
    expected = [data[k] for k in range(4)]
    gradients(layer, x)
    options = {"num_workers": workers, "multiprocessing_context": context, "timeout": 120}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for batch, one in zip(DataLoader(data, batch_size=None, **options), expected, strict=True):
            torch.testing.assert_close(batch, one)
    gradients(layer, x)


def loader_fork():
    load("fork", 2)


def loader_spawn():
    load("spawn", 1)


def shared_memory():
    """Hogwild: two children train the parent's weights, which it sees changing."""
    torch.manual_seed(0)
    layer, x = rnn_ext.GRU(4, 8).share_memory(), torch.randn(6, 3, 4)
    assert all(parameter.is_shared() for parameter in layer.parameters())

    def loss():
        return layer(x)[0].sub(0.5).square().mean()

    optimizer = torch.optim.SGD(layer.parameters(), 0.3)

    def work():
        for _ in range(20):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

    losses = []
    for _ in range(3):
        with torch.no_grad():
            losses.append(loss().item())
        threads = [threading.Thread(target=in_a_fork, args=(work,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert losses[0] > 1.05 * losses[1] and losses[1] > 1.05 * losses[2], losses


if __name__ == "__main__":
    torch.set_num_threads(2)
    globals()[sys.argv[1]]()
    print("done")
