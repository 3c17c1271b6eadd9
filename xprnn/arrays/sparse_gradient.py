"""SparseGradient: the gradient of a look-up table, stored only for the classes that occur.

A look-up of M class numbers in a table of V classes touches at most M of them; the gradient of all others is zero.
Writing these zeros can take longer than the rest of the backward pass: they are 20 MB for an LSTM of 256 units with
V = 5000 in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import numpy as np

from xprnn.arrays.namespace import (
    Array,
    InputError,
    Namespace,
    as_index,
    device_of,
    host_view,
    is_integer,
    is_numpy,
    namespace,
    resolve_namespace,
    to_numpy,
)
from xprnn.arrays.segment_sum import segment_sum

__all__ = ["SparseGradient", "sparse_lookup_gradient", "stored_values"]

SegmentSum = Callable[[Array, Array, int], Array]  # ids (M,), rows (M, W), count -> (count, W)


def _unsupported(self: Any, *others: Any) -> NoReturn:
    """Raise InputError in place of an operator that a sparse gradient does not have."""
    raise InputError("SparseGradient: only addition and scaling are supported: use .to_dense() for anything else")


def _check_scalar(factor: Any) -> None:
    """Raise InputError unless `factor` is a number or an array of shape ()."""
    if not isinstance(factor, (int, float)) and getattr(factor, "shape", None) != ():
        _unsupported(factor)


@dataclass(frozen=True, eq=False, repr=False)
class SparseGradient:
    """The gradient of a table of V classes, stored for the K <= V classes that occur; all other entries are zero.

    `Embedding(..., sparse=True)` and recurrent layers with `sparse=True` return it for their table. `indices` and
    `values` equal those of the coalesced sparse gradient of torch.nn.Embedding(sparse=True). The sum of two sparse
    gradients is sparse; the sum with an array of the table's shape is an array. A sparse gradient can be multiplied
    and divided by a number or an array of shape (). Optimizers and gradient clipping accept it. For every other
    operation use `to_dense()`.

    Args:
        indices: (K,) integers, the classes that occur, in ascending order and each once.
        values: (K, W) floats, the gradient of each of these classes.
        shape: shape of the table, (V, W) or (W, V).
        axis: the axis of `shape` that has length V: 0 (weight of Embedding) or 1 (weight_ih of a recurrent layer).

    Raises:
        InputError: at construction, if the arguments do not fit each other; later, for an unsupported operator.

    >>> import numpy as np
    >>> g = SparseGradient(np.asarray([1, 4]), np.asarray([[1.0, 2.0], [3.0, 4.0]]), (6, 2))
    >>> g
    SparseGradient(2 of 6 classes, shape=(6, 2), axis=0, dtype=float64)
    >>> (g + 2 * g).values.tolist(), float(g.to_dense().sum())
    ([[3.0, 6.0], [9.0, 12.0]], 10.0)
    """

    indices: Array
    values: Array
    shape: tuple[int, int]
    axis: int = 0

    def __post_init__(self) -> None:
        where = "SparseGradient"
        xp = resolve_namespace(where, {"values": self.values}, {"indices": self.indices})
        if not is_integer(xp, self.indices):
            raise InputError(f"{where}: indices must be integers, found {self.indices.dtype}")
        shape = tuple(self.shape)
        object.__setattr__(self, "shape", shape)
        if self.axis not in (0, 1) or len(shape) != 2:
            raise InputError(f"{where}: shape must have two axes, and axis be 0 or 1, found {shape} and {self.axis}")
        count, width = shape[self.axis], shape[1 - self.axis]
        fits = self.values.ndim == 2 and tuple(self.indices.shape) == tuple(self.values.shape[:1])
        if not fits or self.values.shape[1] != width:
            found = f"{tuple(self.indices.shape)} and {tuple(self.values.shape)}"
            raise InputError(f"{where}: indices and values must be (K,) and (K, {width}), found {found}")
        host = host_view(self.indices)
        if host is not None and host.size and (host[0] < 0 or host[-1] >= count or not (host[1:] > host[:-1]).all()):
            raise InputError(f"{where}: indices must be ascending, each once, in 0..{count - 1}, found {host}")

    @property
    def dtype(self) -> Any:
        """The dtype of `values`."""
        return self.values.dtype

    @property
    def ndim(self) -> int:
        """The number of axes of the table, 2."""
        return 2

    def __repr__(self) -> str:
        classes = f"{self.values.shape[0]} of {self.shape[self.axis]} classes"
        dtype = str(self.dtype).rpartition(".")[2]
        return f"SparseGradient({classes}, shape={self.shape}, axis={self.axis}, dtype={dtype})"

    def to_dense(self) -> Array:
        """Return the gradient as an array of the table's shape, equal to the result with `sparse=False`."""
        return self._class_major(self._scatter_rows(self.indices, self.shape[self.axis]))

    def take_rows(self, table: Array) -> Array:
        """Return the entries of an array of the table's shape that belong to `indices`, as rows (K, W)."""
        by_class, xp = self._class_major(table), namespace(table)
        if is_numpy(xp):
            return by_class[self.indices]  # `take` would first copy a whole transposed table
        return xp.take(by_class, self.indices, axis=0)

    def with_rows(self, table: Array, rows: Array) -> Array:
        """Return a copy of an array of the table's shape, with `rows` (K, W) in place of the entries of `indices`."""
        return self._class_major(_with_rows(namespace(table), self._class_major(table), self.indices, rows))

    def _class_major(self, table: Array) -> Array:
        """Return the table with classes along axis 0, transposed if necessary; this is also the inverse."""
        return namespace(table).permute_dims(table, (1, 0)) if self.axis else table

    def _scatter_rows(self, positions: Array, count: int) -> Array:
        """Return zeros (count, W) with `values` written to the rows `positions` (K,), which ascend."""
        xp, width = namespace(self.values), self.values.shape[1]
        if is_numpy(xp):
            out = np.zeros((count, width), self.dtype)
            out[positions] = self.values
            return out
        out = xp.zeros((count, width), dtype=self.dtype, device=device_of(self.values))
        return _with_rows(xp, out, positions, self.values)

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, SparseGradient):
            return self.__radd__(other)
        if (self.shape, self.axis) != (other.shape, other.axis):
            raise InputError(f"SparseGradient: {self!r} and {other!r} are gradients of different tables")
        xp = resolve_namespace("SparseGradient", {"one": self.values, "other": other.values})
        indices = xp.sort(xp.unique_values(xp.concat((self.indices, other.indices))))
        terms = (g._scatter_rows(xp.searchsorted(indices, g.indices), indices.shape[0]) for g in (self, other))
        return SparseGradient(indices, next(terms) + next(terms), self.shape, self.axis)

    def __radd__(self, other: Any) -> Any:
        if isinstance(other, (int, float)) and not other:  # `sum` starts at 0
            return self
        if tuple(getattr(other, "shape", ())) != self.shape:
            _unsupported(self)
        return other + self.to_dense()

    def __mul__(self, factor: Any) -> "SparseGradient":
        _check_scalar(factor)
        return SparseGradient(self.indices, self.values * factor, self.shape, self.axis)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> "SparseGradient":
        _check_scalar(divisor)
        return SparseGradient(self.indices, self.values / divisor, self.shape, self.axis)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        """Support `array + g`, `array += g` and `scalar * g`, where NumPy's operator is called first."""
        if method != "__call__" or options or ufunc not in (np.add, np.multiply):
            _unsupported(self)
        other = inputs[1] if inputs[0] is self else inputs[0]
        result = self + other if ufunc is np.add else self * other
        if out is None:
            return result
        if isinstance(result, SparseGradient):
            _unsupported(self)
        out[0][...] = result
        return out[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.asarray(to_numpy(self.to_dense()), dtype)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"SparseGradient has no attribute {name}: use .to_dense()")

    __getitem__ = __iter__ = __len__ = __bool__ = __float__ = _unsupported
    __sub__ = __rsub__ = __pow__ = __matmul__ = __rmatmul__ = __rtruediv__ = __neg__ = __abs__ = _unsupported
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _unsupported
    __hash__ = None  # type: ignore[assignment]


