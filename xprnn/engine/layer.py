"""One time step of a stream on NumPy arrays that need no words: for all else it returns None, and the checks speak.

`stack.step` resolves, checks, unpacks and packs for any array library and explains what does not fit; that costs twenty
times the step. A quick step does the same work for what a stream holds at every step: plain arrays of one dtype, in the
right shapes. Nothing is remembered between two steps but a layer's names and sizes, so a parameter that was replaced or
written into is seen at once, and threads may share all of it.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

from xprnn.arrays.namespace import Array, Params

__all__ = [
    "CallsForward",
    "FastStep",
    "Steppable",
    "no_fast_path",
]

_CACHED_ATTRIBUTES = frozenset(
    {"_fast_step", "_fast_sequence", "_fast_forward", "_fast_inference", "_fast_backward"}
)  # what a part has made for itself

FastStep = Callable[[Params, Array, Any], tuple[Array, Any] | None]


class Steppable:
    """What has a step: keeps its own quick step, made at its first step, out of copies and pickles."""

    def make_fast_step(self, prefix: str, count: int) -> FastStep | None:
        """The quick step on parameters under `prefix` in a dict of `count` parameters; None if there is none."""
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
    """What is called without a tape by a way of its own: of a class of yours that overrides `forward`, by that.

    Which of the two is decided once, when the class is made, so that a call asks nothing.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if is_library_method(cls, "__call__") and not is_library_method(cls, "forward"):
            cls.__call__ = _call_forward  # type: ignore[method-assign]


def is_library_method(cls: type, verb: str) -> bool:
    """Whether this verb of a part is xprnn's own; one of a class of yours may do more."""
    return str(getattr(getattr(cls, verb), "__module__", "")).startswith("xprnn.")


def _call_forward(
    self: Any, params: Params, x: Array, state: Any = None, lengths: Any = None, mask: Any = None, reset: Any = None
) -> tuple[Array, Any]:
    """y and the final state of `forward`, whose tape is dropped."""
    flags = {"lengths": lengths, "mask": mask, "reset": reset}
    y, final, _ = self.forward(params, x, state, **{name: flag for name, flag in flags.items() if flag is not None})
    return y, final


def no_fast_path(params: Params, x: Array, state: Any) -> None:
    """The quick step of what has none."""
