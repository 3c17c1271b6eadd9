"""The article's five functions against its loops in float64 NumPy, torch, and central differences."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
from support import oracles
from support.backends import Backend
from support.oracles import article_inputs

import xprnn
from xprnn import rnn_backward, rnn_cell_backward, rnn_cell_forward, rnn_forward, softmax
from xprnn.kernels.config import reference_only

float64_only = pytest.mark.not_on("strict:no_float64", reason="central differences need float64")

SIZES = {
    "default": {},
    "all sizes 1": {"n_x": 1, "n_a": 1, "n_y": 1, "m": 1, "T": 1},
    "one hidden unit": {"n_a": 1},
    "one column": {"m": 1},
    "one step": {"T": 1},
    "no steps": {"T": 0},
    "no columns": {"m": 0},
    "wide": {"n_x": 9, "n_a": 2, "n_y": 11, "m": 4, "T": 3},
}
COTANGENTS = {"da": (True, False), "dlogits": (False, True), "both": (True, True)}


def random_cotangents(rng, a, y, included, steps=None, dtype="float64"):
    """Random da and dlogits; one that is not included is None."""
    prefix = slice(None, steps)
    return tuple(
        rng.normal(size=u[..., prefix].shape).astype(dtype).astype("float64") if is_included else None
        for u, is_included in zip((a, y), included, strict=True)
    )


def to_backend(xp, dtype, *arrays):
    return tuple(None if a is None else xp.asarray(a, dtype) for a in arrays)


@pytest.mark.parametrize("included", COTANGENTS.values(), ids=COTANGENTS.keys())
@pytest.mark.parametrize("m", [0, 1, 4])
def test_cell_equals_the_article(xp, dtype, rng, m, included):
    x, a_prev, p = article_inputs(rng, m=m, dtype=dtype)
    xt = x[:, :, 0]
    gxt, ga, gp = to_backend(xp, dtype, xt, a_prev, p)
    a_next, y, cache = rnn_cell_forward(gxt, ga, gp)
    expected_a, expected_y = oracles.cell_forward(xt, a_prev, p)
    xp.assert_close((a_next, y), (expected_a, expected_y), condition=20)
    assert cache[0] is a_next
    assert cache[1] is ga
    assert cache[2] is gxt
    assert cache[3] is gp
    da, dlogits = random_cotangents(rng, expected_a, expected_y, included, dtype=dtype)
    got = rnn_cell_backward(to_backend(xp, dtype, da)[0], cache, dlogits=to_backend(xp, dtype, dlogits)[0])
    expected = oracles.cell_backward(da, expected_a, a_prev, xt, p, dlogits)
    xp.assert_close(got, expected, condition=60)
    xp.assert_like((a_next, y, got), gxt)


@pytest.mark.parametrize("included", COTANGENTS.values(), ids=COTANGENTS.keys())
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_sequence_equals_the_articles_loop(xp, dtype, rng, sizes, included):
    x, a0, p = article_inputs(rng, dtype=dtype, **sizes)
    gx, ga0, gp = to_backend(xp, dtype, x, a0, p)
    a, y, caches = rnn_forward(gx, ga0, gp)
    expected_a, expected_y = oracles.sequence_forward(x, a0, p)
    xp.assert_close((a, y), (expected_a, expected_y), condition=50)
    assert caches[1] is gx
    assert len(caches[0]) == x.shape[2]
    da, dlogits = random_cotangents(rng, expected_a, expected_y, included, dtype=dtype)
    got = rnn_backward(to_backend(xp, dtype, da)[0], caches, dlogits=to_backend(xp, dtype, dlogits)[0])
    xp.assert_close(got, oracles.sequence_backward(da, x, a0, expected_a, p, dlogits), condition=200)
    xp.assert_like((a, y, got), gx)


@pytest.mark.parametrize("included", COTANGENTS.values(), ids=COTANGENTS.keys())
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_shorter_cotangent_back_propagates_its_steps_only(xp, rng, steps, included):
    x, a0, p = article_inputs(rng, dtype=xp.float_dtypes[0])
    _, _, caches = rnn_forward(*to_backend(xp, None, x, a0, p))
    expected_a, expected_y = oracles.sequence_forward(x, a0, p)
    da, dlogits = random_cotangents(rng, expected_a, expected_y, included, steps, dtype=xp.float_dtypes[0])
    got = rnn_backward(to_backend(xp, None, da)[0], caches, dlogits=to_backend(xp, None, dlogits)[0])
    xp.assert_close(got, oracles.sequence_backward(da, x, a0, expected_a, p, dlogits), condition=200)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_numpy_kernel_equals_the_reference_scan(dtype, rng, sizes):
    """The in-place kernel equals the reference scan more closely than the oracles above can show."""
    inputs = to_backend(Backend.NUMPY, dtype, *article_inputs(rng, dtype=dtype, **sizes))
    results = []
    for context in (nullcontext(), reference_only()):
        with context:
            a, y, caches = rnn_forward(*inputs)
            dlogits = np.random.default_rng(1).normal(size=y.shape).astype(dtype)
            results.append((a, y, rnn_backward(np.ones_like(a), caches, dlogits=dlogits)))
    if results[0][0].size:  # the kernel writes its states into read-only memory
        assert [r[0].flags.writeable for r in results] == [False, True], "expected two different implementations"
    Backend.NUMPY.assert_close(*results, condition=60)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("sizes", [{}, {"n_a": 1}, {"m": 1, "T": 1}, {"T": 40, "n_a": 8}])
def test_sequence_equals_torch(xp, rng, sizes):
    """torch's nn.RNN and autograd share no code with xprnn or with the NumPy oracle."""
    x, a0, p = article_inputs(rng, dtype=xp.float_dtypes[0], **sizes)
    a, y, caches = rnn_forward(*to_backend(xp, None, x, a0, p))
    da, dlogits = random_cotangents(rng, xp.to_numpy(a), xp.to_numpy(y), (True, True), dtype=xp.float_dtypes[0])
    grads = rnn_backward(*to_backend(xp, None, da), caches, dlogits=to_backend(xp, None, dlogits)[0])
    expected_a, expected_y, expected = oracles.torch_results(x, a0, p, da, dlogits)
    xp.assert_close((a, y), (expected_a, expected_y), condition=100)
    xp.assert_close(grads, expected, condition=400)


