"""Softmax, cross-entropy and mean squared error against NumPy loops, torch and central differences."""

from __future__ import annotations

import numpy as np
import pytest
from support import oracles

import xprnn
from xprnn import cross_entropy, mse, softmax

float64_only = pytest.mark.not_on("strict:no_float64", reason="central differences need float64")
SHAPE = (4, 3, 5)  # any of these axes may be the class axis


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_softmax_along_every_axis(xp, dtype, rng, axis):
    x = rng.normal(size=SHAPE).astype(dtype).astype("float64")
    x_xp = xp.asarray(x, dtype)
    y = softmax(x_xp, axis=axis)
    xp.assert_close(y, oracles.softmax(x, axis))
    xp.assert_like(y, x_xp)


def test_softmax_shifts_each_column_by_its_own_maximum(xp, dtype):
    """With the maximum of the whole array, as in the article, the lower columns would be 0 / 0."""
    x = np.asarray([[0.0, 1e4, -1e4, 3e4], [1.0, 1e4, -1e4 + 2, -3e4]])
    y = xp.to_numpy(softmax(xp.asarray(x, dtype)))
    np.testing.assert_allclose(y.sum(axis=0), 1.0, rtol=xp.rtol(dtype, 4))
    e = np.exp([1.0, 2.0])
    np.testing.assert_allclose(y[1], [e[0] / (1 + e[0]), 0.5, e[1] / (1 + e[1]), 0.0], rtol=xp.rtol(dtype, 16))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 4), (7,)])
def test_softmax_of_empty_and_one_dimensional_arrays(xp, shape, rng):
    x = rng.normal(size=shape)
    xp.assert_close(softmax(xp.asarray(x)), oracles.softmax(x))


def test_softmax_of_minus_infinity_is_zero(xp, dtype):
    """A score of -inf gives probability 0, not nan."""
    y = softmax(xp.asarray(np.asarray([[-np.inf], [1.0], [1.0]]), dtype))
    xp.assert_close(y, np.asarray([[0.0], [0.5], [0.5]]))


def make_targets(rng, shape, axis, kind):
    """Integer classes, their one-hot form, probabilities or counts, for logits of `shape`."""
    lead = tuple(s for k, s in enumerate(shape) if k != axis % len(shape))
    ids = rng.integers(shape[axis], size=lead)
    if kind == "integers":
        return ids
    if kind == "one-hot":
        return np.moveaxis(np.eye(shape[axis])[ids], -1, axis)
    mixed = rng.uniform(0.1, 1.0, size=shape)
    if kind == "counts":  # need not sum to 1: the gradient multiplies p by their sum
        return 3 * mixed
    return mixed / mixed.sum(axis=axis, keepdims=True)


def reference_cross_entropy(z, targets, axis, mask, weights, reduction):
    """Value and gradient of cross-entropy, computed in a loop over positions."""
    z = np.moveaxis(z, axis, -1)
    probabilities = np.eye(z.shape[-1])[targets] if targets.dtype.kind == "i" else np.moveaxis(targets, axis, -1)
    value, grad, total = 0.0, np.zeros_like(z), 0.0
    for position in np.ndindex(z.shape[:-1]):
        w = (1.0 if weights is None else weights[position]) * (mask is None or mask[position])
        logp = z[position] - z[position].max() - np.log(np.exp(z[position] - z[position].max()).sum())
        value -= w * probabilities[position] @ logp
        grad[position] = w * (np.exp(logp) * probabilities[position].sum() - probabilities[position])
        total += w
    scale = (1 / total if total else 0.0) if reduction == "mean" else 1.0
    return value * scale, np.moveaxis(grad * scale, -1, axis)


