"""A recurrent layer's pass and its adjoint on NumPy arrays that need no words, compiled or not at all.

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
from xprnn.kernels.walk import contiguous
from xprnn.layout import names_of
from xprnn.quick import guarded, plain
from xprnn.stack import Gradients, StackTape
from xprnn.tape import State, Steps, Tape

__all__ = ["Back", "Pass", "recurrent_back", "recurrent_pass"]

Pass = Callable[[Params, Array, Any], tuple[Array, Any, Any] | None]  # the third is a tape, or None
Back = Callable[[Any, Any, Any, Any], Gradients | None]
_KNOWN = 256  # shapes of x at a time


class QuickTape(StackTape):
    """A StackTape whose records are made when they are asked for."""

    start: tuple[Array, ...]
    passes: list[Any]  # plain.Done of each layer

    def __init__(
        self, layer: Any, params: Params, x: Array, y: Array, start: tuple[Array, ...] | None, passes: list[Any]
    ) -> None:
        # Its fields are set at once: a frozen dataclass takes a call for each.
        its = {"layer": layer, "params": params, "x": x, "y": y, "masks": [], "default": start is None}
        vars(self).update(its, start=start, passes=passes)

    @cached_property
    def xp(self) -> Any:
        """NumPy's namespace."""
        return namespace(self.x)

    @cached_property
    def chains(self) -> list[tuple[Chain, ChainTape]]:
        """The records."""
        from xprnn.kernels import compiled

        layer, steps, params, states, tapes = self.layer, Steps(), list[Params](), list[State](), list[Tape]()
        for k, done in enumerate(self.passes):
            params.append(dict(zip(done.way.names, done.arrays, strict=True)))
            states.append(_states(done.way, None if self.default else tuple(s[k] for s in self.start)))
            passed = done.kept(), ()
            _, _, tape = compiled.taped(passed, layer.core, params[k], done.x, states[k], steps, layer.reverse, True)
            assert tape is not None
            tapes.append(tape)
        chain, masks = Chain(self.xp, layer.core, params, layer.reverse, layer.dropout), [None] * len(tapes)
        return [(chain, ChainTape(self.x, states, steps, [(0, len(self.x))], [states], [], tapes, masks))]


def _states(way: Any, given: State | None) -> State:
    """A layer's first states, (N, H) each."""
    return given or (np.zeros((way.shape[1], way.shape[3]), way.dtype),) * way.count


def _short(layer: Any) -> tuple[str, ...]:
    """A layer's parameters in the order of a pass."""
    return ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if layer.bias else ()), *layer.core.vectors)


def _names(layer: Any) -> list[tuple[str, ...]]:
    """The same for all layers, by their names."""
    return [tuple(names[short] for short in _short(layer)) for names in names_of(layer)[1]]


class _Ways(dict[Any, Any]):
    """(shape, dtype) of time-major x -> the pass of each layer for it; None where there is none."""

    def __init__(self, layer: Any, *, keep: bool) -> None:
        self.layer, self.keep = layer, keep

    def __missing__(self, key: Any) -> Any:
        if len(self) >= _KNOWN:
            self.clear()
        self[key] = ways = self._made(*key)
        return ways

    def _made(self, shape: tuple[int, ...], dtype: Any) -> Any:
        from xprnn.kernels import compiled, plain

        layer, cell = self.layer, self.layer.core
        (count, n, d), hidden = shape, layer.hidden_size
        none = compiled.why_not(cell, {"weight_hh": np.empty((0, 0), dtype)})
        if none or d != layer.input_size or not count * n:
            return None
        sources, short = compiled.sources_of(cell, BITS[dtype]), _short(layer)
        full = [(count, n, width, hidden, cell.gates * hidden) for width in (d, *[hidden] * (layer.num_layers - 1))]
        return [plain.ahead(sources, cell, short, one, dtype, layer.reverse, self.keep) for one in full]


def recurrent_pass(layer: Any, *, keep: bool) -> Pass | None:
    """The quick pass of layers in one direction: y, state and tape, or None."""
    if layer.bidirectional or layer.learned_state or layer.projection or not isinstance(layer.hidden_size, int):
        return None
    fast, ndarray, batch_first, size = kernels.fast, np.ndarray, layer.batch_first, layer.hidden_size
    own, total, count, ways = _names(layer), layer.num_layers, len(layer.core.states), _Ways(layer, keep=keep)

    def run(params: Params, x: Array, state: Any) -> tuple[Array, Any, Any] | None:
        x = contiguous(x.swapaxes(0, 1)) if batch_first else x
        if not fast() or (those := ways[x.shape, x.dtype]) is None:
            return None
        shape = total, x.shape[1], size
        start = None if state is None else (state,) if count == 1 else state
        finals = [np.empty(shape, x.dtype) for _ in range(count)]
        begin = (np.zeros(shape, x.dtype),) * count if start is None else start
        for a in begin:
            if a.__class__ is not ndarray or a.shape != shape:
                return None
        y, passes = x, list[Any]()
        for k in range(total):
            before, after = (begin, finals) if total == 1 else ([s[k : k + 1] for s in of] for of in (begin, finals))
            if (done := _one(those[k], y, params, own[k], before, after)) is None:
                return None
            passes += [done] * keep
            y = done.y
        y = y.swapaxes(0, 1) if batch_first else y
        packed = tuple(finals) if count > 1 else finals[0]
        if not keep:
            return y, packed, None
        y.flags.writeable = False  # the tape lives in this memory
        return y, packed, QuickTape(layer, params, x, y, start, passes)

    return guarded(len(layer.shapes()), run)


def _one(way: Any, x: Array, params: Params, names: tuple[str, ...], before: Any, after: Any) -> Any:
    """The pass of one layer."""
    arrays = tuple([params[name] for name in names])
    for a in arrays:
        if a.__class__ is not np.ndarray:
            return None
    return way(x, arrays, before, after)


def recurrent_back(layer: Any) -> Back:
    """The adjoint of the quick pass."""
    count, ndarray, batch_first, own = len(layer.core.states), np.ndarray, layer.batch_first, _names(layer)
    nothing = (None,) * count

    def run(tape: Any, dy: Any, dstate: Any, dstates: Any) -> Gradients | None:
        if tape.__class__ is not QuickTape or tape.layer is not layer or dstates is not None:
            return None
        if dy.__class__ is not ndarray or any(done.way.large() for done in tape.passes):
            return None
        given: Any = nothing if dstate is None else (dstate,) if count == 1 else dstate
        if dstate is not None:
            way = tape.passes[0].way
            shape = len(own), way.shape[1], way.shape[3]
            if given.__class__ is not tuple or not all(d is None or plain(d, shape, way.dtype) for d in given):
                return None
        dx, named, ds = contiguous(dy.swapaxes(0, 1)) if batch_first else dy, Params(), []
        try:
            for k in range(len(own) - 1, -1, -1):
                done = tape.passes[k]
                sent = given if len(own) == 1 else [None if d is None else d[k : k + 1] for d in given]
                dx, first, grads = done.way.back(done, dx, sent)
                ds.append(first)
                named.update(zip(own[k], grads, strict=True))
        except Exception:  # of another shape, dtype or order; numba has exceptions of its own for what it doesn't know
            return None
        packed = ds[0] if len(own) == 1 else tuple(np.concatenate(one) for one in zip(*ds[::-1], strict=True))
        dx = dx.swapaxes(0, 1) if batch_first else dx
        return Gradients(dx, packed if count > 1 else packed[0], {name: named[name] for name in tape.params})

    return run
