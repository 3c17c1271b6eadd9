"""Sums of rows by number: the adjoint of looking rows up."""

from typing import Any

import numpy as np

from xprnn.arrays.namespace import Array, Namespace, device_of, is_numpy

__all__ = ["segment_sum"]

_MIN_MEAN_RUN_LENGTH = 8  # rows of a run, on average: shorter ones are not worth a call each


def segment_sum(xp: Namespace, ids: Array, rows: Array, count: int) -> Array:
    """Scatter-add: out[v] = sum of rows[m] over the m with ids[m] = v. The adjoint of a row look-up.

    The standard has no scatter. Rows are sorted by id, summed within each run of equal ids, and each run's sum is
    looked up: in NumPy one reduction for each, or pairwise additions where runs are short, elsewhere log2(M) shifted
    additions (a segmented scan), so that rounding stays that of a pairwise sum and no index leaves the device.

    Args:
        xp: the namespace.
        ids: (M,) integers in 0..count-1.
        rows: (M, K).
        count: number of rows of the result.

    Returns:
        (count, K).

    >>> segment_sum(np, np.asarray([2, 0, 2]), np.asarray([[1.0], [2.0], [3.0]]), 4)[:, 0]
    array([2., 0., 4., 0.])
    """
    m = rows.shape[0]
    out = xp.zeros((count, rows.shape[1]), dtype=rows.dtype, device=device_of(rows))
    if m == 0 or count == 0:
        return out
    order = xp.argsort(ids, stable=True)
    ids = xp.take(ids, order)
    if is_numpy(xp):
        _sum_runs(out, ids, rows, order)
        return out
    rows = xp.take(rows, order, axis=0)
    shift = 1
    while shift < m:
        same = xp.concat((xp.zeros_like(ids[:shift], dtype=xp.bool), ids[shift:] == ids[:-shift]))
        before = xp.concat((xp.zeros_like(rows[:shift, :]), rows[:-shift, :]))
        rows = rows + xp.where(same[:, None], before, xp.zeros_like(rows))
        shift *= 2
    every = xp.arange(count, dtype=ids.dtype, device=device_of(ids))
    last = xp.searchsorted(ids, every, side="right") - 1
    found = (last >= 0) & (xp.take(ids, xp.where(last >= 0, last, xp.zeros_like(last))) == every)
    sums = xp.take(rows, xp.where(found, last, xp.zeros_like(last)), axis=0)
    return xp.where(found[:, None], sums, out)


def _sum_runs(out: Any, ids: Any, rows: Any, order: Any) -> None:
    """`rows[order]`, whose ids are sorted, into out: a row that is alone in its run is only copied."""
    first = np.concatenate((np.ones(1, bool), ids[1:] != ids[:-1]))
    alone = first & np.append(first[1:], True)
    out[ids[alone]] = rows[order[alone]]
    ids, rows, first = ids[~alone], rows[order[~alone]], first[~alone]
    starts = np.flatnonzero(first)
    if ids.size <= _MIN_MEAN_RUN_LENGTH * starts.size:
        _sum_pairwise(out, ids, rows)
        return
    # A reduction for each run of ids: four times as fast as `reduceat`, and ten times as `add.at`.
    for v, a, b in zip(ids[starts].tolist(), starts.tolist(), [*starts[1:].tolist(), ids.size], strict=True):
        np.add.reduce(rows[a:b], axis=0, out=out[v])


def _sum_pairwise(out: Any, ids: Any, rows: Any) -> None:
    """The same: in every run each second row is added to the one before it, until one is left. Writes into rows."""
    at = np.arange(ids.size)
    while True:
        number = np.arange(ids.size)
        first = np.concatenate((np.ones(1, bool), ids[1:] != ids[:-1]))
        second = (number - np.maximum.accumulate(np.where(first, number, 0))) % 2 == 1
        if not second.any():
            break
        rows[at[np.flatnonzero(second) - 1]] += rows[at[second]]
        at, ids = at[~second], ids[~second]
    out[ids] = rows[at]
