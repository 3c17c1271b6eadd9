"""Fast paths of `step` for plain NumPy arrays."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np

from xprnn.arrays.namespace import Array, Params, namespace
from xprnn.engine.checkpointing import DirectionStack, DirectionStackTape
from xprnn.engine.layer import FastStep, Steppable, is_library_method, no_fast_path
from xprnn.engine.stack import StackTape
from xprnn.engine.state_layout import parameter_names
from xprnn.kernels import config
from xprnn.kernels.jit.short_sequence import compiled_sequence
from xprnn.kernels.jit.step import compiled_step
from xprnn.kernels.memory import contiguous
from xprnn.kernels.reference import single_step
from xprnn.kernels.step_plan import DTYPE_BITS, LayerSignature
from xprnn.kernels.tape import Gradients, State, StepMask, Tape
from xprnn.kernels.ufunc.step import numpy_step

__all__ = [
    "BackwardFn",
    "FastPaths",
    "ForwardFn",
    "is_ndarray",
    "make_embedding_step",
    "make_layer_step",
    "make_linear_step",
    "make_recurrent_backward",
    "make_recurrent_forward",
    "make_sequential_step",
    "with_fallback",
]


Result = TypeVar("Result")


def is_ndarray(a: Array, shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether this is NumPy's own array in this shape and dtype."""
    return a.__class__ is np.ndarray and a.dtype == dtype and a.shape == shape


def _all_ndarrays(params: Params, shapes: tuple[tuple[str, tuple[int, ...]], ...], dtype: Any) -> bool:
    """Whether the parameters are plain arrays of this dtype, in these shapes."""
    return all(is_ndarray(params[name], shape, dtype) for name, shape in shapes)


def with_fallback(
    count: int, run: Callable[[Params, Array, Any], Result | None]
) -> Callable[[Params, Array, Any], Result | None]:
    """`run` for plain arrays outside of the generic scan; it may raise or return None where something doesn't fit."""
    ndarray, generic = np.ndarray, config.is_reference_only

    def step(params: Params, x: Array, state: Any) -> Result | None:
        if x.__class__ is not ndarray or params.__class__ is not dict or len(params) != count or generic():
            return None
        try:
            return run(params, x, state)
        except Exception:  # a name, a kind or a shape; numba has exceptions of its own for a subclass of ndarray
            return None

    return step


def _uses_default_step(layer: Any) -> bool:
    """Whether a part's step, which is a call of one step, does what xprnn's own does."""
    return all(is_library_method(type(layer), verb) for verb in ("__call__", "forward"))


def make_linear_step(layer: Any, prefix: str, count: int) -> FastStep:
    """The quick step of a Linear; none of one whose step is a call that does more."""
    if not _uses_default_step(layer):
        return no_fast_path
    shapes = tuple((prefix + name, shape) for name, shape in layer.shapes().items())
    w, b = prefix + "weight", prefix + "bias" if layer.bias else None

    def step(params: Params, x: Array, state: Any) -> tuple[Array, None] | None:
        dtype = x.dtype
        if (
            dtype not in DTYPE_BITS
            or x.ndim != 2
            or x.shape[1] != layer.in_features
            or not _all_ndarrays(params, shapes, dtype)
        ):
            return None
        y = np.dot(params[w], x[0]) if len(x) == 1 else np.dot(x, params[w].T)
        if b is not None:
            np.add(y, params[b], y)
        return y.reshape(len(x), -1), None

    return with_fallback(count, step)


def make_embedding_step(layer: Any, prefix: str, count: int) -> FastStep:
    """The quick step of an Embedding; none of one whose step is a call that does more."""
    if not _uses_default_step(layer):
        return no_fast_path
    w = prefix + "weight"
    shapes = ((w, layer.shapes()["weight"]),)

    def step(params: Params, x: Array, state: Any) -> tuple[Array, None] | None:
        dtype, n = params[w].dtype, len(x)
        if (
            dtype not in DTYPE_BITS
            or x.dtype.kind not in "iu"
            or x.ndim != 1
            or not _all_ndarrays(params, shapes, dtype)
        ):
            return None
        if n == 1:
            k = x.item()
            return (params[w][k : k + 1].copy(), None) if 0 <= k < layer.num_embeddings else None
        fits = x.min(initial=0) >= 0 and x.max(initial=0) < layer.num_embeddings
        return (params[w].take(x, axis=0), None) if fits else None

    return with_fallback(count, step)


