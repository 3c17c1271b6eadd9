"""The article's five functions: against its own loops written out in float64, torch, and central differences."""

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
    "usual": {},
    "one of each": {"n_x": 1, "n_a": 1, "n_y": 1, "m": 1, "T": 1},
    "one hidden unit": {"n_a": 1},
    "one column": {"m": 1},
    "one step": {"T": 1},
    "no step": {"T": 0},
    "no column": {"m": 0},
    "wide": {"n_x": 9, "n_a": 2, "n_y": 11, "m": 4, "T": 3},
}
GIVEN = {"da": (True, False), "dlogits": (False, True), "both": (True, True)}


def cotangents(rng, a, y, given, steps=None, dtype="float64"):
    """Random da and dlogits, or None, as `given` says."""
    cut = slice(None, steps)
    return tuple(
        rng.normal(size=u[..., cut].shape).astype(dtype).astype("float64") if wanted else None
        for u, wanted in zip((a, y), given, strict=True)
    )


def here(xp, dtype, *arrays):
    return tuple(None if a is None else xp.asarray(a, dtype) for a in arrays)


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN.keys())
@pytest.mark.parametrize("m", [0, 1, 4])
def test_cell_is_the_articles(xp, dtype, rng, m, given):
    x, a_prev, p = article_inputs(rng, m=m, dtype=dtype)
    xt = x[:, :, 0]
    gxt, ga, gp = here(xp, dtype, xt, a_prev, p)
    a_next, y, cache = rnn_cell_forward(gxt, ga, gp)
    want_a, want_y = oracles.cell_forward(xt, a_prev, p)
    xp.assert_close((a_next, y), (want_a, want_y), condition=20)
    assert cache[0] is a_next
    assert cache[1] is ga
    assert cache[2] is gxt
    assert cache[3] is gp
    da, dlogits = cotangents(rng, want_a, want_y, given, dtype=dtype)
    got = rnn_cell_backward(here(xp, dtype, da)[0], cache, dlogits=here(xp, dtype, dlogits)[0])
    want = oracles.cell_backward(da, want_a, a_prev, xt, p, dlogits)
    xp.assert_close(got, want, condition=60)
    xp.assert_like((a_next, y, got), gxt)


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN.keys())
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_sequence_is_the_articles_loop(xp, dtype, rng, sizes, given):
    x, a0, p = article_inputs(rng, dtype=dtype, **sizes)
    gx, ga0, gp = here(xp, dtype, x, a0, p)
    a, y, caches = rnn_forward(gx, ga0, gp)
    want_a, want_y = oracles.sequence_forward(x, a0, p)
    xp.assert_close((a, y), (want_a, want_y), condition=50)
    assert caches[1] is gx
    assert len(caches[0]) == x.shape[2]
    da, dlogits = cotangents(rng, want_a, want_y, given, dtype=dtype)
    got = rnn_backward(here(xp, dtype, da)[0], caches, dlogits=here(xp, dtype, dlogits)[0])
    xp.assert_close(got, oracles.sequence_backward(da, x, a0, want_a, p, dlogits), condition=200)
    xp.assert_like((a, y, got), gx)


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN.keys())
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_fewer_cotangent_steps_walk_just_those(xp, rng, steps, given):
    x, a0, p = article_inputs(rng, dtype=xp.float_dtypes[0])
    _, _, caches = rnn_forward(*here(xp, None, x, a0, p))
    want_a, want_y = oracles.sequence_forward(x, a0, p)
    da, dlogits = cotangents(rng, want_a, want_y, given, steps, dtype=xp.float_dtypes[0])
    got = rnn_backward(here(xp, None, da)[0], caches, dlogits=here(xp, None, dlogits)[0])
    xp.assert_close(got, oracles.sequence_backward(da, x, a0, want_a, p, dlogits), condition=200)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_numpy_kernel_is_the_generic_scan(dtype, rng, sizes):
    """The in-place kernel against the specification, beyond what the oracle above sees: the same rounding."""
    given = here(Backend.NUMPY, dtype, *article_inputs(rng, dtype=dtype, **sizes))
    results = []
    for context in (nullcontext(), reference_only()):
        with context:
            a, y, caches = rnn_forward(*given)
            dlogits = np.random.default_rng(1).normal(size=y.shape).astype(dtype)
            results.append((a, y, rnn_backward(np.ones_like(a), caches, dlogits=dlogits)))
    if results[0][0].size:  # the kernel writes its states into read-only memory
        assert [r[0].flags.writeable for r in results] == [False, True], "two implementations, not one twice"
    Backend.NUMPY.assert_close(*results, condition=60)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("sizes", [{}, {"n_a": 1}, {"m": 1, "T": 1}, {"T": 40, "n_a": 8}])
