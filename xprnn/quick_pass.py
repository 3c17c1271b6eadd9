"""One recurrent layer's pass and its adjoint on NumPy arrays that need no words, compiled or not at all.

As in quick.py, each returns None for what it does not know, and stack.py, which explains what does not fit, goes on.
What stack.py keeps of a pass is told from the kernel's memory when somebody asks for it; backward mostly doesn't.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from xprnn import kernels
from xprnn.arrays import Array, Params, namespace
from xprnn.chain import Chain, ChainTape
from xprnn.kernels.step import BITS
from xprnn.layout import names_of
from xprnn.quick import guarded, plain
from xprnn.stack import Gradients, StackTape
from xprnn.tape import Steps

__all__ = ["Back", "Pass", "recurrent_back", "recurrent_pass"]

Pass = Callable[[Params, Array, Any], tuple[Array, Any, Any] | None]  # the third is a tape, or None
Back = Callable[[Any, Any, Any, Any], Gradients | None]
_KNOWN = 256  # shapes of x at a time


class QuickTape(StackTape):
    """A StackTape whose records are made when they are asked for."""

    start: tuple[Array, ...]
    done: Any

    def __init__(
        self, layer: Any, params: Params, y: Array, start: tuple[Array, ...], default: bool, done: Any
    ) -> None:
        # Its fields are set at once: a frozen dataclass takes a call for each.
        its = {"layer": layer, "params": params, "x": done.x, "y": y, "masks": [], "default": default}
        vars(self).update(its, start=start, done=done)

    @cached_property
    def xp(self) -> Any:
        """NumPy's namespace."""
        return namespace(self.x)

    @cached_property
    def chains(self) -> list[tuple[Chain, ChainTape]]:
        """The records."""
        from xprnn.kernels import compiled

        layer, done, steps, start = self.layer, self.done, Steps(), tuple(s[0] for s in self.start)
        own, passed = dict(zip(done.way.names, done.arrays, strict=True)), (done.kept(), ())
        _, _, tape = compiled.taped(passed, layer.core, own, self.x, start, steps, layer.reverse, keep=True)
        assert tape is not None
        chain = Chain(self.xp, layer.core, [own], layer.reverse, layer.dropout)
        return [(chain, ChainTape(self.x, [start], steps, [(0, len(self.x))], [[start]], [], [tape], [None]))]


def _short(layer: Any) -> tuple[str, ...]:
    """Its parameters in the order of a pass."""
    return ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if layer.bias else ()), *layer.core.vectors)


class _Ways(dict[Any, Any]):
    """(shape, dtype) of x -> the pass of a layer for it; None where it has none."""

    def __init__(self, layer: Any, *, keep: bool) -> None:
        self.layer, self.keep = layer, keep

    def __missing__(self, key: Any) -> Any:
        if len(self) >= _KNOWN:
            self.clear()
        self[key] = way = self._made(*key)
        return way

    def _made(self, shape: tuple[int, ...], dtype: Any) -> Any:
        from xprnn.kernels import compiled
        from xprnn.kernels import plain as ways

        layer, cell = self.layer, self.layer.core
        (count, n, d), hidden = shape, layer.hidden_size
        none = compiled.why_not(cell, {"weight_hh": np.empty((0, 0), dtype)})
        if none or d != layer.input_size or not count * n:
            return None
        sources = compiled.sources_of(cell, BITS[dtype])
        full = (*shape, hidden, cell.gates * hidden)
        return ways.ahead(sources, cell, _short(layer), full, dtype, layer.reverse, self.keep)


def recurrent_pass(layer: Any, *, keep: bool) -> Pass | None:
    """The quick pass of one layer in one direction: y, state and tape, or None."""
    simple = not (layer.bidirectional or layer.batch_first or layer.learned_state or layer.projection)
    if not simple or len(layer.sizes) > 1:
        return None
    cell, (shapes, (names,)), fast, ndarray = layer.core, names_of(layer), kernels.fast, np.ndarray
    count, ways, own = len(cell.states), _Ways(layer, keep=keep), tuple(names[short] for short in _short(layer))

    def run(params: Params, x: Array, state: Any) -> tuple[Array, Any, Any] | None:
        if not fast() or (way := ways[x.shape, x.dtype]) is None:
            return None
        if state is None:
            start = (np.zeros((1, x.shape[1], layer.hidden_size), x.dtype),) * count
        else:
            start = (state,) if count == 1 else state
        arrays = tuple([params[name] for name in own])
        for a in (*start, *arrays):
            if a.__class__ is not ndarray:
                return None
        if len(start) != count or (done := way(x, arrays, start)) is None:
            return None
        y, after = done.y, done.finals if count > 1 else done.finals[0]
        if not keep:
            return y, after, None
        y.flags.writeable = False  # the tape lives in this memory
        return y, after, QuickTape(layer, params, y, start, state is None, done)

    return guarded(len(shapes), run)


def recurrent_back(layer: Any) -> Back:
    """The adjoint of the quick pass."""
    count, ndarray, its = len(layer.core.states), np.ndarray, [f"{short}_l0" for short in _short(layer)]

    def run(tape: Any, dy: Any, dstate: Any, dstates: Any) -> Gradients | None:
        if tape.__class__ is not QuickTape or tape.layer is not layer or dstates is not None:
            return None
        done = tape.done
        if dy.__class__ is not ndarray or (way := done.way).large():
            return None
        given: Any = (None,) * count
        if dstate is not None:
            given, one = (dstate,) if count == 1 else dstate, done.finals[0].shape
            if given.__class__ is not tuple or not all(d is None or plain(d, one, way.dtype) for d in given):
                return None
        try:
            found = way.back(done, dy, given)
        except (
            Exception
        ):  # of another dtype, or not in C order; numba has exceptions of its own for what it doesn't know
            found = None
        if found is None:
            return None
        dx, ds, grads = found
        named = dict(zip(its, grads, strict=True))
        return Gradients(dx, ds if count > 1 else ds[0], {name: named[name] for name in tape.params})

    return run
