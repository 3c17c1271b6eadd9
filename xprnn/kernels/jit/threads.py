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

from xprnn.kernels.row_order import Rows

__all__ = ["Part", "allowed", "each", "parts", "several"]

_WORTH = 1 << 25  # multiplications: less than this isn't split, a thread takes some tens of microseconds to wake up
_FEWEST = 8  # rows for a thread: fewer read the weights as often for less
_GROUP = 4
_pools: dict[int, ThreadPoolExecutor] = {}
Item = TypeVar("Item")
Result = TypeVar("Result")


class Part(NamedTuple):
    """Rows of the batch that one kernel walks."""

    first: int
    rows: int


@cache
def _libraries() -> tuple[Any, ...]:
    return tuple(ThreadpoolController().select(user_api="blas").lib_controllers)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allowed() -> int:
    """How many threads a product may use: as many as NumPy's BLAS, so that limits set for that one count here, too.

    >>> from threadpoolctl import threadpool_limits
    >>> with threadpool_limits(1):
    ...     allowed()
    1
    """
    counts = [library.num_threads for library in _libraries()]
    known = [count for count in counts if count]
    return min(*known, _cores()) if known else int(os.environ.get("OMP_NUM_THREADS") or _cores())


def worth(count: int, n: int, weights: int) -> bool:
    """Whether the rows are for several threads, if there are any."""
    return n >= 2 * _FEWEST and count * n * weights >= _WORTH


def several(count: int, n: int, weights: int) -> int:
    """How many threads take a part each, or 0 where one takes all."""
    threads = min(allowed(), n // _FEWEST) if worth(count, n, weights) else 0
    return threads if threads > 1 else 0


def parts(rows: Rows, count: int, n: int, weights: int) -> list[Part]:
    """One part, or, where it is worth it, as many of about the same number of steps as there are threads."""
    threads = several(count, n, weights)
    if not threads:
        return [Part(0, n)]
    if rows.active is None:
        return _even(n, threads)
    return _cut(np.cumsum(rows.active.sum(axis=0)), n, threads)


@cache
def _even(n: int, threads: int) -> list[Part]:
    return _cut(np.arange(1, n + 1), n, threads)


def _cut(work: Any, n: int, threads: int) -> list[Part]:
    """Parts that end where about as much of the work is done as there are parts so far."""
    ends = [int(np.searchsorted(work, work[-1] * k / threads)) + 1 for k in range(1, threads)]
    cuts = sorted({0, *(min(n, -(-end // _GROUP) * _GROUP) for end in ends), n})
    return [Part(a, b - a) for a, b in pairwise(cuts)]


def each(walk: Callable[[Item], Result], those: list[Item]) -> list[Result]:
    """What `walk` returns for each part, in their order; this thread takes the first."""
    if len(those) == 1:
        return [walk(those[0])]
    pool = _pools.get(os.getpid())  # a forked process has no threads
    if pool is None:
        pool = _pools.setdefault(os.getpid(), ThreadPoolExecutor(_cores(), "xprnn"))
    others = [pool.submit(walk, part) for part in those[1:]]
    return [walk(those[0]), *(other.result() for other in others)]
