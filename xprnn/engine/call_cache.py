"""Fast paths of `step`, `__call__`, `forward` and `backward` for plain NumPy arrays; see engine/layer.py."""

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from xprnn.arrays.namespace import Array, Namespace, Params, namespace
from xprnn.engine.checkpointing import DirectionStack, DirectionStackTape
from xprnn.engine.layer import (
    EmbeddingLayer,
    FastStep,
    LinearLayer,
    RecurrentLayer,
    Steppable,
    SteppedLayer,
    is_library_method,
    is_user_defined,
    no_fast_path,
)
from xprnn.engine.stack import StackTape
from xprnn.engine.state_layout import parameter_names
from xprnn.kernels import config
from xprnn.kernels.jit.short_sequence import compiled_sequence
from xprnn.kernels.jit.step import compiled_step
from xprnn.kernels.memory import contiguous
from xprnn.kernels.reference import single_step
from xprnn.kernels.step_plan import DTYPE_BITS, LayerSignature
from xprnn.kernels.tape import Gradients, State, StepMask, Tape
from xprnn.kernels.ufunc.step import is_traceable, numpy_step

if TYPE_CHECKING:
    from xprnn.kernels.jit.scan_plan import ForwardPlan, ForwardResult

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
    """True if `a` is a NumPy array of this shape and dtype, and not of a subclass."""
    return a.__class__ is np.ndarray and a.dtype == dtype and a.shape == shape


def _all_ndarrays(params: Params, shapes: tuple[tuple[str, tuple[int, ...]], ...], dtype: Any) -> bool:
    """True if all parameters are NumPy arrays of this dtype and of these shapes."""
    return all(is_ndarray(params[name], shape, dtype) for name, shape in shapes)


def with_fallback(
    count: int, run: Callable[[Params, Array, Any], Result | None]
) -> Callable[[Params, Array, Any], Result | None]:
    """Wrap `run`, so that it returns None for arguments that do not fit and within `reference_only`.

    Args:
        count: the number of parameters that the caller must pass.
        run: a function of plain arrays that calls library code only. It may return None or raise where they do not fit.
    """
    ndarray, is_reference_only = np.ndarray, config.is_reference_only

    def fast_path(params: Params, x: Array, state: Any) -> Result | None:
        if x.__class__ is not ndarray or params.__class__ is not dict or len(params) != count or is_reference_only():
            return None
        try:
            return run(params, x, state)
        except Exception:  # a missing name, a wrong type or shape; for a subclass of ndarray, numba's own exceptions
            return None

    return fast_path


# --- steps of single layers


def _calls_library_code(layer: SteppedLayer) -> bool:
    """True if the step of a stateless layer runs no user-defined method and no user-defined activation."""
    verbs = ("step", "__call__", "forward")
    if not all(is_library_method(type(layer), verb) for verb in verbs):
        return False
    return not any(map(is_user_defined, vars(layer).values()))


def make_linear_step(layer: LinearLayer, prefix: str, count: int) -> FastStep:
    """Build the fast step of a Linear; `no_fast_path` for a subclass that overrides what `step` calls."""
    if not _calls_library_code(layer):
        return no_fast_path
    shapes = tuple((prefix + name, shape) for name, shape in layer.shapes().items())
    features, w, b = layer.in_features, prefix + "weight", prefix + "bias" if layer.bias else None

    def step(params: Params, x: Array, state: Any) -> tuple[Array, None] | None:
        dtype = x.dtype
        if dtype not in DTYPE_BITS or x.ndim != 2 or x.shape[1] != features or not _all_ndarrays(params, shapes, dtype):
            return None
        y = np.dot(params[w], x[0]) if len(x) == 1 else np.dot(x, params[w].T)
        if b is not None:
            np.add(y, params[b], y)
        return y.reshape(len(x), -1), None

    return with_fallback(count, step)


