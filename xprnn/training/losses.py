"""Softmax, cross-entropy and squared error: each value beside its gradient."""

from typing import Any

from xprnn.arrays.linear import zeros
from xprnn.arrays.namespace import (
    Array,
    InputError,
    Namespace,
    as_index,
    check_index_bounds,
    check_shape,
    device_of,
    is_integer,
    is_numpy,
    resolve_namespace,
)

__all__ = ["cross_entropy", "mse", "softmax"]


def softmax(x: Array, axis: int = 0) -> Array:
    """Softmax along one axis: exp(x - max) / sum exp(x - max), the maximum taken along that axis.

    The shift is each column's own. With the maximum of the whole array, a column lying far below another (104 in
    float32) would divide 0 by 0.

    Args:
        x: scores of a real floating dtype, any shape with at least one axis.
        axis: the axis that sums to 1; 0, the article's columns, unless given.

    Returns:
        An array like x; along `axis` it is positive and sums to 1.

    Raises:
        InputError: not an array, not floating, or no such axis.

    >>> import numpy as np
    >>> softmax(np.asarray([[0.0, 1e4], [0.0, 0.0]]))
    array([[0.5, 1. ],
           [0.5, 0. ]])
    """
    xp = resolve_namespace("softmax", {"x": x})
    number: Any = axis
    if not isinstance(number, int) or not -x.ndim <= axis < x.ndim:
        raise InputError(
            f"softmax: axis must be in {-x.ndim}..{x.ndim - 1} for x of shape {tuple(x.shape)}, found {axis}"
        )
    return softmax_unchecked(xp, x, axis)


def softmax_unchecked(xp: Namespace, x: Array, axis: int) -> Array:
    """`softmax` without its checks."""
    _, e, total = _shifted_exp(xp, x, axis)
    return e / total


def _shifted_exp(xp: Namespace, x: Array, axis: int) -> tuple[Array, Array, Array]:
    """x shifted by its maximum along the axis, its exponential, and the sum of that."""
    shifted = x - xp.max(x, axis=axis, keepdims=True) if x.shape[axis] else x
    e = xp.exp(shifted)
    return shifted, e, xp.sum(e, axis=axis, keepdims=True, dtype=x.dtype)


def _combine_weights(where: str, xp: Namespace, like: Array, shape: tuple[int, ...], mask: Any, weights: Any) -> Array:
    """mask and weights as one array of `shape`, of like's dtype."""
    w = xp.ones(shape, dtype=like.dtype, device=device_of(like))
    if mask is not None:
        resolve_namespace(where, {}, {"logits": like, "mask": mask})
        check_shape(where, "mask", "(the shape of the targets)", mask, shape)
        if not xp.isdtype(mask.dtype, "bool"):
            raise InputError(f"{where}: mask must be boolean, found {mask.dtype}: pass numbers as weights")
        w = xp.where(mask, w, xp.zeros_like(w))
    if weights is not None:
        resolve_namespace(where, {"prediction": like, "weights": weights})
        check_shape(where, "weights", "(the shape of the targets)", weights, shape)
        w = xp.where(w > 0, weights, xp.zeros_like(w))
    return w


def _reduction_factor(xp: Namespace, where: str, w: Array, reduction: str) -> Array:
    """The factor of a weighted sum: 1, or 1 over the total weight (0 where there is none)."""
    if reduction not in ("mean", "sum"):
        raise InputError(f"{where}: reduction must be 'mean' or 'sum', found {reduction!r}")
    one = xp.ones((), dtype=w.dtype, device=device_of(w))
    if reduction == "sum":
        return one
    total = xp.sum(w, dtype=w.dtype)
    return xp.where(total != 0, one / xp.where(total != 0, total, one), xp.zeros_like(one))


def _check_class_indices(where: str, xp: Namespace, logits: Array, targets: Array, w: Array | None, axis: int) -> Array:
    """Integer targets, checked, with an axis of length 1 for the classes; those of weight 0 may be anything."""
    shape = tuple(s for k, s in enumerate(logits.shape) if k != axis)
    hint = "(logits without the class axis" + (f" {axis}; the article's layout needs axis=0)" if axis else ")")
    check_shape(where, "targets", hint, targets, shape)
    if w is not None:
        targets = xp.where(w != 0, targets, xp.zeros_like(targets))
    check_index_bounds(where, "targets", targets, logits.shape[axis])
    return xp.expand_dims(as_index(xp, targets), axis=axis)


def _from_indices(xp: Namespace, logits: Array, targets: Array, w: Array, axis: int) -> tuple[Array, Array]:
    """The weighted sum of -log p[target], and its gradient w (p - onehot)."""
    shifted, e, total = _shifted_exp(xp, logits, axis)
    picked = xp.take_along_axis(shifted, targets, axis=axis)
    value = xp.sum(w * (xp.log(total) - picked), dtype=logits.dtype)
    gradient = e * (w / total)
    if is_numpy(xp):  # one entry of each column, where the standard can only look at all
        xp.put_along_axis(gradient, targets, xp.take_along_axis(gradient, targets, axis=axis) - w, axis)
        return value, gradient
    v = logits.shape[axis]
    every = xp.arange(v, dtype=targets.dtype, device=device_of(logits))
    hit = targets == xp.reshape(every, tuple(v if k == axis else 1 for k in range(logits.ndim)))
    return value, xp.where(hit, gradient - w, gradient)


