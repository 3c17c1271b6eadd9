"""Fast steps: the results of the checked step, for arrays of any layout and parameters that change between steps."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest
from support.fast_paths import LAYERS, check_fast_step, each_layer, output_arrays, step_inputs, with_and_without_jit
from support.layer_cases import CASES, MAIN_CASES

import xprnn
from xprnn.engine import step_calls
from xprnn.engine.layer import no_fast_path
from xprnn.kernels import step_plan
from xprnn.kernels.config import allow_jit

# Steps with a projection run NumPy calls, in which BLAS may round the rows of a batch in another way than a single one.
UNPROJECTED = [name for name in LAYERS if name != "lstm-proj"]
each_unprojected_layer = pytest.mark.parametrize("make", [LAYERS[name] for name in UNPROJECTED], ids=UNPROJECTED)
LAYERS_AND_ROWS = ((1, 1), (2, 1), (1, 3), (2, 20), (3, 0))


@with_and_without_jit
@pytest.mark.parametrize("name", CASES)
def test_fast_step_equals_checked_step_for_every_cell(rng, name, dtype, jit):
    with allow_jit(jit):
        for layers, n in LAYERS_AND_ROWS:
            layer = CASES[name].make(5, 19, layers)  # 19 units: whole SIMD vectors and a remainder
            check_fast_step(layer, *step_inputs(rng, layer, n, dtype))


@with_and_without_jit
@pytest.mark.parametrize("name", MAIN_CASES)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"learned_state": True}], ids=["plain", "no bias", "learned"])
def test_fast_step_equals_checked_step_for_every_option(rng, name, options, jit):
    with allow_jit(jit):
        for layers, n in LAYERS_AND_ROWS:
            layer = CASES[name].make(5, 19, layers, **options)
            params, x, state = step_inputs(rng, layer, n)
            check_fast_step(layer, params, x, state)
            if n:
                check_fast_step(layer, params, rng.integers(0, 5, n), state)
                check_fast_step(layer, params, rng.integers(0, 5, n).astype(np.uint8), state)


@pytest.mark.needs("numba")
@each_unprojected_layer
def test_few_rows_run_the_compiled_step(rng, make, monkeypatch):
    monkeypatch.setattr(step_calls, "_make_numpy_step", lambda *args: no_fast_path)  # only the compiled step is left
    layer = make(5, 19, 2)
    for n, compiled in ((1, True), (step_plan.MAX_COMPILED_ROWS, True), (step_plan.MAX_COMPILED_ROWS + 1, False)):
        params, x, state = step_inputs(rng, layer, n)
        ids = rng.integers(0, 5, n).astype(np.int32)
        assert (layer._fast_step(params, x, state) is not None) == compiled
        assert (layer._fast_step(params, ids, state) is not None) == compiled
        with allow_jit(False):
            assert layer._fast_step(params, x, state) is None
    wide = make(50, 4)
    params, _, state = step_inputs(rng, wide, 1)
    params["weight_ih_l0"] = np.asfortranarray(
        params["weight_ih_l0"]
    )  # the layout that `init` chooses for many classes
    assert wide._fast_step(params, np.array([3]), state) is not None
    large = make(2000, 400)
    assert large._fast_step(*step_inputs(rng, large, 1)) is not None
    assert large._fast_step(*step_inputs(rng, large, 2)) is None


@with_and_without_jit
@each_layer
@pytest.mark.parametrize("sizes", [(1, 1), (1, 16), (3, 2), (16, 16), (33, 8), (40, 64)])
def test_fast_step_equals_checked_step_for_every_size(rng, make, sizes, dtype, jit):
    layer = make(*sizes)
    with allow_jit(jit):
        check_fast_step(layer, *step_inputs(rng, layer, 1, dtype))


@pytest.mark.needs("numba")
@each_unprojected_layer
def test_rows_of_a_batch_are_independent(rng, make):
    layer = make(5, 19, 2)
    params, x, state = step_inputs(rng, layer, 4)
    batch = output_arrays(layer.step(params, x, state))
    for k in range(4):
        rows = slice(k, k + 1)
        row_state = tuple(s[:, rows] for s in state) if isinstance(state, tuple) else state[:, rows]
        single = output_arrays(layer.step(params, x[rows], row_state))
        for a, b in zip(single, batch, strict=True):
            np.testing.assert_array_equal(a, b[..., rows, :])


@with_and_without_jit
@each_layer
def test_step_uses_changed_parameters(rng, make, jit):
    """Parameters that were replaced, written to, or converted to another dtype after an earlier step."""
    layer, equal_layer = make(3, 8), make(3, 8)
    assert layer == equal_layer
    params, x, state = step_inputs(rng, layer, 1)
    with allow_jit(jit):
        first = check_fast_step(layer, params, x, state)
        params["weight_hh_l0"] *= 0.5
        second = check_fast_step(layer, params, x, state)
        params["weight_ih_l0"] = rng.normal(size=params["weight_ih_l0"].shape)
        third = check_fast_step(layer, params, x, state)
        other = {k: rng.normal(size=v.shape) for k, v in params.items()}
        check_fast_step(equal_layer, other, x, state)
        check_fast_step(layer, params, x, state)
        for a, b in ((first, second), (second, third)):
            assert np.max(np.abs(a[0] - b[0])) > 1e-3
        float32_params = {k: v.astype("float32") for k, v in params.items()}
        check_fast_step(layer, float32_params, *step_inputs(rng, layer, 1, "float32")[1:])
        check_fast_step(layer, params, x, state)


@with_and_without_jit
@each_layer
def test_step_accepts_strided_and_read_only_arrays(rng, make, jit):
    layer = make(3, 8, 2)
    params, x, state = step_inputs(rng, layer, 2)
    is_tuple = isinstance(state, tuple)
    states = state if is_tuple else (state,)
    strided = [np.repeat(s, 2, axis=2)[:, :, ::2] for s in states]
    fortran = [np.asfortranarray(s) for s in states]
    with allow_jit(jit):
        for other in (strided, fortran):
            check_fast_step(layer, params, x, tuple(other) if is_tuple else other[0])
        check_fast_step(layer, params, np.repeat(x, 2, axis=1)[:, ::2], state)
        check_fast_step(layer, params, np.asfortranarray(x)[::-1], state)
        check_fast_step(layer, {k: np.asfortranarray(v) for k, v in params.items()}, x, state)
        check_fast_step(layer, {k: np.repeat(v, 2, axis=0)[::2] for k, v in params.items()}, x, state)
        check_fast_step(layer, params, np.broadcast_to(x[:1], x.shape), state)
        check_fast_step(layer, {k: np.broadcast_to(v[:1], v.shape) for k, v in params.items()}, x, state)
        ids = rng.integers(0, 3, 4)[::2]
        for a in (x, ids, *params.values(), *states):
            a.flags.writeable = False
        check_fast_step(layer, params, x, state)
        check_fast_step(layer, params, ids, state)


def copying_cell():
    """A cell whose first two states are the same value, and whose third never changes."""

    def step(x, h, state, p):
        y = x[0] + h[0]
        return (y, y, state[2]), ()

    def backward(dstate, saved, state, p):
        da = dstate[0] + dstate[1]
        return (da,), (da,), (None, None, dstate[2]), ()

    return xprnn.Cell("copying", 1, lambda xp: (step, backward), states=("h", "same", "constant"))


@with_and_without_jit
@pytest.mark.parametrize("n", [1, 3])
def test_equal_states_share_no_memory(rng, n, jit):
    layer = xprnn.Recurrent(3, 5, cell=copying_cell())
    with allow_jit(jit):
        check_fast_step(layer, *step_inputs(rng, layer, n))


@with_and_without_jit
def test_step_keeps_no_array_alive(rng, jit):
    layer = xprnn.LSTM(3, 8, 2)
    params, x, state = step_inputs(rng, layer, 1)
    with allow_jit(jit):
        check_fast_step(layer, params, x, state)
    references = [weakref.ref(a) for a in (*params.values(), x, *state)]
    del params, x, state
    gc.collect()
    assert not any(ref() is not None for ref in references)


@with_and_without_jit
def test_threads_may_share_a_layer(rng, jit):
    """Each thread steps the layer with other parameters and another state."""
    layer = xprnn.GRU(3, 16)
    tasks = [step_inputs(rng, layer, 1) for _ in range(4)]

    def run(params, x, state):
        with allow_jit(jit):
            for _ in range(300):
                y, state = layer.step(params, x, state)
        return y

    expected = [run(*task) for task in tasks]
    results = [None] * 4

    def work(k):
        results[k] = run(*tasks[k])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(results, expected)