def make_embedding_step(layer: EmbeddingLayer, prefix: str, count: int) -> FastStep:
    """Build the fast step of an Embedding; `no_fast_path` for a subclass that overrides what `step` calls."""
    if not _calls_library_code(layer):
        return no_fast_path
    classes, w = layer.num_embeddings, prefix + "weight"
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
            return (params[w][k : k + 1].copy(), None) if 0 <= k < classes else None
        in_bounds = x.min(initial=0) >= 0 and x.max(initial=0) < classes
        return (params[w].take(x, axis=0), None) if in_bounds else None

    return with_fallback(count, step)


# --- steps of a Sequential


def make_layer_step(layer: SteppedLayer, prefix: str, count: int) -> FastStep | None:
    """Build the fast step of one layer of a Sequential; None if the layer has none.

    A layer that runs user-defined code has none. When the fast step of one layer returns None, the Sequential runs the
    steps of all its layers again, so user-defined code would run twice.
    """
    if isinstance(layer, Steppable):
        fast = layer.make_fast_step(prefix, count) if is_library_method(type(layer), "step") else None
        return None if fast is no_fast_path else fast
    if not type(layer).__module__.startswith("xprnn.") or not _calls_library_code(layer):
        return None
    names = {name: prefix + name for name in layer.shapes()}

    def step(params: Params, x: Array, state: Any) -> tuple[Array, Any] | None:
        return layer.step({short: params[name] for short, name in names.items()}, x, state)

    return with_fallback(count, step)


def make_sequential_step(steps: Mapping[str, FastStep | None], stateful: list[str]) -> FastStep | None:
    """Compose the fast step of a Sequential; None if one of its layers has no fast step.

    The composed step returns None as soon as the step of one layer does.

    Args:
        steps: the fast step of each layer, in order.
        stateful: the names of the layers that have a state. The state of the model is that of its only stateful layer;
            of several, it is a dict by name.
    """
    only = stateful[0] if len(stateful) == 1 else None
    layers = [(name, step, name in stateful) for name, step in steps.items() if step is not None]
    if len(layers) < len(steps):
        return None

    def sequential_step(params: Params, x: Array, state: Any) -> tuple[Array, Any] | None:
        if only is None and not (state is None if not stateful else state.__class__ is dict):
            return None
        if stateful and only is None and len(state) != len(stateful):
            return None
        new_states = {}
        for name, step, has_state in layers:
            old = None if not has_state else state if only is not None else state.get(name)
            result = step(params, x, old)
            if result is None:
                return None
            x, new_states[name] = result
        if only is not None:
            return x, new_states[only]
        return x, {name: new_states[name] for name in stateful} or None

    return sequential_step


# --- forward and backward of recurrent layers

ForwardFn = Callable[[Params, Array, Any], tuple[Array, Any, Any] | None]  # y, final state, tape or None
BackwardFn = Callable[[Any, Any, Any, Any], Gradients | None]
_MAX_CACHED_SHAPES = 256  # entries of one _PlanCache, which is cleared when it is full


class LazyTape(StackTape):
    """A StackTape whose scan tapes are built at the first access; the fast backward does not need them."""

    initial_state: tuple[Array, ...]
    layer_results: "list[ForwardResult]"

    def __init__(
        self,
        layer: RecurrentLayer,
        params: Params,
        x: Array,
        y: Array,
        initial_state: tuple[Array, ...] | None,
        layer_results: "list[ForwardResult]",
    ) -> None:
        # One update of vars: the constructor of a frozen dataclass makes one call for each field.
        fields = {"layer": layer, "params": params, "x": x, "y": y, "dropout_masks": []}
        vars(self).update(
            fields, uses_default_state=initial_state is None, initial_state=initial_state, layer_results=layer_results
        )

    @cached_property
    def xp(self) -> Namespace:
        """The namespace of NumPy."""
        return namespace(self.x)

    @cached_property
    def direction_stacks(self) -> list[tuple[DirectionStack, DirectionStackTape]]:
        """The stack of layers and its tape, built from the results of the fast forward."""
        from xprnn.kernels.jit import scan as jit_scan

        layer, steps, params, states, tapes = self.layer, StepMask(), list[Params](), list[State](), list[Tape]()
        for k, result in enumerate(self.layer_results):
            params.append(dict(zip(result.plan.param_names, result.param_arrays, strict=True)))
            start = None if self.uses_default_state else tuple(s[k] for s in self.initial_state)
            states.append(start or _zero_states(result.plan))
            scan_result = result.saved_for_backward(), ()
            _, _, tape = jit_scan.with_tape(
                scan_result, layer.resolved_cell, params[k], result.x, states[k], steps, layer.reverse, True
            )
            assert tape is not None
            tapes.append(tape)
        stack = DirectionStack(self.xp, layer.resolved_cell, params, layer.reverse, layer.dropout)
        masks = [None] * len(tapes)
        return [(stack, DirectionStackTape(self.x, states, steps, [(0, len(self.x))], [states], [], tapes, masks))]