def _from_probabilities(xp: Namespace, logits: Array, wanted: Array, w: Array, axis: int) -> tuple[Array, Array]:
    """The weighted sum of -wanted log p, and its gradient w (p sum(wanted) - wanted)."""
    shifted, e, total = _shifted_exp(xp, logits, axis)
    # A class that is not wanted has no share, however small its probability: 0 * -inf would be nan.
    parts = xp.where(wanted != 0, wanted * (shifted - xp.log(total)), xp.zeros_like(e))
    mass = xp.sum(wanted, axis=axis, keepdims=True, dtype=logits.dtype)
    return -xp.sum(w * parts, dtype=logits.dtype), (e * (mass / total) - wanted) * w


def cross_entropy(
    logits: Array,
    targets: Array,
    *,
    mask: Array | None = None,
    weights: Array | None = None,
    axis: int = -1,
    reduction: str = "mean",
) -> tuple[Array, Array]:
    """Cross-entropy of softmax(logits), and its gradient: -sum w log p[target] / sum w, w (p - onehot) / sum w.

    Args:
        logits: (..., V), scores before the softmax; V stands at `axis` (0 for the article's (n_y, m, T_x)).
        targets: integers 0..V-1 of logits' shape without `axis`, or probabilities (one-hot rows) of logits' shape.
        mask: boolean, shape of the integer targets; False leaves that position out, whatever stands there.
        weights: real, same shape; multiplies that position's loss.
        axis: where the classes are.
        reduction: "mean" divides by the total weight (0 if that is 0), "sum" doesn't.

    Returns:
        value, a 0-d array in nats; gradient, like logits.

    Raises:
        InputError: shapes, dtypes or libraries that don't fit.

    >>> import numpy as np
    >>> value, dlogits = cross_entropy(np.zeros((2, 4)), np.asarray([1, 3]))
    >>> round(float(value), 6), dlogits[0]
    (1.386294, array([ 0.125, -0.375,  0.125,  0.125]))
    """
    where = "cross_entropy"
    xp = resolve_namespace(where, {"logits": logits}, {"targets": targets})
    if logits.ndim == 0 or not -logits.ndim <= axis < logits.ndim:
        raise InputError(f"{where}: logits has shape {tuple(logits.shape)}, which has no axis {axis}")
    axis = axis % logits.ndim
    shape = tuple(s for k, s in enumerate(logits.shape) if k != axis)
    w = _combine_weights(where, xp, logits, shape, mask, weights)
    some = mask is not None or weights is not None
    if some:  # padding may hold anything, and 0 * nan is nan
        logits = xp.where(xp.expand_dims(w != 0, axis=axis), logits, zeros(xp, (), logits))
    scaled = xp.expand_dims(w * _reduction_factor(xp, where, w, reduction), axis=axis)
    if is_integer(xp, targets):
        classes = _check_class_indices(where, xp, logits, targets, w if some else None, axis)
        return _from_indices(xp, logits, classes, scaled, axis)
    if xp.isdtype(targets.dtype, "bool"):
        dtype = str(logits.dtype).rpartition(".")[2]
        raise InputError(f"{where}: targets must be integer classes or {dtype} probabilities, found bool: convert them")
    resolve_namespace(where, {"logits": logits, "targets": targets})
    check_shape(where, "targets", "(one-hot: the shape of logits)", targets, tuple(logits.shape))
    return _from_probabilities(xp, logits, targets, scaled, axis)


def mse(
    prediction: Array,
    target: Array,
    *,
    mask: Array | None = None,
    weights: Array | None = None,
    reduction: str = "mean",
) -> tuple[Array, Array]:
    """Mean squared error and its gradient: sum w (y - t)^2 / sum w;  dy = 2 w (y - t) / sum w.

    Args:
        prediction: y, any shape.
        target: t, of the same shape.
        mask: boolean, the same shape or that without the last axis; False leaves that position out.
        weights: real, likewise.
        reduction: "mean" divides by the total weight, "sum" doesn't.

    Returns:
        value, a 0-d array; gradient, like prediction.

    Raises:
        InputError: shapes, dtypes or libraries that don't fit.

    >>> import numpy as np
    >>> mse(np.asarray([1.0, 3.0]), np.asarray([1.0, 1.0]))
    (np.float64(2.0), array([0., 2.]))
    """
    xp = resolve_namespace("mse", {"prediction": prediction, "target": target})
    check_shape("mse", "target", "(the shape of the prediction)", target, tuple(prediction.shape))
    if mask is not None and hasattr(mask, "ndim") and mask.ndim == prediction.ndim - 1:
        mask = xp.broadcast_to(mask[..., None], prediction.shape)
    if weights is not None and hasattr(weights, "ndim") and weights.ndim == prediction.ndim - 1:
        weights = xp.broadcast_to(weights[..., None], prediction.shape)
    w = _combine_weights("mse", xp, prediction, tuple(prediction.shape), mask, weights)
    error = xp.where(w != 0, prediction - target, zeros(xp, (), prediction))
    scaled = w * _reduction_factor(xp, "mse", w, reduction)
    return xp.sum(scaled * error * error, dtype=prediction.dtype), 2 * scaled * error
