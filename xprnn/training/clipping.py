"""Gradient clipping by value and by global norm, for dense and sparse gradients."""

from math import sqrt
from typing import Any

from xprnn.arrays.namespace import Array, InputError, Namespace, Params, check_dicts, is_numpy, resolve_namespace
from xprnn.arrays.sparse_gradient import SparseGradient, stored_values
from xprnn.training.reductions import sum_of_squares

__all__ = ["clip_by_global_norm", "clip_by_value"]


def clip_by_value(grads: Params, limit: float) -> Params:
    """Clip every entry of every gradient to [-limit, limit], as the article does.

    Args:
        grads: dict of gradients, arrays or SparseGradients. A SparseGradient stays sparse.
        limit: > 0.

    Returns:
        A dict with the same keys and the clipped gradients.

    Raises:
        InputError: limit is not positive, or grads is not a dict of arrays.

    >>> import numpy as np
    >>> clip_by_value({"w": np.asarray([-3.0, 0.5])}, 1.0)["w"]
    array([-1. ,  0.5])
    """
    if not limit > 0:
        raise InputError(f"clip_by_value: limit must be > 0, found {limit!r}")
    limit = float(limit)
    check_dicts("clip_by_value", grads=grads)
    clipped: Params = {}
    for name, grad in grads.items():
        values = stored_values(grad)
        xp = resolve_namespace("clip_by_value", {name: values})
        clipped[name] = _with_values(grad, xp.minimum(xp.maximum(values, -limit), limit))
    return clipped


def clip_by_global_norm(grads: Params, max_norm: float) -> tuple[Params, Array]:
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)), where norm is the 2-norm of all their entries.

    The 1e-6 is that of torch.nn.utils.clip_grad_norm_. No value is copied to the host. Source: Pascanu et al.,
    "On the difficulty of training recurrent neural networks", arXiv:1211.5063.

    Args:
        grads: dict of gradients, arrays or SparseGradients. A SparseGradient stays sparse.
        max_norm: > 0.

    Returns:
        The scaled gradients, and the norm before scaling (a 0-d array).

    Raises:
        InputError: max_norm is not positive, or grads is empty or not a dict of arrays of one library and dtype.

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
    arrays = {name: stored_values(grad) for name, grad in grads.items()}
    xp = resolve_namespace("clip_by_global_norm", arrays)
    norm, scale = (_numpy_norm_and_scale if is_numpy(xp) else _norm_and_scale)(xp, [*arrays.values()], float(max_norm))
    return {name: grad * scale for name, grad in grads.items()}, norm


def _norm_and_scale(xp: Namespace, arrays: list[Array], max_norm: float) -> tuple[Array, Array]:
    """Return the 2-norm of all entries and min(1, max_norm / (norm + 1e-6)), as 0-d arrays."""
    # The dot product of each row with itself needs no temporary array of squares.
    squares = [xp.sum(xp.vecdot(a, a) if a.ndim else a * a, dtype=a.dtype) for a in arrays]
    norm = xp.sqrt(xp.sum(xp.stack(squares), dtype=squares[0].dtype))
    return norm, xp.minimum(max_norm / (norm + 1e-6), xp.ones_like(norm))


def _numpy_norm_and_scale(xp: Namespace, arrays: list[Array], max_norm: float) -> tuple[Array, Array]:
    """Compute `_norm_and_scale` on NumPy arrays: one pass over each array, and the scalars as Python floats."""
    norm, dtype = sqrt(sum(map(sum_of_squares, arrays))), arrays[0].dtype.type
    scale = max_norm / (norm + 1e-6)
    return dtype(norm), dtype(1.0 if scale > 1.0 else scale)  # noqa: FURB136 - min would lose NaN


def _with_values(grad: Any, values: Array) -> Any:
    """A gradient of the same kind as `grad` with other stored values."""
    return SparseGradient(grad.indices, values, grad.shape, grad.axis) if isinstance(grad, SparseGradient) else values