def _zero_states(plan: "ForwardPlan") -> State:
    """The default initial states of one layer, (N, H) each."""
    return (np.zeros((plan.shape[1], plan.shape[3]), plan.dtype),) * plan.num_states


def _parameter_order(layer: RecurrentLayer) -> tuple[str, ...]:
    """Scan names of one layer's parameters, in kernel-argument order."""
    return ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if layer.bias else ()), *layer.resolved_cell.vectors)


def _ordered_parameter_names(layer: RecurrentLayer) -> list[tuple[str, ...]]:
    """Parameter names of every layer, in kernel-argument order."""
    return [tuple(names[short] for short in _parameter_order(layer)) for names in parameter_names(layer)[1]]


class _PlanCache(dict[Any, Any]):
    """(shape, dtype) of time-major x -> the ForwardPlan of every layer, or None if the kernel does not apply."""

    def __init__(self, layer: RecurrentLayer, *, record_tape: bool) -> None:
        self.layer, self.record_tape = layer, record_tape

    def __missing__(self, key: Any) -> "list[ForwardPlan] | None":
        if len(self) >= _MAX_CACHED_SHAPES:
            self.clear()
        self[key] = plans = self._build_plans(*key)
        return plans

    def _build_plans(self, shape: tuple[int, ...], dtype: Any) -> "list[ForwardPlan] | None":
        from xprnn.kernels.jit import scan as jit_scan
        from xprnn.kernels.jit import scan_plan

        layer, cell = self.layer, self.layer.resolved_cell
        (count, n, d), hidden = shape, layer.hidden_sizes[0]
        reason = jit_scan.unsupported_reason(cell, {"weight_hh": np.empty((0, 0), dtype)})
        if reason or d != layer.input_size or not count * n:
            return None
        sources, names = jit_scan.kernel_sources(cell, DTYPE_BITS[dtype]), _parameter_order(layer)
        assert sources is not None
        widths = (d, *[hidden] * (layer.num_layers - 1))
        shapes = [(count, n, width, hidden, cell.gates * hidden) for width in widths]
        return [scan_plan.forward_plan(sources, cell, names, s, dtype, layer.reverse, self.record_tape) for s in shapes]


def make_recurrent_forward(layer: RecurrentLayer, *, record_tape: bool) -> ForwardFn | None:
    """Build the fast forward of a stack in one direction: it returns y, the final state and, if recorded, the tape."""
    if layer.bidirectional or layer.learned_state or layer.projection_size or not isinstance(layer.hidden_size, int):
        return None
    jit_enabled, ndarray, batch_first, hidden = config.jit_enabled, np.ndarray, layer.batch_first, layer.hidden_size
    names, num_layers = _ordered_parameter_names(layer), layer.num_layers
    num_states, plan_cache = len(layer.resolved_cell.states), _PlanCache(layer, record_tape=record_tape)

    def forward(params: Params, x: Array, state: Any) -> tuple[Array, Any, Any] | None:
        x = contiguous(x.swapaxes(0, 1)) if batch_first else x
        if not jit_enabled() or (plans := plan_cache[x.shape, x.dtype]) is None:
            return None
        shape = num_layers, x.shape[1], hidden
        state_tuple = None if state is None else (state,) if num_states == 1 else state
        finals = [np.empty(shape, x.dtype) for _ in range(num_states)]
        initial = (np.zeros(shape, x.dtype),) * num_states if state_tuple is None else state_tuple
        for a in initial:
            if a.__class__ is not ndarray or a.shape != shape:
                return None
        y, results = x, list[Any]()
        for k in range(num_layers):
            old, new = (
                (initial, finals)
                if num_layers == 1
                else ([s[k : k + 1] for s in states] for states in (initial, finals))
            )
            if (result := _run_layer(plans[k], y, params, names[k], old, new)) is None:
                return None
            results += [result] * record_tape
            y = result.y
        y = y.swapaxes(0, 1) if batch_first else y
        packed = tuple(finals) if num_states > 1 else finals[0]
        if not record_tape:
            return y, packed, None
        y.flags.writeable = False  # y is a view of the tape's memory
        return y, packed, LazyTape(layer, params, x, y, state_tuple, results)

    return with_fallback(len(layer.shapes()), forward)


