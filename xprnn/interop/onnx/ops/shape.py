"""The plumbing of ONNX over the Array API: what moves, cuts, joins and looks up numbers without computing any.

Shapes, axes and cutting points are NumPy arrays on the host; data moves by slices, takes and permutations of the
standard alone (no scatter, no boolean indexing, no negative steps, which torch has not).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np

from xprnn.arrays.namespace import Array, InputError, as_index, device_of
from xprnn.interop.onnx.node import FLOAT_TYPES, Context, HostValue, Node, Op, check_size_limit

__all__ = ["SHAPE_OPS"]

_DTYPES = {1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool"}
_DTYPES |= {10: "float16", 11: "float64", 12: "uint32", 13: "uint64"}


def _int_list(a: Any) -> list[int]:
    return [int(v) for v in np.asarray(a).reshape(-1)]


def _axis_index(ndim: int, axis: int, part: Any) -> tuple[Any, ...]:
    return tuple(part if k == axis else slice(None) for k in range(ndim))


def _transpose(at: Context, node: Node, x: Array) -> Array:
    return at.xp.permute_dims(x, tuple(node.attrs.get("perm", range(x.ndim - 1, -1, -1))))


def _squeeze(at: Context, node: Node, x: Array, axes: Any = None) -> Array:
    given = node.attrs.get("axes") if axes is None else _int_list(axes)
    over = [k for k, d in enumerate(x.shape) if d == 1] if given is None else given
    return at.xp.squeeze(x, axis=tuple(a % x.ndim for a in over))


def _unsqueeze(at: Context, node: Node, x: Array, axes: Any = None) -> Array:
    given = node.attrs["axes"] if axes is None else _int_list(axes)
    rank = x.ndim + len(given)
    for axis in sorted(a % rank for a in given):
        x = at.xp.expand_dims(x, axis=axis)
    return x


def _concat(at: Context, node: Node, *xs: Array) -> Array:
    return at.xp.concat(xs, axis=node.attrs["axis"])


def _slice(
    at: Context, node: Node, x: Array, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None
) -> Array:
    """Cutting points are attributes before opset 10 and inputs since."""
    begin = node.attrs["starts"] if starts is None else _int_list(starts)
    end = node.attrs["ends"] if ends is None else _int_list(ends)
    over = node.attrs.get("axes", range(len(begin))) if axes is None else _int_list(axes)
    by = [1] * len(begin) if steps is None else _int_list(steps)
    for axis, a, b, step in zip(over, begin, end, by, strict=True):
        k = axis % x.ndim
        chosen = range(*slice(a, max(b, -1 - x.shape[k]) if step < 0 else b, step).indices(x.shape[k]))
        if not chosen:
            x = x[_axis_index(x.ndim, k, slice(0, 0))]
            continue
        low, high = min(chosen[0], chosen[-1]), max(chosen[0], chosen[-1])
        x = x[_axis_index(x.ndim, k, slice(low, high + 1, abs(step)))]
        x = at.xp.flip(x, axis=k) if step < 0 else x
    return x


def _gather(at: Context, node: Node, x: Array, indices: Any) -> Array:
    """Rows by number; numbers known on the host are slices where there is one."""
    xp, axis = at.xp, node.attrs.get("axis", 0) % x.ndim
    size = x.shape[axis]
    if isinstance(indices, HostValue):
        found = np.where(indices.array < 0, indices.array + size, indices.array)
        if found.size and not 0 <= found.min() <= found.max() < size:
            raise InputError(f"an index of {_int_list(indices.array)[:9]} is outside the axis of size {size}")
        if found.ndim == 0:
            return x[_axis_index(x.ndim, axis, int(found))]
        indices = at.as_array(HostValue(found))
    else:
        indices = xp.where(indices < 0, indices + size, indices)
    rows = xp.take(x, as_index(xp, xp.reshape(indices, (-1,)) if indices.ndim != 1 else indices), axis=axis)
    return xp.reshape(rows, (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def _reshape(at: Context, node: Node, x: Array, shape: Any) -> Array:
    wanted, zero = _int_list(shape), node.attrs.get("allowzero", 0)
    wanted = [x.shape[k] if d == 0 and not zero else d for k, d in enumerate(wanted)]
    if wanted.count(-1) == 1:
        rest = math.prod(d for d in wanted if d != -1)
        wanted[wanted.index(-1)] = math.prod(x.shape) // rest if rest else 0
    return at.xp.reshape(x, tuple(wanted))


def _flatten(at: Context, node: Node, x: Array) -> Array:
    axis = node.attrs.get("axis", 1)
    axis = axis % x.ndim if axis < 0 else axis
    return at.xp.reshape(x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))


def _shape(at: Context, node: Node, x: Array) -> HostValue:
    return HostValue(np.asarray(x.shape[node.attrs.get("start", 0) : node.attrs.get("end")], np.int64))


def _size(at: Context, node: Node, x: Array) -> HostValue:
    return HostValue(np.asarray(math.prod(x.shape), np.int64))


def _expand(at: Context, node: Node, x: Array, shape: Any) -> Array:
    return at.xp.broadcast_to(x, check_size_limit(node, np.broadcast_shapes(tuple(x.shape), tuple(_int_list(shape)))))


def _constant_of_shape(at: Context, node: Node, shape: Any) -> Any:
    """Floats are data, made where the data is; integers are shapes."""
    value = node.attrs.get("value", np.zeros(1, np.float32)).reshape(-1)[0]
    wanted = check_size_limit(node, _int_list(shape))
    if value.dtype.kind != "f":
        return HostValue(np.full(wanted, value))
    return at.xp.full(wanted, float(value), dtype=at.like.dtype, device=device_of(at.like))


def _split(at: Context, node: Node, x: Array, sizes: Any = None) -> tuple[Array, ...]:
    """Sizes are an attribute before opset 13 and an input since; without, as many equal parts as there are outputs."""
    axis, count = node.attrs.get("axis", 0) % x.ndim, len(node.outputs)
    parts = node.attrs.get("split") if sizes is None else _int_list(sizes)
    if parts is None:
        most = -(-x.shape[axis] // count)
        parts = [most] * (count - 1) + [x.shape[axis] - most * (count - 1)]
    ends = np.cumsum([0, *parts]).tolist()
    if ends[-1] != x.shape[axis] or min(parts) < 0 or len(parts) != count:
        raise InputError(f"{count} parts of {parts} from an axis of size {x.shape[axis]}")
    return tuple(x[_axis_index(x.ndim, axis, slice(a, b))] for a, b in pairwise(ends))


def _split_to_sequence(at: Context, node: Node, x: Array, sizes: Any = None) -> list[Array]:
    """A list of parts: of one step each, of `sizes` steps each, or of these sizes."""
    axis = node.attrs.get("axis", 0) % x.ndim
    count = x.shape[axis]
    if sizes is None:
        keep = node.attrs.get("keepdims", 1)
        return [x[_axis_index(x.ndim, axis, slice(k, k + 1) if keep else k)] for k in range(count)]
    parts = _int_list(sizes)
    if sizes.ndim == 0 and parts[0] > 0:
        parts = [min(parts[0], count - k) for k in range(0, count, parts[0])]
    ends = np.cumsum([0, *parts]).tolist()
    if ends[-1] != count or min(parts, default=0) < 0:
        raise InputError(f"parts of {parts} from an axis of size {count}")
    return [x[_axis_index(x.ndim, axis, slice(a, b))] for a, b in pairwise(ends)]


def _sequence_at(at: Context, node: Node, xs: list[Array], position: Any) -> Array:
    k = _int_list(position)[0]
    if not -len(xs) <= k < len(xs):
        raise InputError(f"position {k} of a sequence of {len(xs)}")
    return xs[k]


def _tile(at: Context, node: Node, x: Array, repeats: Any) -> Array:
    check_size_limit(node, [d * r for d, r in zip(x.shape, _int_list(repeats), strict=True)])
    return at.xp.tile(x, tuple(_int_list(repeats)))


def _range(at: Context, node: Node, start: Any, limit: Any, delta: Any) -> HostValue:
    count = max(0, math.ceil((limit.item() - start.item()) / delta.item()))
    check_size_limit(node, [count])
    return HostValue((start + np.arange(count) * delta).astype(start.dtype))


def _cast(at: Context, node: Node, x: Array) -> Array:
    to = node.attrs["to"]
    if to in FLOAT_TYPES and not at.on_host:
        return at.xp.astype(x, at.like.dtype)
    name = _DTYPES[to]
    return at.xp.astype(x, getattr(at.xp, name))


def _cast_unsupported_reason(node: Node) -> str:
    return "" if node.attrs.get("to") in _DTYPES else f"to={node.attrs.get('to')}"


def _reverse_sequence(at: Context, node: Node, x: Array, lengths: Array) -> Array:
    """The first lengths[b] entries of each row backwards, the rest as it stands."""
    xp, time, batch = at.xp, node.attrs.get("time_axis", 0), node.attrs.get("batch_axis", 1)
    count = x.shape[time]
    t = xp.arange(count, dtype=lengths.dtype, device=device_of(x))
    shape = [1] * x.ndim
    shape[time] = count
    t = xp.reshape(t, tuple(shape))
    shape = [1] * x.ndim
    shape[batch] = x.shape[batch]
    n = xp.reshape(lengths, tuple(shape))
    where = xp.where(t < n, n - 1 - t, t)
    return xp.take_along_axis(x, as_index(xp, xp.broadcast_to(where, tuple(x.shape))), axis=time)


def _topk(at: Context, node: Node, x: Array, k: Any) -> tuple[Array, Array]:
    """Equal values in the order in which they stand."""
    xp, axis, count = at.xp, node.attrs.get("axis", -1) % x.ndim, _int_list(k)[0]
    if not 0 <= count <= x.shape[axis]:
        raise InputError(f"{count} of an axis of size {x.shape[axis]}")
    order = xp.argsort(x, axis=axis, descending=bool(node.attrs.get("largest", 1)), stable=True)
    order = order[_axis_index(x.ndim, axis, slice(0, count))]
    return xp.take_along_axis(x, order, axis=axis), order


def _scatter_elements(at: Context, node: Node, x: Array, indices: Array, updates: Array) -> Array:
    """One axis: the standard of arrays has no scatter, so each place asks who wrote into it last."""
    xp = at.xp
    if x.ndim != 1 or updates.shape[0] == 0:
        if x.ndim == 1:
            return x
        raise InputError(f"data of {x.ndim} axes: expected one")
    size, count = x.shape[0], updates.shape[0]
    indices = xp.where(indices < 0, indices + size, indices)
    here = indices[None, :] == xp.arange(size, dtype=indices.dtype, device=device_of(x))[:, None]
    turn = xp.arange(count, dtype=indices.dtype, device=device_of(x))[None, :]
    last = xp.max(xp.where(here, turn, -1 + 0 * turn), axis=1)
    return xp.where(last < 0, x, xp.take(updates, as_index(xp, xp.maximum(last, 0 * last)), axis=0))


def _scatter_unsupported_reason(node: Node) -> str:
    found = node.attrs.get("reduction", "none")
    return "" if found == "none" else f"reduction={found!r}"


def _gather_elements(at: Context, node: Node, x: Array, indices: Array) -> Array:
    """Along one axis, an entry for each index; on the other axes as many of them as there are indices."""
    axis = node.attrs.get("axis", 0) % x.ndim
    for k, count in enumerate(indices.shape):
        x = x if k == axis else x[_axis_index(x.ndim, k, slice(0, count))]
    ids = at.xp.where(indices < 0, indices + x.shape[axis], indices)
    return at.xp.take_along_axis(x, ids, axis=axis)


def _one_hot(at: Context, node: Node, indices: Array, depth: Any, values: Array) -> Array:
    xp, count = at.xp, _int_list(depth)[0]
    axis = node.attrs.get("axis", -1) % (indices.ndim + 1)
    indices = xp.expand_dims(xp.where(indices < 0, indices + count, indices), axis=axis)
    shape = [1] * indices.ndim
    shape[axis] = count
    classes = xp.reshape(xp.arange(count, dtype=indices.dtype, device=device_of(indices)), tuple(shape))
    return xp.where(indices == classes, values[1], values[0])


def _dropout(at: Context, node: Node, x: Array, ratio: Any = None, training: Any = None) -> Array:
    if training is not None and bool(training):
        raise InputError("it drops out, which a graph that is only run does not do: export it for inference")
    return x


def _dropout_unsupported_reason(node: Node) -> str:
    return "its mask" if len(node.outputs) > 1 and node.outputs[1] else ""


SHAPE_OPS: dict[str, Op] = {
    "Cast": Op(_cast, ("to", "saturate", "round_mode"), unsupported_reason=_cast_unsupported_reason),
    "Concat": Op(_concat, ("axis",)),
    "Constant": Op(lambda at, node: HostValue(node.attrs["value"]), ("value",)),
    "ConstantOfShape": Op(_constant_of_shape, ("value",), host_inputs=(0,), runs_on_host=False),
    "Dropout": Op(_dropout, ("ratio", "seed"), host_inputs=(1, 2), unsupported_reason=_dropout_unsupported_reason),
    "Expand": Op(_expand, host_inputs=(1,)),
    "Flatten": Op(_flatten, ("axis",)),
    "Gather": Op(_gather, ("axis",), raw_inputs=(1,)),
    "GatherElements": Op(_gather_elements, ("axis",)),
    "Identity": Op(lambda at, node, x: x),
    "OneHot": Op(_one_hot, ("axis",), host_inputs=(1,)),
    "Range": Op(_range, host_inputs=(0, 1, 2), runs_on_host=False),
    "Reshape": Op(_reshape, ("allowzero",), host_inputs=(1,)),
    "ReverseSequence": Op(_reverse_sequence, ("batch_axis", "time_axis")),
    "ScatterElements": Op(_scatter_elements, ("axis", "reduction"), unsupported_reason=_scatter_unsupported_reason),
    "SequenceAt": Op(_sequence_at, host_inputs=(1,)),
    "Shape": Op(_shape, ("start", "end"), runs_on_host=False),
    "Size": Op(_size, runs_on_host=False),
    "Slice": Op(_slice, ("starts", "ends", "axes"), host_inputs=(1, 2, 3, 4)),
    "Split": Op(_split, ("axis", "split", "num_outputs"), host_inputs=(1,)),
    "SplitToSequence": Op(_split_to_sequence, ("axis", "keepdims"), host_inputs=(1,), runs_on_host=False),
    "Squeeze": Op(_squeeze, ("axes",), host_inputs=(1,)),
    "Tile": Op(_tile, host_inputs=(1,)),
    "TopK": Op(_topk, ("axis", "largest", "sorted"), host_inputs=(1,)),
    "Transpose": Op(_transpose, ("perm",)),
    "Unsqueeze": Op(_unsqueeze, ("axes",), host_inputs=(1,)),
}