def make_layer_step(part: Any, prefix: str, count: int) -> FastStep | None:
    """A part's quick step, or where it has none its own step."""
    if isinstance(part, Steppable) and is_library_method(type(part), "step"):
        quick = part.make_fast_step(prefix, count)
        if quick is not no_fast_path:
            return quick
    names = {name: prefix + name for name in part.shapes()}

    def step(params: Params, x: Array, state: Any) -> tuple[Array, Any] | None:
        done: tuple[Array, Any] = part.step({short: params[name] for short, name in names.items()}, x, state)
        return done

    return with_fallback(count, step)


def make_sequential_step(steps: dict[str, Any], recurrent: list[str]) -> FastStep:
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


ForwardFn = Callable[[Params, Array, Any], tuple[Array, Any, Any] | None]  # the third is a tape, or None
BackwardFn = Callable[[Any, Any, Any, Any], Gradients | None]
_MAX_CACHED_SHAPES = 256  # shapes of x at a time


class LazyTape(StackTape):
    """A StackTape whose records are made when they are asked for."""

    initial_state: tuple[Array, ...]
    layer_results: list[Any]  # plain.Done of each layer

    def __init__(
        self, layer: Any, params: Params, x: Array, y: Array, start: tuple[Array, ...] | None, passes: list[Any]
    ) -> None:
        # Its fields are set at once: a frozen dataclass takes a call for each.
        inherited = {"layer": layer, "params": params, "x": x, "y": y, "dropout_masks": []}
        vars(self).update(inherited, uses_default_state=start is None, initial_state=start, layer_results=passes)

    @cached_property
    def xp(self) -> Any:
        """NumPy's namespace."""
        return namespace(self.x)

    @cached_property
    def direction_stacks(self) -> list[tuple[DirectionStack, DirectionStackTape]]:
        """The records."""
        from xprnn.kernels.jit import scan as jit_scan

        layer, steps, params, states, tapes = self.layer, StepMask(), list[Params](), list[State](), list[Tape]()
        for k, done in enumerate(self.layer_results):
            params.append(dict(zip(done.plan.param_names, done.param_arrays, strict=True)))
            states.append(
                _initial_states(done.plan, None if self.uses_default_state else tuple(s[k] for s in self.initial_state))
            )
            passed = done.saved_for_backward(), ()
            _, _, tape = jit_scan.with_tape(
                passed, layer.resolved_cell, params[k], done.x, states[k], steps, layer.reverse, True
            )
            assert tape is not None
            tapes.append(tape)
        chain, masks = (
            DirectionStack(self.xp, layer.resolved_cell, params, layer.reverse, layer.dropout),
            [None] * len(tapes),
        )
        return [(chain, DirectionStackTape(self.x, states, steps, [(0, len(self.x))], [states], [], tapes, masks))]


def _initial_states(way: Any, given: State | None) -> State:
    """A layer's first states, (N, H) each."""
    return given or (np.zeros((way.shape[1], way.shape[3]), way.dtype),) * way.num_states


def _parameter_order(layer: Any) -> tuple[str, ...]:
    """A layer's parameters in the order of a pass."""
    return ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if layer.bias else ()), *layer.resolved_cell.vectors)


def _ordered_parameter_names(layer: Any) -> list[tuple[str, ...]]:
    """The same for all layers, by their names."""
    return [tuple(names[short] for short in _parameter_order(layer)) for names in parameter_names(layer)[1]]