def _run_layer(
    plan: "ForwardPlan", x: Array, params: Params, names: tuple[str, ...], initial: Any, final: Any
) -> "ForwardResult | None":
    """Run the compiled scan of one layer, which writes into the arrays `final`; None if an array does not fit."""
    arrays = tuple([params[name] for name in names])
    for a in arrays:
        if a.__class__ is not np.ndarray:
            return None
    return plan(x, arrays, initial, final)


def make_recurrent_backward(layer: RecurrentLayer) -> BackwardFn:
    """Build the fast backward, which applies to tapes of this layer's fast forward that need no threads."""
    num_states, ndarray, batch_first = len(layer.resolved_cell.states), np.ndarray, layer.batch_first
    names = _ordered_parameter_names(layer)
    num_layers, no_cotangents = len(names), (None,) * num_states

    def backward(tape: Any, dy: Any, dstate: Any, dstates: Any) -> Gradients | None:
        if tape.__class__ is not LazyTape or tape.layer is not layer or dstates is not None:
            return None
        if dy.__class__ is not ndarray or any(result.plan.is_threaded() for result in tape.layer_results):
            return None
        dfinal: Any = no_cotangents if dstate is None else (dstate,) if num_states == 1 else dstate
        if dstate is not None:
            plan = tape.layer_results[0].plan
            shape = num_layers, plan.shape[1], plan.shape[3]
            if dfinal.__class__ is not tuple or not all(d is None or is_ndarray(d, shape, plan.dtype) for d in dfinal):
                return None
        dx, grads, dinitial = contiguous(dy.swapaxes(0, 1)) if batch_first else dy, Params(), []
        try:
            for k in range(num_layers - 1, -1, -1):
                result = tape.layer_results[k]
                d = dfinal if num_layers == 1 else [None if d is None else d[k : k + 1] for d in dfinal]
                if (gradients := result.plan.backward_plan(result, dx, d)) is None:
                    return None
                dx, dlayer, dparams = gradients
                dinitial.append(dlayer)
                grads.update(zip(names[k], dparams, strict=True))
        except Exception:  # dy of another shape, dtype or order; for types that numba does not know, its own exceptions
            return None
        packed = dinitial[0] if num_layers == 1 else tuple(map(np.concatenate, zip(*dinitial[::-1], strict=True)))
        dx = dx.swapaxes(0, 1) if batch_first else dx
        return Gradients(dx, packed if num_states > 1 else packed[0], {name: grads[name] for name in tape.params})

    return backward


class FastPaths(Steppable):
    """Base class of recurrent layers that holds their fast paths, each built at its first use."""

    def make_fast_step(self, prefix: str, count: int) -> FastStep | None:
        """Build the fast step for parameters `prefix + name` in a dict of `count` arrays; None if there is none."""
        return make_recurrent_step(self._as_layer(), prefix, count)

    def _as_layer(self) -> RecurrentLayer:
        return cast(RecurrentLayer, self)  # layers.Recurrent, the only subclass, satisfies the protocol

    @cached_property
    def _fast_sequence(self) -> FastStep:
        return make_recurrent_sequence(self._as_layer()) or no_fast_path

    @cached_property
    def _fast_forward(self) -> ForwardFn:
        return make_recurrent_forward(self._as_layer(), record_tape=True) or no_fast_path

    @cached_property
    def _fast_inference(self) -> ForwardFn:
        return make_recurrent_forward(self._as_layer(), record_tape=False) or no_fast_path

    @cached_property
    def _fast_backward(self) -> BackwardFn:
        return make_recurrent_backward(self._as_layer())

    def _infer(self, params: Params, x: Array, state: Any) -> tuple[Array, Any] | None:
        """Run a whole sequence without a tape; None if no fast path applies."""
        if (result := self._fast_sequence(params, x, state)) is not None:
            return result
        forward = self._fast_inference(params, x, state)
        return None if forward is None else forward[:2]


