"""Sums, scaling, clipping and optimiser steps of sparse gradients equal those of dense ones; other operations raise."""

from __future__ import annotations

import copy
import operator
import pickle

import numpy as np
import pytest

import xprnn
from xprnn import InputError, SparseGradient, clip_by_global_norm, clip_by_value

V, W, STEPS = 9, 3, 12
RULES = {
    "sgd": xprnn.sgd(0.1),
    "momentum": xprnn.sgd(0.1, 0.9),
    "nesterov": xprnn.sgd(0.1, 0.9, nesterov=True),
    "adagrad": xprnn.adagrad(0.05),
    "rmsprop": xprnn.rmsprop(0.02),
    "adam": xprnn.adam(0.03),
    "adamw": xprnn.adamw(0.03),
}


def random_gradients(xp, rng, axis=0, dtype=None, indices=None):
    """A sparse gradient of random classes, and the equivalent dense NumPy array."""
    indices = np.flatnonzero(rng.random(V) < 0.5) if indices is None else np.asarray(indices, int)
    values = rng.standard_normal((len(indices), W)).astype(dtype or xp.float_dtypes[0])
    table = np.zeros((V, W), values.dtype)
    table[indices] = values
    shape = (W, V) if axis else (V, W)
    return SparseGradient(xp.asarray(indices), xp.asarray(values), shape, axis), table.T if axis else table


def assert_identical(xp, found, expected):
    xp.assert_close(found, expected, condition=0)


@pytest.mark.parametrize("axis", [0, 1])
def test_sums_and_multiples_equal_dense_gradients(xp, dtype, rng, axis):
    (a, da), (b, db), (empty, zeros) = (random_gradients(xp, rng, axis, dtype, ids) for ids in (None, None, []))
    dense = rng.standard_normal(da.shape).astype(dtype)
    factor = np.asarray(0.3, dtype)
    array, scale = xp.asarray(dense), xp.asarray(factor)
    with xp.allow_data_dependent_shapes():
        sums = {"a+b": a + b, "b+a": b + a, "sum": sum([a, b, a]), "a+0": a + empty, "0+0": empty + empty}
    expected = {"a+b": da + db, "b+a": da + db, "sum": da + db + da, "a+0": da, "0+0": zeros}
    for name, total in sums.items():
        assert isinstance(total, SparseGradient)
        assert_identical(xp, total.to_dense(), expected[name])
    np.testing.assert_array_equal(
        xp.to_numpy(sums["a+b"].indices), np.union1d(*map(xp.to_numpy, (a.indices, b.indices)))
    )
    assert_identical(xp, (a * scale).to_dense(), da * factor)
    assert_identical(xp, (2 * a / 4).to_dense(), da * np.asarray(0.5, dtype))
    xp.assert_close((a / scale).to_dense(), da / factor, condition=2)  # XLA multiplies by the reciprocal
    assert_identical(xp, a + array, da + dense)
    xp.assert_like((a.to_dense(), sums["a+b"].values, a + array), array)
    if xp.library in ("numpy", "torch", "jax"):  # other libraries' arrays on the left do not call __radd__ or __rmul__
        assert_identical(xp, (scale * a).to_dense(), da * factor)
        assert_identical(xp, array + a, da + dense)


def test_sum_keeps_negative_zero_like_dense_sums():
    a = SparseGradient(np.asarray([0, 1]), np.asarray([[-0.0], [-0.0]]), (3, 1))
    b = SparseGradient(np.asarray([1, 2]), np.asarray([[-0.0], [-0.0]]), (3, 1))
    assert (a + b).to_dense().tobytes() == (a.to_dense() + b.to_dense()).tobytes()


@pytest.mark.parametrize("factor", [2.0, np.float32(2), np.float64(2), np.asarray(2.0)], ids=lambda f: type(f).__name__)
def test_numpy_scalars_scale_from_both_sides(rng, factor):
    g = SparseGradient(np.asarray([1]), np.ones((1, 2)), (3, 2))
    for product in (factor * g, g * factor):
        assert isinstance(product, SparseGradient)
        assert product.values.tolist() == [[2.0, 2.0]]


def test_in_place_addition_to_a_numpy_array():
    g, total = SparseGradient(np.asarray([1]), np.ones((1, 2)), (3, 2)), np.ones((3, 2))
    same_array = total
    total += g
    assert same_array.tolist() == [[1, 1], [2, 2], [1, 1]]
    assert np.asarray(g).tolist() == [[0, 0], [1, 1], [0, 0]]
    assert np.asarray(g, np.float32).dtype == np.float32


def test_copies_and_pickles_are_equal(rng):
    g = SparseGradient(np.asarray([1]), np.ones((1, 2)), (3, 2))
    for other in (copy.copy(g), copy.deepcopy(g), pickle.loads(pickle.dumps(g))):
        np.testing.assert_array_equal(other.to_dense(), g.to_dense())
    assert repr(g) == "SparseGradient(1 of 3 classes, shape=(3, 2), axis=0, dtype=float64)"
    assert (g.ndim, g.dtype) == (2, np.float64)


