"""Learning while a stream runs: gradients without going back in time."""

from .rtrl import RTRL

__all__ = ["RTRL"]
