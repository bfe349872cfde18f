"""Speed and memory of rnn_ext beside torch.nn and others: ``python -m benchmarks --help``."""
