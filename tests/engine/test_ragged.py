"""lengths, mask and reset in both directions, compared with the naive reference on cases drawn by hypothesis."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import given as for_all
from hypothesis import strategies as st
from support.layer_cases import (
    CASES,
    MAIN_CASES,
    SLOW_LIBRARIES,
    LayerInputs,
    inputs_on,
    random_cotangents,
    random_inputs,
    reference_outputs,
    to_backend,
)

import xprnn
from xprnn.gradcheck import check_layer

# derandomize: the same examples in every run, so that a failure can be reproduced.
hypothesis_settings = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
main_cases = pytest.mark.parametrize("name", MAIN_CASES)
finite_differences = pytest.mark.not_on(
    "strict:no_float64", "strict:device1", "numpy:readonly", reason="finite differences are taken on the plain variant"
)


@st.composite
def ragged_batches(draw, max_steps=4):
    """T, N, flags (each may be absent) and a seed for the numbers."""
    T, N = draw(st.integers(0, max_steps)), draw(st.integers(0, 3))

    def boolean_array(odds):
        rows = st.lists(st.sampled_from([True] * odds + [False]), min_size=N, max_size=N)
        return np.array(draw(st.lists(rows, min_size=T, max_size=T)), bool).reshape(T, N)

    flags = {}
    if draw(st.booleans()):
        flags["lengths"] = np.array(draw(st.lists(st.integers(0, T), min_size=N, max_size=N)), int)
    if draw(st.booleans()):
        flags["mask"] = boolean_array(2)
    if draw(st.booleans()):
        flags["reset"] = ~boolean_array(2)
    return T, N, flags, draw(st.integers(0, 2**16))


def inputs_of_batch(layer, batch) -> LayerInputs:
    T, N, flags, seed = batch
    return random_inputs(np.random.default_rng(seed), layer, T, N)._replace(flags=flags)


@main_cases
def test_ragged_batches_equal_the_naive_reference(xp, name):
    case = CASES[name]
    layer = case.make(2, 3, bidirectional=True)

    @settings(hypothesis_settings, max_examples={"numpy": 50, "jax": 2}.get(xp.library, 5))
    @for_all(ragged_batches())
    def check(batch):
        p = inputs_of_batch(layer, batch)
        params, x, state, flags = inputs_on(xp, p)
        y, final, _ = layer.forward(params, x, state, **flags)
        xp.assert_close((y, final), reference_outputs(case, layer, p), condition=64)
        xp.assert_close(layer(params, x, state, **flags)[0], xp.to_numpy(y), condition=0)

    check()


@finite_differences
@main_cases
def test_gradients_of_ragged_batches(xp, name):
    layer = CASES[name].make(1, 3 if name == "lstm-proj" else 2, bidirectional=True)

    @settings(hypothesis_settings, max_examples={"numpy": 18, "torch": 6}.get(xp.library, 2))
    @for_all(ragged_batches(max_steps=3))
    def check(batch):
        params, x, state, flags = inputs_on(xp, inputs_of_batch(layer, batch), "float64")
        check_layer(layer, params, x, state, **flags)

    check()


@finite_differences
@pytest.mark.parametrize("flags", ["l", "m", "r", "lmr"])
@pytest.mark.parametrize("name", ["lstm-proj", "gru"])
@pytest.mark.not_on(*SLOW_LIBRARIES, reason="slow: one layer is enough on these libraries")
def test_gradients_of_two_layers_with_flags(xp, rng, name, flags):
    layer = CASES[name].make(2, 3, 2, bidirectional=True)
    params, x, state, flags = inputs_on(xp, random_inputs(rng, layer, T=4, N=3, flags=flags), "float64")
    check_layer(layer, params, x, state, **flags)


@main_cases
def test_values_in_padding_have_no_effect(xp, rng, name):
    """With NaN in the padding, outputs, states and gradients have the same bits as with zeros."""
    layer = CASES[name].make(2, 3, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=5, N=4, flags="lmr")
    p.flags["lengths"] = np.array([2, 5, 0, 4])
    valid = p.flags["mask"] & (np.arange(5)[:, None] < p.flags["lengths"])
    assert 0 < valid.sum() < valid.size
    results = []
    for padding in (0.0, np.nan):
        filled = np.where(valid[..., None], p.x, padding)
        params, x, state, flags = inputs_on(xp, p._replace(x=filled))
        y, final, tape = layer.forward(params, x, state, **flags)
        if not results:
            dy, dfinal = random_cotangents(rng, y), random_cotangents(rng, final)
        padded_dy = to_backend(xp, np.where(valid[..., None], dy, padding))
        grads = layer.backward(tape, padded_dy, to_backend(xp, dfinal))
        results.append((y, final, *grads))
        assert not xp.to_numpy(grads.dx)[~valid].any()
        assert not xp.to_numpy(y)[~valid].any()
    xp.assert_close(results[1], tree_to_numpy(xp, results[0]), condition=0)


def tree_to_numpy(xp, tree):
    return tuple(tree_to_numpy(xp, a) for a in tree) if isinstance(tree, tuple) else xp.to_numpy(tree)


@main_cases
def test_all_false_mask_passes_states_and_cotangents_through(xp, rng, name):
    layer = CASES[name].make(2, 3, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=4)
    for no_steps in ({"mask": np.zeros((4, 3), bool)}, {"lengths": np.zeros(3, int)}):
        params, x, state, flags = inputs_on(xp, p._replace(flags=no_steps))
        y, final, tape = layer.forward(params, x, state, **flags)
        dfinal = to_backend(xp, random_cotangents(rng, final))
        dx, dstate, dparams = layer.backward(tape, xp.xp.ones_like(y), dfinal)
        xp.assert_close((final, dstate), tree_to_numpy(xp, (state, dfinal)), condition=0)
        assert not any(xp.to_numpy(a).any() for a in (y, dx, *dparams.values()))


@main_cases
def test_reset_splits_a_row_into_independent_sequences(xp, rng, name):
    """A reset at t separates t-1 from t in the forward direction, and t+1 from t in the reverse direction."""
    layer = CASES[name].make(2, 3, bidirectional=True)
    p = random_inputs(rng, layer, T=6, N=2)
    reset = np.zeros((6, 2), bool)
    reset[3] = True
    params, x, state, flags = inputs_on(xp, p._replace(flags={"reset": reset}))
    y, final, _ = layer.forward(params, x, state, **flags)
    half = layer.output_size // 2

    def run(start, end):
        return layer(params, x[start:end, ...], state)

    expected_forward = [xp.to_numpy(run(a, b)[0])[..., :half] for a, b in ((0, 3), (3, 6))]
    expected_reverse = [xp.to_numpy(run(a, b)[0])[..., half:] for a, b in ((0, 4), (4, 6))]
    expected = np.concatenate((np.concatenate(expected_forward), np.concatenate(expected_reverse)), axis=-1)
    xp.assert_close(y, expected, condition=64)
    ends = (run(3, 6)[1], run(0, 4)[1])
    for k, end in enumerate(ends):
        pairs = zip(final, end, strict=True) if isinstance(final, tuple) else [(final, end)]
        for actual, expected_state in pairs:
            xp.assert_close(actual[k, ...], xp.to_numpy(expected_state[k, ...]), condition=64)


@main_cases
def test_gradient_at_a_reset_goes_to_the_initial_state(xp, rng, name):
    layer = CASES[name].make(2, 3)
    p = random_inputs(rng, layer, T=4, N=2, flags="r")
    p.flags["reset"][:] = [[False, False], [False, True], [True, False], [False, False]]
    params, x, state, flags = inputs_on(xp, p)
    y, _, tape = layer.forward(params, x, state, **flags)
    dy = random_cotangents(rng, y)
    dy[:2, 0], dy[:1, 1] = 0, 0  # only the steps after each row's reset have a cotangent
    dx, dstate, _ = layer.backward(tape, to_backend(xp, dy))
    dx = xp.to_numpy(dx)
    assert not dx[:2, 0].any()
    assert not dx[:1, 1].any()
    assert dx[2, 0].all()
    assert dx[1, 1].all()
    for d in dstate if isinstance(dstate, tuple) else (dstate,):
        assert xp.to_numpy(d).all()


def test_reset_after_the_end_of_a_row_has_no_effect(xp, rng):
    layer = xprnn.LSTM(2, 3, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=5, flags="l")
    p.flags["lengths"] = np.array([0, 3, 5])
    reset = np.arange(5)[:, None] >= p.flags["lengths"]
    params, x, state, flags = inputs_on(xp, p)
    y, final, tape = layer.forward(params, x, state, **flags)
    reset_y, reset_final, reset_tape = layer.forward(params, x, state, **flags, reset=to_backend(xp, reset))
    dy, dfinal = to_backend(xp, random_cotangents(rng, y)), to_backend(xp, random_cotangents(rng, final))
    actual, expected = layer.backward(reset_tape, dy, dfinal), layer.backward(tape, dy, dfinal)
    xp.assert_close((reset_y, reset_final, *actual[:2]), tree_to_numpy(xp, (y, final, *expected[:2])), condition=0)


def test_reset_at_a_masked_step_takes_effect(xp, rng):
    """The mask skips the step, but not the reset before it."""
    layer = xprnn.GRU(2, 3)
    p = random_inputs(rng, layer, T=2, N=1)
    flags = {"mask": np.array([[True], [False]]), "reset": np.array([[False], [True]])}
    params, x, state, flags = inputs_on(xp, p._replace(flags=flags))
    _, final = layer(params, x, state, **flags)
    xp.assert_close(final, xp.to_numpy(state), condition=0)


@pytest.mark.parametrize("kind", [list, tuple, np.asarray])
def test_lengths_may_be_a_host_sequence(xp, rng, kind):
    layer = xprnn.GRU(2, 3, bidirectional=True)
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer, N=3))
    on_device = layer(params, x, state, lengths=to_backend(xp, np.array([2, 0, 5])))
    on_host = layer(params, x, state, lengths=kind([2, 0, 5]))
    xp.assert_close(on_host, tree_to_numpy(xp, on_device), condition=0)


@pytest.mark.parametrize("dtype_of_lengths", ["int32", "int64"])
def test_lengths_may_have_any_integer_dtype(xp, rng, dtype_of_lengths):
    case = CASES["gru"]
    layer = case.make(2, 3, bidirectional=True)
    p = random_inputs(rng, layer, flags="l")
    params, x, state, _ = inputs_on(xp, p)
    lengths = xp.asarray(p.flags["lengths"].astype(dtype_of_lengths))
    xp.assert_close(layer(params, x, state, lengths=lengths), reference_outputs(case, layer, p), condition=64)


def test_flags_without_padding_have_no_effect(xp, rng):
    layer = xprnn.LSTM(2, 3, 2, bidirectional=True)
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer))
    expected = layer(params, x, state)
    for flags in (
        {"lengths": [5, 5, 5]},
        {"mask": to_backend(xp, np.ones((5, 3), bool))},
        {"reset": to_backend(xp, np.zeros((5, 3), bool))},
    ):
        xp.assert_close(layer(params, x, state, **flags), tree_to_numpy(xp, expected), condition=16)
