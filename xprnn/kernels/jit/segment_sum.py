"""The adjoint of a look-up in compiled code: sums of rows by class, the whole table written once.

Imported only when a kernel is about to run, because it imports numba.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from xprnn.arrays.namespace import Array
from xprnn.kernels.jit import compile_cache

__all__ = ["segment_sum"]


@njit(error_model="numpy", inline="always")
def segment_sum_into(ids, rows, out):  # type: ignore[no-untyped-def]
    """out[v] = sum of rows[m] over the m with ids[m] = v, in the order of the rows; zero where there is none.

    A class after the other: each row of the table is written once, those of absent classes in one go up to the next
    that occurs, and what is added up stays in the cache, in float64.
    """
    count, width = out.shape
    ends = np.zeros(count + 1, np.int64)
    for v in ids:
        ends[v + 1] += 1
    for v in range(count):
        ends[v + 1] += ends[v]
    order, place = np.empty(ids.size, np.int64), ends[:count].copy()
    for m in range(ids.size):
        order[place[ids[m]]] = m
        place[ids[m]] += 1
    total, flat, written, k = np.empty(width, np.float64), out.reshape(-1), 0, 0
    while k < ids.size:
        v = ids[order[k]]
        flat[written * width : v * width] = 0
        some = order[k : ends[v + 1]]
        written, k = v + 1, ends[v + 1]
        if some.size == 1:
            out[v, :] = rows[some[0], :]
        else:
            total[:] = rows[some[0], :]
            for m in some[1:]:
                for j in range(width):
                    total[j] += rows[m, j]
            out[v, :] = total
    flat[written * width :] = 0


_SOURCE = '''"""Written by xprnn: sums of rows by class; it may be deleted at any time."""
from xprnn.kernels.jit.segment_sum import segment_sum_into


def kernel(ids, rows, out):
    segment_sum_into(ids, rows, out)
'''
_SIGNATURES = ";".join(
    f"void(Array(int64, 1, 'C', True), Array(float{bits}, 2, 'C', True), Array(float{bits}, 2, 'C'))"
    for bits in (32, 64)
)


def segment_sum(ids: Array, rows: Array, count: int) -> Array:
    """What scatter.segment_sum returns: ids (M,) in 0..count-1, rows (M, K) -> (count, K).

    >>> segment_sum(np.asarray([2, 0, 2]), np.asarray([[1.0], [2.0], [3.0]]), 4)[:, 0]
    array([2., 0., 4., 0.])
    """
    kernel: Callable[..., Any] = compile_cache.compile_kernel(_SOURCE, _SIGNATURES)
    out = np.empty((count, rows.shape[1]), rows.dtype)
    kernel(np.ascontiguousarray(ids, np.int64), np.ascontiguousarray(rows), out)
    return out
