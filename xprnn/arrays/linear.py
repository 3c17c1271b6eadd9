"""y = x W' + b over whole sequences, and its adjoint: one matrix product each, however many steps there are.

Integer x of shape (T, N) stands for one-hot vectors: x W' is then a look-up of W's columns and its adjoint a
scatter-add, and no one-hot matrix exists.
"""

from functools import partial

import numpy as np

from xprnn.arrays.namespace import Array, Namespace, as_index, device_of, is_integer, is_numpy
from xprnn.arrays.segment_sum import sum_rows_by_id
from xprnn.arrays.sparse_gradient import SparseGradient, Total, occurring

__all__ = ["affine", "affine_back", "columns", "few", "flat", "table_back"]


def flat(xp: Namespace, a: Array) -> Array:
    """(..., K) -> (M, K), M the product of the leading axes, which may be 0."""
    m = 1
    for n in a.shape[:-1]:
        m *= n
    return xp.reshape(a, (m, a.shape[-1]))


def affine(xp: Namespace, x: Array, w: Array, b: Array | None) -> Array:
    """x (..., D) or integers (...), w (K, D), b (K,) or None -> (..., K)."""
    if is_integer(xp, x):
        m = 1
        for n in x.shape:
            m *= n
        y, lead = columns(xp, w, xp.reshape(x, (m,))), x.shape
    else:
        y, lead = xp.matmul(flat(xp, x), xp.permute_dims(w, (1, 0))), x.shape[:-1]
    if b is not None:
        y = y + b
    return xp.reshape(y, (*lead, w.shape[0]))


def columns(xp: Namespace, w: Array, ids: Array) -> Array:
    """The columns of w (K, V) with these numbers (M,), as rows (M, K).

    >>> columns(np, np.asarray([[1, 2, 3], [4, 5, 6]]), np.asarray([2, 0]))
    array([[3, 6],
           [1, 4]])
    """
    if not is_numpy(xp):
        return xp.permute_dims(xp.take(w, as_index(xp, ids), axis=1), (1, 0))
    if few(w, ids):
        return np.ascontiguousarray(w.take(ids, axis=1).T)
    # Where a class lies after the other, as `init` lays wide weights, its row is simply there.
    return np.ascontiguousarray(w.T).take(ids, axis=0)


def few(w: Array, ids: Array) -> bool:
    """Whether to turn the columns that are found, and not all of a NumPy table that lies in C order."""
    # A column of such a table is far apart in memory: to turn one costs as much as to turn five to ten in line.
    return not w.flags.f_contiguous and 8 * ids.size < w.shape[1]


def affine_back(
    xp: Namespace,
    dy: Array,
    x: Array,
    w: Array,
    *,
    need_dx: bool = True,
    sparse: bool = False,
    active: Array | None = None,
) -> tuple[Array | None, Array | SparseGradient, Array]:
    """The adjoint of `affine`: dy (..., K) -> dx like x (None for integers), dw like w, db (K,).

    Where x is integer, `sparse` and `active` are those of `table_back`.
    """
    dy2 = flat(xp, dy)
    # A sum down the rows as a product: the matrix libraries do it at the speed of memory.
    db = xp.matmul(xp.ones((1, dy2.shape[0]), dtype=dy.dtype, device=device_of(dy)), dy2)[0, :]
    if is_integer(xp, x):
        ids = as_index(xp, xp.reshape(x, (dy2.shape[0],)))
        return None, table_back(xp, ids, dy2, w.shape[1], sparse=sparse, active=active), db
    dw = xp.matmul(xp.permute_dims(dy2, (1, 0)), flat(xp, x))
    dx = xp.reshape(xp.matmul(dy2, w), x.shape) if need_dx else None
    return dx, dw, db


def table_back(
    xp: Namespace,
    ids: Array,
    rows: Array,
    count: int,
    *,
    sparse: bool = False,
    active: Array | None = None,
    total: Total | None = None,
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
    total = total or partial(sum_rows_by_id, xp)
    if not sparse:
        return xp.permute_dims(total(ids, rows, count), (1, 0))
    active = None if active is None else xp.reshape(active, (rows.shape[0],))
    return occurring(xp, ids, rows, (rows.shape[1], count), 1, active=active, total=total)


def zeros(xp: Namespace, shape: tuple[int, ...], like: Array) -> Array:
    """Zeros of `like`'s dtype and device."""
    return xp.zeros(shape, dtype=like.dtype, device=device_of(like))
