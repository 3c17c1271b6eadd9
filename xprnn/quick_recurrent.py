"""A recurrent layer's quick ways on NumPy arrays that need no words: a step, a walk, a pass with its tape.

As in quick.py, each returns None for what it does not know, and stack.py, which explains what does not fit, goes on.
"""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import numpy as np

from xprnn import kernels
from xprnn.arrays import Array, Params, namespace
from xprnn.chain import Chain, ChainTape
from xprnn.kernels.step import BITS, Stepped, compiled_step, compiled_walk, numpy_step
from xprnn.layout import names_of
from xprnn.quick import Quick, Streams, guarded, nothing, plain
from xprnn.scan import step_once
from xprnn.stack import StackTape
from xprnn.tape import Steps

__all__ = ["QuickRecurrent"]

Passed = tuple[Array, Any, Any]  # the third is a StackTape, or None where no tape is kept
Pass = Callable[[Params, Array, Any], Passed | None]


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


class _Found(dict[Any, Any]):
    """dtype -> the sources of a cell's kernels, looked for once; None where it has none."""

    def __init__(self, cell: Any) -> None:
        self.cell = cell

    def __missing__(self, dtype: Any) -> Any:
        from xprnn.kernels import compiled

        none = compiled.why_not(self.cell, {"weight_hh": np.empty((0, 0), dtype)})
        self[dtype] = None if none else compiled.sources_of(self.cell, BITS[dtype])
        return self[dtype]


def recurrent_pass(layer: Any, *, keep: bool) -> Pass | None:
    """The quick pass of one layer in one direction: y, state and tape, or None; compiled or not at all."""
    simple = not (layer.bidirectional or layer.batch_first or layer.learned_state or layer.projection)
    if not simple or len(layer.sizes) > 1:
        return None
    from xprnn.kernels import compiled  # here, because the walks of others don't need them
    from xprnn.kernels import plain as way

    cell, (shapes, (names,)), fast = layer.core, names_of(layer), kernels.fast
    count, steps, xp, found = len(cell.states), Steps(), namespace(np.zeros(0)), _Found(cell)
    fits = tuple((short, name, shapes[name]) for short, name in names.items())

    def run(params: Params, x: Array, state: Any) -> Passed | None:
        own, dtype, (length, n, d) = {}, x.dtype, x.shape
        for short, name, shape in fits:
            own[short] = a = params[name]
            if a.shape != shape:
                return None
        if not fast() or d != layer.input_size:
            return None
        if (sources := found[dtype]) is None:
            return None
        one = (1, n, layer.hidden_size)
        given = (np.zeros(one, dtype),) * count if state is None else (state,) if count == 1 else state
        if len(given) != count or not all(plain(s, one, dtype) for s in given):
            return None
        start = tuple(s[0] for s in given)
        done = way.forward(sources, cell, own, x, start, steps, layer.reverse, keep)
        if done is None:
            return None
        y, final, tape = compiled.taped(done, cell, own, x, start, steps, layer.reverse, keep)
        packed = tuple(s[None] for s in final)
        after = packed if count > 1 else packed[0]
        if tape is None:
            return y, after, None
        chain = Chain(xp, cell, [own], layer.reverse, layer.dropout)
        record = ChainTape(x, [start], steps, [(0, length)], [[start]], [], [tape], [None])
        whole = StackTape(layer, xp, params, x, y, [(chain, record)], [], state is None)
        return y, after, whole

    return guarded(len(shapes), run)


def _stepped(layer: Any, prefix: str) -> Stepped:
    core, (shapes, names) = layer.core, names_of(layer)
    short = ["weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if layer.bias else ()), *core.vectors]
    short += ["weight_hr"] if layer.projection else []
    found = tuple(tuple(prefix + own[name] for name in short) for own in names)
    learned = tuple(prefix + name for name in shapes if name.startswith("initial_"))
    shapes = {prefix + name: shape for name, shape in shapes.items()}
    return Stepped(core, layer.bias, layer.input_size, layer.hidden_size, layer.projection, found, learned, shapes)
