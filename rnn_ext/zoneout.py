"""What a step holds on to of the state before, as ``ops.layer`` takes it."""

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

__all__ = ["Zoneout", "paired", "with_masks"]

# Of h and, of the LSTM, of c: bool laid out like output and like cells, True where a unit keeps its
# state; or the share of it that every unit keeps, float64 without dimensions on the CPU.
Zoneout: TypeAlias = tuple[Tensor, Tensor | None]


def paired(hold_h: Tensor | None, hold_c: Tensor | None) -> Zoneout | None:
    return None if hold_h is None else (hold_h, hold_c)


def with_masks(zoneout: Zoneout | None, change: Callable[[Tensor], Tensor]) -> Zoneout | None:
    """``zoneout`` with the masks changed; a share is for any layout."""
    if zoneout is None or zoneout[0].dim() == 0:
        return zoneout
    hold_h, hold_c = zoneout
    return change(hold_h), None if hold_c is None else change(hold_c)
