"""One time step of a stream on NumPy arrays that need no words: for all else it returns None, and the checks speak.

`stack.step` resolves, checks, unpacks and packs for any array library and explains what does not fit; that costs twenty
times the step. A quick step does the same work for what a stream holds at every step: plain arrays of one dtype, in the
right shapes. Nothing is remembered between two steps but a layer's names and sizes, so a parameter that was replaced or
written into is seen at once, and threads may share all of it.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from xprnn import kernels
from xprnn.arrays import Array, Params
from xprnn.kernels.step import BITS

__all__ = [
    "Calls",
    "Quick",
    "Streams",
    "chain_step",
    "embedding_step",
    "guarded",
    "linear_step",
    "nothing",
    "plain",
    "quick_of",
]

KEPT = frozenset({"_step", "_walk", "_pass", "_tapeless", "_back"})  # what a part has made for itself

Quick = Callable[[Params, Array, Any], tuple[Array, Any] | None]
Result = TypeVar("Result")


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


def plain(a: Array, shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether this is NumPy's own array in this shape and dtype."""
    return a.__class__ is np.ndarray and a.dtype == dtype and a.shape == shape


def _all_plain(params: Params, shapes: tuple[tuple[str, tuple[int, ...]], ...], dtype: Any) -> bool:
    """Whether the parameters are plain arrays of this dtype, in these shapes."""
    return all(plain(params[name], shape, dtype) for name, shape in shapes)


def guarded(
    count: int, run: Callable[[Params, Array, Any], Result | None]
) -> Callable[[Params, Array, Any], Result | None]:
    """`run` for plain arrays outside of the generic scan; it may raise or return None where something doesn't fit."""
    ndarray, generic = np.ndarray, kernels.generic

    def step(params: Params, x: Array, state: Any) -> Result | None:
        if x.__class__ is not ndarray or params.__class__ is not dict or len(params) != count or generic():
            return None
        try:
            return run(params, x, state)
        except Exception:  # a name, a kind or a shape; numba has exceptions of its own for a subclass of ndarray
            return None

    return step


def _steps_by_row(layer: Any) -> bool:
    """Whether a part's step, which is a call of one step, does what xprnn's own does."""
    return all(_is_ours(type(layer), verb) for verb in ("__call__", "forward"))


def linear_step(layer: Any, prefix: str, count: int) -> Quick:
    """The quick step of a Linear; none of one whose step is a call that does more."""
    if not _steps_by_row(layer):
        return nothing
    shapes = tuple((prefix + name, shape) for name, shape in layer.shapes().items())
    w, b = prefix + "weight", prefix + "bias" if layer.bias else None

    def step(params: Params, x: Array, state: Any) -> tuple[Array, None] | None:
        dtype = x.dtype
        if dtype not in BITS or x.ndim != 2 or x.shape[1] != layer.in_features or not _all_plain(params, shapes, dtype):
            return None
        y = np.dot(params[w], x[0]) if len(x) == 1 else np.dot(x, params[w].T)
        if b is not None:
            np.add(y, params[b], y)
        return y.reshape(len(x), -1), None

    return guarded(count, step)


def embedding_step(layer: Any, prefix: str, count: int) -> Quick:
    """The quick step of an Embedding; none of one whose step is a call that does more."""
    if not _steps_by_row(layer):
        return nothing
    w = prefix + "weight"
    shapes = ((w, layer.shapes()["weight"]),)

    def step(params: Params, x: Array, state: Any) -> tuple[Array, None] | None:
        dtype, n = params[w].dtype, len(x)
        if dtype not in BITS or x.dtype.kind not in "iu" or x.ndim != 1 or not _all_plain(params, shapes, dtype):
            return None
        if n == 1:
            k = x.item()
            return (params[w][k : k + 1].copy(), None) if 0 <= k < layer.num_embeddings else None
        fits = x.min(initial=0) >= 0 and x.max(initial=0) < layer.num_embeddings
        return (params[w].take(x, axis=0), None) if fits else None

    return guarded(count, step)


def quick_of(part: Any, prefix: str, count: int) -> Quick | None:
    """A part's quick step, or where it has none its own step."""
    if isinstance(part, Streams) and _is_ours(type(part), "step"):
        quick = part.quick(prefix, count)
        if quick is not nothing:
            return quick
    names = {name: prefix + name for name in part.shapes()}

    def step(params: Params, x: Array, state: Any) -> tuple[Array, Any] | None:
        done: tuple[Array, Any] = part.step({short: params[name] for short, name in names.items()}, x, state)
        return done

    return guarded(count, step)


def chain_step(steps: dict[str, Any], recurrent: list[str]) -> Quick:
    """The quick step of parts in a row, of which these have a state: one its own, several a dict of theirs."""
    only = recurrent[0] if len(recurrent) == 1 else None
    every = [(name, step, name in recurrent) for name, step in steps.items()]

    def step(params: Params, x: Array, state: Any) -> tuple[Array, Any] | None:
        if only is None and not (state is None if not recurrent else state.__class__ is dict):
            return None
        if recurrent and only is None and len(state) != len(recurrent):
            return None
        after = {}
        for name, part, kept in every:
            before = None if not kept else state if only is not None else state.get(name)
            done = part(params, x, before)
            if done is None:
                return None
            x, after[name] = done
        if only is not None:
            return x, after[only]
        return x, {name: after[name] for name in recurrent} or None

    return step
