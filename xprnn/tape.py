"""What a pass over time is told and what it leaves behind; shared by the generic scan and every kernel."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from xprnn.arrays import Array, Namespace, Params
from xprnn.cells import Cell

__all__ = ["State", "Steps", "Tape"]

State = tuple[Array, ...]


class Steps(NamedTuple):
    """Which rows take part in which step; None means all (active) or none (reset)."""

    active: Array | None = None  # (T, N) boolean
    reset: Array | None = None  # (T, N) boolean
    lengths: Array | None = None  # (N,) integers: where given, active is start + t < lengths and nothing else
    start: int = 0

    def between(self, t0: int, t1: int) -> "Steps":
        """The steps t0 to t1 - 1."""
        active, reset = (None if a is None else a[t0:t1, ...] for a in (self.active, self.reset))
        return Steps(active, reset, self.lengths, self.start + t0)


@dataclass(frozen=True)
class Tape:
    """What backward needs of a forward pass; replaying it any number of times gives the same gradients."""

    back: Callable[..., Any]  # the backward of the implementation that wrote this tape
    xp: Namespace
    cell: Cell
    params: Params
    x: Array
    initial: State  # before the first step
    home: State  # where a reset leads
    steps: Steps
    reverse: bool
    states: Callable[[], State]  # one (T, N, .) for each of the cell's states: after each step
    saved: Any  # what the writer keeps for its backward
    kernel: str
    sparse: bool = False  # whether, where x is integer, weight_ih's gradient is to be a SparseGradient