def stored_values(gradient: Any) -> Array:
    """Return the array of all entries that may differ from zero: the gradient itself, or `values` if it is sparse."""
    return gradient.values if isinstance(gradient, SparseGradient) else gradient


def _with_rows(xp: Namespace, table: Array, positions: Array, rows: Array) -> Array:
    """Return a copy of `table` (V, W) with `rows` (K, W) in place of its rows `positions` (K,), which ascend."""
    if is_numpy(xp):
        out = table.copy(order="K")
        out[positions] = rows
        return out
    if not positions.shape[0] or not table.shape[0]:
        return xp.asarray(table, copy=True)
    # The standard has no index assignment: each row of the table looks for its replacement by binary search.
    all_rows = xp.arange(table.shape[0], dtype=positions.dtype, device=device_of(positions))
    candidate = xp.searchsorted(positions, all_rows, side="right") - 1
    candidate = xp.where(candidate < 0, xp.zeros_like(candidate), candidate)
    is_replaced = xp.take(positions, candidate) == all_rows
    return xp.where(is_replaced[:, None], xp.take(rows, candidate, axis=0), table)


def sparse_lookup_gradient(
    xp: Namespace,
    ids: Array,
    rows: Array,
    shape: tuple[int, int],
    axis: int = 0,
    *,
    active: Array | None = None,
    segment_sum_fn: SegmentSum | None = None,
) -> SparseGradient:
    """Adjoint of a table look-up: the sum of rows for each class that occurs.

    Args:
        xp: the namespace of the arrays.
        ids: (M,) integers in 0..V-1, the classes that were looked up.
        rows: (M, W) floats, the cotangent of each look-up.
        shape: shape of the table, as in SparseGradient.
        axis: the axis of classes, as in SparseGradient.
        active: (M,) booleans or None. Where it is False, the rows must be zero and the id does not count as occurring.
        segment_sum_fn: ids, rows, count -> (count, W); None: `xprnn.arrays.segment_sum.segment_sum`.

    Raises:
        InputError: the library cannot return an array whose shape depends on values (JAX inside jax.jit).

    >>> sparse_lookup_gradient(np, np.asarray([2, 0, 2]), np.asarray([[1.0], [2.0], [3.0]]), (4, 1)).indices
    array([0, 2])
    """
    num_classes = shape[axis]
    ids = np.asarray(ids, np.int64) if is_numpy(xp) else as_index(xp, ids)
    # V, which sorts behind every class, stands for the ids that occur only where inactive; its row is dropped.
    sentinel = xp.full((1,), num_classes, dtype=ids.dtype, device=device_of(ids))
    active_ids = ids if active is None else xp.where(active, ids, sentinel)
    try:
        classes = xp.sort(xp.unique_values(xp.concat((active_ids, sentinel))))
    except (TypeError, RuntimeError) as error:
        hint = "call outside jax.jit, or set sparse=False"
        raise InputError(
            f"sparse=True: the number of classes that occur cannot be determined here: {hint} ({error})"
        ) from error
    count = classes.shape[0] - 1
    position = xp.searchsorted(classes, ids)
    if active is not None:
        occurs = xp.take(classes, position) == ids
        position = xp.where(occurs, position, xp.full_like(position, count))
    values = (segment_sum_fn or partial(segment_sum, xp))(position, rows, count + 1)[:count, ...]
    return SparseGradient(classes[:count], values, shape, axis)
