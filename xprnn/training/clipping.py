"""Gradients kept within bounds: each entry, or all of them together by their norm. Sparse ones stay sparse."""

from typing import Any

from xprnn.arrays.namespace import Array, InputError, Params, check_dicts, resolve_namespace
from xprnn.arrays.sparse_gradient import SparseGradient, stored_values

__all__ = ["clip_by_global_norm", "clip_by_value"]


def clip_by_value(grads: Params, limit: float) -> Params:
    """Each entry bounded to [-limit, limit], the article's clipping.

    >>> import numpy as np
    >>> clip_by_value({"w": np.asarray([-3.0, 0.5])}, 1.0)["w"]
    array([-1. ,  0.5])
    """
    if not limit > 0:
        raise InputError(f"clip_by_value: limit must be > 0, found {limit!r}")
    limit = float(limit)
    check_dicts("clip_by_value", grads=grads)
    out: Params = {}
    for k, g in grads.items():
        a = stored_values(g)
        xp = resolve_namespace("clip_by_value", {k: a})
        out[k] = _with_values(g, xp.minimum(xp.maximum(a, -limit), limit))
    return out


def clip_by_global_norm(grads: Params, max_norm: float) -> tuple[Params, Array]:
    """All gradients scaled by min(1, max_norm / (norm + 1e-6)), norm over all of them (Pascanu et al. 2012).

    The 1e-6 is torch's (clip_grad_norm_). Nothing is read on the host.

    Args:
        grads: the gradients.
        max_norm: > 0.

    Returns:
        the scaled gradients, and the norm before scaling, a 0-d array.

    >>> import numpy as np
    >>> grads, norm = clip_by_global_norm({"w": np.asarray([3.0, 4.0])}, 1.0)
    >>> float(norm), grads["w"].round(3)
    (5.0, array([0.6, 0.8]))
    """
    if not max_norm > 0:
        raise InputError(f"clip_by_global_norm: max_norm must be > 0, found {max_norm!r}")
    check_dicts("clip_by_global_norm", grads=grads)
    if not grads:
        raise InputError("clip_by_global_norm: grads must hold at least one array, found none")
    arrays = {k: stored_values(g) for k, g in grads.items()}
    xp = resolve_namespace("clip_by_global_norm", arrays)
    # A row's own product with itself, then the sum: no array of squares is made.
    squares = [xp.sum(xp.vecdot(a, a) if a.ndim else a * a, dtype=a.dtype) for a in arrays.values()]
    norm = xp.sqrt(xp.sum(xp.stack(squares), dtype=squares[0].dtype))
    scale = xp.minimum(float(max_norm) / (norm + 1e-6), xp.ones_like(norm))
    return {k: g * scale for k, g in grads.items()}, norm


def _with_values(g: Any, entries: Array) -> Any:
    return SparseGradient(g.indices, entries, g.shape, g.axis) if isinstance(g, SparseGradient) else entries