@float64_only
@pytest.mark.parametrize("outputs", ["a", "a and y_pred"])
def test_gradients_equal_central_differences(xp, rng, outputs):
    x, a0, p = article_inputs(rng, m=3, T=5)

    def forward(x, a0, p):
        a, y, caches = rnn_forward(x, a0, p)
        return (a, y) if outputs != "a" else a, (y, caches)

    def backward(tape, u):
        y, caches = tape
        da, dlogits = (u, None) if outputs == "a" else (u[0], softmax_backward(xp, y, u[1]))
        g = rnn_backward(da, caches, dlogits=dlogits)
        return g["dx"], g["da0"], {name: g.get("d" + name) for name in p}

    worst = oracles.check_gradients_on(
        xp, forward, backward, to_backend(xp, None, x, a0, p), names=("x", "a0", "p"), rng=rng
    )
    assert worst.keys() == {"x", "a0", *(f"p[{k!r}]" for k in p)}
    assert max(worst.values()) < 1e-7


@float64_only
def test_cell_gradients_equal_central_differences(xp, rng):
    x, a0, p = article_inputs(rng, m=3)

    def forward(xt, a_prev, p):
        a_next, y, cache = rnn_cell_forward(xt, a_prev, p)
        return (a_next, y), (y, cache)

    def backward(tape, u):
        y, cache = tape
        g = rnn_cell_backward(u[0], cache, dlogits=softmax_backward(xp, y, u[1]))
        return g["dxt"], g["da_prev"], {name: g["d" + name] for name in p}

    worst = oracles.check_gradients_on(
        xp, forward, backward, to_backend(xp, None, x[:, :, 0], a0, p), names=("xt", "a_prev", "p")
    )
    assert max(worst.values()) < 1e-7


def softmax_backward(xp, y, dy):
    """The cotangent of the logits, for softmax over the first axis."""
    return y * (dy - xp.xp.sum(y * dy, axis=0, keepdims=True))


def test_rnn_cell_backward_over_the_caches_equals_rnn_backward(xp, rng):
    """rnn_cell_backward accepts every cache of rnn_forward, so the article's loop runs on them."""
    x, a0, p = article_inputs(rng, dtype=xp.float_dtypes[0])
    a, _, (cells, gx) = rnn_forward(*to_backend(xp, None, x, a0, p))
    da = xp.asarray(rng.normal(size=a.shape))
    expected = rnn_backward(da, (cells, gx))
    da_prev, sums = xp.asarray(np.zeros(a0.shape)), {}
    for t in reversed(range(len(cells))):
        g = rnn_cell_backward(da[:, :, t] + da_prev, cells[t])
        da_prev = g.pop("da_prev")
        xp.assert_close(g.pop("dxt"), expected["dx"][:, :, t], condition=200)
        sums = {k: v + sums.get(k, 0 * v) for k, v in g.items()}
    xp.assert_close(
        sums | {"da0": da_prev}, {k: xp.to_numpy(v) for k, v in expected.items() if k != "dx"}, condition=200
    )


def test_caches_are_a_sequence(xp, rng):
    x, a0, p = article_inputs(rng)
    gx, ga0, gp = to_backend(xp, None, x, a0, p)
    a, _, (cells, _) = rnn_forward(gx, ga0, gp)
    host = xp.to_numpy(a)
    for t, cell in enumerate(cells):
        expected = (host[:, :, t], host[:, :, t - 1] if t else xp.to_numpy(ga0), xp.to_numpy(gx)[:, :, t])
        xp.assert_close(cell[:3], expected, condition=0)
        assert cell[3] is gp
        xp.assert_close(cells[t - len(cells)][:3], expected, condition=0)
    assert len(list(cells)) == len(cells) == 6
    assert [len(cells[s]) for s in (slice(2, 5), slice(None, None, -1), slice(9, None))] == [3, 6, 0]
    xp.assert_close(cells[2:5][1][:3], cells[3][:3], condition=0)
    xp.assert_close(cells[::-2][1][:3], cells[3][:3], condition=0)
    for out_of_range in (6, -7):
        with pytest.raises(IndexError):
            cells[out_of_range]


