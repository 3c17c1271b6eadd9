"""Gradients of tables that are looked up by class: only the classes that occur.

A look-up of M classes in a table of V touches at most M of them; the rest of its gradient is zero, and to write those
zeros, 20 MB for an LSTM of 256 units and V = 5000, costs more than all that is computed.
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
    raise InputError("SparseGradient: it can be added and scaled; whatever else is wanted, its .to_dense() can do")


def _check_scalar(factor: Any) -> None:
    if not isinstance(factor, (int, float)) and getattr(factor, "shape", None) != ():
        _unsupported(factor)


@dataclass(frozen=True, eq=False, repr=False)
class SparseGradient:
    """The gradient of a table of V classes, of those K <= V that occur; that of all others is zero.

    What `sparse=True` of an Embedding or a recurrent layer gives, as torch.nn.Embedding does: `indices` and `values`
    are those of torch's coalesced tensor. It is added to another, or to an array, which gives an array, and is scaled
    by a number or an array without axes. Optimisers and clipping take it as it is. What else is wanted, `dense()` has.

    Args:
        indices: (K,) the classes, in ascending order, each once.
        values: (K, W) the gradient of each.
        shape: the table's, (V, W) or (W, V).
        axis: which axis of it counts classes: 0 (Embedding's weight) or 1 (a recurrent layer's weight_ih).

    Raises:
        InputError: parts that do not fit each other; or, by whatever it is asked for beyond this, a hint at `dense()`.

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
            raise InputError(f"{where}: a table has two axes, 0 or 1 of classes, found shape {shape}, axis {self.axis}")
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
        """That of the values."""
        return self.values.dtype

    @property
    def ndim(self) -> int:
        """2, as the table has."""
        return 2

    def __repr__(self) -> str:
        classes = f"{self.values.shape[0]} of {self.shape[self.axis]} classes"
        dtype = str(self.dtype).rpartition(".")[2]
        return f"SparseGradient({classes}, shape={self.shape}, axis={self.axis}, dtype={dtype})"

    def to_dense(self) -> Array:
        """The whole gradient, (V, W) or (W, V): what is computed where nobody asks for a sparse one."""
        return self._class_major(self._scatter_rows(self.indices, self.shape[self.axis]))

    def take_rows(self, table: Array) -> Array:
        """The rows (K, W) of an array of the table's shape that belong to `indices`."""
        by_class, xp = self._class_major(table), namespace(table)
        if is_numpy(xp):
            return by_class[self.indices]  # `take` would copy all of a table that is turned
        return xp.take(by_class, self.indices, axis=0)

    def with_rows(self, table: Array, rows: Array) -> Array:
        """A copy of an array of the table's shape in which these rows (K, W) stand at `indices`."""
        return self._class_major(_with_rows(namespace(table), self._class_major(table), self.indices, rows))

    def _class_major(self, table: Array) -> Array:
        return namespace(table).permute_dims(table, (1, 0)) if self.axis else table

    def _scatter_rows(self, places: Array, count: int) -> Array:
        """(count, W): the values at these places (K,), ascending, and zeros."""
        xp, width = namespace(self.values), self.values.shape[1]
        if is_numpy(xp):
            blank = np.zeros((count, width), self.dtype)
            blank[places] = self.values
            return blank
        blank = xp.zeros((count, width), dtype=self.dtype, device=device_of(self.values))
        return _with_rows(xp, blank, places, self.values)

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, SparseGradient):
            return self.__radd__(other)
        if (self.shape, self.axis) != (other.shape, other.axis):
            raise InputError(f"SparseGradient: {self!r} and {other!r} belong to different tables")
        xp = resolve_namespace("SparseGradient", {"one": self.values, "other": other.values})
        indices = xp.sort(xp.unique_values(xp.concat((self.indices, other.indices))))
        both = (g._scatter_rows(xp.searchsorted(indices, g.indices), indices.shape[0]) for g in (self, other))
        return SparseGradient(indices, next(both) + next(both), self.shape, self.axis)

    def __radd__(self, other: Any) -> Any:
        if isinstance(other, (int, float)) and not other:  # where `sum` starts
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
        """What NumPy's arrays and numbers ask for that stand on the left: their sums, also in place, and products."""
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
        raise AttributeError(f"SparseGradient has no {name}: its .to_dense() may have it")

    __getitem__ = __iter__ = __len__ = __bool__ = __float__ = _unsupported
    __sub__ = __rsub__ = __pow__ = __matmul__ = __rmatmul__ = __rtruediv__ = __neg__ = __abs__ = _unsupported
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _unsupported
    __hash__ = None  # type: ignore[assignment]


def stored_values(gradient: Any) -> Array:
    """All of a gradient, dense or sparse, that may differ from zero."""
    return gradient.values if isinstance(gradient, SparseGradient) else gradient


def _with_rows(xp: Namespace, table: Array, places: Array, rows: Array) -> Array:
    """A copy of the table (V, W) with rows (K, W) at places (K,), which ascend."""
    if is_numpy(xp):
        out = table.copy(order="K")
        out[places] = rows
        return out
    if not places.shape[0] or not table.shape[0]:
        return xp.asarray(table, copy=True)
    every = xp.arange(table.shape[0], dtype=places.dtype, device=device_of(places))
    at = xp.searchsorted(places, every, side="right") - 1
    at = xp.where(at < 0, xp.zeros_like(at), at)
    here = xp.take(places, at) == every
    return xp.where(here[:, None], xp.take(rows, at, axis=0), table)


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
    """The sums of rows by class, for the classes that occur: the adjoint of looking a table's classes up.

    Args:
        xp: the namespace.
        ids: (M,) integers in 0..V-1.
        rows: (M, W).
        shape, axis: as in SparseGradient.
        active: (M,) boolean; a class that only occurs where it is False does not occur. Rows are zero there.
        total: how the sums are made: ids, rows, count -> (count, W); None: scatter.segment_sum.

    Raises:
        InputError: an array library that cannot say how many classes occur (JAX inside jit).

    >>> sparse_lookup_gradient(np, np.asarray([2, 0, 2]), np.asarray([[1.0], [2.0], [3.0]]), (4, 1)).indices
    array([0, 2])
    """
    end = shape[axis]
    ids = np.asarray(ids, np.int64) if is_numpy(xp) else as_index(xp, ids)
    last = xp.full((1,), end, dtype=ids.dtype, device=device_of(ids))
    seen = ids if active is None else xp.where(active, ids, last)
    try:
        classes = xp.sort(xp.unique_values(xp.concat((seen, last))))
    except (TypeError, RuntimeError) as error:
        hint = "outside jax.jit, or with sparse=False"
        raise InputError(
            f"sparse=True: how many classes occur cannot be known here: {hint} it can ({error})"
        ) from error
    found = classes.shape[0] - 1
    place = xp.searchsorted(classes, ids)
    if active is not None:  # a class that is not among them: with what stands behind the last
        same = xp.take(classes, place) == ids
        place = xp.where(same, place, xp.full_like(place, found))
    values = (segment_sum_fn or partial(segment_sum, xp))(place, rows, found + 1)[:found, ...]
    return SparseGradient(classes[:found], values, shape, axis)
