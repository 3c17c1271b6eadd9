"""What a pass over time is told and what it leaves behind; shared by the generic scan and every kernel."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from xprnn.arrays.namespace import Array, Namespace, Params
from xprnn.cells.cell import Cell

__all__ = [
    "Gradients",
    "ModelTape",
    "State",
    "StepMask",
    "Tape",
    "UnpicklableTape",
]


State = tuple[Array, ...]


class StepMask(NamedTuple):
    """Which rows take part in which step; None means all (active) or none (reset)."""

    active: Array | None = None  # (T, N) boolean
    reset: Array | None = None  # (T, N) boolean
    lengths: Array | None = None  # (N,) integers: where given, active is start + t < lengths and nothing else
    start: int = 0

    def slice_steps(self, t0: int, t1: int) -> "StepMask":
        """The steps t0 to t1 - 1."""
        active, reset = (None if a is None else a[t0:t1, ...] for a in (self.active, self.reset))
        return StepMask(active, reset, self.lengths, self.start + t0)


class UnpicklableTape:
    """What a forward pass leaves for its backward: it refers to arrays and to code, and stays in its process.

    >>> import pickle
    >>> pickle.dumps(UnpicklableTape())
    Traceback (most recent call last):
    TypeError: a tape can be neither pickled nor copied: keep params, x and the state, and run forward again
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a tape can be neither pickled nor copied: keep params, x and the state, and run forward again")

    def __copy__(self) -> Any:
        return self  # frozen, and what it refers to would be shared anyway


class ModelTape(UnpicklableTape, dict[str, Any]):
    """The tapes of a model's parts, by their names."""

    def __copy__(self) -> "ModelTape":
        return ModelTape(self)


@dataclass(frozen=True)
class Tape(UnpicklableTape):
    """What backward needs of a forward pass; replaying it any number of times gives the same gradients."""

    backward_fn: Callable[..., Any]  # the backward of the implementation that wrote this tape
    xp: Namespace
    cell: Cell
    params: Params
    x: Array
    initial_state: State  # before the first step
    reset_state: State  # where a reset leads
    step_mask: StepMask
    reverse: bool
    states: Callable[[], State]  # one (T, N, .) for each of the cell's states: after each step
    saved: Any  # what the writer keeps for its backward
    kernel_name: str
    sparse: bool = False  # whether, where x is integer, weight_ih's gradient is to be a SparseGradient


class Gradients(NamedTuple):
    """What `backward` returns: the adjoint of each thing that `forward` received."""

    dx: Array | None
    dstate: Any
    dparams: Params
