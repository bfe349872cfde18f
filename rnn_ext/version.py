"""The version of rnn_ext, read by setup.py without importing anything."""

__all__ = ["__version__"]

__version__ = "0.1.0"
