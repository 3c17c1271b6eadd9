"""Layers upon layers: checks what a recurrent layer is given, runs its scans, and puts states and gradients together.

Inside, a state is a list with one tuple (h,) or (h, c) for each layer and direction, layers first; outside, it has
torch's layout (layers.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator

from xprnn import scan
from xprnn.affine import zeros
from xprnn.arrays import (
    Array,
    InputError,
    Namespace,
    Params,
    check_integers,
    check_shape,
    device_of,
    from_numpy,
    is_integer,
    is_numpy,
    resolve,
)
from xprnn.scan import Steps

__all__ = ["Gradients", "StackTape", "backward", "forward", "step"]

State = Any
States = list[tuple[Array, ...]]


class Gradients(NamedTuple):
    """What `backward` returns: the adjoint of each thing that `forward` received."""

    dx: Array | None
    dstate: State
    dparams: Params


@dataclass(frozen=True)
class StackTape:
    """The record of one forward pass of a recurrent layer."""

    xp: Namespace
    params: Params
    x: Array
    y: Array
    scans: list[scan.Tape]
    masks: list[Array | None]  # dropout after each layer
    default: bool  # whether the state was left out

    def states(self) -> tuple[tuple[Array, ...], ...]:
        """The states after every step: for each layer and direction a tuple of (T, N, H), (h,) or (h, c)."""
        return tuple(t.states() for t in self.scans)

    def explain(self) -> str:
        """Which implementation ran each layer and direction."""
        return "\n".join(f"{k}: {t.cell.name}, {t.kernel}" for k, t in enumerate(self.scans))


@lru_cache(maxsize=512)
def _names(layer: Any) -> tuple[dict[str, tuple[int, ...]], list[dict[str, str]]]:
    """The shapes of all parameters and, for each layer and direction, scan name -> parameter name."""
    shapes = layer.shapes()
    ends = [f"_l{k}{s}" for k in range(layer.num_layers) for s in ("", "_reverse")[: layer.directions]]
    return shapes, [
        {n[: -len(e)]: n for n in shapes if n.endswith(e) and not n.startswith("initial_")} for e in ends
    ]


def _check_params(where: str, params: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    if not isinstance(params, dict):
        raise InputError(f"{where}: params must be a dict of arrays, found {type(params).__name__}")
    if params.keys() != shapes.keys():
        missing, extra = sorted(shapes.keys() - params.keys()), sorted(params.keys() - shapes.keys())
        parts = [f"{what} {', '.join(n)}" for what, n in (("missing", missing), ("unexpected", extra)) if n]
        raise InputError(f"{where}: params: {'; '.join(parts)} (expected {', '.join(shapes)})")


def _check_param_shapes(where: str, params: Params, shapes: dict[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if tuple(params[name].shape) != shape:
            check_shape(where, name, "", params[name], shape)


def _check_x(where: str, layer: Any, xp: Namespace, x: Array, lead: str) -> None:
    """x (lead..., D) of the parameters' dtype, or integers (lead...)."""
    rank, d = len(lead), layer.input_size
    axes = ",".join(lead)
    if is_integer(xp, x):
        if x.ndim != rank:
            raise InputError(f"{where}: integer x must be ({axes}), the numbers of one-hot classes, found shape {tuple(x.shape)}")
        check_integers(where, "x", xp, x, d)
    elif x.ndim != rank + 1:
        raise InputError(f"{where}: x must be ({axes},D), {rank + 1} axes, found shape {tuple(x.shape)}")
    elif x.shape[-1] != d:
        raise InputError(
            f"{where}: x has {x.shape[-1]} features but weight_ih_l0 expects {d} "
            f"(x ({axes},D)={tuple(x.shape)}, input_size={d})"
        )


def _flags(state: State) -> list[Array]:
    if state is None:
        return []
    return [a for s in state for a in _flags(s)] if isinstance(state, (tuple, list)) else [state]


