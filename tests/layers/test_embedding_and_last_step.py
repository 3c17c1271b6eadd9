"""Embedding and LastStep on NumPy arrays, with and without compiled kernels, against loops; padding of NaN."""

from __future__ import annotations

import numpy as np
import pytest
from support.fast_paths import with_and_without_jit

import xprnn
from xprnn.kernels.config import allow_jit


@with_and_without_jit
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(7, 5), (0,), (1,), (40,)])
def test_gradient_of_the_table_is_the_sum_over_look_ups(rng, jit, sparse, dtype, shape):
    layer = xprnn.Embedding(6, 3, sparse=sparse)
    params = layer.init(rng, like=np.zeros(0, dtype))
    x, dy = rng.integers(1, 5, size=shape), rng.normal(size=(*shape, 3)).astype(dtype)
    with allow_jit(jit):
        _, _, tape = layer.forward(params, x)
        gradient = layer.backward(tape, dy).dparams["weight"]
    expected = np.zeros((6, 3))
    np.add.at(expected, x, dy.astype(np.float64))
    dense = gradient.to_dense() if sparse else gradient
    np.testing.assert_allclose(dense, expected, rtol=0, atol=16 * np.finfo(dtype).eps)
    assert dense.dtype == dtype


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
def test_last_step_reads_no_padding_and_sends_it_no_gradient(rng, direction, batch_first):
    lengths, layer = np.asarray([3, 0, 5]), xprnn.LastStep(direction=direction, batch_first=batch_first)
    x, dy = rng.normal(size=(5, 3, 4)), rng.normal(size=(3, 4))
    x[np.arange(5)[:, None] >= lengths] = np.nan
    y, _, tape = layer.forward({}, x.swapaxes(0, 1) if batch_first else x, lengths=lengths)
    dx = layer.backward(tape, dy).dx
    expected_y, expected_dx = np.zeros((3, 4)), np.zeros((5, 3, 4))
    halves = {"forward": [(0, 4, False)], "reverse": [(0, 4, True)], "both": [(0, 2, False), (2, 4, True)]}[direction]
    for start, stop, reverse in halves:
        for n in (0, 2):
            t = 0 if reverse else lengths[n] - 1
            expected_y[n, start:stop] = x[t, n, start:stop]
            expected_dx[t, n, start:stop] = dy[n, start:stop]
    np.testing.assert_array_equal(y, expected_y)
    np.testing.assert_array_equal(dx.swapaxes(0, 1) if batch_first else dx, expected_dx)


def test_result_of_a_linear_layer_shares_no_memory_with_its_arguments(rng):
    """The bias is added in place: to the product, not to x or to a parameter."""
    layer = xprnn.Linear(3, 3)
    params = layer.init(rng, like=np.zeros(0))
    x = rng.normal(size=(2, 4, 3))
    copies = x.copy(), {name: p.copy() for name, p in params.items()}
    y, _, _ = layer.forward(params, x)
    np.testing.assert_allclose(y, copies[0] @ copies[1]["weight"].T + copies[1]["bias"], rtol=1e-13, atol=1e-14)
    np.testing.assert_array_equal(x, copies[0])
    assert all((params[name] == copies[1][name]).all() for name in params)
    assert not any(np.shares_memory(y, a) for a in (x, *params.values()))
