"""Compiled losses and optimisers on NumPy arrays against float64 formulas, torch and the NumPy paths."""

from __future__ import annotations

import numpy as np
import pytest
from support.backends import Backend

import xprnn
from xprnn import cross_entropy, mse
from xprnn.kernels.config import allow_jit, reference_only
from xprnn.training import losses, optimizers

pytestmark = pytest.mark.needs("numba")
XP = Backend.NUMPY
EPS = {"float32": 2.0**-23, "float64": 2.0**-52}
each_dtype = pytest.mark.parametrize("kind", ["float32", "float64"])
OPTIMIZERS = {
    "sgd": xprnn.sgd(0.1),
    "momentum": xprnn.sgd(0.1, 0.9),
    "nesterov": xprnn.sgd(0.1, 0.9, nesterov=True),
    "adagrad": xprnn.adagrad(0.05),
    "rmsprop": xprnn.rmsprop(0.02, 0.9),
    "adam": xprnn.adam(0.03, 0.8, 0.99),
    "adamw": xprnn.adamw(0.03, weight_decay=0.1),
}


@pytest.fixture
def only_compiled(monkeypatch):
    """Make the NumPy formulas raise."""

    def fail(*args, **options):
        raise AssertionError("a NumPy formula ran")

    monkeypatch.setattr(losses, "_from_indices", fail)
    monkeypatch.setattr(optimizers, "_update_blocks", fail)


def float64_cross_entropy(z, ids, w):
    """-sum(w log p[target]) and w (p - onehot), computed in float64 with logaddexp."""
    z = z.astype(np.float64)
    logp = z - np.logaddexp.reduce(z, axis=-1, keepdims=True)
    gradient = np.exp(logp) * w[..., None]
    np.put_along_axis(gradient, ids[..., None], np.take_along_axis(gradient, ids[..., None], -1) - w[..., None], -1)
    return -np.sum(w * np.take_along_axis(logp, ids[..., None], -1)[..., 0]), gradient


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (7,), (4, 3, 10), (5, 64), (2, 3, 1001)])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_cross_entropy_equals_the_float64_formula(only_compiled, rng, kind, shape, scale):
    z, ids = (scale * rng.normal(size=shape)).astype(kind), rng.integers(shape[-1], size=shape[:-1])
    value, gradient = cross_entropy(z, ids)
    w = np.full(ids.shape, 1 / max(1, ids.size))
    expected_value, expected_gradient = float64_cross_entropy(z, ids, w)
    np.testing.assert_allclose(value, expected_value, rtol=32 * EPS[kind], atol=32 * scale * EPS[kind])
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e3 * EPS[kind], atol=4 * EPS[kind] * w.max())
    assert value.dtype == gradient.dtype == kind
    assert gradient.shape == shape


@each_dtype
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weighted_rows_equal_the_float64_formula(only_compiled, rng, kind, reduction):
    z, ids = rng.normal(size=(6, 4, 9)).astype(kind), rng.integers(9, size=(6, 4))
    mask, weights = rng.random((6, 4)) < 0.6, rng.uniform(0.2, 2, (6, 4)).astype(kind)
    z[~mask], ids[~mask] = np.nan, -5
    value, gradient = cross_entropy(z, ids, mask=mask, weights=weights, reduction=reduction)
    w = np.where(mask, weights, 0).astype(np.float64)
    w /= w.sum() if reduction == "mean" else 1
    expected_value, expected = float64_cross_entropy(np.where(mask[..., None], z, 0), np.where(mask, ids, 0), w)
    np.testing.assert_allclose(value, expected_value, rtol=32 * EPS[kind])
    np.testing.assert_allclose(gradient, expected, rtol=64 * EPS[kind], atol=4 * EPS[kind] * w.max())
    assert not gradient[~mask].any()


