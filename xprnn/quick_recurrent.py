"""A recurrent layer's quick ways on NumPy arrays that need no words: a step, a walk, a pass with its tape.

As in quick.py, each returns None for what it does not know, and stack.py, which explains what does not fit, goes on.
"""

from functools import cached_property, partial
from typing import Any

import numpy as np

from xprnn import kernels
from xprnn.arrays import Array, Params
from xprnn.kernels.step import BITS, Stepped, compiled_step, compiled_walk, numpy_step
from xprnn.layout import names_of
from xprnn.quick import Quick, Streams, guarded, nothing
from xprnn.quick_pass import Back, Pass, recurrent_back, recurrent_pass
from xprnn.scan import step_once

__all__ = ["QuickRecurrent"]


class QuickRecurrent(Streams):
    """A recurrent layer's quick ways, each made when it is first wanted."""

    def quick(self, prefix: str, count: int) -> Quick | None:
        """The quick step."""
        return recurrent_step(self, prefix, count)

    @cached_property
    def _walk(self) -> Quick:
        return recurrent_walk(self) or nothing

    @cached_property
    def _pass(self) -> Pass:
        return recurrent_pass(self, keep=True) or nothing

    @cached_property
    def _tapeless(self) -> Pass:
        return recurrent_pass(self, keep=False) or nothing

    @cached_property
    def _back(self) -> Back:
        return recurrent_back(self)

    def _sequence(self, params: Params, x: Array, state: Any) -> tuple[Array, Any] | None:
        """A whole sequence of which no tape is kept."""
        if (done := self._walk(params, x, state)) is not None:
            return done
        whole = self._tapeless(params, x, state)
        return None if whole is None else whole[:2]


def recurrent_step(layer: Any, prefix: str, count: int) -> Quick | None:
    """The quick step of a recurrent layer: compiled for a few rows, or else in NumPy."""
    if layer.bidirectional or layer.reverse or not isinstance(layer.hidden_size, int):
        return None
    its, fast = _stepped(layer, prefix), kernels.fast
    few, floats, ways = its.few, BITS, dict[tuple[bool, bool], Quick]()
    fastest = list[Quick | None]([None, None])  # the compiled ones, by whether x is integer

    def way(integer: bool, one: bool) -> Quick:
        """The step in NumPy, for one row or for many; made when it is first wanted."""
        found = ways.get((integer, one))
        if found is None:
            found = ways[integer, one] = numpy_step(its, integer, one, partial(step_once, np, its.cell))
        return found

    def step(params: Params, x: Array, state: Any) -> tuple[Array, Any] | None:
        integer, n = x.dtype not in floats, len(x)
        if integer and x.dtype.kind not in "iu":
            return None
        if n <= few and fast():
            try:
                run = fastest[integer]
                if run is None:
                    run = fastest[integer] = compiled_step(its, integer) or nothing
                done = run(params, x, state)
            except (KeyError, TypeError):  # no kernel, or one that takes no such arrays
                done = None
            if done is not None:
                return done
        return way(integer, n == 1)(params, x, state)

    return guarded(count, step)


def recurrent_walk(layer: Any) -> Quick | None:
    """The quick walk of a recurrent layer, for few rows and small weights; compiled or not at all."""
    if layer.bidirectional or layer.reverse or not isinstance(layer.hidden_size, int):
        return None
    its, fast, floats, batch_first = _stepped(layer, ""), kernels.fast, BITS, layer.batch_first
    ways = dict[bool, Quick]()

    def walk(params: Params, x: Array, state: Any) -> tuple[Array, Any] | None:
        integer, n = x.dtype not in floats, x.shape[0 if batch_first else 1]
        if not fast() or not its.short(n, integer) or (integer and x.dtype.kind not in "iu"):
            return None
        if integer not in ways:
            ways[integer] = compiled_walk(its, integer, batch_first) or nothing
        return ways[integer](params, x, state)

    return guarded(len(its.shapes), walk)


def _stepped(layer: Any, prefix: str) -> Stepped:
    core, (shapes, names) = layer.core, names_of(layer)
    short = ["weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if layer.bias else ()), *core.vectors]
    short += ["weight_hr"] if layer.projection else []
    found = tuple(tuple(prefix + own[name] for name in short) for own in names)
    learned = tuple(prefix + name for name in shapes if name.startswith("initial_"))
    shapes = {prefix + name: shape for name, shape in shapes.items()}
    return Stepped(core, layer.bias, layer.input_size, layer.hidden_size, layer.projection, found, learned, shapes)
