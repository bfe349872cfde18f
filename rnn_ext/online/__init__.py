"""Learning while a stream runs: gradients without going back in time, or not far back."""

from .rtrl import RTRL
from .truncated import Window, tbptt

__all__ = ["RTRL", "Window", "tbptt"]
