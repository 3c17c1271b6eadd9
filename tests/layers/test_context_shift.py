"""ContextShift: values and gradients, and predictions that do not depend on the character to be predicted."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.oracles import check_gradients_on

import xprnn
from xprnn.layers.context_shift import next_window_state
from xprnn.layers.sequential import from_config

float64_only = pytest.mark.not_on("strict:no_float64", reason="central differences need float64")
V, H, T, N = 6, 3, 5, 4


def shift_loop(x, offset):
    """ContextShift by its definition, one step and one half at a time."""
    y = np.zeros_like(x)
    for t in range(len(x)):
        for half, source in ((slice(None, H), t - offset), (slice(H, None), t + offset)):
            if 0 <= source < len(x):
                y[t, ..., half] = x[source, ..., half]
    return y


@pytest.mark.parametrize("lead", [(T,), (T, N), (T, 2, N), (T, 0), (0, N), (1, N), (2, N)])
def test_values_and_gradients(xp, dtype, rng, lead):
    layer = xprnn.ContextShift(H)
    x, dy = (rng.normal(size=(*lead, 2 * H)).astype(dtype) for _ in range(2))
    params = layer.init(rng, xp.asarray(x))
    y, state, tape = layer.forward(params, xp.asarray(x))
    dx, dstate, dparams = layer.backward(tape, xp.asarray(dy))
    xp.assert_close((y, dx), (shift_loop(x, 1), shift_loop(dy, -1)), condition=0)
    xp.assert_close(layer(params, xp.asarray(x))[0], shift_loop(x, 1), condition=0)
    xp.assert_like((y, dx), xp.asarray(x))
    assert state is dstate is None
    assert params == dparams == layer.shapes() == {}


@float64_only
@pytest.mark.parametrize("lead", [(T, N), (1, 2), (T,)])
def test_gradient_equals_central_differences(xp, rng, lead):
    layer, x = xprnn.ContextShift(H), xp.asarray(rng.normal(size=(*lead, 2 * H)))
    worst = check_gradients_on(
        xp,
        lambda x: layer.forward({}, x)[::2],
        lambda tape, dy: (layer.backward(tape, dy).dx,),
        (x,),
        names=("x",),
    )
    assert max(worst.values()) < 1e-9


def network(kind="RNN"):
    return xprnn.Sequential(
        rnn=getattr(xprnn, kind)(V, H, bidirectional=True), shift=xprnn.ContextShift(H), head=xprnn.Linear(2 * H, V)
    )


@float64_only
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_network_gradients_equal_central_differences(xp, rng, kind):
    model = network(kind)
    params = model.init(rng, xp.asarray(np.zeros(1)))
    ids = xp.asarray(rng.integers(V, size=(T, N)))
    h = xp.asarray(rng.normal(size=(2, N, H)))

    def forward(params, state):
        y, final, tape = model.forward(params, ids, state)
        loss, dy = xprnn.cross_entropy(y, ids)
        return (loss, final), (tape, dy)

    def backward(tape, u):
        _, dstate, dparams = model.backward(tape[0], u[0] * tape[1], u[1])
        return dparams, dstate

    state = (h, 0.5 * h) if kind == "LSTM" else h
    assert max(check_gradients_on(xp, forward, backward, (params, state), names=("params", "state")).values()) < 1e-6


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_prediction_depends_on_every_other_character(xp, rng, kind):
    model = network(kind)
    params = model.init(rng, xp.asarray(np.zeros(1)))
    ids = rng.integers(V, size=(T, 1))
    before = xp.to_numpy(model(params, xp.asarray(ids))[0])
    for t in range(T):
        other = ids.copy()
        other[t] = (ids[t] + 1) % V
        after = xp.to_numpy(model(params, xp.asarray(other))[0])
        np.testing.assert_array_equal(after[t], before[t])
        changed = (after != before).any(axis=(1, 2))
        assert changed[np.arange(T) != t].all()


def test_two_layers_or_no_shift_leak_the_predicted_character(rng):
    """The test above fails without ContextShift and for a stack of two layers, so it can detect a leak."""
    ids = rng.integers(V, size=(T, 1))
    other = ids.copy()
    other[2] = (ids[2] + 1) % V
    two_layers = xprnn.Sequential(
        rnn=xprnn.RNN(V, H, num_layers=2, bidirectional=True), shift=xprnn.ContextShift(H), head=xprnn.Linear(2 * H, V)
    )
    no_shift = xprnn.Sequential(rnn=xprnn.RNN(V, H, bidirectional=True), head=xprnn.Linear(2 * H, V))
    for model in (two_layers, no_shift):
        params = model.init(rng, np.zeros(1))
        assert (model(params, ids)[0][2] != model(params, other)[0][2]).any()


def test_next_window_keeps_forward_state_and_zeroes_reverse_state(xp, rng):
    h, c = (rng.normal(size=(2, N, H)).astype("float32") for _ in range(2))
    state = next_window_state((xp.asarray(h), xp.asarray(c)))
    zero = np.zeros((1, N, H))
    xp.assert_close(state, (np.concatenate((h[:1], zero)), np.concatenate((c[:1], zero))), condition=0)
    xp.assert_like(state, xp.asarray(h))


def test_masked_character_does_not_influence_output(xp, rng):
    """A blank to be filled in is masked: both directions skip it, so the character stored there has no effect."""
    model = network("GRU")
    params = model.init(rng, xp.asarray(np.zeros(1)))
    ids = rng.integers(V, size=(T, 1))
    mask = np.ones((T, 1), bool)
    mask[2] = False
    other = ids.copy()
    other[2] = (ids[2] + 1) % V
    got = [model(params, xp.asarray(i), mask=xp.asarray(mask))[0] for i in (ids, other)]
    xp.assert_close(got[0], xp.to_numpy(got[1]), condition=0)


def test_invalid_calls_raise_input_error(rng):
    layer = xprnn.ContextShift(H)
    with pytest.raises(xprnn.InputError, match=r"x \(T,...,2H\) must end in 6 features"):
        layer({}, np.zeros((T, N, H)))
    with pytest.raises(xprnn.InputError, match="must end in 6 features"):
        layer({}, np.zeros(2 * H))
    with pytest.raises(xprnn.InputError, match="unexpected weight"):
        layer({"weight": np.zeros(1)}, np.zeros((T, N, 2 * H)))
    with pytest.raises(xprnn.InputError, match=r"dy .* must have shape \(5, 4, 6\)"):
        layer.backward(layer.forward({}, np.zeros((T, N, 2 * H)))[2], np.zeros((T, N, H)))
    with pytest.raises(xprnn.InputError, match="give the whole sequence"):
        layer.step({}, np.zeros((N, 2 * H)))
    with pytest.raises(xprnn.InputError, match="hidden_size must be an integer >= 1"):
        xprnn.ContextShift(0)
    model = network()
    with pytest.raises(xprnn.InputError, match="bidirectional"):
        model.step(model.init(rng, np.zeros(1)), np.zeros(N, int))


def test_config_round_trip():
    model = network("LSTM")
    assert from_config(model.config()) == model


def test_sizes_may_be_numpy_integers():
    size = np.int64(3)
    for layer in (
        xprnn.LSTM(size, (size, size), np.int32(2), proj_size=np.int64(2)),
        xprnn.RNN(size, size),
        xprnn.Linear(size, size),
        xprnn.Embedding(size, size),
        xprnn.ContextShift(size),
    ):
        assert from_config(json.loads(json.dumps(layer.config()))) == layer