def _resolve(where: str, layer: Any, params: Params, x: Array, state: State, lead: str) -> Namespace:
    shapes, _ = _names(layer)
    _check_params(where, params, shapes)
    floats = dict(params) | {f"state[{i}]" if i else "state": a for i, a in enumerate(_flags(state))}
    integer = not hasattr(x, "dtype") or not _is_float(x)
    xp = resolve(where, floats if integer else {"x": x, **floats}, {"x": x} if integer else None)
    _check_param_shapes(where, params, shapes)
    _check_x(where, layer, xp, x, lead)
    if integer and not is_integer(xp, x):
        raise InputError(f"{where}: x must be of a real floating or an integer dtype, found {x.dtype}")
    return xp


def _is_float(x: Array) -> bool:
    return "float" in str(x.dtype)


def _steps(where: str, layer: Any, xp: Namespace, x: Array, n: int, count: int, lengths: Any, mask: Any, reset: Any) -> Steps:
    """Put lengths, mask and reset together, time-major and on x's device."""
    axes, shape = ("(N,T)", (n, count)) if layer.batch_first else ("(T,N)", (count, n))
    flags = {}
    for name, flag in (("mask", mask), ("reset", reset)):
        if flag is not None:
            resolve(where, {}, {"x": x, name: flag})
            check_shape(where, name, axes, flag, shape)
            if not xp.isdtype(flag.dtype, "bool"):
                raise InputError(f"{where}: {name} must be boolean, found {flag.dtype}")
            flags[name] = xp.permute_dims(flag, (1, 0)) if layer.batch_first else flag
    active, reset = flags.get("mask"), flags.get("reset")
    if lengths is not None:
        lengths = _lengths(where, xp, x, lengths, n, count)
        within = xp.arange(count, dtype=lengths.dtype, device=device_of(x))[:, None] < lengths[None, :]
        active = within if active is None else within & active
        # Past its end a row keeps the state of its last valid step, whatever the flags there say.
        reset = None if reset is None else reset & within
    return Steps(active, reset)


def _lengths(where: str, xp: Namespace, x: Array, lengths: Any, n: int, count: int) -> Array:
    host = isinstance(lengths, (list, tuple, np.ndarray))
    if host:
        lengths = np.asarray(lengths)
        lengths = lengths.astype(int) if lengths.shape == (0,) else lengths
        if lengths.dtype.kind in "iu" and lengths.size and (lengths.min() < 0 or lengths.max() > count):
            raise InputError(f"{where}: lengths must be in 0..T={count}, found {lengths.tolist()}")
        kind = lengths.dtype.kind in "iu"
    else:
        resolve(where, {}, {"x": x, "lengths": lengths})
        kind = is_integer(xp, lengths)
    if not kind:
        raise InputError(f"{where}: lengths must be integers, found {lengths.dtype}")
    check_shape(where, "lengths", "(N,)", lengths, (n,))
    return from_numpy(lengths, like=x) if host and not is_numpy(xp) else lengths


def _unpack(where: str, layer: Any, xp: Namespace, params: Params, like: Array, n: int, state: State) -> States:
    """The state of each layer and direction, checked."""
    names, dirs = layer.core.states, layer.directions
    uniform = isinstance(layer.hidden_size, int)
    if state is None and not layer.learned_state:
        sizes = [(layer.proj_size or h, *[h] * (len(names) - 1)) for h in layer.sizes for _ in range(dirs)]
        return [tuple(zeros(xp, (n, h), like) for h in hs) for hs in sizes]
    parts = (state,) if len(names) == 1 else state
    if state is None:
        parts = [_learned(xp, params, f"initial_{name}", layer, n) for name in names]
    elif not isinstance(parts, (tuple, list)) or len(parts) != len(names):
        raise InputError(f"{where}: state must be the pair ({', '.join(names)}), found {_found(state)}")
    columns: list[list[Array]] = []
    for i, (name, part) in enumerate(zip(names, parts, strict=True)):
        sizes_ = [h if i or not layer.proj_size else layer.proj_size for h in layer.sizes]
        if uniform:
            if isinstance(part, (tuple, list)):
                raise InputError(f"{where}: state {name} must be one array, found {_found(part)}")
            check_shape(where, f"state {name}", "(L*directions,N,H)", part, (layer.num_layers * dirs, n, sizes_[0]))
            columns.append([part[k, ...] for k in range(layer.num_layers * dirs)])
            continue
        if not isinstance(part, (tuple, list)) or len(part) != layer.num_layers:
            raise InputError(f"{where}: state {name} must have an array for each layer, {layer.num_layers}, found {_found(part)}")
        for k, a in enumerate(part):
            check_shape(where, f"state {name}[{k}]", "(directions,N,H)", a, (dirs, n, sizes_[k]))
        columns.append([a[d, ...] for a in part for d in range(dirs)])
    return [tuple(c) for c in zip(*columns, strict=True)]


