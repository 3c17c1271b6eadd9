"""Softmax, cross-entropy and mean squared error. Each loss returns its value and its gradient."""

from math import prod
from typing import Any

import numpy as np

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
from xprnn.kernels.step_plan import DTYPE_BITS
from xprnn.training.compiled import compiled_passes
from xprnn.training.reductions import sum_of_squares

__all__ = ["cross_entropy", "mse", "softmax"]


def softmax(x: Array, axis: int = 0) -> Array:
    """Return softmax along one axis: exp(x - max) / sum(exp(x - max)).

    The maximum is taken per slice along `axis`. The article uses the maximum of the whole array, which gives 0 / 0 for
    a slice that lies far enough below it (104 in float32).

    Args:
        x: scores of a real floating dtype, any shape with at least one axis.
        axis: the axis that sums to 1. The default 0 is the article's layout, one sample per column.

    Returns:
        An array like x, with values >= 0 that sum to 1 along `axis`.

    Raises:
        InputError: x is not an array or not floating, or has no such axis.

    >>> import numpy as np
    >>> softmax(np.asarray([[0.0, 1e4], [0.0, 0.0]]))
    array([[0.5, 1. ],
           [0.5, 0. ]])
    """
    xp = resolve_namespace("softmax", {"x": x})
    axis_value: Any = axis
    if not isinstance(axis_value, int) or not -x.ndim <= axis < x.ndim:
        raise InputError(
            f"softmax: axis must be in {-x.ndim}..{x.ndim - 1} for x of shape {tuple(x.shape)}, found {axis}"
        )
    return softmax_unchecked(xp, x, axis)


def softmax_unchecked(xp: Namespace, x: Array, axis: int) -> Array:
    """Softmax without argument checks."""
    _, e, total = _shifted_exp(xp, x, axis)
    return e / total


def _shifted_exp(xp: Namespace, x: Array, axis: int) -> tuple[Array, Array, Array]:
    """Return x - max(x), its exponential, and the sum of the exponential; maximum and sum are taken along `axis`."""
    shifted = x - xp.max(x, axis=axis, keepdims=True) if x.shape[axis] else x
    e = xp.exp(shifted)
    return shifted, e, xp.sum(e, axis=axis, keepdims=True, dtype=x.dtype)


def _combine_weights(
    where: str, xp: Namespace, like: Array, shape: tuple[int, ...], mask: Any, weights: Any
) -> Array | None:
    """Combine mask and weights into one weight array with this shape and the dtype of `like`; None without both."""
    if mask is None and weights is None:
        return None
    w = None
    if mask is not None:
        resolve_namespace(where, {}, {"logits": like, "mask": mask})
        check_shape(where, "mask", "(the shape of the targets)", mask, shape)
        if not xp.isdtype(mask.dtype, "bool"):
            raise InputError(f"{where}: mask must be boolean, found {mask.dtype}: pass numbers as weights")
        w = xp.astype(mask, like.dtype)
    if weights is not None:
        resolve_namespace(where, {"prediction": like, "weights": weights})
        check_shape(where, "weights", "(the shape of the targets)", weights, shape)
        w = weights if w is None else xp.where(w > 0, weights, xp.zeros_like(w))
    return w


def _check_reduction(where: str, reduction: str) -> None:
    if reduction not in ("mean", "sum"):
        raise InputError(f"{where}: reduction must be 'mean' or 'sum', found {reduction!r}")


def _scale_weights(xp: Namespace, like: Array, count: int, w: Array | None, reduction: str) -> Array:
    """Return w for "sum", w / sum(w) for "mean" (0 if sum(w) is 0).

    For w = None, which stands for `count` ones, this is one number (0-d).
    """
    if w is None:
        factor = 1.0 if reduction == "sum" else 1 / count if count else 0.0
        return xp.asarray(factor, dtype=like.dtype, device=device_of(like))
    if reduction == "sum":
        return w
    one, total = xp.ones((), dtype=w.dtype, device=device_of(w)), xp.sum(w, dtype=w.dtype)
    return w * xp.where(total != 0, one / xp.where(total != 0, total, one), xp.zeros_like(one))


