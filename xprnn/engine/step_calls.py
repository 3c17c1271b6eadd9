"""Steps of recurrent layers on plain NumPy arrays: a compiled kernel for a few rows, printed NumPy calls for more."""

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np

from xprnn.arrays.namespace import Array, Params
from xprnn.engine.fast_steps import is_ndarray, with_fallback
from xprnn.engine.layer import FastStep, RecurrentLayer, is_user_defined, no_fast_path
from xprnn.engine.state_layout import parameter_names, scan_parameter_order
from xprnn.kernels import config
from xprnn.kernels.jit.kernel import ScanKernel, scan_kernel
from xprnn.kernels.reference import single_step
from xprnn.kernels.step_plan import DTYPE_BITS, LayerSignature
from xprnn.kernels.ufunc.step import is_traceable, numpy_step

__all__ = ["make_recurrent_step"]


def make_recurrent_step(layer: RecurrentLayer, prefix: str, count: int) -> FastStep | None:
    """Build the fast step of a recurrent layer: compiled code for a few rows, NumPy calls for more."""
    if layer.bidirectional or layer.reverse or not isinstance(layer.hidden_size, int):
        return None
    signature, ndarray, no_override = _layer_signature(layer, prefix), np.ndarray, config.is_default
    max_rows = 0 if signature.projection_size else signature.max_compiled_rows
    compiled_steps = dict[Any, FastStep]()  # by dtype of x
    checked = with_fallback(count, _any_step(signature, max_rows, compiled_steps))

    def step(params: Params, x: Array, state: Any) -> tuple[Array, Any] | None:
        # The common case: a kernel that an earlier call compiled.
        if x.__class__ is ndarray and x.ndim and params.__class__ is dict and no_override():
            run = compiled_steps.get(x.dtype)
            if run is not None and state is not None and x.shape[0] <= max_rows and len(params) == count:
                result = run(params, x, state)
                if result is not None:
                    return result
        return checked(params, x, state)

    return step


def _any_step(signature: LayerSignature, max_rows: int, compiled_steps: dict[Any, FastStep]) -> FastStep:
    """Build the step that compiles a kernel at its first use; `compiled_steps` by dtype of x is filled."""
    numpy_steps = dict[tuple[bool, bool], FastStep]()  # by (x is integer, one row)
    widths, dtype_of = signature.state_sizes, signature.parameter_names[0][1]

    def step(params: Params, x: Array, state: Any) -> tuple[Array, Any] | None:
        if not x.shape or params[dtype_of].__class__ is not np.ndarray:
            return None
        n = len(x)
        if state is None:
            if signature.initial_state_names:
                return None
            shapes = [(len(signature.parameter_names), n, width) for width in widths]
            zeros = tuple(np.zeros(shape, params[dtype_of].dtype) for shape in shapes)
            state = zeros if len(widths) > 1 else zeros[0]
        if n <= max_rows and config.jit_enabled():
            if x.dtype not in compiled_steps:
                compiled_steps[x.dtype] = _make_compiled_step(signature, params, x)
            if (result := compiled_steps[x.dtype](params, x, state)) is not None:
                return result
        integer = x.dtype not in DTYPE_BITS
        if integer and x.dtype.kind not in "iu":
            return None
        key = integer, n == 1
        if key not in numpy_steps:
            numpy_steps[key] = _make_numpy_step(signature, *key)
        return numpy_steps[key](params, x, state)

    return step


def _make_compiled_step(signature: LayerSignature, params: Params, x: Array) -> FastStep:
    """Build the step by a compiled kernel for x of this dtype; `no_fast_path` if there is none."""
    integer, ndarray, empty = x.dtype.kind in "iu", np.ndarray, np.empty
    dtype = params[signature.parameter_names[0][1]].dtype if integer else x.dtype
    kernel = scan_kernel(signature.cell, dtype, False)
    if isinstance(kernel, str):
        return no_fast_path
    first, later, template = kernel.entry("step", integer), kernel.entry("step", False), kernel.template(False, False)
    widths, num_layers = signature.state_sizes, len(signature.parameter_names)
    num_states, width = len(widths), widths[0]
    padding = kernel.states_tuple(())[num_states:]
    layers = [(k, _make_getter(signature, names, kernel)) for k, names in enumerate(signature.parameter_names)]

    def step(params: Params, x: Array, state: Any) -> tuple[Array, Any] | None:
        n, states = len(x), (state,) if num_states == 1 else state
        if states.__class__ is not tuple or len(states) != num_states:
            return None
        for a in states:
            if a.__class__ is not ndarray or a.ndim != 3 or len(a) != num_layers:
                return None
        final = tuple([empty((num_layers, n, size), dtype) for size in widths])
        starts, ends = (*states, *padding), (*final, *padding)
        y, entry = x.astype(np.int64, copy=False) if integer else x, first
        try:
            for k, get in layers:
                arrays, out = get(params), empty((n, width), dtype)
                if arrays is None or entry(template, k, y, *arrays, starts, out, ends):
                    return None
                y, entry = out, later
        except (KeyError, TypeError):  # a parameter is missing, or an array has another dtype or number of axes
            return None
        return y, final[0] if num_states == 1 else final

    return step


def _make_getter(signature: LayerSignature, names: tuple[str, ...], kernel: ScanKernel) -> Callable[[Params], Any]:
    """Build the function that returns weights, biases and vectors of a layer, or None if one is no ndarray."""
    ndarray, cut = np.ndarray, 4 if signature.bias else 2
    get, vector_names = itemgetter(*names[:cut]), names[cut:]
    biases = () if signature.bias else (kernel.zeros(signature.cell.gates * signature.hidden_size),) * 2
    others = (*vector_names, *signature.initial_state_names)
    width = signature.parameter_shapes[names[0]][1:]

    def arrays(params: Params) -> Any:
        w, u, b, c = get(params) + biases
        # numba treats a masked array as a plain one and would ignore its mask.
        if not (w.__class__ is u.__class__ is b.__class__ is c.__class__ is ndarray) or w.shape[1:] != width:
            return None
        if not others:
            return w, u, b, c, ()
        if not all(is_ndarray(params[name], signature.parameter_shapes[name], w.dtype) for name in others):
            return None
        return w, u, b, c, kernel.vectors_tuple([params[name] for name in vector_names])

    return arrays


def _make_numpy_step(signature: LayerSignature, integer: bool, one_row: bool) -> FastStep:
    cell = signature.cell
    if is_user_defined(cell) and not is_traceable(cell):
        return no_fast_path  # the step would call the user's functions
    return numpy_step(signature, integer, one_row, partial(single_step, np, cell))


def _layer_signature(layer: RecurrentLayer, prefix: str) -> LayerSignature:
    """The signature of a layer whose parameters are named `prefix + name`; hidden_size must be an integer."""
    cell, (shapes, names) = layer.resolved_cell, parameter_names(layer)
    order = scan_parameter_order(layer)
    ordered = tuple(tuple(prefix + by_scan_name[short] for short in order) for by_scan_name in names)
    initial = tuple(prefix + name for name in shapes if name.startswith("initial_"))
    prefixed = {prefix + name: shape for name, shape in shapes.items()}
    return LayerSignature(
        cell, layer.bias, layer.input_size, layer.hidden_sizes[0], layer.projection_size, ordered, initial, prefixed
    )
