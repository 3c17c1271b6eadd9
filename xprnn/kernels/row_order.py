"""Row order of a ragged batch on NumPy: rows sorted by their last active step, longest first.

In this order the rows that are still active at a step are the first rows of the batch, so a kernel can skip the others.
"""

from typing import Any, NamedTuple

import numpy as np

from xprnn.arrays.namespace import Array

__all__ = ["RowOrder"]


class RowOrder(NamedTuple):
    """The order in which a kernel processes the rows of a batch, and how many of them run at each step."""

    step_runs: tuple[tuple[int, int, int], ...]  # (first step, last step + 1, number of rows that run)
    active: Array | None  # (T, N) boolean, rows sorted; None: every row at every step
    has_gaps: bool  # True if a row that runs may be inactive at some step
    reset: Array | None  # (T, N) boolean, rows sorted
    sorted_indices: Array | None  # from the caller's order to the sorted order; None: the rows are not sorted
    unsorted_indices: Array | None  # the inverse permutation

    @classmethod
    def from_step_mask(cls, shape: tuple[int, ...], step_mask: Any) -> "RowOrder":
        """Plan the order of the rows of a StepMask over `shape` = (T, N)."""
        count, n = shape
        if step_mask.active is None:
            return cls(((0, count, n),) if count else (), None, False, step_mask.reset, None, None)
        active = np.asarray(step_mask.active)
        step_numbers = np.arange(1, count + 1)[:, None]
        lengths = np.max(np.where(active, step_numbers, 0), axis=0, initial=0)
        order: Array = np.argsort(-lengths, kind="stable")
        if np.array_equal(order, np.arange(n)):
            order = None
        elif lengths.sum() > 0.9 * count * n:  # too few steps to skip: sorting costs two copies of the arrays
            order, lengths = None, np.full(n, count)
        inverse = None if order is None else np.argsort(order, kind="stable")
        if order is not None:
            active, lengths = active[:, order], lengths[order]
        reset = step_mask.reset if step_mask.reset is None or order is None else step_mask.reset[:, order]
        num_rows = np.sum(lengths[None, :] >= step_numbers, axis=1)
        changes = np.flatnonzero(np.diff(num_rows)) + 1
        starts, ends = [0, *changes.tolist()], [*changes.tolist(), count]
        runs = tuple((a, b, int(num_rows[a])) for a, b in zip(starts, ends, strict=True)) if count else ()
        has_gaps = bool((active != (np.arange(n)[None, :] < num_rows[:, None])).any())
        return cls(runs, active, has_gaps, reset, order, inverse)

    def sort(self, a: Array, axis: int) -> Array:
        """Return `a` with its rows in sorted order."""
        return a if self.sorted_indices is None else np.take(a, self.sorted_indices, axis=axis)

    def unsort(self, a: Array, axis: int) -> Array:
        """Return `a` with its rows in the caller's order; the inverse of `sort`."""
        return a if self.unsorted_indices is None else np.take(a, self.unsorted_indices, axis=axis)

    def original_order(self, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        """Return (T, N, .) arrays of a tape with their rows in the caller's order, as read-only views or copies."""
        views = tuple(self.unsort(a.view(), 1) for a in arrays)
        for v in views:
            v.flags.writeable = False
        return views

    def carry_inactive(self, t: int, n: int, arrays: dict[str, Array], after: tuple[Array, ...]) -> None:
        """Copy the state of every inactive row over step t, of which a kernel has computed the first n rows.

        Args:
            t: the step.
            n: the number of rows that run at step t.
            arrays: holds the states before each step, (T, N, .), as "s0", "s1", ...
            after: the states after each step, (T, N, .); written.
        """
        assert self.active is not None
        for k, a in enumerate(after):
            before = arrays[f"s{k}"]
            a[t, n:] = before[t, n:]
            if self.has_gaps:
                np.copyto(a[t, :n], before[t, :n], where=~self.active[t, :n, None])