def test_sequence_is_torchs(xp, rng, sizes):
    """torch's nn.RNN and its autograd share no line with us or with the oracle."""
    x, a0, p = article_inputs(rng, dtype=xp.float_dtypes[0], **sizes)
    a, y, caches = rnn_forward(*here(xp, None, x, a0, p))
    da, dlogits = cotangents(rng, xp.to_numpy(a), xp.to_numpy(y), (True, True), dtype=xp.float_dtypes[0])
    grads = rnn_backward(*here(xp, None, da), caches, dlogits=here(xp, None, dlogits)[0])
    want_a, want_y, want = oracles.torch_results(x, a0, p, da, dlogits)
    xp.assert_close((a, y), (want_a, want_y), condition=100)
    xp.assert_close(grads, want, condition=400)


@float64_only
@pytest.mark.parametrize("outputs", ["a", "a and y_pred"])
def test_every_gradient_by_central_differences(xp, rng, outputs):
    x, a0, p = article_inputs(rng, m=3, T=5)

    def forward(x, a0, p):
        a, y, caches = rnn_forward(x, a0, p)
        return (a, y) if outputs != "a" else a, (y, caches)

    def backward(tape, u):
        y, caches = tape
        da, dlogits = (u, None) if outputs == "a" else (u[0], softmax_back(xp, y, u[1]))
        g = rnn_backward(da, caches, dlogits=dlogits)
        return g["dx"], g["da0"], {name: g.get("d" + name) for name in p}

    worst = oracles.check_gradients_on(xp, forward, backward, here(xp, None, x, a0, p), names=("x", "a0", "p"), rng=rng)
    assert worst.keys() == {"x", "a0", *(f"p[{k!r}]" for k in p)}
    assert max(worst.values()) < 1e-7


@float64_only
def test_cell_gradients_by_central_differences(xp, rng):
    x, a0, p = article_inputs(rng, m=3)

    def forward(xt, a_prev, p):
        a_next, y, cache = rnn_cell_forward(xt, a_prev, p)
        return (a_next, y), (y, cache)

    def backward(tape, u):
        y, cache = tape
        g = rnn_cell_backward(u[0], cache, dlogits=softmax_back(xp, y, u[1]))
        return g["dxt"], g["da_prev"], {name: g["d" + name] for name in p}

    worst = oracles.check_gradients_on(
        xp, forward, backward, here(xp, None, x[:, :, 0], a0, p), names=("xt", "a_prev", "p")
    )
    assert max(worst.values()) < 1e-7


def softmax_back(xp, y, dy):
    """The adjoint of softmax over the first axis."""
    return y * (dy - xp.xp.sum(y * dy, axis=0, keepdims=True))


def test_article_loop_over_the_caches_is_rnn_backward(xp, rng):
    """Each lazily made cache is a cache of rnn_cell_backward: the article's own loop runs on them."""
    x, a0, p = article_inputs(rng, dtype=xp.float_dtypes[0])
    a, _, (cells, gx) = rnn_forward(*here(xp, None, x, a0, p))
    da = xp.asarray(rng.normal(size=a.shape))
    want = rnn_backward(da, (cells, gx))
    carried, sums = xp.asarray(np.zeros(a0.shape)), {}
    for t in reversed(range(len(cells))):
        g = rnn_cell_backward(da[:, :, t] + carried, cells[t])
        carried = g.pop("da_prev")
        xp.assert_close(g.pop("dxt"), want["dx"][:, :, t], condition=200)
        sums = {k: v + sums.get(k, 0 * v) for k, v in g.items()}
    xp.assert_close(sums | {"da0": carried}, {k: xp.to_numpy(v) for k, v in want.items() if k != "dx"}, condition=200)