class _PlanCache(dict[Any, Any]):
    """(shape, dtype) of time-major x -> the pass of each layer for it; None where there is none."""

    def __init__(self, layer: Any, *, record_tape: bool) -> None:
        self.layer, self.record_tape = layer, record_tape

    def __missing__(self, key: Any) -> Any:
        if len(self) >= _MAX_CACHED_SHAPES:
            self.clear()
        self[key] = ways = self._build_plans(*key)
        return ways

    def _build_plans(self, shape: tuple[int, ...], dtype: Any) -> Any:
        from xprnn.kernels.jit import scan as jit_scan
        from xprnn.kernels.jit import scan_plan

        layer, cell = self.layer, self.layer.resolved_cell
        (count, n, d), hidden = shape, layer.hidden_size
        none = jit_scan.unsupported_reason(cell, {"weight_hh": np.empty((0, 0), dtype)})
        if none or d != layer.input_size or not count * n:
            return None
        sources, short = jit_scan.kernel_sources(cell, DTYPE_BITS[dtype]), _parameter_order(layer)
        full = [(count, n, width, hidden, cell.gates * hidden) for width in (d, *[hidden] * (layer.num_layers - 1))]
        return [
            scan_plan.forward_plan(sources, cell, short, one, dtype, layer.reverse, self.record_tape) for one in full
        ]


def make_recurrent_forward(layer: Any, *, record_tape: bool) -> ForwardFn | None:
    """The quick pass of layers in one direction: y, state and tape, or None."""
    if layer.bidirectional or layer.learned_state or layer.projection_size or not isinstance(layer.hidden_size, int):
        return None
    fast, ndarray, batch_first, size = config.jit_enabled, np.ndarray, layer.batch_first, layer.hidden_size
    own, total, count, ways = (
        _ordered_parameter_names(layer),
        layer.num_layers,
        len(layer.resolved_cell.states),
        _PlanCache(layer, record_tape=record_tape),
    )

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
            if (done := _run_layer(those[k], y, params, own[k], before, after)) is None:
                return None
            passes += [done] * record_tape
            y = done.y
        y = y.swapaxes(0, 1) if batch_first else y
        packed = tuple(finals) if count > 1 else finals[0]
        if not record_tape:
            return y, packed, None
        y.flags.writeable = False  # the tape lives in this memory
        return y, packed, LazyTape(layer, params, x, y, start, passes)

    return with_fallback(len(layer.shapes()), run)


def _run_layer(way: Any, x: Array, params: Params, names: tuple[str, ...], before: Any, after: Any) -> Any:
    """The pass of one layer."""
    arrays = tuple([params[name] for name in names])
    for a in arrays:
        if a.__class__ is not np.ndarray:
            return None
    return way(x, arrays, before, after)


def make_recurrent_backward(layer: Any) -> BackwardFn:
    """The adjoint of the quick pass."""
    count, ndarray, batch_first, own = (
        len(layer.resolved_cell.states),
        np.ndarray,
        layer.batch_first,
        _ordered_parameter_names(layer),
    )
    nothing = (None,) * count

    def run(tape: Any, dy: Any, dstate: Any, dstates: Any) -> Gradients | None:
        if tape.__class__ is not LazyTape or tape.layer is not layer or dstates is not None:
            return None
        if dy.__class__ is not ndarray or any(done.plan.is_threaded() for done in tape.layer_results):
            return None
        given: Any = nothing if dstate is None else (dstate,) if count == 1 else dstate
        if dstate is not None:
            way = tape.layer_results[0].plan
            shape = len(own), way.shape[1], way.shape[3]
            if given.__class__ is not tuple or not all(d is None or is_ndarray(d, shape, way.dtype) for d in given):
                return None
        dx, named, ds = contiguous(dy.swapaxes(0, 1)) if batch_first else dy, Params(), []
        try:
            for k in range(len(own) - 1, -1, -1):
                done = tape.layer_results[k]
                sent = given if len(own) == 1 else [None if d is None else d[k : k + 1] for d in given]
                dx, first, grads = done.plan.backward_plan(done, dx, sent)
                ds.append(first)
                named.update(zip(own[k], grads, strict=True))
        except Exception:  # of another shape, dtype or order; numba has exceptions of its own for what it doesn't know
            return None
        packed = ds[0] if len(own) == 1 else tuple(np.concatenate(one) for one in zip(*ds[::-1], strict=True))
        dx = dx.swapaxes(0, 1) if batch_first else dx
        return Gradients(dx, packed if count > 1 else packed[0], {name: named[name] for name in tape.params})

    return run