def _learned(xp: Namespace, params: Params, key: str, layer: Any, n: int) -> State:
    def rows(a: Array) -> Array:
        return xp.broadcast_to(a[:, None, :], (a.shape[0], n, a.shape[1]))

    if isinstance(layer.hidden_size, int):
        return rows(params[key])
    return tuple(rows(params[f"{key}_l{k}"]) for k in range(layer.num_layers))


def _found(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)}"
    return f"an array of shape {tuple(value.shape)}" if hasattr(value, "shape") else type(value).__name__


def _pack(layer: Any, xp: Namespace, states: Sequence[Sequence[Array]]) -> State:
    columns = list(zip(*states, strict=True))
    if isinstance(layer.hidden_size, int):
        packed = tuple(xp.stack(c) for c in columns)
    else:
        d = layer.directions
        packed = tuple(tuple(xp.stack(c[k : k + d]) for k in range(0, len(c), d)) for c in columns)
    return packed[0] if len(packed) == 1 else packed


def _time_major(layer: Any, xp: Namespace, a: Array) -> Array:
    """Swap the first two axes of a batch-first layer's array; its own inverse."""
    return xp.permute_dims(a, (1, 0, *range(2, a.ndim))) if layer.batch_first else a


def forward(
    layer: Any,
    params: Params,
    x: Array,
    state: State,
    *,
    lengths: Any = None,
    mask: Any = None,
    reset: Any = None,
    keep: bool,
    rng: Generator | None = None,
) -> tuple[Array, State, StackTape | None]:
    """See layers.Recurrent.forward."""
    where = f"{type(layer).__name__}.forward" if keep else type(layer).__name__
    xp = _resolve(where, layer, params, x, state, "NT" if layer.batch_first else "TN")
    x = _time_major(layer, xp, x)
    count, n = x.shape[:2]
    steps = _steps(where, layer, xp, x, n, count, lengths, mask, reset)
    initial = _unpack(where, layer, xp, params, params["weight_hh_l0"], n, state)
    y, finals, scans, masks = x, [], [], []
    for k in range(layer.num_layers):
        outputs = []
        for d in range(layer.directions):
            i = k * layer.directions + d
            own = {short: params[name] for short, name in _names(layer)[1][i].items()}
            out, final, tape = scan.forward(layer.core, own, y, initial[i], steps, xp=xp, reverse=d == 1, keep=keep)
            outputs.append(out)
            finals.append(final)
            scans.append(tape)
        y = outputs[0] if len(outputs) == 1 else xp.concat(outputs, axis=-1)
        drop = None
        if rng is not None and layer.dropout and k < layer.num_layers - 1:
            kept = (rng.random(tuple(y.shape)) >= layer.dropout) / (1 - layer.dropout)
            drop = from_numpy(kept, like=y)
            y = y * drop
        masks.append(drop)
    out = _time_major(layer, xp, y)
    tape_ = StackTape(xp, params, x, out, scans, masks, state is None) if keep else None
    return out, _pack(layer, xp, finals), tape_