def _target_shape_hint(axis: int) -> str:
    return "(logits without the class axis" + (f" {axis}; the article's layout needs axis=0)" if axis else ")")


def _class_indices(where: str, xp: Namespace, logits: Array, targets: Array, w: Array | None, axis: int) -> Array:
    """Check the range of integer targets and insert a class axis of length 1. Targets of weight 0 are not checked."""
    if w is not None:
        targets = xp.where(w != 0, targets, xp.zeros_like(targets))
    check_index_bounds(where, "targets", targets, logits.shape[axis])
    return xp.expand_dims(as_index(xp, targets), axis=axis)


def _from_indices(xp: Namespace, logits: Array, targets: Array, w: Array, axis: int) -> tuple[Array, Array]:
    """Return the weighted sum of -log p[target], and its gradient w (p - onehot)."""
    shifted, e, total = _shifted_exp(xp, logits, axis)
    target_scores = xp.take_along_axis(shifted, targets, axis=axis)
    value = xp.sum(w * (xp.log(total) - target_scores), dtype=logits.dtype)
    gradient = e * (w / total)
    if is_numpy(xp):
        xp.put_along_axis(gradient, targets, xp.take_along_axis(gradient, targets, axis=axis) - w, axis)
        return value, gradient
    # The Array API standard has no put_along_axis: compare the target with every class instead.
    num_classes = logits.shape[axis]
    class_ids = xp.arange(num_classes, dtype=targets.dtype, device=device_of(logits))
    class_ids = xp.reshape(class_ids, tuple(num_classes if k == axis else 1 for k in range(logits.ndim)))
    return value, xp.where(targets == class_ids, gradient - w, gradient)


def _from_probabilities(xp: Namespace, logits: Array, targets: Array, w: Array, axis: int) -> tuple[Array, Array]:
    """Return the weighted sum of -targets log p, and its gradient w (p sum(targets) - targets)."""
    shifted, e, total = _shifted_exp(xp, logits, axis)
    # Classes of target probability 0 are skipped: log p may be -inf there, and 0 * -inf is nan.
    terms = xp.where(targets != 0, targets * (shifted - xp.log(total)), xp.zeros_like(e))
    target_sum = xp.sum(targets, axis=axis, keepdims=True, dtype=logits.dtype)
    return -xp.sum(w * terms, dtype=logits.dtype), (e * (target_sum / total) - targets) * w