class FastPaths(Steppable):
    """A recurrent layer's quick ways, each made when it is first wanted."""

    def make_fast_step(self, prefix: str, count: int) -> FastStep | None:
        """The quick step."""
        return make_recurrent_step(self, prefix, count)

    @cached_property
    def _fast_sequence(self) -> FastStep:
        return make_recurrent_sequence(self) or no_fast_path

    @cached_property
    def _fast_forward(self) -> ForwardFn:
        return make_recurrent_forward(self, record_tape=True) or no_fast_path

    @cached_property
    def _fast_inference(self) -> ForwardFn:
        return make_recurrent_forward(self, record_tape=False) or no_fast_path

    @cached_property
    def _fast_backward(self) -> BackwardFn:
        return make_recurrent_backward(self)

    def _infer(self, params: Params, x: Array, state: Any) -> tuple[Array, Any] | None:
        """A whole sequence of which no tape is kept."""
        if (done := self._fast_sequence(params, x, state)) is not None:
            return done
        whole = self._fast_inference(params, x, state)
        return None if whole is None else whole[:2]


def make_recurrent_step(layer: Any, prefix: str, count: int) -> FastStep | None:
    """The quick step of a recurrent layer: compiled for a few rows, or else in NumPy."""
    if layer.bidirectional or layer.reverse or not isinstance(layer.hidden_size, int):
        return None
    its, fast = _layer_signature(layer, prefix), config.jit_enabled
    few, floats, ways = its.max_compiled_rows, DTYPE_BITS, dict[tuple[bool, bool], FastStep]()
    fastest = list[FastStep | None]([None, None])  # the compiled ones, by whether x is integer

    def way(integer: bool, one: bool) -> FastStep:
        """The step in NumPy, for one row or for many; made when it is first wanted."""
        found = ways.get((integer, one))
        if found is None:
            found = ways[integer, one] = numpy_step(its, integer, one, partial(single_step, np, its.cell))
        return found

    def step(params: Params, x: Array, state: Any) -> tuple[Array, Any] | None:
        integer, n = x.dtype not in floats, len(x)
        if integer and x.dtype.kind not in "iu":
            return None
        if n <= few and fast():
            try:
                run = fastest[integer]
                if run is None:
                    run = fastest[integer] = compiled_step(its, integer) or no_fast_path
                done = run(params, x, state)
            except (KeyError, TypeError):  # no kernel, or one that takes no such arrays
                done = None
            if done is not None:
                return done
        return way(integer, n == 1)(params, x, state)

    return with_fallback(count, step)


def make_recurrent_sequence(layer: Any) -> FastStep | None:
    """The quick walk of a recurrent layer, for few rows and small weights; compiled or not at all."""
    if layer.bidirectional or layer.reverse or not isinstance(layer.hidden_size, int):
        return None
    its, fast, floats, batch_first = _layer_signature(layer, ""), config.jit_enabled, DTYPE_BITS, layer.batch_first
    ways = dict[bool, FastStep]()

    def walk(params: Params, x: Array, state: Any) -> tuple[Array, Any] | None:
        integer, n = x.dtype not in floats, x.shape[0 if batch_first else 1]
        if not fast() or not its.use_sequence_kernel(n, integer) or (integer and x.dtype.kind not in "iu"):
            return None
        if integer not in ways:
            ways[integer] = compiled_sequence(its, integer, batch_first) or no_fast_path
        return ways[integer](params, x, state)

    return with_fallback(len(its.parameter_shapes), walk)


def _layer_signature(layer: Any, prefix: str) -> LayerSignature:
    core, (shapes, names) = layer.resolved_cell, parameter_names(layer)
    short = ["weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if layer.bias else ()), *core.vectors]
    short += ["weight_hr"] if layer.projection_size else []
    found = tuple(tuple(prefix + own[name] for name in short) for own in names)
    learned = tuple(prefix + name for name in shapes if name.startswith("initial_"))
    shapes = {prefix + name: shape for name, shape in shapes.items()}
    return LayerSignature(
        core, layer.bias, layer.input_size, layer.hidden_size, layer.projection_size, found, learned, shapes
    )