@pytest.mark.parametrize("kind", ["integers", "one-hot", "probabilities", "counts"])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("weighting", ["", "mask", "weights", "mask weights"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_equals_the_loop(xp, rng, kind, axis, weighting, reduction):
    dtype = xp.float_dtypes[0]
    z = (3 * rng.normal(size=SHAPE)).astype(dtype).astype("float64")
    targets = make_targets(rng, SHAPE, axis, kind)
    lead = tuple(s for k, s in enumerate(SHAPE) if k != axis % 3)
    mask = rng.random(lead) < 0.6 if "mask" in weighting else None
    weights = rng.uniform(0.2, 2.0, lead).astype(dtype) if "weights" in weighting else None
    logits = xp.asarray(z)
    options = {
        "mask": None if mask is None else xp.asarray(mask),
        "weights": None if weights is None else xp.asarray(weights),
    }
    targets_xp = xp.asarray(targets, None if kind == "integers" else dtype)
    value, dz = cross_entropy(logits, targets_xp, axis=axis, reduction=reduction, **options)
    expected = reference_cross_entropy(z, targets, axis, mask, weights, reduction)
    xp.assert_close(value, np.asarray(expected[0]), condition=30)
    xp.assert_close(dz, expected[1], condition=30)
    xp.assert_like((value, dz), logits)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("kind", ["integers", "probabilities", "counts"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_equals_torch(xp, rng, kind, reduction):
    import torch

    dtype = xp.float_dtypes[0]
    z = (3 * rng.normal(size=(6, 5))).astype(dtype)
    targets = make_targets(rng, (6, 5), -1, kind)
    targets = targets if kind == "integers" else targets.astype(dtype)
    leaf = torch.tensor(z, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(leaf, torch.tensor(targets), reduction=reduction)
    loss.backward()
    value, dz = cross_entropy(xp.asarray(z), xp.asarray(targets), reduction=reduction)
    xp.assert_close(value, loss.detach().numpy(), condition=30)
    xp.assert_close(dz, leaf.grad.numpy(), condition=30)


@float64_only
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("axis", [0, -1])
def test_cross_entropy_gradient_equals_central_differences(xp, rng, axis, reduction):
    z, targets = rng.normal(size=(4, 3)), make_targets(rng, (4, 3), axis, "integers")
    weights = xp.asarray(rng.uniform(0.2, 2.0, targets.shape))
    ids = xp.asarray(targets)

    def forward(z):
        value, dz = cross_entropy(z, ids, axis=axis, weights=weights, reduction=reduction)
        return value, dz

    worst = oracles.check_gradients_on(xp, forward, lambda dz, u: u * dz, [xp.asarray(z)], names=["logits"])
    assert worst["logits"] < 1e-8


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_loss_of_fully_masked_input_is_zero(xp, dtype, rng, loss):
    y = xp.asarray(rng.normal(size=(4, 3)), dtype)
    target = xp.asarray([0, 1, 2, 0]) if loss == "cross_entropy" else xp.asarray(rng.normal(size=(4, 3)), dtype)
    value, dy = getattr(xprnn, loss)(y, target, mask=xp.asarray(np.zeros(4, bool)))
    xp.assert_close((value, dy), (np.asarray(0.0), np.zeros((4, 3))), condition=0)


@pytest.mark.parametrize("weighting", ["mask", "weights"])
@pytest.mark.parametrize("kind", ["integers", "one-hot"])
def test_masked_logits_and_targets_do_not_reach_the_loss(xp, rng, weighting, kind):
    """Masked positions may hold nan logits and the class -1; neither makes the loss nan or raises."""
    dtype = xp.float_dtypes[0]
    z, ids = rng.normal(size=(4, 3)), np.asarray([0, 2, 1, 2])
    keep = np.asarray([True, False, True, False])

    def loss(z, targets):
        options = {"mask": xp.asarray(keep)} if weighting == "mask" else {"weights": xp.asarray(keep, dtype)}
        return cross_entropy(
            xp.asarray(z, dtype), xp.asarray(targets, None if kind == "integers" else dtype), **options
        )

    targets = ids if kind == "integers" else np.eye(3)[ids]
    expected = loss(z, targets)
    z[1], z[3] = np.nan, np.inf
    if kind == "integers":
        targets[1] = -1
    xp.assert_close(loss(z, targets), tuple(xp.to_numpy(e) for e in expected), condition=0)


def test_masked_values_do_not_reach_the_squared_error(xp, rng):
    dtype = xp.float_dtypes[0]
    y, t = rng.normal(size=(3, 2)), rng.normal(size=(3, 2))
    mask = xp.asarray([True, False, True])
    expected = mse(xp.asarray(y), xp.asarray(t), mask=mask)
    y[1], t[1] = np.inf, 3.0
    got = mse(xp.asarray(y, dtype), xp.asarray(t, dtype), mask=mask)
    xp.assert_close(got, tuple(xp.to_numpy(e) for e in expected), condition=0)


def test_loss_of_certain_right_predictions_is_zero(xp, dtype):
    """The term 0 * log 0 of a class with target probability 0 must be 0, not nan."""
    z = xp.asarray(np.asarray([[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4]]), dtype)
    value, dz = cross_entropy(z, xp.asarray([0, 2]))
    xp.assert_close((value, dz), (np.asarray(0.0), np.zeros((2, 3))), condition=0)
    one_hot = xp.asarray(np.eye(3)[[0, 2]], dtype)
    xp.assert_close(cross_entropy(z, one_hot), (np.asarray(0.0), np.zeros((2, 3))), condition=0)


@pytest.mark.parametrize("shape", [(0, 3), (0, 2, 3)])
def test_cross_entropy_of_no_positions_is_zero(xp, shape):
    z = xp.asarray(np.zeros(shape))
    value, dz = cross_entropy(z, xp.asarray(np.zeros(shape[:-1], "int64")))
    xp.assert_close((value, dz), (np.asarray(0.0), np.zeros(shape)), condition=0)


@pytest.mark.parametrize("weighting", ["", "mask", "weights", "row mask", "row weights"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mse_equals_numpy(xp, rng, weighting, reduction):
    dtype = xp.float_dtypes[0]
    y, t = (rng.normal(size=(4, 3)).astype(dtype).astype("float64") for _ in range(2))
    lead = (4,) if "row" in weighting else (4, 3)
    w = np.ones(lead)
    options = {}
    if "mask" in weighting:
        w = (rng.random(lead) < 0.6).astype("float64")
        options["mask"] = xp.asarray(w > 0)
    elif weighting:
        w = rng.uniform(0.2, 2.0, lead).astype(dtype).astype("float64")
        options["weights"] = xp.asarray(w)
    value, dy = mse(xp.asarray(y), xp.asarray(t), reduction=reduction, **options)
    full = np.broadcast_to(w[:, None] if "row" in weighting else w, y.shape)
    scale = 1 / full.sum() if reduction == "mean" else 1.0
    expected = (np.asarray(scale * np.sum(full * (y - t) ** 2)), scale * 2 * full * (y - t))
    xp.assert_close((value, dy), expected, condition=30)
    xp.assert_like((value, dy), xp.asarray(y))


@pytest.mark.needs("torch")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mse_equals_torch(xp, rng, reduction):
    import torch

    y, t = (rng.normal(size=(4, 3)).astype(xp.float_dtypes[0]) for _ in range(2))
    leaf = torch.tensor(y, requires_grad=True)
    loss = torch.nn.functional.mse_loss(leaf, torch.tensor(t), reduction=reduction)
    loss.backward()
    expected = (loss.detach().numpy(), leaf.grad.numpy())
    xp.assert_close(mse(xp.asarray(y), xp.asarray(t), reduction=reduction), expected, condition=30)


@float64_only
def test_mse_gradient_equals_central_differences(xp, rng):
    y, t, w = (xp.asarray(rng.uniform(0.5, 2, size=(4, 3))) for _ in range(3))

    def backward(dy, u):
        return u * dy, -u * dy

    worst = oracles.check_gradients_on(xp, lambda y, t: mse(y, t, weights=w), backward, [y, t], names=["y", "t"])
    assert max(worst.values()) < 1e-8