UNSUPPORTED = {
    "index": lambda g: g[0],
    "iterate": list,
    "length": len,
    "truth": bool,
    "minus": lambda g: g - g,
    "negative": operator.neg,
    "power": lambda g: g**2,
    "product": lambda g: g * g,
    "matrix product": lambda g: np.ones((2, 3)) @ g,
    "array": lambda g: g * np.ones((3, 2)),
    "quotient": lambda g: 1 / g,
    "equal": lambda g: g == 0,
    "less": lambda g: g < 0,
    "root": np.sqrt,
    "sum": np.add.reduce,
    "array minus": lambda g: np.ones((3, 2)) - g,
    "product in place": lambda g: np.multiply(2.0, g, out=np.zeros((3, 2))),
    "a number": lambda g: g + 1.0,
    "another shape": lambda g: g + np.ones((2, 3)),
}


@pytest.mark.parametrize("operation", UNSUPPORTED)
def test_unsupported_operation_names_to_dense(operation):
    g = SparseGradient(np.asarray([1]), np.ones((1, 2)), (3, 2))
    with pytest.raises(InputError, match=r"\.to_dense\(\)"):
        UNSUPPORTED[operation](g)


def test_invalid_arguments_and_attributes_raise():
    g = SparseGradient(np.asarray([1]), np.ones((1, 2)), (3, 2))
    with pytest.raises(AttributeError, match=r"no attribute T: use \.to_dense\(\)"):
        _ = g.T
    with pytest.raises(InputError, match="different tables"):
        g + SparseGradient(np.asarray([1]), np.ones((1, 2)), (4, 2))
    with pytest.raises(InputError, match="other is float32"):
        g + SparseGradient(np.asarray([1]), np.ones((1, 2), np.float32), (3, 2))
    for indices in ([1, 1], [2, 1], [3, 4], [-1, 0]):
        with pytest.raises(InputError, match=r"ascending, each once, in 0\.\.2"):
            SparseGradient(np.asarray(indices), np.ones((2, 2)), (3, 2))
    for indices, values in (([1], (1, 3)), ([1, 2], (1, 2)), ([1], (2,))):
        with pytest.raises(InputError, match=r"must be \(K,\) and \(K, 2\)"):
            SparseGradient(np.asarray(indices), np.ones(values), (3, 2))
    with pytest.raises(InputError, match="two axes"):
        SparseGradient(np.asarray([1]), np.ones((1, 2)), (3, 2), 2)
    with pytest.raises(InputError, match="indices must be integers, found float64"):
        SparseGradient(np.asarray([1.0]), np.ones((1, 2)), (3, 2))


@pytest.mark.not_on("numpy", "torch", "jax", "cupy", reason="these libraries support data-dependent shapes")
def test_library_without_data_dependent_shapes_raises(xp):
    layer = xprnn.Embedding(V, W, sparse=True)
    y, _, tape = layer.forward({"weight": xp.asarray(np.zeros((V, W)))}, xp.asarray(np.asarray([1, 2])))
    with pytest.raises(InputError, match="number of classes that occur cannot be determined here"):
        layer.backward(tape, y)


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clipping_keeps_sparsity_and_equals_dense_clipping(xp, dtype, rng, max_norm):
    (g, dense), (empty, zeros) = random_gradients(xp, rng, 1, dtype, [0, 2, 5]), random_gradients(xp, rng, 0, dtype, [])
    other = rng.standard_normal(4).astype(dtype)
    sparse_grads = {"t": g, "n": empty, "b": xp.asarray(other)}
    dense_grads = xp.asarray({"t": dense, "n": zeros, "b": other}, dtype)
    found, norm = clip_by_global_norm(sparse_grads, max_norm)
    expected, expected_norm = clip_by_global_norm(dense_grads, max_norm)
    xp.assert_close(norm, expected_norm, condition=4)
    clipped, dense_clipped = clip_by_value(sparse_grads, 0.3), clip_by_value(dense_grads, 0.3)
    for name in ("t", "n"):
        assert isinstance(found[name], SparseGradient)
        assert isinstance(clipped[name], SparseGradient)
        xp.assert_close(found[name].to_dense(), expected[name], condition=4)
        assert_identical(xp, clipped[name].to_dense(), dense_clipped[name])
    xp.assert_close(found["b"], expected["b"], condition=4)
    with pytest.raises(InputError, match="dtype"):
        clip_by_global_norm({"t": g, "b": xp.asarray(np.ones(2, "int64"))}, 1.0)