@pytest.mark.parametrize("part", [slice(0, 3), slice(2, 5), slice(1, 6, 2), slice(3, 4)], ids=str)
@pytest.mark.parametrize("included", COTANGENTS.values(), ids=COTANGENTS.keys())
@pytest.mark.parametrize("kind", ["slice", "list"])
def test_slice_or_list_of_caches_equals_the_articles_loop(xp, rng, part, included, kind):
    """rnn_backward of a part of the caches equals the article's loop over that part."""
    x, a0, p = article_inputs(rng, dtype=xp.float_dtypes[0])
    _, _, (cells, gx) = rnn_forward(*to_backend(xp, None, x, a0, p))
    selected = cells[part] if kind == "slice" else list(cells)[part]
    steps = range(6)[part]
    da, dlogits = random_cotangents(rng, np.zeros((5, 2, len(steps))), np.zeros((4, 2, len(steps))), included)
    got = rnn_backward(to_backend(xp, None, da)[0], (selected, gx), dlogits=to_backend(xp, None, dlogits)[0])
    states = [a0, *np.moveaxis(oracles.sequence_forward(x, a0, p)[0], 2, 0)]
    da_prev, sums, dx = np.zeros(a0.shape), {}, []
    for k, t in reversed(list(enumerate(steps))):
        u, v = (None if c is None else c[:, :, k] for c in (da, dlogits))
        g = oracles.cell_backward(da_prev + (0 if u is None else u), states[t + 1], states[t], x[:, :, t], p, v)
        da_prev = g.pop("da_prev")
        dx.append(g.pop("dxt"))
        sums = {name: value + sums.get(name, 0) for name, value in g.items()}
    xp.assert_close(got, {"dx": np.stack(dx[::-1], -1), "da0": da_prev} | sums, condition=200)


def test_rnn_backward_of_caches_from_rnn_cell_forward(xp, rng):
    """rnn_backward accepts the list of caches that the article's forward loop collects."""
    x, a0, p = article_inputs(rng, dtype=xp.float_dtypes[0])
    gx, state, gp = to_backend(xp, None, x, a0, p)
    cells = []
    for t in range(x.shape[2]):
        state, _, cache = rnn_cell_forward(gx[:, :, t], state, gp)
        cells.append(cache)
    expected_a, _ = oracles.sequence_forward(x, a0, p)
    for steps in (6, 3):
        da = rng.normal(size=(*a0.shape, steps)).astype(xp.float_dtypes[0]).astype("float64")
        got = rnn_backward(xp.asarray(da), (cells, gx))
        xp.assert_close(got, oracles.sequence_backward(da, x, a0, expected_a, p), condition=200)


def test_code_of_the_article_runs_unchanged():
    """The article's code with another import; the expected numbers are those that its course prints."""
    np.random.seed(1)  # noqa: NPY002 - the generator of the course's numbers
    randn = np.random.randn
    xt, a_prev = randn(3, 10), randn(5, 10)
    Waa, Wax, Wya, ba, by = randn(5, 5), randn(5, 3), randn(2, 5), randn(5, 1), randn(2, 1)
    parameters = {"Waa": Waa, "Wax": Wax, "Wya": Wya, "ba": ba, "by": by}
    a_next, yt_pred, cache = rnn_cell_forward(xt, a_prev, parameters)
    np.testing.assert_allclose(a_next[4][:4], [0.59584544, 0.18141802, 0.61311866, 0.99808218], atol=5e-9)
    np.testing.assert_allclose(yt_pred[1][:4], [0.9888161, 0.01682021, 0.21140899, 0.36817467], atol=5e-9)
    assert np.shape(rnn_cell_backward(randn(5, 10), cache)["dba"]) == (5, 1)

    np.random.seed(1)  # noqa: NPY002
    x, a0 = randn(3, 10, 4), randn(5, 10)
    a, y_pred, caches = rnn_forward(x, a0, parameters)
    assert a[4][1].shape == y_pred[1][3].shape == (4,)
    np.testing.assert_allclose(caches[1][1][3], [-1.1425182, -0.34934272, -0.20889423, 0.58662319], atol=5e-9)
    assert len(caches) == 2
    np.testing.assert_array_equal(caches[0][1][1], caches[0][0][0])
    assert caches[1][0][3].shape == (4,)
    gradients = rnn_backward(randn(5, 10, 4), caches)
    assert gradients["dx"][1][2].shape == (4,)
    assert isinstance(float(gradients["da0"][2][3]), float)
    assert [gradients[k].shape for k in ("dx", "da0", "dWax", "dWaa", "dba")] == [
        (3, 10, 4),
        (5, 10),
        (5, 3),
        (5, 5),
        (5, 1),
    ]
    assert xprnn.softmax is softmax