def test_caches_are_a_sequence(xp, rng):
    x, a0, p = article_inputs(rng)
    gx, ga0, gp = here(xp, None, x, a0, p)
    a, _, (cells, _) = rnn_forward(gx, ga0, gp)
    host = xp.to_numpy(a)
    for t, cell in enumerate(cells):
        wanted = (host[:, :, t], host[:, :, t - 1] if t else xp.to_numpy(ga0), xp.to_numpy(gx)[:, :, t])
        xp.assert_close(cell[:3], wanted, condition=0)
        assert cell[3] is gp
        xp.assert_close(cells[t - len(cells)][:3], wanted, condition=0)
    assert len(list(cells)) == len(cells) == 6
    assert [len(cells[s]) for s in (slice(2, 5), slice(None, None, -1), slice(9, None))] == [3, 6, 0]
    xp.assert_close(cells[2:5][1][:3], cells[3][:3], condition=0)
    xp.assert_close(cells[::-2][1][:3], cells[3][:3], condition=0)
    for outside in (6, -7):
        with pytest.raises(IndexError):
            cells[outside]


@pytest.mark.parametrize("part", [slice(0, 3), slice(2, 5), slice(1, 6, 2), slice(3, 4)], ids=str)
@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN.keys())
@pytest.mark.parametrize("kind", ["slice", "list"])
def test_part_of_the_caches(xp, rng, part, given, kind):
    """A slice of the caches, or a list of them, is walked as the article's loop would walk it."""
    x, a0, p = article_inputs(rng, dtype=xp.float_dtypes[0])
    _, _, (cells, gx) = rnn_forward(*here(xp, None, x, a0, p))
    some = cells[part] if kind == "slice" else list(cells)[part]
    steps = range(6)[part]
    da, dlogits = cotangents(rng, np.zeros((5, 2, len(steps))), np.zeros((4, 2, len(steps))), given)
    got = rnn_backward(here(xp, None, da)[0], (some, gx), dlogits=here(xp, None, dlogits)[0])
    states = [a0, *np.moveaxis(oracles.sequence_forward(x, a0, p)[0], 2, 0)]
    carried, sums, dx = np.zeros(a0.shape), {}, []
    for k, t in reversed(list(enumerate(steps))):
        u, v = (None if c is None else c[:, :, k] for c in (da, dlogits))
        g = oracles.cell_backward(carried + (0 if u is None else u), states[t + 1], states[t], x[:, :, t], p, v)
        carried = g.pop("da_prev")
        dx.append(g.pop("dxt"))
        sums = {name: value + sums.get(name, 0) for name, value in g.items()}
    xp.assert_close(got, {"dx": np.stack(dx[::-1], -1), "da0": carried} | sums, condition=200)


def test_hand_made_caches(xp, rng):
    """The article's own forward loop, written by a reader, feeds rnn_backward."""
    x, a0, p = article_inputs(rng, dtype=xp.float_dtypes[0])
    gx, state, gp = here(xp, None, x, a0, p)
    cells = []
    for t in range(x.shape[2]):
        state, _, cache = rnn_cell_forward(gx[:, :, t], state, gp)
        cells.append(cache)
    want_a, _ = oracles.sequence_forward(x, a0, p)
    for steps in (6, 3):
        da = rng.normal(size=(*a0.shape, steps)).astype(xp.float_dtypes[0]).astype("float64")
        got = rnn_backward(xp.asarray(da), (cells, gx))
        xp.assert_close(got, oracles.sequence_backward(da, x, a0, want_a, p), condition=200)


def test_the_articles_text_runs_unchanged():
    """The article's usage, word for word but for the import; the numbers are those its course prints."""
    np.random.seed(1)  # noqa: NPY002 - the course's generator, whose numbers are known
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
