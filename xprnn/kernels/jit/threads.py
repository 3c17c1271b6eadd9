"""Splits a batch into row ranges, one per thread, and runs them on a thread pool of the process.

The rows of a batch are independent in a scan, so each thread runs the whole time loop for its rows without waiting for
the others. Only parameter gradients are sums over all rows. Each thread sums its rows, and these partial sums are added
in the order of the rows, so that results are reproducible bit for bit for the same number of threads.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

from xprnn.kernels.row_order import RowOrder

__all__ = ["RowRange", "max_threads", "parallel_map", "split_rows", "thread_count"]

_MIN_WORK = 1 << 25  # multiplications: less is not split, because waking a thread takes tens of microseconds
_MIN_ROWS_PER_THREAD = 8  # every thread reads all weights, however few its rows
_ROW_MULTIPLE = 4
_pools: dict[int, ThreadPoolExecutor] = {}
Item = TypeVar("Item")
Result = TypeVar("Result")


class RowRange(NamedTuple):
    """Range of rows of the batch that one kernel call processes."""

    start: int
    size: int


@cache
def _blas_libraries() -> tuple[Any, ...]:
    return tuple(ThreadpoolController().select(user_api="blas").lib_controllers)


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def max_threads() -> int:
    """Return the maximal number of threads: that of NumPy's BLAS, so that limits set for the BLAS hold here, too.

    >>> from threadpoolctl import threadpool_limits
    >>> with threadpool_limits(1):
    ...     max_threads()
    1
    """
    counts = [library.num_threads for library in _blas_libraries()]
    known = [count for count in counts if count]
    return min(*known, _available_cores()) if known else int(os.environ.get("OMP_NUM_THREADS") or _available_cores())


def worth_threading(T: int, N: int, weights: int) -> bool:
    """Return True if a scan of T steps and N rows with so many weights is large enough for several threads."""
    return N >= 2 * _MIN_ROWS_PER_THREAD and T * N * weights >= _MIN_WORK


def thread_count(T: int, N: int, weights: int) -> int:
    """Return the number of threads for a scan, or 0 if one thread is best."""
    threads = min(max_threads(), N // _MIN_ROWS_PER_THREAD) if worth_threading(T, N, weights) else 0
    return threads if threads > 1 else 0


def split_rows(row_order: RowOrder, T: int, N: int, weights: int) -> list[RowRange]:
    """Split the rows into one range per thread, of about the same number of active steps each."""
    threads = thread_count(T, N, weights)
    if not threads:
        return [RowRange(0, N)]
    if row_order.active is None:
        return _even_split(N, threads)
    return _split_by_work(np.cumsum(row_order.active.sum(axis=0)), N, threads)


@cache
def _even_split(n: int, threads: int) -> list[RowRange]:
    return _split_by_work(np.arange(1, n + 1), n, threads)


def _split_by_work(work: Any, n: int, threads: int) -> list[RowRange]:
    """Split n rows so that every range has about the same work; work[r] is the work of rows 0 to r."""
    ends = [int(np.searchsorted(work, work[-1] * k / threads)) + 1 for k in range(1, threads)]
    cuts = sorted({0, *(min(n, -(-end // _ROW_MULTIPLE) * _ROW_MULTIPLE) for end in ends), n})
    return [RowRange(a, b - a) for a, b in pairwise(cuts)]


def parallel_map(fn: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    """Return fn(item) for every item, in order. The calling thread runs the first."""
    if len(items) == 1:
        return [fn(items[0])]
    pool = _pools.get(os.getpid())  # a forked process inherits the pool without its threads
    if pool is None:
        pool = _pools.setdefault(os.getpid(), ThreadPoolExecutor(_available_cores(), "xprnn"))
    others = [pool.submit(fn, item) for item in items[1:]]
    return [fn(items[0]), *(other.result() for other in others)]
