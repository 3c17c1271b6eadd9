"""Compiled segment sum: the adjoint of a row lookup.

This module imports numba. Import it only when a kernel is about to run.
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
    """out[v] = sum of rows[m] over all m with ids[m] = v, in the order of m; zero if no id is v.

    Segments are processed in the order of v, so that each row of `out` is written once. A run of absent v is zeroed
    with one assignment. Sums are float64 and stay in the cache.
    """
    count, width = out.shape
    ends = np.zeros(count + 1, np.int64)
    for v in ids:
        ends[v + 1] += 1
    for v in range(count):
        ends[v + 1] += ends[v]
    order, next_slot = np.empty(ids.size, np.int64), ends[:count].copy()
    for m in range(ids.size):
        order[next_slot[ids[m]]] = m
        next_slot[ids[m]] += 1
    total, flat, written, k = np.empty(width, np.float64), out.reshape(-1), 0, 0
    while k < ids.size:
        v = ids[order[k]]
        flat[written * width : v * width] = 0
        members = order[k : ends[v + 1]]
        written, k = v + 1, ends[v + 1]
        if members.size == 1:
            out[v, :] = rows[members[0], :]
        else:
            total[:] = rows[members[0], :]
            for m in members[1:]:
                for j in range(width):
                    total[j] += rows[m, j]
            out[v, :] = total
    flat[written * width :] = 0


_SOURCE = '''"""Segment sum, printed by xprnn (a cache entry, safe to delete)"""
from xprnn.kernels.jit.segment_sum import segment_sum_into


def kernel(ids, rows, out):
    segment_sum_into(ids, rows, out)
'''
_SIGNATURES = ";".join(
    f"void(Array(int64, 1, 'C', True), Array(float{bits}, 2, 'C', True), Array(float{bits}, 2, 'C'))"
    for bits in (32, 64)
)


def segment_sum(ids: Array, rows: Array, count: int) -> Array:
    """Sum the rows of equal id, as xprnn.arrays.segment_sum does.

    Args:
        ids: (M,) integers in 0 to count-1.
        rows: (M, K), float32 or float64.
        count: number of segments.

    Returns:
        (count, K), in the dtype of `rows`; zero for ids that do not occur.

    >>> segment_sum(np.asarray([2, 0, 2]), np.asarray([[1.0], [2.0], [3.0]]), 4)[:, 0]
    array([2., 0., 4., 0.])
    """
    kernel: Callable[..., Any] = compile_cache.compile_kernel(_SOURCE, _SIGNATURES)
    out = np.empty((count, rows.shape[1]), rows.dtype)
    kernel(np.ascontiguousarray(ids, np.int64), np.ascontiguousarray(rows), out)
    return out
