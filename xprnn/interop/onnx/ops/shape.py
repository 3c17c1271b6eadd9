"""Data movement operators of ONNX: reshape, transpose, slice, concatenate, gather and the like.

Shapes, axes and slice bounds are NumPy arrays on the host. Data is moved with functions of the Array API standard
only: without scatter and boolean indexing, and without negative steps, which torch does not support.

Source: the ONNX operators (onnx.ai/onnx/operators).
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


def _axis_index(ndim: int, axis: int, index: Any) -> tuple[Any, ...]:
    """An index that applies `index` to one axis and takes all of the others."""
    return tuple(index if k == axis else slice(None) for k in range(ndim))


def _transpose(context: Context, node: Node, x: Array) -> Array:
    return context.xp.permute_dims(x, tuple(node.attrs.get("perm", range(x.ndim - 1, -1, -1))))


def _squeeze(context: Context, node: Node, x: Array, axes: Any = None) -> Array:
    listed = node.attrs.get("axes") if axes is None else _int_list(axes)
    removed = [k for k, d in enumerate(x.shape) if d == 1] if listed is None else listed
    return context.xp.squeeze(x, axis=tuple(a % x.ndim for a in removed))


def _unsqueeze(context: Context, node: Node, x: Array, axes: Any = None) -> Array:
    added = node.attrs["axes"] if axes is None else _int_list(axes)
    rank = x.ndim + len(added)
    for axis in sorted(a % rank for a in added):
        x = context.xp.expand_dims(x, axis=axis)
    return x


def _concat(context: Context, node: Node, *xs: Array) -> Array:
    return context.xp.concat(xs, axis=node.attrs["axis"])


def _slice(
    context: Context, node: Node, x: Array, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None
) -> Array:
    """Slice. The bounds are attributes before opset 10, inputs from opset 10 on."""
    starts = node.attrs["starts"] if starts is None else _int_list(starts)
    ends = node.attrs["ends"] if ends is None else _int_list(ends)
    axes = node.attrs.get("axes", range(len(starts))) if axes is None else _int_list(axes)
    steps = [1] * len(starts) if steps is None else _int_list(steps)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        k = axis % x.ndim
        indices = range(*slice(start, max(end, -1 - x.shape[k]) if step < 0 else end, step).indices(x.shape[k]))
        if not indices:
            x = x[_axis_index(x.ndim, k, slice(0, 0))]
            continue
        low, high = min(indices[0], indices[-1]), max(indices[0], indices[-1])
        x = x[_axis_index(x.ndim, k, slice(low, high + 1, abs(step)))]
        x = context.xp.flip(x, axis=k) if step < 0 else x
    return x


def _gather(context: Context, node: Node, x: Array, indices: Any) -> Array:
    """Gather. A single index that is known on the host becomes a slice."""
    xp, axis = context.xp, node.attrs.get("axis", 0) % x.ndim
    size = x.shape[axis]
    if isinstance(indices, HostValue):
        ids = np.where(indices.array < 0, indices.array + size, indices.array)
        if ids.size and not 0 <= ids.min() <= ids.max() < size:
            raise InputError(f"an index of {_int_list(indices.array)[:9]} is outside the axis of size {size}")
        if ids.ndim == 0:
            return x[_axis_index(x.ndim, axis, int(ids))]
        indices = context.as_array(HostValue(ids))
    else:
        indices = xp.where(indices < 0, indices + size, indices)
    rows = xp.take(x, as_index(xp, xp.reshape(indices, (-1,)) if indices.ndim != 1 else indices), axis=axis)
    return xp.reshape(rows, (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def _reshape(context: Context, node: Node, x: Array, shape: Any) -> Array:
    sizes, allow_zero = _int_list(shape), node.attrs.get("allowzero", 0)
    sizes = [x.shape[k] if d == 0 and not allow_zero else d for k, d in enumerate(sizes)]
    if sizes.count(-1) == 1:
        rest = math.prod(d for d in sizes if d != -1)
        sizes[sizes.index(-1)] = math.prod(x.shape) // rest if rest else 0
    return context.xp.reshape(x, tuple(sizes))


def _flatten(context: Context, node: Node, x: Array) -> Array:
    axis = node.attrs.get("axis", 1)
    axis = axis % x.ndim if axis < 0 else axis
    return context.xp.reshape(x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))


def _shape(context: Context, node: Node, x: Array) -> HostValue:
    return HostValue(np.asarray(x.shape[node.attrs.get("start", 0) : node.attrs.get("end")], np.int64))


def _size(context: Context, node: Node, x: Array) -> HostValue:
    return HostValue(np.asarray(math.prod(x.shape), np.int64))


def _expand(context: Context, node: Node, x: Array, shape: Any) -> Array:
    return context.xp.broadcast_to(
        x, check_size_limit(node, np.broadcast_shapes(tuple(x.shape), tuple(_int_list(shape))))
    )


def _constant_of_shape(context: Context, node: Node, shape: Any) -> Any:
    """ConstantOfShape. Floats are made on the device of the data, integers on the host, since they are shapes."""
    value = node.attrs.get("value", np.zeros(1, np.float32)).reshape(-1)[0]
    sizes = check_size_limit(node, _int_list(shape))
    if value.dtype.kind != "f":
        return HostValue(np.full(sizes, value))
    return context.xp.full(sizes, float(value), dtype=context.like.dtype, device=device_of(context.like))


def _split(context: Context, node: Node, x: Array, sizes: Any = None) -> tuple[Array, ...]:
    """Split. The sizes are an attribute before opset 13, an input from opset 13 on; by default all parts are equal."""
    axis, count = node.attrs.get("axis", 0) % x.ndim, len(node.outputs)
    parts = node.attrs.get("split") if sizes is None else _int_list(sizes)
    if parts is None:
        size = -(-x.shape[axis] // count)
        parts = [size] * (count - 1) + [x.shape[axis] - size * (count - 1)]
    ends = np.cumsum([0, *parts]).tolist()
    if ends[-1] != x.shape[axis] or min(parts) < 0 or len(parts) != count:
        raise InputError(f"cannot split an axis of size {x.shape[axis]} into {count} outputs of sizes {parts}")
    return tuple(x[_axis_index(x.ndim, axis, slice(a, b))] for a, b in pairwise(ends))


def _split_to_sequence(context: Context, node: Node, x: Array, sizes: Any = None) -> list[Array]:
    """SplitToSequence. Without sizes, each part has size 1; a scalar is the size of all parts, a vector lists them."""
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
        raise InputError(f"cannot split an axis of size {count} into parts of sizes {parts}")
    return [x[_axis_index(x.ndim, axis, slice(a, b))] for a, b in pairwise(ends)]


def _sequence_at(context: Context, node: Node, xs: list[Array], position: Any) -> Array:
    k = _int_list(position)[0]
    if not -len(xs) <= k < len(xs):
        raise InputError(f"position {k} is outside a sequence of length {len(xs)}")
    return xs[k]


def _tile(context: Context, node: Node, x: Array, repeats: Any) -> Array:
    check_size_limit(node, [d * r for d, r in zip(x.shape, _int_list(repeats), strict=True)])
    return context.xp.tile(x, tuple(_int_list(repeats)))


def _range(context: Context, node: Node, start: Any, limit: Any, delta: Any) -> HostValue:
    count = max(0, math.ceil((limit.item() - start.item()) / delta.item()))
    check_size_limit(node, [count])
    return HostValue((start + np.arange(count) * delta).astype(start.dtype))


def _cast(context: Context, node: Node, x: Array) -> Array:
    to = node.attrs["to"]
    if to in FLOAT_TYPES and not context.on_host:
        return context.xp.astype(x, context.like.dtype)
    name = _DTYPES[to]
    return context.xp.astype(x, getattr(context.xp, name))


def _cast_unsupported_reason(node: Node) -> str:
    return "" if node.attrs.get("to") in _DTYPES else f"to={node.attrs.get('to')}"


def _reverse_sequence(context: Context, node: Node, x: Array, lengths: Array) -> Array:
    """ReverseSequence: reverse the first lengths[b] entries of row b; the rest keeps its order."""
    xp, time, batch = context.xp, node.attrs.get("time_axis", 0), node.attrs.get("batch_axis", 1)
    count = x.shape[time]
    t = xp.arange(count, dtype=lengths.dtype, device=device_of(x))
    shape = [1] * x.ndim
    shape[time] = count
    t = xp.reshape(t, tuple(shape))
    shape = [1] * x.ndim
    shape[batch] = x.shape[batch]
    n = xp.reshape(lengths, tuple(shape))
    source = xp.where(t < n, n - 1 - t, t)
    return xp.take_along_axis(x, as_index(xp, xp.broadcast_to(source, tuple(x.shape))), axis=time)


def _topk(context: Context, node: Node, x: Array, k: Any) -> tuple[Array, Array]:
    """TopK. Equal values keep their order."""
    xp, axis, count = context.xp, node.attrs.get("axis", -1) % x.ndim, _int_list(k)[0]
    if not 0 <= count <= x.shape[axis]:
        raise InputError(f"k={count} is outside 0 to {x.shape[axis]}, the size of the axis")
    order = xp.argsort(x, axis=axis, descending=bool(node.attrs.get("largest", 1)), stable=True)
    order = order[_axis_index(x.ndim, axis, slice(0, count))]
    return xp.take_along_axis(x, order, axis=axis), order


def _scatter_elements(context: Context, node: Node, x: Array, indices: Array, updates: Array) -> Array:
    """ScatterElements of 1-d data. The Array API has no scatter: each element gathers the last update of its index."""
    xp = context.xp
    if x.ndim != 1:
        raise InputError(f"data has {x.ndim} axes, expected 1")
    if updates.shape[0] == 0:
        return x
    size, count = x.shape[0], updates.shape[0]
    indices = xp.where(indices < 0, indices + size, indices)
    is_target = indices[None, :] == xp.arange(size, dtype=indices.dtype, device=device_of(x))[:, None]
    update = xp.arange(count, dtype=indices.dtype, device=device_of(x))[None, :]
    last = xp.max(xp.where(is_target, update, -1 + 0 * update), axis=1)
    return xp.where(last < 0, x, xp.take(updates, as_index(xp, xp.maximum(last, 0 * last)), axis=0))


def _scatter_unsupported_reason(node: Node) -> str:
    found = node.attrs.get("reduction", "none")
    return "" if found == "none" else f"reduction={found!r}"


def _gather_elements(context: Context, node: Node, x: Array, indices: Array) -> Array:
    """GatherElements. On the other axes, `indices` may be smaller than x."""
    axis = node.attrs.get("axis", 0) % x.ndim
    for k, count in enumerate(indices.shape):
        x = x if k == axis else x[_axis_index(x.ndim, k, slice(0, count))]
    ids = context.xp.where(indices < 0, indices + x.shape[axis], indices)
    return context.xp.take_along_axis(x, ids, axis=axis)


def _one_hot(context: Context, node: Node, indices: Array, depth: Any, values: Array) -> Array:
    xp, count = context.xp, _int_list(depth)[0]
    axis = node.attrs.get("axis", -1) % (indices.ndim + 1)
    indices = xp.expand_dims(xp.where(indices < 0, indices + count, indices), axis=axis)
    shape = [1] * indices.ndim
    shape[axis] = count
    classes = xp.reshape(xp.arange(count, dtype=indices.dtype, device=device_of(indices)), tuple(shape))
    return xp.where(indices == classes, values[1], values[0])


def _dropout(context: Context, node: Node, x: Array, ratio: Any = None, training: Any = None) -> Array:
    if training is not None and bool(training):
        raise InputError("training_mode is true, which is not supported: export the model for inference")
    return x


def _dropout_unsupported_reason(node: Node) -> str:
    return "a mask output" if len(node.outputs) > 1 and node.outputs[1] else ""


SHAPE_OPS: dict[str, Op] = {
    "Cast": Op(_cast, ("to", "saturate", "round_mode"), unsupported_reason=_cast_unsupported_reason),
    "Concat": Op(_concat, ("axis",)),
    "Constant": Op(lambda context, node: HostValue(node.attrs["value"]), ("value",)),
    "ConstantOfShape": Op(_constant_of_shape, ("value",), host_inputs=(0,), runs_on_host=False),
    "Dropout": Op(_dropout, ("ratio", "seed"), host_inputs=(1, 2), unsupported_reason=_dropout_unsupported_reason),
    "Expand": Op(_expand, host_inputs=(1,)),
    "Flatten": Op(_flatten, ("axis",)),
    "Gather": Op(_gather, ("axis",), raw_inputs=(1,)),
    "GatherElements": Op(_gather_elements, ("axis",)),
    "Identity": Op(lambda context, node, x: x),
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