@pytest.mark.needs("torch")
@each_dtype
def test_cross_entropy_of_turned_logits_equals_torch(only_compiled, rng, kind):
    """The logits are a time-major view of a batch-major array."""
    import torch

    z, ids = rng.normal(size=(4, 6, 5)).astype(kind).transpose(1, 0, 2), rng.integers(5, size=(6, 4)).astype(np.uint8)
    leaf = torch.tensor(z.reshape(-1, 5), requires_grad=True)
    loss = torch.nn.functional.cross_entropy(leaf, torch.tensor(ids.astype(np.int64)).reshape(-1))
    loss.backward()
    value, gradient = cross_entropy(z, ids)
    np.testing.assert_allclose(value, loss.detach().numpy(), rtol=32 * EPS[kind])
    np.testing.assert_allclose(gradient.reshape(-1, 5), leaf.grad.numpy(), rtol=64 * EPS[kind], atol=EPS[kind])


@each_dtype
@pytest.mark.parametrize("width", [3, 40])
def test_nan_and_infinite_logits(only_compiled, kind, width):
    """NaN, +inf and a row of -inf make value and gradient NaN, as in NumPy; single -inf have probability 0."""
    ids = np.asarray([1])
    for planted in (np.nan, np.inf):
        z = np.zeros((1, width), kind)
        z[0, 2] = planted
        value, gradient = cross_entropy(z, ids)
        assert np.isnan(value)
        assert np.isnan(gradient).all()
    value, gradient = cross_entropy(np.full((1, width), -np.inf, kind), ids)
    assert np.isnan(value)
    assert np.isnan(gradient).all()
    z = np.zeros((1, width), kind)
    z[0, 2] = -np.inf
    value, gradient = cross_entropy(z, ids)
    np.testing.assert_allclose(value, np.log(width - 1), rtol=8 * EPS[kind])
    assert gradient[0, 2] == 0


@each_dtype
def test_nan_in_one_row_leaves_the_gradient_of_the_others_finite(only_compiled, kind):
    z = np.zeros((2, 5), kind)
    z[0, 0] = np.nan
    value, gradient = cross_entropy(z, np.asarray([1, 1]))
    assert np.isnan(value)
    assert np.isfinite(gradient[1]).all()


@each_dtype
def test_huge_logits_neither_overflow_nor_lose_the_loss(only_compiled, kind):
    z = np.asarray([[1e30, -1e30, 0.0], [5e3, 5e3, -5e3]], kind)
    value, gradient = cross_entropy(z, np.asarray([0, 2]), reduction="sum")
    np.testing.assert_allclose(value, np.log(2) + 1e4, rtol=4 * EPS[kind])
    np.testing.assert_allclose(gradient, [[0, 0, 0], [0.5, 0.5, -1]], atol=EPS[kind])


@pytest.mark.parametrize("target", [-1, 3])
def test_a_target_that_is_no_class_is_named(target):
    with pytest.raises(xprnn.InputError, match=f"targets must hold integers in 0..2, found {target}"):
        cross_entropy(np.zeros((2, 3)), np.asarray([0, target]))


def test_empty_arrays_have_loss_zero():
    for shape in ((0, 3), (0, 2, 3)):
        value, gradient = cross_entropy(np.zeros(shape), np.zeros(shape[:-1], int))
        assert value == 0
        assert gradient.shape == shape


