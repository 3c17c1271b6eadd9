"""Look-ups of one-hot classes: the same rows however the table lies, and never the whole table for a few of them."""

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xprnn
from xprnn.arrays.linear import gather_columns, linear
from xprnn.kernels.config import allow_jit, reference_only

V, H = 5000, 16
LAYERS = {
    "RNN": xprnn.RNN(V, H),
    "LSTM": xprnn.LSTM(V, H),
    "GRU": xprnn.GRU(V, H),
    "original GRU": xprnn.GRU(V, H, reset_after=False),
}


def peak(call: Callable[[], Any]) -> int:
    """Bytes."""
    call()
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("count", [0, 1, 3, 40])
@pytest.mark.parametrize("turn", [np.asfortranarray, np.ascontiguousarray, lambda a: np.repeat(a, 2, axis=1)[:, ::2]])
def test_columns_are_the_tables(count, turn):
    rng = np.random.default_rng(0)
    w, ids = rng.standard_normal((3, 50)), rng.integers(0, 50, count)
    found = gather_columns(np, turn(w), ids)
    np.testing.assert_array_equal(found, np.stack([w[:, k] for k in ids]) if count else np.zeros((0, 3)))
    found[...] = 0  # its own memory
    assert w.all()


def test_the_generic_look_up_adds_the_bias(xp):
    rng = np.random.default_rng(0)
    w, b, ids = rng.standard_normal((3, 7)), rng.standard_normal(3), rng.integers(0, 7, (4, 2))
    w, b = w.astype(xp.float_dtypes[0]), b.astype(xp.float_dtypes[0])
    found = linear(xp.xp, xp.asarray(ids), xp.asarray(w), xp.asarray(b))
    xp.assert_close(found, w.T[ids] + b, condition=1)


@pytest.mark.parametrize("which", ["sequence", "step"])
@pytest.mark.parametrize("way", ["fast", "plain", "generic"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_few_of_many_classes_do_not_turn_the_table(name, way, which):
    """As `init` lays it. To turn it for 20 look-ups took ten times as long as the whole pass at V=50."""
    layer, rng = LAYERS[name], np.random.default_rng(0)
    params = layer.init(rng, like=np.zeros(0, "float32"))
    ids = rng.integers(0, V, (5, 20))
    with reference_only() if way == "generic" else allow_jit(way == "fast"):
        used = peak(lambda: layer.step(params, ids[0]) if which == "step" else layer(params, ids))
    assert used < params["weight_ih_l0"].nbytes / 2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count", [0, 1, 2, 300])
def test_compiled_sums_by_class_are_right_to_one_rounding(dtype, count):
    pytest.importorskip("numba")
    from xprnn.kernels.jit.segment_sum import segment_sum

    rng = np.random.default_rng(count)
    ids, rows = rng.integers(0, 40, count).astype("int32"), rng.standard_normal((count, 5)).astype(dtype)
    wanted = np.zeros((41, 5))
    np.add.at(wanted, ids, rows.astype("float64"))
    found = segment_sum(ids, rows, 41)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, wanted, rtol=4 * np.finfo(dtype).eps, atol=1e-14)
