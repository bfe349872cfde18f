"""The version of rnn_ext, read by setup.py without importing anything."""

__version__ = "0.1.0"
