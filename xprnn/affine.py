"""y = x W' + b over whole sequences, and its adjoint: one matrix product each, however many steps there are.

Integer x of shape (T, N) stands for one-hot vectors: x W' is then a look-up of W's columns and its adjoint a
scatter-add, and no one-hot matrix exists.
"""

from xprnn.arrays import Array, Namespace, as_index, device_of, is_integer
from xprnn.scatter import sum_rows_by_id

__all__ = ["affine", "affine_back", "flat"]


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
        columns = xp.take(w, as_index(xp, xp.reshape(x, (m,))), axis=1)
        y, lead = xp.permute_dims(columns, (1, 0)), x.shape
    else:
        y, lead = xp.matmul(flat(xp, x), xp.permute_dims(w, (1, 0))), x.shape[:-1]
    if b is not None:
        y = y + b
    return xp.reshape(y, (*lead, w.shape[0]))


def affine_back(
    xp: Namespace, dy: Array, x: Array, w: Array, *, need_dx: bool = True
) -> tuple[Array | None, Array, Array]:
    """The adjoint of `affine`: dy (..., K) -> dx like x (None for integers), dw like w, db (K,)."""
    dy2 = flat(xp, dy)
    # A sum down the rows as a product: the matrix libraries do it at the speed of memory.
    db = xp.matmul(xp.ones((1, dy2.shape[0]), dtype=dy.dtype, device=device_of(dy)), dy2)[0, :]
    if is_integer(xp, x):
        ids = as_index(xp, xp.reshape(x, (dy2.shape[0],)))
        return None, xp.permute_dims(sum_rows_by_id(xp, ids, dy2, w.shape[1]), (1, 0)), db
    dw = xp.matmul(xp.permute_dims(dy2, (1, 0)), flat(xp, x))
    dx = xp.reshape(xp.matmul(dy2, w), x.shape) if need_dx else None
    return dx, dw, db


def zeros(xp: Namespace, shape: tuple[int, ...], like: Array) -> Array:
    """Zeros of `like`'s dtype and device."""
    return xp.zeros(shape, dtype=like.dtype, device=device_of(like))
