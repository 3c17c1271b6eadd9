"""Checks of the arguments of a recurrent layer, made once at the public functions.

An error names the function and the argument, and says what was expected and what was found.
"""

from typing import Any, Protocol

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
from xprnn.engine.layer import RecurrentLayer
from xprnn.engine.state_layout import parameter_names
from xprnn.kernels.tape import StepMask

__all__ = [
    "check_call",
    "check_state_cotangents",
    "make_step_mask",
    "tree_leaves",
]


class TimeLayout(Protocol):
    """A layer with a time axis, which is the second axis if `batch_first` is True."""

    @property
    def batch_first(self) -> bool:
        """True if sequences are (N, T, .) instead of (T, N, .)."""


def _check_x(where: str, layer: RecurrentLayer, xp: Namespace, x: Array, leading_axes: str) -> None:
    """Raise InputError unless x is (leading axes..., D), or for integers (leading axes...)."""
    rank, d = len(leading_axes), layer.input_size
    axes = ",".join(leading_axes)
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
    """Return all arrays in nested tuples and lists; none for None."""
    if state is None:
        return []
    return [a for s in state for a in tree_leaves(s)] if isinstance(state, (tuple, list)) else [state]


def check_call(where: str, layer: RecurrentLayer, params: Params, x: Array, state: Any, leading_axes: str) -> Namespace:
    """Check params and x against the layer's configuration, and that all arrays share a namespace, dtype and device.

    Args:
        where: the public function, named in errors.
        layer: the layer.
        params: as from `init`.
        x: an array with the leading axes and D features, or integers with the leading axes.
        state: arrays in nested tuples, or None; `state_layout.unpack` checks their shapes.
        leading_axes: "TN", "NT" or, for one step, "N".

    Returns:
        The namespace of the arrays.

    Raises:
        InputError: an argument that does not fit.
    """
    shapes, _ = parameter_names(layer)
    check_params(where, params, shapes)
    require_array(where, "x", x)
    floats = dict(params) | {f"state[{i}]" if i else "state": a for i, a in enumerate(tree_leaves(state))}
    integer = not hasattr(x, "dtype") or not _is_float(x)
    xp = resolve_namespace(where, floats if integer else {"x": x, **floats}, {"x": x} if integer else None)
    check_param_shapes(where, params, shapes)
    if integer and not is_integer(xp, x):
        boolean = xp.isdtype(x.dtype, "bool") and x.ndim == len(leading_axes)
        hint = ": as class numbers, convert it to integers" if boolean else ""
        raise InputError(f"{where}: x must be of a real floating or an integer dtype, found {x.dtype}{hint}")
    _check_x(where, layer, xp, x, leading_axes)
    return xp


def _is_float(x: Array) -> bool:
    return x.dtype.kind == "f" if isinstance(x.dtype, np.dtype) else "float" in str(x.dtype)


def make_step_mask(
    where: str, layer: TimeLayout, xp: Namespace, x: Array, lengths: Any, mask: Any, reset: Any
) -> StepMask:
    """Combine lengths, mask and reset, after checking them, into one time-major StepMask.

    Args:
        where: the public function, named in errors.
        layer: the layer; its `batch_first` says which axes `mask` and `reset` have.
        xp: the namespace of x.
        x: time-major, (T, N, ...).
        lengths: (N,) integers 0 to T, an array or a host sequence, or None.
        mask: (T, N) boolean, (N, T) if batch_first, or None.
        reset: as `mask`.

    Raises:
        InputError: a shape, dtype, library or device that does not fit.
    """
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
        # After its end a row keeps the state of its last valid step, so a reset there must have no effect.
        reset = None if reset is None else reset & within
    return StepMask(active, reset, lengths if mask is None else None)


def _resolve_lengths(where: str, xp: Namespace, x: Array, lengths: Any, n: int, count: int) -> Array:
    """Check lengths, and convert a host sequence to an array on the device of x."""
    reject_masked_array(where, "lengths", lengths)
    on_host = isinstance(lengths, (list, tuple, np.ndarray))
    if on_host:
        try:
            lengths = np.asarray(lengths)
        except ValueError:
            raise InputError(f"{where}: lengths must be (N,) integers, found a nested sequence") from None
        lengths = lengths.astype(int) if lengths.shape == (0,) else lengths
    else:
        resolve_namespace(where, {}, {"x": x, "lengths": lengths})
    if not (lengths.dtype.kind in "iu" if on_host else is_integer(xp, lengths)):
        raise InputError(f"{where}: lengths must be integers, found {lengths.dtype}")
    check_shape(where, "lengths", "(N,)", lengths, (n,))
    host = host_view(lengths)
    if host is not None and host.size and (host.min() < 0 or host.max() > count):
        raise InputError(f"{where}: lengths must be in 0..T={count}, found {host.tolist()}")
    return from_numpy(lengths, like=x) if on_host and not is_numpy(xp) else lengths


def check_state_cotangents(
    where: str,
    dstates: list[Any],
    names: tuple[str, ...],
    widths: list[tuple[int, ...]],
    shape: tuple[int, int],
) -> list[Any]:
    """Check the cotangents of the states after every step, and fill in None for those that are missing.

    Args:
        where: the public function, named in errors.
        dstates: for each layer and direction a tuple of arrays or None, or None.
        names: the names of the cell's states.
        widths: the last axis of each state, for each layer and direction.
        shape: (T, N).

    Returns:
        For each layer and direction a tuple with an array (T, N, H) or None for each state.

    Raises:
        InputError: entries that are missing or have another shape.
    """
    if len(dstates) != len(widths):
        raise InputError(
            f"{where}: dstates must have {len(widths)} entries, as tape.states() has, found {len(dstates)}"
        )
    result = []
    for k, (entry, width) in enumerate(zip(dstates, widths, strict=True)):
        arrays = (None,) * len(names) if entry is None else tuple(entry)
        if len(arrays) != len(names):
            raise InputError(
                f"{where}: dstates[{k}] must have {len(names)} entries ({', '.join(names)}), found {len(arrays)}"
            )
        for name, d, h in zip(names, arrays, width, strict=True):
            if d is not None:
                check_shape(where, f"dstates[{k}] {name}", "(T,N,H)", d, (*shape, h))
        result.append(arrays)
    return result
