"""What a recurrent layer is given, checked once at the public boundary and put into the form the scans use.

Errors say where, which argument, what was expected and what was found.
"""

from typing import Any

import numpy as np

from xprnn.arrays.namespace import (
    Array,
    InputError,
    Namespace,
    Params,
    check_index_bounds,
    check_shape,
    device_of,
    from_numpy,
    host_view,
    is_integer,
    is_numpy,
    reject_masked_array,
    resolve_namespace,
)
from xprnn.arrays.validation import check_param_shapes, check_params, require_array
from xprnn.engine.state_layout import parameter_names
from xprnn.kernels.tape import StepMask

__all__ = [
    "check_call",
    "check_state_cotangents",
    "make_step_mask",
    "tree_leaves",
]


def _check_x(where: str, layer: Any, xp: Namespace, x: Array, lead: str) -> None:
    """x (lead..., D) of the parameters' dtype, or integers (lead...)."""
    rank, d = len(lead), layer.input_size
    axes = ",".join(lead)
    if is_integer(xp, x):
        if x.ndim != rank:
            raise InputError(
                f"{where}: integer x must be ({axes}), the numbers of one-hot classes, found shape {tuple(x.shape)}"
            )
        check_index_bounds(where, "x", x, d)
    elif x.ndim != rank + 1:
        raise InputError(f"{where}: x must be ({axes},D), {rank + 1} axes, found shape {tuple(x.shape)}")
    elif x.shape[-1] != d:
        raise InputError(
            f"{where}: x has {x.shape[-1]} features but weight_ih_l0 expects {d} "
            f"(x ({axes},D)={tuple(x.shape)}, input_size={d})"
        )


def tree_leaves(state: Any) -> list[Array]:
    """All arrays in nested tuples and lists."""
    if state is None:
        return []
    return [a for s in state for a in tree_leaves(s)] if isinstance(state, (tuple, list)) else [state]


def check_call(where: str, layer: Any, params: Params, x: Array, state: Any, leading_axes: str) -> Namespace:
    """The namespace of a layer's arguments, which are checked against its configuration and each other."""
    shapes, _ = parameter_names(layer)
    check_params(where, params, shapes)
    require_array(where, "x", x)
    floats = dict(params) | {f"state[{i}]" if i else "state": a for i, a in enumerate(tree_leaves(state))}
    integer = not hasattr(x, "dtype") or not _is_float(x)
    xp = resolve_namespace(where, floats if integer else {"x": x, **floats}, {"x": x} if integer else None)
    check_param_shapes(where, params, shapes)
    if integer and not is_integer(xp, x):
        classes = xp.isdtype(x.dtype, "bool") and x.ndim == len(leading_axes)
        hint = ": as class numbers, convert it to integers" if classes else ""
        raise InputError(f"{where}: x must be of a real floating or an integer dtype, found {x.dtype}{hint}")
    _check_x(where, layer, xp, x, leading_axes)
    return xp


def _is_float(x: Array) -> bool:
    return x.dtype.kind == "f" if isinstance(x.dtype, np.dtype) else "float" in str(x.dtype)


def make_step_mask(where: str, layer: Any, xp: Namespace, x: Array, lengths: Any, mask: Any, reset: Any) -> StepMask:
    """Put lengths, mask and reset together, on the device of the time-major x."""
    count, n = x.shape[:2]
    axes, shape = ("(N,T)", (n, count)) if layer.batch_first else ("(T,N)", (count, n))
    flags = {}
    for name, flag in (("mask", mask), ("reset", reset)):
        if flag is not None:
            resolve_namespace(where, {}, {"x": x, name: flag})
            check_shape(where, name, axes, flag, shape)
            if not xp.isdtype(flag.dtype, "bool"):
                raise InputError(f"{where}: {name} must be boolean, found {flag.dtype}")
            flags[name] = xp.permute_dims(flag, (1, 0)) if layer.batch_first else flag
    active, reset = flags.get("mask"), flags.get("reset")
    if lengths is not None:
        lengths = _resolve_lengths(where, xp, x, lengths, n, count)
        within = xp.arange(count, dtype=lengths.dtype, device=device_of(x))[:, None] < lengths[None, :]
        active = within if active is None else within & active
        # Past its end a row keeps the state of its last valid step, whatever the flags there say.
        reset = None if reset is None else reset & within
    return StepMask(active, reset, lengths if mask is None else None)


def _resolve_lengths(where: str, xp: Namespace, x: Array, lengths: Any, n: int, count: int) -> Array:
    reject_masked_array(where, "lengths", lengths)
    plain = isinstance(lengths, (list, tuple, np.ndarray))
    if plain:
        try:
            lengths = np.asarray(lengths)
        except ValueError:
            raise InputError(f"{where}: lengths must be (N,) integers, found a nested sequence") from None
        lengths = lengths.astype(int) if lengths.shape == (0,) else lengths
    else:
        resolve_namespace(where, {}, {"x": x, "lengths": lengths})
    if not (lengths.dtype.kind in "iu" if plain else is_integer(xp, lengths)):
        raise InputError(f"{where}: lengths must be integers, found {lengths.dtype}")
    check_shape(where, "lengths", "(N,)", lengths, (n,))
    host = host_view(lengths)
    if host is not None and host.size and (host.min() < 0 or host.max() > count):
        raise InputError(f"{where}: lengths must be in 0..T={count}, found {host.tolist()}")
    return from_numpy(lengths, like=x) if plain and not is_numpy(xp) else lengths


def check_state_cotangents(
    where: str,
    state_cotangents: list[Any],
    names: tuple[str, ...],
    widths: list[tuple[int, ...]],
    shape: tuple[int, int],
) -> list[Any]:
    """The adjoints of all states at all steps: for each layer and direction a tuple of arrays or None."""
    if len(state_cotangents) != len(widths):
        raise InputError(
            f"{where}: dstates must have {len(widths)} entries, as tape.states() has, found {len(state_cotangents)}"
        )
    out = []
    for k, (entry, width) in enumerate(zip(state_cotangents, widths, strict=True)):
        parts = (None,) * len(names) if entry is None else tuple(entry)
        if len(parts) != len(names):
            raise InputError(
                f"{where}: dstates[{k}] must have {len(names)} entries ({', '.join(names)}), found {len(parts)}"
            )
        for name, part, w in zip(names, parts, width, strict=True):
            if part is not None:
                check_shape(where, f"dstates[{k}] {name}", "(T,N,H)", part, (*shape, w))
        out.append(parts)
    return out
