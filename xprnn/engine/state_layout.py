"""Layouts of the parameters and states of a recurrent layer, for the caller and for the scans, and their conversion.

The caller's state has torch's layout: one array (L*directions, N, H) for each of the cell's states, in a tuple if the
cell has several states. If `hidden_size` is a tuple, each of these arrays is replaced by a tuple with one array
(directions, N, H_l) for each layer.

Within the engine a state is a list with one tuple (h,) or (h, c) of arrays (N, H) for each layer and direction. The
list is ordered by layer, then by direction.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from xprnn.arrays.linear import zeros
from xprnn.arrays.namespace import Array, InputError, Namespace, Params, check_shape
from xprnn.engine.layer import RecurrentLayer
from xprnn.kernels.tape import State

__all__ = [
    "learned_state_gradients",
    "pack",
    "parameter_names",
    "parameter_shapes",
    "params_by_layer",
    "scan_parameter_order",
    "time_major",
    "unpack",
    "zero_states",
]


def parameter_shapes(layer: RecurrentLayer) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every parameter of a recurrent layer, in torch's order."""
    shapes: dict[str, tuple[int, ...]] = {}
    width, cell = layer.input_size, layer.resolved_cell
    for k, h in enumerate(layer.hidden_sizes):
        p = layer.projection_size or h
        scan_shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (cell.gates * h, width),
            "weight_hh": (cell.gates * h, p),
        }
        if layer.bias:
            scan_shapes |= {"bias_ih": (cell.gates * h,), "bias_hh": (cell.gates * h,)}
        if layer.projection_size:
            scan_shapes["weight_hr"] = (p, h)
        scan_shapes |= dict.fromkeys(cell.vectors, (h,))
        for suffix in ("", "_reverse")[: layer.num_directions]:
            shapes |= {f"{name}_l{k}{suffix}": shape for name, shape in scan_shapes.items()}
        width = layer.num_directions * p
    if layer.learned_state:
        for i, name in enumerate(cell.states):
            for k, size in enumerate(_state_sizes(layer, i)):
                key = f"initial_{name}" if isinstance(layer.hidden_size, int) else f"initial_{name}_l{k}"
                rows = layer.num_layers if isinstance(layer.hidden_size, int) else 1
                shapes[key] = (rows * layer.num_directions, size)
    return shapes


@lru_cache(maxsize=512)
def parameter_names(layer: RecurrentLayer) -> tuple[dict[str, tuple[int, ...]], list[dict[str, str]]]:
    """Return the shapes of all parameters and, for each layer and direction, a dict from scan name to parameter name.

    The scan name of weight_ih_l0 or weight_ih_l0_reverse is weight_ih. Learned initial states have none.
    """
    shapes, directions = layer.shapes(), ("", "_reverse")[: layer.num_directions]
    suffixes = [f"_l{k}{direction}" for k in range(layer.num_layers) for direction in directions]
    names = [name for name in shapes if not name.startswith("initial_")]
    return shapes, [{n[: -len(s)]: n for n in names if n.endswith(s)} for s in suffixes]


def scan_parameter_order(layer: RecurrentLayer) -> tuple[str, ...]:
    """Return the scan names of one layer's parameters in the order in which kernels take them."""
    biases = ("bias_ih", "bias_hh") if layer.bias else ()
    projection = ("weight_hr",) if layer.projection_size else ()
    return ("weight_ih", "weight_hh", *biases, *layer.resolved_cell.vectors, *projection)


def params_by_layer(layer: RecurrentLayer, params: Params) -> list[Params]:
    """Return the parameters of each layer and direction, by scan name."""
    return [{short: params[name] for short, name in names.items()} for names in parameter_names(layer)[1]]


def _state_sizes(layer: RecurrentLayer, index: int) -> list[int]:
    """The number of features of one of the cell's states in each layer: P for the first if h is projected, else H."""
    return [h if index or not layer.projection_size else layer.projection_size for h in layer.hidden_sizes]


def zero_states(layer: RecurrentLayer, xp: Namespace, like: Array, n: int) -> list[State]:
    """Return states of zeros for n rows, for each layer and direction."""
    sizes = zip(*(_state_sizes(layer, i) for i in range(len(layer.resolved_cell.states))), strict=True)
    return [tuple(zeros(xp, (n, h), like) for h in one) for one in sizes for _ in range(layer.num_directions)]