@pytest.mark.parametrize("layout", [np.ascontiguousarray, np.asfortranarray])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("case", RULES)
def test_every_optimizer_equals_the_dense_update(xp, dtype, rng, case, axis, layout, monkeypatch):
    monkeypatch.setattr("xprnn.training.optimizers._BLOCK_SIZE", 8)
    rule = RULES[case]
    shape = (W, V) if axis else (V, W)
    initial = {"t": layout(rng.standard_normal(shape).astype(dtype)), "b": rng.standard_normal(2).astype(dtype)}
    params, dense_params = xp.asarray(initial), xp.asarray(initial)
    state, dense_state = rule.init(params), rule.init(dense_params)
    for step in range(STEPS):
        g, dense = random_gradients(xp, rng, axis, dtype, [] if step == 3 else None)
        b = xp.asarray(rng.standard_normal(2), dtype)
        before, copies = params, {k: xp.to_numpy(a) for k, a in params.items()}
        params, state = rule.update(params, {"t": g, "b": b}, state)
        dense_params, dense_state = rule.update(dense_params, {"t": xp.asarray(dense, dtype), "b": b}, dense_state)
        for k, a in before.items():
            np.testing.assert_array_equal(xp.to_numpy(a), copies[k])
    for k in initial:
        xp.assert_close(params[k], dense_params[k], condition=0 if xp.library == "numpy" else 4)
        for m in rule.moments:
            xp.assert_close(state[m][k], dense_state[m][k], condition=0 if xp.library == "numpy" else 4)
    xp.assert_like(params, dense_params["t"])


def test_rows_that_are_not_stored_are_not_computed():
    """The other rows hold inf, which any computation with them would turn into nan or an error."""
    p, g = {"t": np.full((5, 2), np.inf)}, SparseGradient(np.asarray([1]), np.ones((1, 2)), (5, 2))
    p["t"][1] = 1.0
    for rule in (xprnn.sgd(0.5), xprnn.adagrad(0.5, eps=0.0), xprnn.adam(0.5, lazy=True)):
        new, state = rule.update(p, {"t": g}, rule.init(p))
        np.testing.assert_allclose(new["t"][1], 0.5, rtol=1e-6)  # eps changes the last digits
        assert np.isinf(new["t"][[0, 2, 3, 4]]).all()
        assert all(not state[m]["t"][[0, 2, 3, 4]].any() for m in rule.moments)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("eps", [1e-8, 0.1])
@pytest.mark.parametrize("axis", [0, 1])
def test_lazy_adam_equals_torch_sparse_adam(xp, dtype, rng, axis, eps):
    import torch

    start = rng.standard_normal((V, W)).astype(dtype)
    leaf = torch.tensor(start, requires_grad=True)
    torch_adam = torch.optim.SparseAdam([leaf], lr=0.03, betas=(0.8, 0.99), eps=eps)
    rule, p = xprnn.adam(0.03, 0.8, 0.99, eps, lazy=True), {"t": xp.asarray(start.T if axis else start)}
    state = rule.init(p)
    for step in range(1, STEPS + 1):
        g, _ = random_gradients(xp, rng, axis, dtype)
        indices, values = (torch.tensor(xp.to_numpy(a)) for a in (g.indices, g.values))
        leaf.grad = torch.sparse_coo_tensor(indices[None], values, (V, W), check_invariants=True)
        torch_adam.step()
        p, state = rule.update(p, {"t": g}, state)
        moments = torch_adam.state[leaf]
        pairs = ((p, leaf), (state["mean"], moments["exp_avg"]), (state["square"], moments["exp_avg_sq"]))
        for found, expected in pairs:
            table = expected.detach().numpy()
            xp.assert_close(found["t"], table.T if axis else table, condition=16 * step)


def test_lazy_adam_of_dense_gradients_equals_adam(rng):
    p, g = {"t": rng.standard_normal((V, W))}, {"t": rng.standard_normal((V, W))}
    found, expected = (rule.update(p, g, rule.init(p))[0] for rule in (xprnn.adam(0.1, lazy=True), xprnn.adam(0.1)))
    np.testing.assert_array_equal(found["t"], expected["t"])


@pytest.mark.parametrize(
    "rule", [xprnn.sgd(0.1), xprnn.adam(0.1), xprnn.adam(0.1, lazy=True)], ids=["sgd", "adam", "lazy"]
)
def test_gradient_of_other_shape_or_dtype_raises(rule):
    p = {"t": np.zeros((4, 2))}
    with pytest.raises(InputError, match=r"the gradient of t has shape \(3, 2\), expected \(4, 2\)"):
        rule.update(p, {"t": SparseGradient(np.asarray([1]), np.ones((1, 2)), (3, 2))}, rule.init(p))
    with pytest.raises(InputError, match="float32"):
        rule.update(p, {"t": SparseGradient(np.asarray([1]), np.ones((1, 2), "f"), (4, 2))}, rule.init(p))
