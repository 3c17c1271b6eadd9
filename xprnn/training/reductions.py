"""Sums over all entries of an array."""

from typing import Any

import numpy as np

__all__ = ["sum_of_squares"]

_MAX_DOT_SIZE = 4096  # the sum of a longer float32 dot product would lose digits; OpenBLAS would also split it
_BLOCK_SIZE = 1024


def sum_of_squares(a: Any) -> float:
    """Return the sum of the squares of a NumPy array.

    Args:
        a: floats of any shape. An array that is contiguous in C or Fortran order is not copied.

    Returns:
        The sum of dot products of at most 4096 entries, added in float64. It overflows where the dtype of `a` does.

    >>> sum_of_squares(np.asarray([[1.0, 2.0], [3.0, 0.0]]))
    14.0
    """
    flat = a.ravel("K")
    if flat.size <= _MAX_DOT_SIZE:
        return float(np.dot(flat, flat))
    tail = flat.size % _BLOCK_SIZE
    blocks = flat[: flat.size - tail].reshape(-1, _BLOCK_SIZE)
    total = float(np.add.reduce(np.vecdot(blocks, blocks), dtype=np.float64))
    return total + float(np.dot(flat[-tail:], flat[-tail:])) if tail else total