def cross_entropy(
    logits: Array,
    targets: Array,
    *,
    mask: Array | None = None,
    weights: Array | None = None,
    axis: int = -1,
    reduction: str = "mean",
) -> tuple[Array, Array]:
    """Return the cross-entropy of softmax(logits) and its gradient.

    value = -sum(w log p[target]) / sum(w),  dlogits = w (p - onehot(target)) / sum(w),  p = softmax(logits)

    Args:
        logits: scores before the softmax, any shape with V classes along `axis`, for example (T, N, V).
        targets: integers in 0..V-1 with the shape of logits without `axis`, or probabilities (for example one-hot
            rows) with the shape of logits.
        mask: boolean, with the shape of the integer targets. False excludes a position: its logits and its target may
            hold any value, nan included.
        weights: real, with the same shape as the mask. The loss of each position is multiplied by its weight.
        axis: the class axis; 0 for the article's layout (n_y, m, T_x).
        reduction: "mean" divides by the total weight (and gives 0 if that is 0), "sum" does not.

    Returns:
        The value (a 0-d array, nats) and the gradient with respect to logits (the shape of logits).

    Raises:
        InputError: shapes, dtypes or array libraries do not fit, or an integer target is out of range.

    >>> import numpy as np
    >>> value, dlogits = cross_entropy(np.zeros((2, 4)), np.asarray([1, 3]))
    >>> round(float(value), 6), dlogits[0]
    (1.386294, array([ 0.125, -0.375,  0.125,  0.125]))
    """
    where = "cross_entropy"
    xp = resolve_namespace(where, {"logits": logits})
    if targets.__class__ is not np.ndarray or not is_numpy(xp):
        resolve_namespace(where, {"logits": logits}, {"targets": targets})
    if logits.ndim == 0 or not -logits.ndim <= axis < logits.ndim:
        raise InputError(f"{where}: logits has shape {tuple(logits.shape)}, which has no axis {axis}")
    axis = axis % logits.ndim
    shape = (*logits.shape[:axis], *logits.shape[axis + 1 :])
    w = _combine_weights(where, xp, logits, shape, mask, weights)
    _check_reduction(where, reduction)
    scaled = _scale_weights(xp, logits, prod(shape), w, reduction)
    if is_integer(xp, targets):
        check_shape(where, "targets", _target_shape_hint(axis), targets, shape)
        result = _compiled_cross_entropy(xp, logits, targets, scaled, axis)
        if result is not None:
            return result
    if w is not None:  # excluded positions may hold nan, and 0 * nan is nan
        logits = xp.where(xp.expand_dims(w != 0, axis=axis), logits, zeros(xp, (), logits))
        scaled = xp.expand_dims(scaled, axis=axis)
    if is_integer(xp, targets):
        return _from_indices(xp, logits, _class_indices(where, xp, logits, targets, w, axis), scaled, axis)
    if xp.isdtype(targets.dtype, "bool"):
        dtype = str(logits.dtype).rpartition(".")[2]
        raise InputError(f"{where}: targets must be integer classes or {dtype} probabilities, found bool: convert them")
    resolve_namespace(where, {"logits": logits, "targets": targets})
    check_shape(where, "targets", "(one-hot: the shape of logits)", targets, tuple(logits.shape))
    return _from_probabilities(xp, logits, targets, scaled, axis)


def _compiled_cross_entropy(
    xp: Namespace, logits: Array, targets: Array, weights: Array, axis: int
) -> tuple[Array, Array] | None:
    """Compute value and gradient by the compiled pass; None if it does not apply or a target is not a class."""
    if not is_numpy(xp) or axis != logits.ndim - 1 or not logits.shape[axis]:
        return None
    passes = compiled_passes(logits.dtype)
    kernel = passes.cross_entropy_kernel(logits.dtype.itemsize) if passes is not None else None
    if passes is None or kernel is None:
        return None
    result: tuple[Array, Array] | None = passes.run_cross_entropy(kernel, logits, targets, weights)
    return result


def mse(
    prediction: Array,
    target: Array,
    *,
    mask: Array | None = None,
    weights: Array | None = None,
    reduction: str = "mean",
) -> tuple[Array, Array]:
    """Return the mean squared error and its gradient.

    value = sum(w (y - t)^2) / sum(w),  dy = 2 w (y - t) / sum(w)

    Args:
        prediction: y, any shape.
        target: t, with the same shape.
        mask: boolean, with the same shape or with that without the last axis. False excludes a position.
        weights: real, with the same shape or with that without the last axis.
        reduction: "mean" divides by the total weight (and gives 0 if that is 0), "sum" does not.

    Returns:
        The value (a 0-d array) and the gradient with respect to prediction (the shape of prediction).

    Raises:
        InputError: shapes, dtypes or array libraries do not fit.

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
    _check_reduction("mse", reduction)
    scaled = _scale_weights(xp, prediction, prod(prediction.shape), w, reduction)
    error = prediction - target
    if w is None and error.__class__ is np.ndarray and error.dtype in DTYPE_BITS:
        factor = scaled[()]
        return factor * error.dtype.type(sum_of_squares(error)), np.multiply(error, 2 * factor, out=error)
    if w is not None:
        error = xp.where(w != 0, error, zeros(xp, (), prediction))
    return xp.sum(scaled * error * error, dtype=prediction.dtype), 2 * scaled * error