@each_dtype
@pytest.mark.parametrize("shape", [(), (3,), (5, 1), (2, 3, 4), (40, 300)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mse_equals_the_float64_formula(rng, kind, shape, reduction):
    y, target = (np.asarray(rng.normal(size=shape), kind) for _ in range(2))
    value, gradient = mse(y, target, reduction=reduction)
    error = y.astype(np.float64) - target
    factor = 1 / error.size if reduction == "mean" else 1
    np.testing.assert_allclose(value, factor * np.sum(error**2), rtol=64 * EPS[kind])
    np.testing.assert_allclose(gradient, 2 * factor * error, rtol=8 * EPS[kind], atol=EPS[kind] * factor)
    assert np.asarray(gradient).shape == shape
    assert value.dtype == gradient.dtype == kind


def test_mse_of_nothing_is_zero():
    value, gradient = mse(np.zeros((0, 3)), np.zeros((0, 3)))
    assert value == 0
    assert gradient.shape == (0, 3)


@each_dtype
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_compiled_update_equals_the_rule_bit_for_bit(rng, kind, name, monkeypatch):
    """Parameters of several sizes, two memory orders and no axis; the arguments are read-only."""
    shapes = {"a": (3, 5), "b": (67,), "c": (), "d": (0, 2), "e": (33, 31)}
    params = {k: np.asarray(rng.normal(size=s), kind) for k, s in shapes.items()}
    params["e"] = np.asfortranarray(params["e"])
    noise = [{k: np.asarray(rng.normal(size=s), kind) for k, s in shapes.items()} for _ in range(4)]
    for arrays in (params, *noise):
        for a in arrays.values():
            a.flags.writeable = False
    opt = OPTIMIZERS[name]

    def final():
        p, state = params, opt.init(params)
        for g in noise:
            p, state = opt.update(p, g, state)
        return [p, *(state[m] for m in opt.moments)]

    with allow_jit(False):
        expected = final()
    monkeypatch.setattr(optimizers, "_update_blocks", None)
    for got, reference in zip(final(), expected, strict=True):
        for key, a in reference.items():
            np.testing.assert_array_equal(got[key], a)
            assert got[key].shape == a.shape
            assert got[key].dtype == kind
            assert got[key].flags.c_contiguous == params[key].flags.c_contiguous


def test_arrays_of_other_classes_and_strides_take_the_formula(tmp_path):
    """A memory-mapped parameter, a strided one, and a moment of another dtype."""
    mapped = np.memmap(tmp_path / "w", np.float32, "w+", shape=(4,))
    mapped[:] = 1
    strided = np.ones((4, 2), np.float32)[:, 0]
    for p in (mapped, strided):
        new, _ = xprnn.sgd(0.5).update({"w": p}, {"w": np.ones(4, np.float32)}, {"step": 0})
        assert new["w"].tolist() == [0.5] * 4
    opt = xprnn.sgd(0.5, 0.5)
    state = {"step": 0, "velocity": {"w": np.ones(4)}}
    new, state = opt.update({"w": np.ones(4, np.float32)}, {"w": np.ones(4, np.float32)}, state)
    assert new["w"].tolist() == [0.25] * 4


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nan_in_a_gradient_reaches_only_its_entry(only_compiled, name):
    params = {"w": np.ones(40)}
    g = np.ones(40)
    g[7] = np.nan
    new, _ = OPTIMIZERS[name].update(params, {"w": g}, OPTIMIZERS[name].init(params))
    assert np.flatnonzero(np.isnan(new["w"])).tolist() == [7]


def test_reference_only_and_allow_jit_choose_the_formulas(only_compiled):
    for context in (reference_only(), allow_jit(False)):
        with context:
            with pytest.raises(AssertionError, match="a NumPy formula ran"):
                cross_entropy(np.zeros((1, 2)), np.asarray([1]))
            with pytest.raises(AssertionError, match="a NumPy formula ran"):
                OPTIMIZERS["adam"].update(
                    {"w": np.ones(2)}, {"w": np.ones(2)}, OPTIMIZERS["adam"].init({"w": np.ones(2)})
                )


def test_results_are_the_same_bits_on_every_call(rng):
    z, ids = rng.normal(size=(30, 77)).astype("float32"), rng.integers(77, size=30)
    first = cross_entropy(z, ids)
    for _ in range(3):
        XP.assert_close(cross_entropy(z.copy(), ids), first, condition=0)


@each_dtype
def test_exp_is_accurate_to_two_ulp_and_keeps_limits(kind):
    from numba import njit

    from xprnn.kernels.jit.simd import exp32
    from xprnn.kernels.jit.training import exp_of_nonpositive64

    exp = exp32 if kind == "float32" else exp_of_nonpositive64

    @njit
    def apply(x, out):
        for k in range(x.size):
            out[k] = exp(x[k])

    largest = 88.7 if kind == "float32" else 0.0
    x = np.linspace(-87 if kind == "float32" else -700, largest, 20001).astype(kind)
    x = np.concatenate((x, np.asarray([-np.inf, -1e30, 0.0, -0.0, np.nan], kind)))
    got = np.empty_like(x)
    apply(x, got)
    exact = np.exp(x.astype(np.longdouble))
    np.testing.assert_allclose(got[:-1], exact[:-1].astype(np.float64), rtol=2 * EPS[kind])
    assert np.isnan(got[-1])
    if kind == "float32":
        x = np.asarray([np.inf, 89.0, -103.9], kind)
        got = np.empty_like(x)
        apply(x, got)
        assert got.tolist() == [np.inf, np.inf, 2.0**-149]
