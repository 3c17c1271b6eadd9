"""y = x W' + b over whole sequences, and its adjoint: one matrix product each, however many steps there are.

Integer x of shape (T, N) stands for one-hot vectors: x W' is then a look-up of W's columns and its adjoint a
scatter-add, and no one-hot matrix exists.
"""

from functools import partial

import numpy as np

from xprnn.arrays.namespace import Array, Namespace, as_index, device_of, is_integer, is_numpy
from xprnn.arrays.segment_sum import segment_sum
from xprnn.arrays.sparse_gradient import SegmentSum, SparseGradient, sparse_lookup_gradient

__all__ = ["flatten_leading", "gather_columns", "gather_is_cheaper", "linear", "linear_backward", "lookup_backward"]


def flatten_leading(xp: Namespace, a: Array) -> Array:
    """(..., K) -> (M, K), M the product of the leading axes, which may be 0."""
    m = 1
    for n in a.shape[:-1]:
        m *= n
    return xp.reshape(a, (m, a.shape[-1]))


def linear(xp: Namespace, x: Array, w: Array, b: Array | None) -> Array:
    """x (..., D) or integers (...), w (K, D), b (K,) or None -> (..., K)."""
    if is_integer(xp, x):
        m = 1
        for n in x.shape:
            m *= n
        y, lead = gather_columns(xp, w, xp.reshape(x, (m,))), x.shape
    else:
        y, lead = xp.matmul(flatten_leading(xp, x), xp.permute_dims(w, (1, 0))), x.shape[:-1]
    if b is not None:
        y = y + b
    return xp.reshape(y, (*lead, w.shape[0]))


def gather_columns(xp: Namespace, w: Array, ids: Array) -> Array:
    """The columns of w (K, V) with these numbers (M,), as rows (M, K).

    >>> gather_columns(np, np.asarray([[1, 2, 3], [4, 5, 6]]), np.asarray([2, 0]))
    array([[3, 6],
           [1, 4]])
    """
    if not is_numpy(xp):
        return xp.permute_dims(xp.take(w, as_index(xp, ids), axis=1), (1, 0))
    if gather_is_cheaper(w, ids):
        return np.ascontiguousarray(w.take(ids, axis=1).T)
    # Where a class lies after the other, as `init` lays wide weights, its row is simply there.
    return np.ascontiguousarray(w.T).take(ids, axis=0)


def gather_is_cheaper(w: Array, ids: Array) -> bool:
    """Whether to turn the columns that are found, and not all of a NumPy table that lies in C order."""
    # A column of such a table is far apart in memory: to turn one costs as much as to turn five to ten in line.
    return not w.flags.f_contiguous and 8 * ids.size < w.shape[1]


def linear_backward(
    xp: Namespace,
    dy: Array,
    x: Array,
    w: Array,
    *,
    need_dx: bool = True,
    sparse: bool = False,
    active: Array | None = None,
) -> tuple[Array | None, Array | SparseGradient, Array]:
    """The adjoint of `linear`: dy (..., K) -> dx like x (None for integers), dw like w, db (K,).

    Where x is integer, `sparse` and `active` are those of `lookup_backward`.
    """
    dy2 = flatten_leading(xp, dy)
    # A sum down the rows as a product: the matrix libraries do it at the speed of memory.
    db = xp.matmul(xp.ones((1, dy2.shape[0]), dtype=dy.dtype, device=device_of(dy)), dy2)[0, :]
    if is_integer(xp, x):
        ids = as_index(xp, xp.reshape(x, (dy2.shape[0],)))
        return None, lookup_backward(xp, ids, dy2, w.shape[1], sparse=sparse, active=active), db
    dw = xp.matmul(xp.permute_dims(dy2, (1, 0)), flatten_leading(xp, x))
    dx = xp.reshape(xp.matmul(dy2, w), x.shape) if need_dx else None
    return dx, dw, db


def lookup_backward(
    xp: Namespace,
    ids: Array,
    rows: Array,
    count: int,
    *,
    sparse: bool = False,
    active: Array | None = None,
    segment_sum_fn: SegmentSum | None = None,
) -> Array | SparseGradient:
    """The adjoint of `columns`: the gradient of a table (K, V) of which columns were looked up.

    Args:
        xp: the namespace.
        ids: (M,) their numbers.
        rows: (M, K) the adjoint of each.
        count: V.
        sparse: whether only the classes that occur are wanted, as a SparseGradient.
        active: which of `ids` occur (any shape with M entries), see sparse.occurring; None: all.
        total: how rows are summed by number: ids, rows, count -> (count, K).
    """
    segment_sum_fn = segment_sum_fn or partial(segment_sum, xp)
    if not sparse:
        return xp.permute_dims(segment_sum_fn(ids, rows, count), (1, 0))
    active = None if active is None else xp.reshape(active, (rows.shape[0],))
    return sparse_lookup_gradient(
        xp, ids, rows, (rows.shape[1], count), 1, active=active, segment_sum_fn=segment_sum_fn
    )


def zeros(xp: Namespace, shape: tuple[int, ...], like: Array) -> Array:
    """Zeros of `like`'s dtype and device."""
    return xp.zeros(shape, dtype=like.dtype, device=device_of(like))
