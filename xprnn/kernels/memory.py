"""Contiguous and aligned NumPy arrays, and their addresses."""

import math
from typing import Any

import numpy as np

from xprnn.arrays.namespace import Array

__all__ = [
    "contiguous",
]


def contiguous(a: Array) -> Array:
    """Return `a` in C order: `a` itself if it is, else a copy.

    A time-major view of an array in which time is the fastest axis (as in the article's layout) is copied row by row.
    Each row is then a plain transpose, which NumPy does five times as fast as one copy of the whole array.
    """
    if a.flags.c_contiguous:
        return a
    out = np.empty(a.shape, a.dtype)
    if a.ndim == 3 and abs(a.strides[0]) < abs(a.strides[2]):
        for n in range(a.shape[1]):
            out[:, n] = a[:, n]
    else:
        out[...] = a
    return out


ALIGNMENT = 64  # bytes, one cache line: a vector load that crosses two lines reads both


def address(a: Array) -> int:
    """Return the address of the first element."""
    return int(a.__array_interface__["data"][0])


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> Array:
    """Allocate an uninitialised array that begins on a cache line."""
    size, line = math.prod(shape), ALIGNMENT // np.dtype(dtype).itemsize
    buffer = np.empty(size + line, dtype)
    offset = -address(buffer) % ALIGNMENT // buffer.itemsize
    return buffer[offset : offset + size].reshape(shape)
