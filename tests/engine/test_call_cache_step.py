"""Quick steps: the same numbers and the same errors as the checked step, whatever happens to the arrays in between."""

from __future__ import annotations

import gc
import threading
import weakref
from functools import partial

import numpy as np
import pytest
from support.backends import Backend
from support.layer_cases import CASES, MAIN_CASES, random_inputs

import xprnn
from xprnn.engine import call_cache, stack
from xprnn.kernels import step_plan
from xprnn.kernels.config import allow_jit

XP = Backend.NUMPY
WAYS = pytest.mark.parametrize("fast", [pytest.param(True, marks=pytest.mark.needs("numba")), False])


def projected(D, H, *rest, **options):
    """An LSTM of H units, whose h is projected to about half of them."""
    return xprnn.LSTM(D, H + 1, *rest, proj_size=(H + 1) // 2, **options)


SHAPES = ((1, 1), (2, 1), (1, 3), (2, 20), (3, 0))  # layers, rows
LAYERS = {"rnn": xprnn.RNN, "lstm": xprnn.LSTM, "gru": xprnn.GRU}
LAYERS |= {"gru-before": partial(xprnn.GRU, reset_after=False), "lstm-proj": projected}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def given(rng, layer, n, dtype="float64"):
    """params, x and the state for one step, in a dtype."""
    p = random_inputs(rng, layer, 1, N=n)
    state = tuple(s.astype(dtype) for s in p.state) if isinstance(p.state, tuple) else p.state.astype(dtype)
    return {k: v.astype(dtype) for k, v in p.params.items()}, p.x[0].astype(dtype), state


def leaves(result):
    y, state = result
    return [y, *(state if isinstance(state, tuple) else (state,))]


def agree(layer, params, x, state):
    """The quick step takes these and says what the checked one says; returns its result."""
    before = [a.copy() for a in (x, *params.values(), *leaves((x, state)))]
    found, checked = layer._fast_step(params, x, state), stack.step(layer, params, x, state)
    assert found is not None
    XP.assert_close(found, checked, condition=32)
    for a, b in zip((x, *params.values(), *leaves((x, state))), before, strict=True):
        np.testing.assert_array_equal(a, b)
    fresh = leaves(found)
    for k, a in enumerate(fresh):
        assert a.flags.writeable
        assert not any(np.shares_memory(a, b) for b in (*fresh[:k], x, *params.values(), *leaves((x, state))))
    return found


@WAYS
@pytest.mark.parametrize("name", CASES)
def test_every_cell_is_the_checked_step(rng, name, dtype, fast):
    with allow_jit(fast):
        for layers, n in SHAPES:
            layer = CASES[name].make(5, 19, layers)  # 19: neither a whole vector nor less than one
            agree(layer, *given(rng, layer, n, dtype))


@WAYS
@pytest.mark.parametrize("name", MAIN_CASES)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"learned_state": True}], ids=["plain", "no bias", "learned"])
def test_every_option_is_the_checked_step(rng, name, options, fast):
    with allow_jit(fast):
        for layers, n in SHAPES:
            layer = CASES[name].make(5, 19, layers, **options)
            params, x, state = given(rng, layer, n)
            agree(layer, params, x, state)
            if n:
                agree(layer, params, rng.integers(0, 5, n), state)
                agree(layer, params, rng.integers(0, 5, n).astype(np.uint8), state)


@pytest.mark.needs("numba")
@each_layer
def test_a_few_rows_take_the_compiled_way(rng, make, monkeypatch):
    monkeypatch.setattr(call_cache, "numpy_step", None)  # who calls it falls through to the checked step
    layer = make(5, 19, 2)
    for n, taken in ((1, True), (step_plan.MAX_COMPILED_ROWS, True), (step_plan.MAX_COMPILED_ROWS + 1, False)):
        params, x, state = given(rng, layer, n)
        ids = rng.integers(0, 5, n).astype(np.int32)
        assert (layer._fast_step(params, x, state) is not None) == taken
        assert (layer._fast_step(params, ids, state) is not None) == taken
        with allow_jit(False):
            assert layer._fast_step(params, x, state) is None
    wide = make(50, 4)
    params, _, state = given(rng, wide, 1)
    params["weight_ih_l0"] = np.asfortranarray(params["weight_ih_l0"])  # as `init` lays out many classes
    assert wide._fast_step(params, np.array([3]), state) is not None
    large = make(2000, 400)
    assert large._fast_step(*given(rng, large, 1)) is not None
    assert large._fast_step(*given(rng, large, 2)) is None


