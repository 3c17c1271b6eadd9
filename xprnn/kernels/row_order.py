"""Which rows a step touches on NumPy: sorted by their last active step, those still running stand first."""

from typing import Any, NamedTuple

import numpy as np

from xprnn.arrays.namespace import Array

__all__ = ["RowOrder"]


class RowOrder(NamedTuple):
    """The rows of a batch, in the order in which a kernel walks them."""

    step_runs: tuple[tuple[int, int, int], ...]  # (first step, last step + 1, how many rows)
    active: Array | None  # (T, N) boolean in walking order; None: every row in every step
    has_gaps: bool  # whether a row within the count may still sit a step out
    reset: Array | None
    sorted_indices: Array | None  # walking order; None: as they came
    unsorted_indices: Array | None

    @classmethod
    def from_step_mask(cls, shape: tuple[int, ...], step_mask: Any) -> "RowOrder":
        """The rows of `steps` = (active, reset) over `shape` = (T, N)."""
        count, n = shape
        if step_mask.active is None:
            return cls(((0, count, n),) if count else (), None, False, step_mask.reset, None, None)
        active = np.asarray(step_mask.active)
        numbers = np.arange(1, count + 1)[:, None]
        end = np.max(np.where(active, numbers, 0), axis=0, initial=0)
        order: Array = np.argsort(-end, kind="stable")
        if np.array_equal(order, np.arange(n)):
            order = None
        elif end.sum() > 0.9 * count * n:  # too little to save for two copies
            order, end = None, np.full(n, count)
        inverse = None if order is None else np.argsort(order, kind="stable")
        if order is not None:
            active, end = active[:, order], end[order]
        reset = step_mask.reset if step_mask.reset is None or order is None else step_mask.reset[:, order]
        counts = np.sum(end[None, :] >= numbers, axis=1)
        edges = np.flatnonzero(np.diff(counts)) + 1
        starts, ends = [0, *edges.tolist()], [*edges.tolist(), count]
        runs = tuple((a, b, int(counts[a])) for a, b in zip(starts, ends, strict=True)) if count else ()
        holes = bool((active != (np.arange(n)[None, :] < counts[:, None])).any())
        return cls(runs, active, holes, reset, order, inverse)

    def sort(self, a: Array, axis: int) -> Array:
        """`a` with its rows in walking order."""
        return a if self.sorted_indices is None else np.take(a, self.sorted_indices, axis=axis)

    def unsort(self, a: Array, axis: int) -> Array:
        """`a` with its rows as they came."""
        return a if self.unsorted_indices is None else np.take(a, self.unsorted_indices, axis=axis)

    def original_order(self, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        """(T, N, .) arrays with their rows as they came, read-only: a tape lives in their memory."""
        views = tuple(self.unsort(a.view(), 1) for a in arrays)
        for v in views:
            v.flags.writeable = False
        return views

    def carry_inactive(self, t: int, n: int, arrays: dict[str, Array], after: tuple[Array, ...]) -> None:
        """After step t of the first n rows: rows that sat it out keep their state."""
        assert self.active is not None
        for k, a in enumerate(after):
            before = arrays[f"s{k}"]
            a[t, n:] = before[t, n:]
            if self.has_gaps:
                np.copyto(a[t, :n], before[t, :n], where=~self.active[t, :n, None])
