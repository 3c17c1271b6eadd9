"""Look-ups of class numbers: the result for any memory layout of the table, and the memory that a look-up uses."""

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


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return the peak of the memory allocated during the second call, in bytes."""
    call()
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("count", [0, 1, 3, 40])
@pytest.mark.parametrize("layout", [np.asfortranarray, np.ascontiguousarray, lambda a: np.repeat(a, 2, axis=1)[:, ::2]])
def test_gather_columns_copies_columns_of_any_layout(count, layout):
    rng = np.random.default_rng(0)
    w, ids = rng.standard_normal((3, 50)), rng.integers(0, 50, count)
    columns = gather_columns(np, layout(w), ids)
    np.testing.assert_array_equal(columns, np.stack([w[:, k] for k in ids]) if count else np.zeros((0, 3)))
    columns[...] = 0  # must not write to w
    assert w.all()


def test_linear_of_class_numbers_adds_the_bias(xp):
    rng = np.random.default_rng(0)
    w, b, ids = rng.standard_normal((3, 7)), rng.standard_normal(3), rng.integers(0, 7, (4, 2))
    w, b = w.astype(xp.float_dtypes[0]), b.astype(xp.float_dtypes[0])
    y = linear(xp.xp, xp.asarray(ids), xp.asarray(w), xp.asarray(b))
    xp.assert_close(y, w.T[ids] + b, condition=1)


@pytest.mark.parametrize("call", ["sequence", "step"])
@pytest.mark.parametrize("implementation", ["jit", "ufunc", "reference"])
@pytest.mark.parametrize("name", LAYERS)
def test_few_look_ups_do_not_transpose_the_table(name, implementation, call):
    """`init` creates the table. Transposing it for 20 look-ups took ten times as long as a whole pass at V=50."""
    layer, rng = LAYERS[name], np.random.default_rng(0)
    params = layer.init(rng, like=np.zeros(0, "float32"))
    ids = rng.integers(0, V, (5, 20))
    with reference_only() if implementation == "reference" else allow_jit(implementation == "jit"):
        used = peak_bytes(lambda: layer.step(params, ids[0]) if call == "step" else layer(params, ids))
    assert used < params["weight_ih_l0"].nbytes / 2


@pytest.mark.needs("numba")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count", [0, 1, 2, 300])
def test_compiled_segment_sum_is_correct_to_a_few_eps(dtype, count):
    from xprnn.kernels.jit.segment_sum import segment_sum

    rng = np.random.default_rng(count)
    ids, rows = rng.integers(0, 40, count).astype("int32"), rng.standard_normal((count, 5)).astype(dtype)
    expected = np.zeros((41, 5))
    np.add.at(expected, ids, rows.astype("float64"))
    sums = segment_sum(ids, rows, 41)
    assert sums.dtype == dtype
    np.testing.assert_allclose(sums, expected, rtol=4 * np.finfo(dtype).eps, atol=1e-14)