@WAYS
@each_layer
@pytest.mark.parametrize("sizes", [(1, 1), (1, 16), (3, 2), (16, 16), (33, 8), (40, 64)])
def test_every_size_is_the_checked_step(rng, make, sizes, dtype, fast):
    layer = make(*sizes)
    with allow_jit(fast):
        agree(layer, *given(rng, layer, 1, dtype))


@pytest.mark.needs("numba")
@each_layer
def test_a_row_does_not_see_the_others(rng, make):
    layer = make(5, 19, 2)
    params, x, state = given(rng, layer, 4)
    together = leaves(layer.step(params, x, state))
    for k in range(4):
        rows = slice(k, k + 1)
        part = tuple(s[:, rows] for s in state) if isinstance(state, tuple) else state[:, rows]
        alone = leaves(layer.step(params, x[rows], part))
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a, b[..., rows, :])


@WAYS
@each_layer
def test_what_happens_to_a_parameter_is_seen(rng, make, fast):
    """Replaced, written into, of another dtype: nothing of an earlier step is left."""
    layer, twin = make(3, 8), make(3, 8)
    assert layer == twin
    params, x, state = given(rng, layer, 1)
    with allow_jit(fast):
        first = agree(layer, params, x, state)
        params["weight_hh_l0"] *= 0.5
        second = agree(layer, params, x, state)
        params["weight_ih_l0"] = rng.normal(size=params["weight_ih_l0"].shape)
        third = agree(layer, params, x, state)
        other = {k: rng.normal(size=v.shape) for k, v in params.items()}
        agree(twin, other, x, state)
        agree(layer, params, x, state)
        for a, b in ((first, second), (second, third)):
            assert np.max(np.abs(a[0] - b[0])) > 1e-3
        single = {k: v.astype("float32") for k, v in params.items()}
        agree(layer, single, *given(rng, layer, 1, "float32")[1:])
        agree(layer, params, x, state)


@WAYS
@each_layer
def test_arrays_of_any_strides_and_read_only_ones(rng, make, fast):
    layer = make(3, 8, 2)
    params, x, state = given(rng, layer, 2)
    parts = state if isinstance(state, tuple) else (state,)
    wide = [np.repeat(s, 2, axis=2)[:, :, ::2] for s in parts]
    turned = [np.asfortranarray(s) for s in parts]
    one = isinstance(state, tuple)
    with allow_jit(fast):
        for other in (wide, turned):
            agree(layer, params, x, tuple(other) if one else other[0])
        agree(layer, params, np.repeat(x, 2, axis=1)[:, ::2], state)
        agree(layer, params, np.asfortranarray(x)[::-1], state)
        agree(layer, {k: np.asfortranarray(v) for k, v in params.items()}, x, state)
        agree(layer, {k: np.repeat(v, 2, axis=0)[::2] for k, v in params.items()}, x, state)
        ids = rng.integers(0, 3, 4)[::2]
        for a in (x, ids, *params.values(), *parts):
            a.flags.writeable = False
        agree(layer, params, x, state)
        agree(layer, params, ids, state)


def copying_cell():
    """A cell with two states that are one value, and one that passes through."""

    def step(x, h, state, p):
        y = x[0] + h[0]
        return (y, y, state[2]), ()

    def back(dstate, saved, state, p):
        da = dstate[0] + dstate[1]
        return (da,), (da,), (None, None, dstate[2]), ()

    return xprnn.Cell("copying", 1, lambda xp: (step, back), states=("h", "same", "kept"))


@WAYS
@pytest.mark.parametrize("n", [1, 3])
def test_states_that_share_a_value_share_no_memory(rng, n, fast):
    layer = xprnn.Recurrent(3, 5, cell=copying_cell())
    with allow_jit(fast):
        agree(layer, *given(rng, layer, n))


@WAYS
def test_nothing_is_kept_alive(rng, fast):
    layer = xprnn.LSTM(3, 8, 2)
    params, x, state = given(rng, layer, 1)
    with allow_jit(fast):
        agree(layer, params, x, state)
    watched = [weakref.ref(a) for a in (*params.values(), x, *state)]
    del params, x, state
    gc.collect()
    assert not any(w() is not None for w in watched)


@WAYS
def test_threads_share_a_layer(rng, fast):
    """Each with parameters and a stream of its own, at the same time."""
    layer = xprnn.GRU(3, 16)
    tasks = [given(rng, layer, 1) for _ in range(4)]

    def run(params, x, state):
        with allow_jit(fast):
            for _ in range(300):
                y, state = layer.step(params, x, state)
        return y

    want = [run(*task) for task in tasks]
    got = [None] * 4

    def work(k):
        got[k] = run(*tasks[k])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(got, want)
