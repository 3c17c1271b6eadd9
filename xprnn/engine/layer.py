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
    "Calls",
    "Quick",
    "Streams",
    "nothing",
]

KEPT = frozenset({"_step", "_walk", "_pass", "_tapeless", "_back"})  # what a part has made for itself

Quick = Callable[[Params, Array, Any], tuple[Array, Any] | None]


class Streams:
    """What has a step: keeps its own quick step, made at its first step, out of copies and pickles."""

    def quick(self, prefix: str, count: int) -> Quick | None:
        """The quick step on parameters under `prefix` in a dict of `count` parameters; None if there is none."""
        raise NotImplementedError

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every parameter."""
        raise NotImplementedError

    def step(self, params: Params, x: Array, state: Any = None) -> tuple[Array, Any]:
        """One time step; see Recurrent.step."""
        raise NotImplementedError

    @cached_property
    def _step(self) -> Quick:
        return self.quick("", len(self.shapes())) or nothing

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in KEPT}


class Calls:
    """What is called without a tape by a way of its own: of a class of yours that overrides `forward`, by that.

    Which of the two is decided once, when the class is made, so that a call asks nothing.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if _is_ours(cls, "__call__") and not _is_ours(cls, "forward"):
            cls.__call__ = _by_forward  # type: ignore[method-assign]


def _is_ours(cls: type, verb: str) -> bool:
    """Whether this verb of a part is xprnn's own; one of a class of yours may do more."""
    return str(getattr(getattr(cls, verb), "__module__", "")).startswith("xprnn.")


def _by_forward(
    self: Any, params: Params, x: Array, state: Any = None, lengths: Any = None, mask: Any = None, reset: Any = None
) -> tuple[Array, Any]:
    """y and the final state of `forward`, whose tape is dropped."""
    flags = {"lengths": lengths, "mask": mask, "reset": reset}
    y, final, _ = self.forward(params, x, state, **{name: flag for name, flag in flags.items() if flag is not None})
    return y, final


def nothing(params: Params, x: Array, state: Any) -> None:
    """The quick step of what has none."""
