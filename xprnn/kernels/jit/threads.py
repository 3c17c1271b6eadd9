"""Rows of a batch over the cores: which thread walks which, how many there may be, and a pool that is kept.

The rows of a batch never meet in a scan, so each thread walks its own through the whole time loop and waits for no
other. Only the parameters' gradients are sums over all rows: each thread has its own, and they are added up in the
order of the rows, so that for the same number of threads the same bits come out.
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

_MIN_WORK = 1 << 25  # multiplications: less than this isn't split, a thread takes some tens of microseconds to wake up
_MIN_ROWS_PER_THREAD = 8  # rows for a thread: fewer read the weights as often for less
_ROW_MULTIPLE = 4
_pools: dict[int, ThreadPoolExecutor] = {}
Item = TypeVar("Item")
Result = TypeVar("Result")


class RowRange(NamedTuple):
    """Rows of the batch that one kernel walks."""

    start: int
    size: int


@cache
def _blas_libraries() -> tuple[Any, ...]:
    return tuple(ThreadpoolController().select(user_api="blas").lib_controllers)


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def max_threads() -> int:
    """How many threads a product may use: as many as NumPy's BLAS, so that limits set for that one count here, too.

    >>> from threadpoolctl import threadpool_limits
    >>> with threadpool_limits(1):
    ...     max_threads()
    1
    """
    counts = [library.num_threads for library in _blas_libraries()]
    known = [count for count in counts if count]
    return min(*known, _available_cores()) if known else int(os.environ.get("OMP_NUM_THREADS") or _available_cores())


def worth_threading(count: int, n: int, weights: int) -> bool:
    """Whether the rows are for several threads, if there are any."""
    return n >= 2 * _MIN_ROWS_PER_THREAD and count * n * weights >= _MIN_WORK


def thread_count(count: int, n: int, weights: int) -> int:
    """How many threads take a part each, or 0 where one takes all."""
    threads = min(max_threads(), n // _MIN_ROWS_PER_THREAD) if worth_threading(count, n, weights) else 0
    return threads if threads > 1 else 0


def split_rows(row_order: RowOrder, count: int, n: int, weights: int) -> list[RowRange]:
    """One part, or, where it is worth it, as many of about the same number of steps as there are threads."""
    threads = thread_count(count, n, weights)
    if not threads:
        return [RowRange(0, n)]
    if row_order.active is None:
        return _even_split(n, threads)
    return _split_by_work(np.cumsum(row_order.active.sum(axis=0)), n, threads)


@cache
def _even_split(n: int, threads: int) -> list[RowRange]:
    return _split_by_work(np.arange(1, n + 1), n, threads)


def _split_by_work(work: Any, n: int, threads: int) -> list[RowRange]:
    """Parts that end where about as much of the work is done as there are parts so far."""
    ends = [int(np.searchsorted(work, work[-1] * k / threads)) + 1 for k in range(1, threads)]
    cuts = sorted({0, *(min(n, -(-end // _ROW_MULTIPLE) * _ROW_MULTIPLE) for end in ends), n})
    return [RowRange(a, b - a) for a, b in pairwise(cuts)]


def parallel_map(fn: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    """What `walk` returns for each part, in their order; this thread takes the first."""
    if len(items) == 1:
        return [fn(items[0])]
    pool = _pools.get(os.getpid())  # a forked process has no threads
    if pool is None:
        pool = _pools.setdefault(os.getpid(), ThreadPoolExecutor(_available_cores(), "xprnn"))
    others = [pool.submit(fn, part) for part in items[1:]]
    return [fn(items[0]), *(other.result() for other in others)]