def backward(layer: Any, tape: StackTape, dy: Array | None, dstate: State, dstates: Sequence[Any] | None) -> Gradients:
    """See layers.Recurrent.backward."""
    where, xp, dirs = f"{type(layer).__name__}.backward", tape.xp, layer.directions
    given = _flags(dstate) + _flags(dstates if dstates is None else tuple(dstates))
    named = {"dy": dy} | {f"dstate[{i}]": a for i, a in enumerate(given)}
    resolve(where, {"params": params_like(tape.params), **named})
    if dy is not None:
        check_shape(where, "dy", "(the shape of y)", dy, tuple(tape.y.shape))
        dy = _time_major(layer, xp, dy)
    blank = (None,) * len(layer.core.states)
    dfinal: Sequence[Any] = [blank] * len(tape.scans)
    if dstate is not None:
        dfinal = _unpack_partial(where, layer, xp, tape, dstate)
    inner = [blank] * len(tape.scans) if dstates is None else list(dstates)
    if len(inner) != len(tape.scans):
        raise InputError(f"{where}: dstates must have {len(tape.scans)} entries, as tape.states() has, found {len(inner)}")
    inner = _check_inner(where, tape, inner, blank)
    grads: Params = {}
    dinitial: list[Any] = [None] * len(tape.scans)
    for k in reversed(range(layer.num_layers)):
        if tape.masks[k] is not None and dy is not None:
            dy = dy * tape.masks[k]
        width = tape.scans[k * dirs].initial[0].shape[-1]
        dx = None
        for d in range(dirs):
            i = k * dirs + d
            dout = dy if dy is None or dirs == 1 else dy[..., d * width : (d + 1) * width]
            dx_d, dinitial[i], dp = scan.backward(tape.scans[i], dout, dfinal[i], inner[i])
            dx = dx_d if dx is None else dx + dx_d
            grads |= {name: dp[short] for short, name in _names(layer)[1][i].items()}
        dy = dx
    packed = _pack(layer, xp, dinitial)
    grads |= _learned_gradients(layer, xp, tape, packed)
    dx = None if dy is None else _time_major(layer, xp, dy)
    return Gradients(dx, packed, {name: grads[name] for name in tape.params})


def params_like(params: Params) -> Array:
    """Any one of the parameters: they share library, dtype and device."""
    return next(iter(params.values()))


def _unpack_partial(where: str, layer: Any, xp: Namespace, tape: StackTape, dstate: State) -> Sequence[Any]:
    """As _unpack, where an entry of a pair may be None."""
    like, n = params_like(tape.params), tape.x.shape[1]
    names = layer.core.states
    if len(names) > 1 and isinstance(dstate, (tuple, list)) and len(dstate) == len(names) and None in [
        d if d is None else 0 for d in dstate
    ]:
        free = _unpack(where, layer, xp, tape.params, like, n, None)
        blank = _pack(layer, xp, free)
        dstate = tuple(b if d is None else d for d, b in zip(dstate, blank, strict=True))
    return _unpack(where, layer, xp, tape.params, like, n, dstate)


def _check_inner(where: str, tape: StackTape, inner: Sequence[Any], blank: Any) -> list[Any]:
    out = []
    for k, (entry, one) in enumerate(zip(inner, tape.scans, strict=True)):
        parts = blank if entry is None else tuple(entry)
        if len(parts) != len(blank):
            raise InputError(f"{where}: dstates[{k}] must have {len(blank)} entries ({', '.join(one.cell.states)}), found {len(parts)}")
        for name, part, i in zip(one.cell.states, parts, one.initial, strict=True):
            if part is not None:
                check_shape(where, f"dstates[{k}] {name}", "(T,N,H)", part, (tape.x.shape[0], *i.shape))
        out.append(parts)
    return out


def _learned_gradients(layer: Any, xp: Namespace, tape: StackTape, dstate: State) -> Params:
    if not layer.learned_state:
        return {}
    parts = (dstate,) if len(layer.core.states) == 1 else dstate
    found: Params = {}
    for name, part in zip(layer.core.states, parts, strict=True):
        if isinstance(layer.hidden_size, int):
            found[f"initial_{name}"] = part
        else:
            found |= {f"initial_{name}_l{k}": a for k, a in enumerate(part)}
    sums = {key: xp.sum(a, axis=1, dtype=a.dtype) for key, a in found.items()}
    return sums if tape.default else {key: xp.zeros_like(a) for key, a in sums.items()}


def step(layer: Any, params: Params, x: Array, state: State) -> tuple[Array, State]:
    """See layers.Recurrent.step."""
    where = f"{type(layer).__name__}.step"
    if layer.bidirectional:
        raise InputError(f"{where}: a bidirectional layer needs the whole sequence: call the layer instead")
    xp = _resolve(where, layer, params, x, state, "N")
    states = _unpack(where, layer, xp, params, params["weight_hh_l0"], x.shape[0], state)
    y, finals = x, []
    for own, s in zip(_names(layer)[1], states, strict=True):
        finals.append(scan.step_once(xp, layer.core, {short: params[name] for short, name in own.items()}, y, s))
        y = finals[-1][0]
    return y, _pack(layer, xp, finals)
