"""Memory of the article's functions: which arguments are copied, and which results are views."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from support.oracles import article_inputs

from xprnn import rnn_backward, rnn_cell_forward, rnn_forward


@pytest.fixture
def case(rng):
    x, a0, p = article_inputs(rng, n_x=64, n_a=2, n_y=1, m=8, T=500)
    parameters = {name: value.astype("float32") for name, value in p.items()}
    return np.asfortranarray(x, "float32"), np.asfortranarray(a0, "float32"), parameters


def peak_memory(function):
    """The peak memory of `function` in bytes, and its result."""
    function()  # fills the caches that later calls share
    tracemalloc.start()
    try:
        result = function()
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()


def test_fortran_ordered_x_is_not_copied(case):
    x, a0, p = case
    used, _ = peak_memory(lambda: rnn_forward(x, a0, p))
    assert used < x.nbytes / 2


def test_c_ordered_x_is_copied(case):
    """Shows that the bound of the test above is sharp enough to detect a copy."""
    x, a0, p = case
    c_ordered = np.ascontiguousarray(x)
    used, _ = peak_memory(lambda: rnn_forward(c_ordered, a0, p))
    assert used > x.nbytes / 2


def test_backward_allocates_dx_once(case, rng):
    x, a0, p = case
    a, _, caches = rnn_forward(x, a0, p)
    da = np.asfortranarray(rng.normal(size=a.shape), "float32")
    used, grads = peak_memory(lambda: rnn_backward(da, caches))
    assert x.nbytes <= used < 1.5 * x.nbytes
    assert grads["dx"].dtype == np.float32


def test_results_are_views_of_time_major_memory(case, rng):
    x, a0, p = case
    a, y_pred, (cells, same_x) = rnn_forward(x, a0, p)
    grads = rnn_backward(np.asfortranarray(rng.normal(size=a.shape), "float32"), (cells, same_x))
    for view in (a, y_pred, grads["dx"]):
        assert view.flags.f_contiguous
        assert view.base is not None
    assert same_x is x
    for t in (0, 1, 499):
        a_next, a_prev, xt, parameters = cells[t]
        assert np.shares_memory(a_next, a[:, :, t])
        assert np.shares_memory(a_prev, a[:, :, t - 1] if t else a0)
        assert np.shares_memory(xt, x[:, :, t])
        assert parameters is p


@pytest.mark.parametrize("order", ["C", "F"])
def test_memory_order_of_arguments_does_not_change_gradients(case, rng, order):
    x, a0, p = ({k: np.array(v, order=order) for k, v in c.items()} if isinstance(c, dict) else c for c in case)
    da = rng.normal(size=(2, 8, 500)).astype("float32")
    first = rnn_backward(da, rnn_forward(*case)[2])
    second = rnn_backward(
        np.array(da, order=order), rnn_forward(np.array(x, order=order), np.array(a0, order=order), p)[2]
    )
    for name, value in first.items():
        np.testing.assert_allclose(second[name], value, atol=2e-5 * np.abs(value).max(), err_msg=name)


def test_caches_need_no_memory_until_indexed(rng):
    x, a0, p = article_inputs(rng, n_x=1, n_a=1, n_y=1, m=1, T=20_000)
    used, (_, _, (cells, _)) = peak_memory(lambda: rnn_forward(x, a0, p))
    assert used < 200 * len(cells), "a tuple of four arrays would take over 300 bytes per step"
    used, _ = peak_memory(lambda: cells[1:-1][::3])
    assert used < 2000


def test_cell_forward_copies_no_input(case):
    x, a0, p = case
    a_next, _, cache = rnn_cell_forward(x[:, :, 0], a0, p)
    assert cache[0] is a_next
    assert cache[1] is a0
    assert np.shares_memory(cache[2], x)