# --- steps and short sequences of recurrent layers


def make_recurrent_step(layer: RecurrentLayer, prefix: str, count: int) -> FastStep | None:
    """Build the fast step of a recurrent layer: compiled code for a few rows, NumPy calls for more."""
    if layer.bidirectional or layer.reverse or not isinstance(layer.hidden_size, int):
        return None
    signature, jit_enabled = _layer_signature(layer, prefix), config.jit_enabled
    max_rows, float_dtypes = signature.max_compiled_rows, DTYPE_BITS
    numpy_steps = dict[tuple[bool, bool], FastStep]()  # by (x is integer, one row)
    compiled_steps = list[FastStep | None]([None, None])  # by whether x is integer

    def step(params: Params, x: Array, state: Any) -> tuple[Array, Any] | None:
        integer, n = x.dtype not in float_dtypes, len(x)
        if integer and x.dtype.kind not in "iu":
            return None
        if n <= max_rows and jit_enabled():
            try:
                run = compiled_steps[integer]
                if run is None:
                    run = compiled_steps[integer] = compiled_step(signature, integer) or no_fast_path
                result = run(params, x, state)
            except (KeyError, TypeError):  # there is no kernel, or it does not take these arrays
                result = None
            if result is not None:
                return result
        key = integer, n == 1
        if (in_numpy := numpy_steps.get(key)) is None:
            in_numpy = numpy_steps[key] = _make_numpy_step(signature, *key)
        return in_numpy(params, x, state)

    return with_fallback(count, step)


def _make_numpy_step(signature: LayerSignature, integer: bool, one_row: bool) -> FastStep:
    cell = signature.cell
    if is_user_defined(cell) and not is_traceable(cell):
        return no_fast_path  # the step would call the user's functions
    return numpy_step(signature, integer, one_row, partial(single_step, np, cell))


def make_recurrent_sequence(layer: RecurrentLayer) -> FastStep | None:
    """Build the compiled kernel call for a short sequence without a tape, for few rows and small weights."""
    if layer.bidirectional or layer.reverse or not isinstance(layer.hidden_size, int):
        return None
    signature, jit_enabled, float_dtypes = _layer_signature(layer, ""), config.jit_enabled, DTYPE_BITS
    batch_first, kernels = layer.batch_first, dict[bool, FastStep]()  # by whether x is integer

    def sequence(params: Params, x: Array, state: Any) -> tuple[Array, Any] | None:
        integer, n = x.dtype not in float_dtypes, x.shape[0 if batch_first else 1]
        if not jit_enabled() or not signature.use_sequence_kernel(n, integer) or (integer and x.dtype.kind not in "iu"):
            return None
        if integer not in kernels:
            kernels[integer] = compiled_sequence(signature, integer, batch_first) or no_fast_path
        return kernels[integer](params, x, state)

    return with_fallback(len(signature.parameter_shapes), sequence)


def _layer_signature(layer: RecurrentLayer, prefix: str) -> LayerSignature:
    """The signature of a layer whose parameters are named `prefix + name`; hidden_size must be an integer."""
    cell, (shapes, names) = layer.resolved_cell, parameter_names(layer)
    order = [*_parameter_order(layer), *(["weight_hr"] if layer.projection_size else [])]
    ordered = tuple(tuple(prefix + by_scan_name[short] for short in order) for by_scan_name in names)
    initial = tuple(prefix + name for name in shapes if name.startswith("initial_"))
    prefixed = {prefix + name: shape for name, shape in shapes.items()}
    return LayerSignature(
        cell, layer.bias, layer.input_size, layer.hidden_sizes[0], layer.projection_size, ordered, initial, prefixed
    )
