"""Step masks, tapes and gradients: the types that the reference scan and every kernel share."""

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


State = tuple[Array, ...]  # the cell's states at one step: h first


class StepMask(NamedTuple):
    """Which rows of the batch are active, and which are reset, at each step."""

    active: Array | None = None  # (T, N) boolean; None: every row at every step
    reset: Array | None = None  # (T, N) boolean; None: no row at any step
    lengths: Array | None = None  # (N,) integers; if not None, active[t] is exactly start + t < lengths
    start: int = 0  # the number of steps before the first, in the sequence to which `lengths` refers

    def slice_steps(self, t0: int, t1: int) -> "StepMask":
        """Return the mask of the steps t0 to t1 - 1."""
        active, reset = (None if a is None else a[t0:t1, ...] for a in (self.active, self.reset))
        return StepMask(active, reset, self.lengths, self.start + t0)


class UnpicklableTape:
    """Base class of tapes: they refer to arrays and to code of this process, so they cannot be pickled.

    >>> import pickle
    >>> pickle.dumps(UnpicklableTape())
    Traceback (most recent call last):
    TypeError: a tape can be neither pickled nor copied: keep params, x and the state, and run forward again
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a tape can be neither pickled nor copied: keep params, x and the state, and run forward again")

    def __copy__(self) -> Any:
        return self  # a tape is frozen, and a shallow copy would share all arrays


class ModelTape(UnpicklableTape, dict[str, Any]):
    """The tapes of the layers of a model, by layer name."""

    def __copy__(self) -> "ModelTape":
        return ModelTape(self)


@dataclass(frozen=True)
class Tape(UnpicklableTape):
    """Tape of one scan: the arrays that a forward pass saved. `backward` may use it any number of times."""

    backward_fn: Callable[..., Any]  # the backward function of the kernel that recorded this tape
    xp: Namespace
    cell: Cell
    params: Params
    x: Array
    initial_state: State  # before the first step that runs, which is T-1 if `reverse`
    reset_state: State  # the states that a reset restores
    step_mask: StepMask
    reverse: bool
    states: Callable[[], State]  # returns each of the cell's states after every step, (T, N, .)
    saved: Any  # private to the kernel
    kernel_name: str
    sparse: bool = False  # True if the gradient of weight_ih is a SparseGradient where x is integer


class Gradients(NamedTuple):
    """Result of `backward`: the cotangents of the arguments of `forward`."""

    dx: Array | None
    dstate: Any
    dparams: Params
