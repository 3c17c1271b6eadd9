"""Contiguous and aligned NumPy memory, and its addresses."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from xprnn.arrays.namespace import Array

__all__ = [
    "contiguous",
]


def contiguous(a: Array) -> Array:
    """`a` in C order: itself, or a copy. The article's arrays, turned to time-major, have time as their fastest axis.

    Such an array is copied row by row: each is then a plain transpose, which NumPy does five times faster than the
    whole at once, and every step that would have strided through it is spared that.
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


ALIGNMENT = 64  # bytes: a vector that lies across two lines of the cache is read twice


def address(a: Array) -> int:
    """Where its first element lies."""
    return int(a.__array_interface__["data"][0])


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> Array:
    """Fresh memory that begins on a line of the cache."""
    size, line = math.prod(shape), ALIGNMENT // np.dtype(dtype).itemsize
    whole = np.empty(size + line, dtype)
    skip = -address(whole) % ALIGNMENT // whole.itemsize
    return whole[skip : skip + size].reshape(shape)


def allocate_workspace(dtype: Any, sizes: Mapping[str, int]) -> tuple[dict[str, Array], dict[str, int]]:
    """Flat arrays of these sizes in one piece of memory, and their addresses: asking for one takes a microsecond."""
    item = np.dtype(dtype).itemsize
    line = ALIGNMENT // item
    whole = np.empty(sum(sizes.values()) + (len(sizes) + 1) * line, dtype)
    arrays, table, at = {}, {}, address(whole)
    start = -at % ALIGNMENT // item
    for name, size in sizes.items():
        arrays[name], table[name] = whole[start : start + size], at + start * item
        start += -(-size // line) * line
    return arrays, table
