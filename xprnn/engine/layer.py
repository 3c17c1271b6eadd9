"""Protocols of the layers that the engine runs, and base classes of layers that cache fast paths.

A fast path runs one call on plain NumPy arrays that have one dtype and the expected shapes. For any other input it
returns None. The caller then takes the validated path, which accepts every array library and raises the errors.
Validation, unpacking and packing of one step take about twenty times as long as the arithmetic of a small layer.

A fast path keeps the names and sizes of a layer between two calls, but no array. The next call therefore sees a
parameter that was replaced or overwritten, and threads may share a layer. A fast path runs no user-defined function,
because it may be abandoned halfway: the validated path would run that function a second time.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

from xprnn.arrays.namespace import Array, Params
from xprnn.cells.activations import Activation
from xprnn.cells.cell import Cell
from xprnn.cells.serialization import activation_to_config, cell_to_config

__all__ = [
    "CallsForward",
    "EmbeddingLayer",
    "FastStep",
    "LinearLayer",
    "RecurrentLayer",
    "Steppable",
    "SteppedLayer",
    "is_library_method",
    "is_user_defined",
    "no_fast_path",
]

# Cached properties of a layer that hold compiled code and closures: they are left out of copies and pickles.
_CACHED_ATTRIBUTES = frozenset({"_fast_step", "_calls"})

FastStep = Callable[[Params, Array, Any], tuple[Array, Any] | None]


class SteppedLayer(Protocol):
    """A layer that can run one time step."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every parameter."""

    def step(self, params: Params, x: Array, state: Any = None) -> tuple[Array, Any]:
        """One time step: y and the next state."""


class LinearLayer(SteppedLayer, Protocol):
    """A Linear layer: y = x W^T + b."""

    @property
    def in_features(self) -> int:
        """H, the size of the last axis of x."""

    @property
    def bias(self) -> bool:
        """True if there is a parameter "bias"."""


class EmbeddingLayer(SteppedLayer, Protocol):
    """An Embedding layer: rows of a table, selected by class number."""

    @property
    def num_embeddings(self) -> int:
        """V, the number of rows of the table."""


class RecurrentLayer(Protocol):
    """The configuration of a recurrent layer that the engine runs; layers.Recurrent satisfies it."""

    def __hash__(self) -> int: ...

    @property
    def input_size(self) -> int:
        """D, the number of features of x, or of classes if x is integer."""

    @property
    def hidden_size(self) -> int | Sequence[int]:
        """H, or one H for each layer."""

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """H of each layer."""

    @property
    def num_layers(self) -> int:
        """L, the number of layers."""

    @property
    def num_directions(self) -> int:
        """2 if the layer is bidirectional, else 1."""

    @property
    def bidirectional(self) -> bool:
        """True if every layer runs in both directions."""

    @property
    def reverse(self) -> bool:
        """True if the only direction runs from the last step to the first."""

    @property
    def batch_first(self) -> bool:
        """True if x and y are (N, T, .) instead of (T, N, .)."""

    @property
    def dropout(self) -> float:
        """Probability of zeroing an output of any layer but the last."""

    @property
    def sparse(self) -> bool:
        """True if the gradient of layer 0's weight_ih is a SparseGradient where x is integer."""

    @property
    def learned_state(self) -> bool:
        """True if the default initial state is a parameter."""

    @property
    def projection_size(self) -> int:
        """P, the number of features to which h is projected, or 0."""

    @property
    def bias(self) -> bool:
        """True if there are parameters bias_ih and bias_hh."""

    @property
    def resolved_cell(self) -> Cell:
        """The cell that every layer runs."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every parameter."""


class Steppable:
    """Base class of layers with a fast step: builds it at the first step, and keeps it out of copies and pickles."""

    def make_fast_step(self, prefix: str, count: int) -> FastStep | None:
        """Build the fast step for parameters `prefix + name` in a dict of `count` arrays; None if there is none."""
        raise NotImplementedError

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every parameter."""
        raise NotImplementedError

    def step(self, params: Params, x: Array, state: Any = None) -> tuple[Array, Any]:
        """One time step; see Recurrent.step."""
        raise NotImplementedError

    @cached_property
    def _fast_step(self) -> FastStep:
        return self.make_fast_step("", len(self.shapes())) or no_fast_path

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _CACHED_ATTRIBUTES}


class CallsForward:
    """Base class of layers with a `__call__` that records no tape.

    If a subclass overrides `forward` but not `__call__`, calling an instance runs that `forward`. This is decided when
    the class is created, so a call costs no check.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if is_library_method(cls, "__call__") and not is_library_method(cls, "forward"):
            cls.__call__ = _call_forward  # type: ignore[method-assign]


def is_library_method(cls: type, name: str) -> bool:
    """True if this method of a layer class is defined in xprnn, and False if a user's class overrides it."""
    return str(getattr(getattr(cls, name), "__module__", "")).startswith("xprnn.")


def is_user_defined(value: Any) -> bool:
    """True for a cell or an activation that runs a user's function, and False for everything else.

    >>> from xprnn.cells.activations import activation
    >>> is_user_defined(activation("tanh")), is_user_defined(Activation("step", lambda xp: (xp.sign, xp.zeros_like)))
    (False, True)
    """
    if isinstance(value, Cell):
        return cell_to_config(value) is None
    return isinstance(value, Activation) and activation_to_config(value) is None


def _call_forward(
    self: Any, params: Params, x: Array, state: Any = None, lengths: Any = None, mask: Any = None, reset: Any = None
) -> tuple[Array, Any]:
    """Run `forward` and return y and the final state without the tape."""
    flags = {"lengths": lengths, "mask": mask, "reset": reset}
    y, final, _ = self.forward(params, x, state, **{name: flag for name, flag in flags.items() if flag is not None})
    return y, final


def no_fast_path(params: Params, x: Array, state: Any) -> None:
    """The fast path of a layer that has none: always None."""
