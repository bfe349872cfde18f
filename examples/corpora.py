"""What language models read: tokens, a vocabulary, windows of text."""

import collections
import re

import torch

PAD, UNK, BOS, EOS = range(4)
SPECIALS = ["<pad>", "<unk>", "<bos>", "<eos>"]


def words(text):
    """Words and runs of punctuation, each with the space before it: joined, they are the text."""
    return re.findall(r" ?\w+| ?[^\w\s]+|\s+", text)


class Vocabulary:
    """Tokens by falling frequency, after <pad>, <unk>, <bos> and <eos>; rare ones become <unk>.

    documents: lists of tokens. A token must occur min_count times; size limits how many are kept.
    """

    def __init__(self, documents, min_count=1, size=None):
        counts = collections.Counter(token for document in documents for token in document)
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        kept = [token for token, count in ranked if count >= min_count][:size]
        self.tokens = SPECIALS + kept
        self.codes = {token: code for code, token in enumerate(self.tokens)}

    def __len__(self):
        return len(self.tokens)

    def encode(self, tokens):
        return [self.codes.get(token, UNK) for token in tokens]

    def decode(self, codes):
        return "".join(self.tokens[code] for code in codes if code not in (PAD, BOS, EOS))

    def stream(self, documents):
        """One tensor [N]: every document between <bos> and <eos>."""
        codes = [[BOS, *self.encode(document), EOS] for document in documents]
        return torch.tensor([code for document in codes for code in document])


def cut_into_streams(codes, batch):  # [N] -> [N // batch, batch], each column a stretch of text
    length = len(codes) // batch
    return codes[: length * batch].view(batch, length).t().contiguous()


class Sequential:
    """Windows of streams [N, batch] one after the other: windows(step) -> inputs, targets, fresh.

    fresh: the state of the step before does not belong to this window. whole: the last window, a
    short one, is given too.
    """

    def __init__(self, streams, window, whole=False):
        self.streams, self.window = streams, window
        steps = max(0, len(streams) - 1)
        self.count = -(-steps // window) if whole else steps // window

    def __len__(self):  # in one pass over the text
        return self.count

    def __call__(self, step):
        start = step % self.count * self.window
        targets = self.streams[start + 1 : start + 1 + self.window]
        return self.streams[start : start + len(targets)], targets, start == 0


class Random:
    """Windows that begin anywhere in codes [N], drawn from seed and step; each starts afresh."""

    def __init__(self, codes, batch, window, seed):
        self.codes, self.batch, self.window, self.seed = codes, batch, window, seed

    def __len__(self):
        return (len(self.codes) - 1) // (self.batch * self.window)

    def __call__(self, step):
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        starts = torch.randint(len(self.codes) - self.window, (self.batch,), generator=generator)
        starts = starts.to(self.codes.device)
        positions = starts + torch.arange(self.window, device=starts.device).unsqueeze(1)
        return self.codes[positions], self.codes[positions + 1], True


class Padded:
    """Whole documents, lists of codes, filled up with <pad>, in shuffled batches."""

    def __init__(self, documents, batches, device):
        self.documents = [torch.tensor(document, device=device) for document in documents]
        self.batches = batches

    def __len__(self):
        return self.batches.per_epoch

    def __call__(self, step):
        chosen = [self.documents[index] for index in self.batches(step)]
        codes = torch.nn.utils.rnn.pad_sequence(chosen, padding_value=PAD)
        return codes[:-1], codes[1:], True
