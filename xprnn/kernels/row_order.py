"""Which rows a step touches on NumPy: sorted by their last active step, those still running stand first."""

from typing import Any, NamedTuple

import numpy as np

from xprnn.arrays.namespace import Array

__all__ = ["Rows"]


class Rows(NamedTuple):
    """The rows of a batch, in the order in which a kernel walks them."""

    runs: tuple[tuple[int, int, int], ...]  # (first step, last step + 1, how many rows)
    active: Array | None  # (T, N) boolean in walking order; None: every row in every step
    holes: bool  # whether a row within the count may still sit a step out
    reset: Array | None
    order: Array | None  # walking order; None: as they came
    inverse: Array | None

    @classmethod
    def of(cls, shape: tuple[int, ...], steps: Any) -> "Rows":
        """The rows of `steps` = (active, reset) over `shape` = (T, N)."""
        count, n = shape
        if steps.active is None:
            return cls(((0, count, n),) if count else (), None, False, steps.reset, None, None)
        active = np.asarray(steps.active)
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
        reset = steps.reset if steps.reset is None or order is None else steps.reset[:, order]
        counts = np.sum(end[None, :] >= numbers, axis=1)
        edges = np.flatnonzero(np.diff(counts)) + 1
        starts, ends = [0, *edges.tolist()], [*edges.tolist(), count]
        runs = tuple((a, b, int(counts[a])) for a, b in zip(starts, ends, strict=True)) if count else ()
        holes = bool((active != (np.arange(n)[None, :] < counts[:, None])).any())
        return cls(runs, active, holes, reset, order, inverse)

    def sort(self, a: Array, axis: int) -> Array:
        """`a` with its rows in walking order."""
        return a if self.order is None else np.take(a, self.order, axis=axis)

    def unsort(self, a: Array, axis: int) -> Array:
        """`a` with its rows as they came."""
        return a if self.inverse is None else np.take(a, self.inverse, axis=axis)

    def shown(self, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        """(T, N, .) arrays with their rows as they came, read-only: a tape lives in their memory."""
        views = tuple(self.unsort(a.view(), 1) for a in arrays)
        for v in views:
            v.flags.writeable = False
        return views

    def carry(self, t: int, n: int, arrays: dict[str, Array], after: tuple[Array, ...]) -> None:
        """After step t of the first n rows: rows that sat it out keep their state."""
        assert self.active is not None
        for k, a in enumerate(after):
            before = arrays[f"s{k}"]
            a[t, n:] = before[t, n:]
            if self.holes:
                np.copyto(a[t, :n], before[t, :n], where=~self.active[t, :n, None])
