"""The linear map y = x W' + b and its adjoint, for feature vectors and for class numbers.

All leading axes of x (time, batch) are flattened, so that a sequence takes one matrix product. Integer x stands for
one-hot vectors: y is then a look-up of columns of W, the adjoint is a segment sum, and no one-hot matrix is created.
"""

from functools import partial

import numpy as np

from xprnn.arrays.namespace import Array, Namespace, as_index, device_of, is_integer, is_numpy
from xprnn.arrays.segment_sum import segment_sum
from xprnn.arrays.sparse_gradient import SegmentSum, SparseGradient, sparse_lookup_gradient

__all__ = ["flatten_leading", "gather_columns", "gather_is_cheaper", "linear", "linear_backward", "lookup_backward"]


def flatten_leading(xp: Namespace, a: Array) -> Array:
    """Reshape (..., K) to (M, K), where M is the product of the leading axes and may be 0."""
    m = 1
    for n in a.shape[:-1]:
        m *= n
    return xp.reshape(a, (m, a.shape[-1]))


def linear(xp: Namespace, x: Array, w: Array, b: Array | None) -> Array:
    """Return y = x W' + b.

    Args:
        xp: the namespace of the arrays.
        x: (..., D) floats, or (...) integers in 0..D-1 that stand for one-hot vectors.
        w: (K, D).
        b: (K,), or None for no bias.

    Returns:
        (..., K).
    """
    if is_integer(xp, x):
        m = 1
        for n in x.shape:
            m *= n
        y, leading = gather_columns(xp, w, xp.reshape(x, (m,))), x.shape
    else:
        y, leading = xp.matmul(flatten_leading(xp, x), xp.permute_dims(w, (1, 0))), x.shape[:-1]
    if b is not None:
        y = y + b
    return xp.reshape(y, (*leading, w.shape[0]))


def gather_columns(xp: Namespace, w: Array, ids: Array) -> Array:
    """Return columns of a table as rows: out[m] = w[:, ids[m]].

    Args:
        xp: the namespace of the arrays.
        w: (K, V).
        ids: (M,) integers in 0..V-1.

    Returns:
        (M, K); in NumPy a C-contiguous copy.

    >>> gather_columns(np, np.asarray([[1, 2, 3], [4, 5, 6]]), np.asarray([2, 0]))
    array([[3, 6],
           [1, 4]])
    """
    if not is_numpy(xp):
        return xp.permute_dims(xp.take(w, as_index(xp, ids), axis=1), (1, 0))
    if gather_is_cheaper(w, ids):
        return np.ascontiguousarray(w.take(ids, axis=1).T)
    # If w is Fortran-contiguous, as `init` creates wide weights, its transpose is not copied here.
    return np.ascontiguousarray(w.T).take(ids, axis=0)


def gather_is_cheaper(w: Array, ids: Array) -> bool:
    """Return True if gathering the columns of a NumPy table is cheaper than transposing the whole table."""
    # In C order, gathering one strided column costs as much as five to ten columns of a whole transpose.
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
    """Adjoint of `linear`: dx = dy W, dW = dy' x, db = sum of dy over the leading axes.

    Args:
        xp: the namespace of the arrays.
        dy: (..., K) the cotangent of y.
        x: (..., D) floats or (...) integers, the input of `linear`.
        w: (K, D).
        need_dx: if False, dx is not computed.
        sparse: for integer x: return dW as a SparseGradient.
        active: for integer x: boolean, as in `lookup_backward`.

    Returns:
        dx like x (None for integer x or without `need_dx`), dW like w, db (K,).
    """
    dy2 = flatten_leading(xp, dy)
    # The column sums as a product with ones: BLAS computes them at memory bandwidth.
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
    """Adjoint of `gather_columns`: the gradient of the table whose columns were looked up.

    Args:
        xp: the namespace of the arrays.
        ids: (M,) integers in 0..V-1, the columns that were looked up.
        rows: (M, K) the cotangent of each looked-up column.
        count: number of columns of the table, V.
        sparse: return only the columns that occur, as a SparseGradient.
        active: booleans with M entries, of any shape; False excludes an id, see `sparse_lookup_gradient`. None: all
            are active. Used only with `sparse`.
        segment_sum_fn: ids, rows, count -> (count, K); None: `xprnn.arrays.segment_sum.segment_sum`.

    Returns:
        (K, V), or a SparseGradient of that shape with axis 1.
    """
    segment_sum_fn = segment_sum_fn or partial(segment_sum, xp)
    if not sparse:
        return xp.permute_dims(segment_sum_fn(ids, rows, count), (1, 0))
    active = None if active is None else xp.reshape(active, (rows.shape[0],))
    return sparse_lookup_gradient(
        xp, ids, rows, (rows.shape[1], count), 1, active=active, segment_sum_fn=segment_sum_fn
    )


def zeros(xp: Namespace, shape: tuple[int, ...], like: Array) -> Array:
    """Return zeros of the dtype and device of `like`."""
    return xp.zeros(shape, dtype=like.dtype, device=device_of(like))
