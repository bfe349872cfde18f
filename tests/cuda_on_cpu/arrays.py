"""Numbers of 16 bits that NumPy does not have, and addresses."""

import enum

import numpy as np


class Number(enum.Enum):
    """How a kernel stores a number; the value is NumPy's type of the same size."""

    FLOAT64 = np.dtype(np.float64)
    FLOAT32 = np.dtype(np.float32)
    FLOAT16 = np.dtype(np.float16)
    BFLOAT16 = np.dtype(np.uint16)


def to_bits(values, number):
    """``values`` rounded to nearest even, as an array of ``number.value``."""
    if number is not Number.BFLOAT16:
        return np.asarray(values).astype(number.value)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bits(array, number):
    """The float64 values of an array that a kernel wrote."""
    if number is not Number.BFLOAT16:
        return np.asarray(array, np.float64)
    return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


# Where arrays have a copy on a GPU: (first address, bytes, address there). Empty in the emulator.
device_copies = []


def pointer(array):
    """Address of an array's data for a kernel, or None (a null pointer) for None."""
    if array is None:
        return None
    address = array.ctypes.data
    for begin, size, copy in device_copies:
        if begin <= address < begin + size:
            return copy + address - begin
    return address