def unpack(where: str, layer: RecurrentLayer, xp: Namespace, params: Params, n: int, state: Any) -> list[State]:
    """Check a state and convert it from the caller's layout to a list with a tuple for each layer and direction.

    Args:
        where: the public function, named in errors.
        layer: the layer.
        xp: the namespace of the parameters.
        params: all parameters.
        n: the number of rows.
        state: in the caller's layout; None for zero or, if the layer has one, the learned initial state.

    Raises:
        InputError: a state of another structure or shape.
    """
    names, like = layer.resolved_cell.states, params["weight_hh_l0"]
    if state is None and not layer.learned_state:
        return zero_states(layer, xp, like, n)
    if state is None:
        state = tuple(_expand_learned_state(layer, xp, params, f"initial_{name}", n) for name in names)
    elif len(names) == 1:
        state = (state,)
    if not isinstance(state, (tuple, list)) or len(state) != len(names):
        raise InputError(f"{where}: state must be the pair ({', '.join(names)}), found {_describe(state)}")
    columns = [
        _split_state(where, layer, name, value, n, _state_sizes(layer, i))
        for i, (name, value) in enumerate(zip(names, state, strict=True))
    ]
    return list(zip(*columns, strict=True))


def _split_state(where: str, layer: RecurrentLayer, name: str, value: Any, n: int, sizes: list[int]) -> list[Array]:
    """Check one of the cell's states in the caller's layout; return its array (N, H) for each layer and direction."""
    dirs, count = layer.num_directions, layer.num_layers
    if isinstance(layer.hidden_size, int):
        if value is None or isinstance(value, (tuple, list)):
            raise InputError(f"{where}: state {name} must be one array, found {_describe(value)}")
        check_shape(where, f"state {name}", "(L*directions,N,H)", value, (count * dirs, n, sizes[0]))
        return [value[k, ...] for k in range(count * dirs)]
    if not isinstance(value, (tuple, list)) or len(value) != count:
        raise InputError(
            f"{where}: state {name} must have an array for each of {count} layers, found {_describe(value)}"
        )
    for k, a in enumerate(value):
        check_shape(where, f"state {name}[{k}]", "(directions,N,H)", a, (dirs, n, sizes[k]))
    return [a[d, ...] for a in value for d in range(dirs)]


def _expand_learned_state(layer: RecurrentLayer, xp: Namespace, params: Params, key: str, n: int) -> Any:
    """Repeat a learned initial state for n rows, in the caller's layout."""

    def expand(a: Array) -> Array:
        return xp.broadcast_to(a[:, None, :], (a.shape[0], n, a.shape[1]))

    if isinstance(layer.hidden_size, int):
        return expand(params[key])
    return tuple(expand(params[f"{key}_l{k}"]) for k in range(layer.num_layers))


def _describe(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"an array of shape {tuple(value.shape)}" if hasattr(value, "shape") else type(value).__name__


def _stack(xp: Namespace, arrays: Sequence[Array]) -> Array:
    if len(arrays) == 1 and arrays[0].__class__ is np.ndarray:
        return arrays[0][None].copy()  # five times as fast as np.stack
    return xp.stack(arrays)


def pack(layer: RecurrentLayer, xp: Namespace, states: Sequence[State]) -> Any:
    """Convert states from a list with a tuple for each layer and direction to the caller's layout."""
    columns = list(zip(*states, strict=True))
    if isinstance(layer.hidden_size, int):
        packed: tuple[Any, ...] = tuple(_stack(xp, c) for c in columns)
    else:
        d = layer.num_directions
        packed = tuple(tuple(xp.stack(c[k : k + d]) for k in range(0, len(c), d)) for c in columns)
    return packed[0] if len(packed) == 1 else packed


def time_major(layer: RecurrentLayer, xp: Namespace, a: Array) -> Array:
    """Swap the first two axes if the layer is batch-first: (N, T, ...) to (T, N, ...), and back."""
    return xp.permute_dims(a, (1, 0, *range(2, a.ndim))) if layer.batch_first else a


def learned_state_gradients(layer: RecurrentLayer, xp: Namespace, dstate: Any, uses_default_state: bool) -> Params:
    """Return the gradients of the learned initial states: `dstate` summed over rows, or zero if the caller passed one.

    Args:
        layer: the layer.
        xp: the namespace of the arrays.
        dstate: the cotangent of the initial state, in the caller's layout.
        uses_default_state: True if `forward` was called with state=None.
    """
    if not layer.learned_state:
        return {}
    values = (dstate,) if len(layer.resolved_cell.states) == 1 else dstate
    by_name: Params = {}
    for name, value in zip(layer.resolved_cell.states, values, strict=True):
        if isinstance(layer.hidden_size, int):
            by_name[f"initial_{name}"] = value
        else:
            by_name |= {f"initial_{name}_l{k}": a for k, a in enumerate(value)}
    sums = {key: xp.sum(a, axis=1, dtype=a.dtype) for key, a in by_name.items()}
    return sums if uses_default_state else {key: xp.zeros_like(a) for key, a in sums.items()}
