"""Fast steps of layers without recurrence and of a Sequential, for plain NumPy arrays; see engine/layer.py."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from xprnn.arrays.namespace import Array, Params
from xprnn.engine.layer import (
    EmbeddingLayer,
    FastStep,
    LinearLayer,
    Steppable,
    SteppedLayer,
    is_library_method,
    is_user_defined,
    no_fast_path,
)
from xprnn.kernels import config
from xprnn.kernels.step_plan import DTYPE_BITS

__all__ = [
    "is_ndarray",
    "make_embedding_step",
    "make_layer_step",
    "make_linear_step",
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
    """Wrap `run`, so that it returns None where a parameter is missing and within `reference_only`.

    Args:
        count: the number of parameters that the caller must pass.
        run: a function of plain arrays that calls library code only. It returns None where they do not fit.
    """
    ndarray, is_reference_only = np.ndarray, config.is_reference_only

    def fast_path(params: Params, x: Array, state: Any) -> Result | None:
        if x.__class__ is not ndarray or params.__class__ is not dict or len(params) != count or is_reference_only():
            return None
        try:
            return run(params, x, state)
        except KeyError:  # a parameter is missing
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
