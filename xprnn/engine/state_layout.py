"""The layout of parameters and states: what belongs to which layer and direction.

Inside, a state is a list with one tuple (h,) or (h, c) for each layer and direction, layers first; outside, it has
torch's layout: (L*directions, N, H), for the LSTM a pair of them. Where layers have hidden sizes of their own, each
such array is a tuple instead, with one (directions, N, H_l) for each layer.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from xprnn.arrays.linear import zeros
from xprnn.arrays.namespace import Array, InputError, Namespace, Params, check_shape
from xprnn.kernels.tape import State

__all__ = [
    "learned_state_gradients",
    "pack",
    "parameter_names",
    "parameter_shapes",
    "params_by_layer",
    "time_major",
    "unpack",
    "zero_states",
]


def parameter_shapes(layer: Any) -> dict[str, tuple[int, ...]]:
    """The name and shape of every parameter of a recurrent layer, in torch's order."""
    out: dict[str, tuple[int, ...]] = {}
    width, core = layer.input_size, layer.resolved_cell
    for k, h in enumerate(layer.hidden_sizes):
        p = layer.projection_size or h
        for suffix in ("", "_reverse")[: layer.num_directions]:
            one: dict[str, tuple[int, ...]] = {
                "weight_ih": (core.gates * h, width),
                "weight_hh": (core.gates * h, p),
            }
            if layer.bias:
                one |= {"bias_ih": (core.gates * h,), "bias_hh": (core.gates * h,)}
            if layer.projection_size:
                one["weight_hr"] = (p, h)
            one |= dict.fromkeys(core.vectors, (h,))
            out |= {f"{name}_l{k}{suffix}": shape for name, shape in one.items()}
        width = layer.num_directions * p
    if layer.learned_state:
        for i, name in enumerate(core.states):
            for k, h in enumerate(layer.hidden_sizes):
                size = h if i or not layer.projection_size else layer.projection_size
                key = f"initial_{name}" if isinstance(layer.hidden_size, int) else f"initial_{name}_l{k}"
                lead = layer.num_layers if isinstance(layer.hidden_size, int) else 1
                out[key] = (lead * layer.num_directions, size)
    return out


@lru_cache(maxsize=512)
def parameter_names(layer: Any) -> tuple[dict[str, tuple[int, ...]], list[dict[str, str]]]:
    """The shapes of all parameters and, for each layer and direction, scan name -> parameter name."""
    shapes = layer.shapes()
    ends = [f"_l{k}{s}" for k in range(layer.num_layers) for s in ("", "_reverse")[: layer.num_directions]]
    return shapes, [{n[: -len(e)]: n for n in shapes if n.endswith(e) and not n.startswith("initial_")} for e in ends]


def params_by_layer(layer: Any, params: Params) -> list[Params]:
    """The parameters of each layer and direction, under the names the scan uses."""
    return [{short: params[name] for short, name in names.items()} for names in parameter_names(layer)[1]]


def _state_sizes(layer: Any, which: int) -> list[int]:
    """The width of state number `which` in each layer: h may be projected."""
    return [h if which or not layer.projection_size else layer.projection_size for h in layer.hidden_sizes]


def zero_states(layer: Any, xp: Namespace, like: Array, n: int) -> list[State]:
    """States of zeros."""
    count = len(layer.resolved_cell.states)
    widths = [[_state_sizes(layer, i)[k] for i in range(count)] for k in range(layer.num_layers)]
    return [tuple(zeros(xp, (n, h), like) for h in hs) for hs in widths for _ in range(layer.num_directions)]


def unpack(where: str, layer: Any, xp: Namespace, params: Params, n: int, state: Any) -> list[State]:
    """The state of each layer and direction, checked; the layer's own where `state` is None."""
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
        _split_state(where, layer, name, part, n, _state_sizes(layer, i))
        for i, (name, part) in enumerate(zip(names, state, strict=True))
    ]
    return list(zip(*columns, strict=True))


def _split_state(where: str, layer: Any, name: str, part: Any, n: int, sizes: list[int]) -> list[Array]:
    """One of the cell's states for each layer and direction."""
    dirs, count = layer.num_directions, layer.num_layers
    if isinstance(layer.hidden_size, int):
        if part is None or isinstance(part, (tuple, list)):
            raise InputError(f"{where}: state {name} must be one array, found {_describe(part)}")
        check_shape(where, f"state {name}", "(L*directions,N,H)", part, (count * dirs, n, sizes[0]))
        return [part[k, ...] for k in range(count * dirs)]
    if not isinstance(part, (tuple, list)) or len(part) != count:
        raise InputError(
            f"{where}: state {name} must have an array for each of {count} layers, found {_describe(part)}"
        )
    for k, a in enumerate(part):
        check_shape(where, f"state {name}[{k}]", "(directions,N,H)", a, (dirs, n, sizes[k]))
    return [a[d, ...] for a in part for d in range(dirs)]


def _expand_learned_state(layer: Any, xp: Namespace, params: Params, key: str, n: int) -> Any:
    def rows(a: Array) -> Array:
        return xp.broadcast_to(a[:, None, :], (a.shape[0], n, a.shape[1]))

    if isinstance(layer.hidden_size, int):
        return rows(params[key])
    return tuple(rows(params[f"{key}_l{k}"]) for k in range(layer.num_layers))


def _describe(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"an array of shape {tuple(value.shape)}" if hasattr(value, "shape") else type(value).__name__


def _stack(xp: Namespace, arrays: Sequence[Array]) -> Array:
    if len(arrays) == 1 and arrays[0].__class__ is np.ndarray:
        return arrays[0][None].copy()  # a fifth of the time
    return xp.stack(arrays)


def pack(layer: Any, xp: Namespace, states: Sequence[State]) -> Any:
    """The states of all layers and directions as the caller sees them."""
    columns = list(zip(*states, strict=True))
    if isinstance(layer.hidden_size, int):
        packed: tuple[Any, ...] = tuple(_stack(xp, c) for c in columns)
    else:
        d = layer.num_directions
        packed = tuple(tuple(xp.stack(c[k : k + d]) for k in range(0, len(c), d)) for c in columns)
    return packed[0] if len(packed) == 1 else packed


def time_major(layer: Any, xp: Namespace, a: Array) -> Array:
    """Swap the first two axes of a batch-first layer's array; its own inverse."""
    return xp.permute_dims(a, (1, 0, *range(2, a.ndim))) if layer.batch_first else a


def learned_state_gradients(layer: Any, xp: Namespace, dstate: Any, uses_default_state: bool) -> Params:
    """The gradient of a learned initial state: the rows' sum, or zero where the caller gave a state."""
    if not layer.learned_state:
        return {}
    parts = (dstate,) if len(layer.resolved_cell.states) == 1 else dstate
    found: Params = {}
    for name, part in zip(layer.resolved_cell.states, parts, strict=True):
        if isinstance(layer.hidden_size, int):
            found[f"initial_{name}"] = part
        else:
            found |= {f"initial_{name}_l{k}": a for k, a in enumerate(part)}
    sums = {key: xp.sum(a, axis=1, dtype=a.dtype) for key, a in found.items()}
    return sums if uses_default_state else {key: xp.zeros_like(a) for key, a in sums.items()}
