"""Fast paths of `step` for plain NumPy arrays."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np

from xprnn.arrays.namespace import Array, Params, namespace
from xprnn.engine.checkpointing import Chain, ChainTape
from xprnn.engine.layer import Quick, Streams, _is_ours, nothing
from xprnn.engine.stack import StackTape
from xprnn.engine.state_layout import names_of
from xprnn.kernels import config
from xprnn.kernels.jit.short_sequence import compiled_walk
from xprnn.kernels.jit.step import compiled_step
from xprnn.kernels.memory import contiguous
from xprnn.kernels.reference import step_once
from xprnn.kernels.step_plan import BITS, Stepped
from xprnn.kernels.tape import Gradients, State, Steps, Tape
from xprnn.kernels.ufunc.step import numpy_step

__all__ = [
    "Back",
    "Pass",
    "QuickRecurrent",
    "chain_step",
    "embedding_step",
    "guarded",
    "linear_step",
    "plain",
    "quick_of",
    "recurrent_back",
    "recurrent_pass",
]


Result = TypeVar("Result")


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
    ndarray, generic = np.ndarray, config.generic

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
        from xprnn.kernels.jit import scan as jit_scan

        layer, steps, params, states, tapes = self.layer, Steps(), list[Params](), list[State](), list[Tape]()
        for k, done in enumerate(self.passes):
            params.append(dict(zip(done.way.names, done.arrays, strict=True)))
            states.append(_states(done.way, None if self.default else tuple(s[k] for s in self.start)))
            passed = done.kept(), ()
            _, _, tape = jit_scan.taped(passed, layer.core, params[k], done.x, states[k], steps, layer.reverse, True)
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
        from xprnn.kernels.jit import scan as jit_scan
        from xprnn.kernels.jit import scan_plan

        layer, cell = self.layer, self.layer.core
        (count, n, d), hidden = shape, layer.hidden_size
        none = jit_scan.why_not(cell, {"weight_hh": np.empty((0, 0), dtype)})
        if none or d != layer.input_size or not count * n:
            return None
        sources, short = jit_scan.sources_of(cell, BITS[dtype]), _short(layer)
        full = [(count, n, width, hidden, cell.gates * hidden) for width in (d, *[hidden] * (layer.num_layers - 1))]
        return [scan_plan.ahead(sources, cell, short, one, dtype, layer.reverse, self.keep) for one in full]


def recurrent_pass(layer: Any, *, keep: bool) -> Pass | None:
    """The quick pass of layers in one direction: y, state and tape, or None."""
    if layer.bidirectional or layer.learned_state or layer.projection or not isinstance(layer.hidden_size, int):
        return None
    fast, ndarray, batch_first, size = config.fast, np.ndarray, layer.batch_first, layer.hidden_size
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
    its, fast = _stepped(layer, prefix), config.fast
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
    its, fast, floats, batch_first = _stepped(layer, ""), config.fast, BITS, layer.batch_first
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
