"""Windows over endless sequences, checkpoints and bounded memory."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import xprnn
from xprnn.training.truncated_bptt import window_gradients, windows

LAYERS = {
    "elman": lambda **kw: xprnn.RNN(3, 4, **kw),
    "lstm": lambda **kw: xprnn.LSTM(3, 4, **kw),
    "projected": lambda **kw: xprnn.LSTM(3, 4, proj_size=2, **kw),
    "gru": lambda **kw: xprnn.GRU(3, 4, **kw),
    "original gru": lambda **kw: xprnn.GRU(3, 4, reset_after=False, **kw),
}


def arrays_in(tree: Any) -> list[Any]:
    if isinstance(tree, (tuple, list)):
        return [a for t in tree for a in arrays_in(t)]
    return [] if tree is None else [tree]


def like(tree: Any, make: Any) -> Any:
    return tuple(like(t, make) for t in tree) if isinstance(tree, tuple) else make(tree)


def passed(xp: Any, layer: Any, given: Any, checkpoint: Any) -> list[Any]:
    """Everything a pass and its adjoint give, under one checkpoint setting."""
    x, flags = given
    params = xp.asarray({n: xp.to_numpy(a) for n, a in layer.init(np.random.default_rng(1), like=x).items()})
    masks = np.random.default_rng(5) if layer.dropout else None
    y, state, tape = layer.forward(params, x, rng=masks, checkpoint=checkpoint, **flags)
    rng = np.random.default_rng(7)

    def draw(a: Any) -> Any:
        return xp.asarray(rng.standard_normal(tuple(a.shape)))

    states = tape.states()
    g = layer.backward(tape, draw(y), like(state, draw), dstates=like(states, draw))
    return [y, *arrays_in(state), g.dx, *arrays_in(g.dstate), *g.dparams.values(), *arrays_in(states)]


@pytest.mark.parametrize(
    ("options", "ragged"),
    [
        ({}, False),
        ({"num_layers": 2, "dropout": 0.3}, True),
        ({"num_layers": 2, "bidirectional": True, "dropout": 0.3}, True),
        ({"num_layers": 2, "reverse": True, "dropout": 0.3}, True),
    ],
    ids=["one", "stack", "both ways", "reverse"],
)
@pytest.mark.parametrize("name", LAYERS)
def test_checkpoints_change_memory_and_nothing_else(xp, rng, name, options, ragged):
    layer = LAYERS[name](**options)
    x, flags = xp.asarray(rng.standard_normal((11, 3, 3))), {}
    if ragged:
        flags = {"mask": xp.asarray(rng.random((11, 3)) < 0.8), "reset": xp.asarray(rng.random((11, 3)) < 0.2)}
        flags["lengths"] = [11, 4, 0]
    whole = passed(xp, layer, (x, flags), None)
    for checkpoint in (3, "sqrt", "50KB") if xp.library == "numpy" else (4,):
        for a, b in zip(passed(xp, layer, (x, flags), checkpoint), whole, strict=True):
            xp.assert_close(a, b, condition=64)


@pytest.mark.parametrize("bad", [0, -1, True, 2.5, "many", "10", "MB", "1B", ""])
def test_a_checkpoint_that_means_nothing_is_refused(bad):
    layer = xprnn.RNN(3, 4)
    params = layer.init(np.random.default_rng(0), like=np.zeros(0))
    with pytest.raises(xprnn.InputError, match=r"RNN.forward: checkpoint.*found|RNN.forward: checkpoint.*at least"):
        layer.forward(params, np.zeros((5, 2, 3)), checkpoint=bad)


def test_peak_memory_follows_the_budget():
    layer = xprnn.LSTM(8, 16, num_layers=2)
    rng = np.random.default_rng(0)
    params = layer.init(rng, like=np.zeros(0))
    x = rng.standard_normal((1500, 8, 8))

    def peak(checkpoint: Any) -> int:
        tracemalloc.start()
        y, _, tape = layer.forward(params, x, checkpoint=checkpoint)
        dy = np.ones_like(y)
        tracemalloc.reset_peak()
        before = dy.nbytes + y.nbytes
        layer.backward(tape, dy)
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # What is returned, dx, and what joining its segments takes, is not the tape's.
        return high - before - 2 * x.nbytes

    peak(500)  # what is compiled and cached once
    full, small, large = peak(None), peak("2MB"), peak("6MB")
    assert small <= 2e6, small
    assert small < large <= 6e6, large
    assert full > 3 * large


def test_windows_hold_every_step_once_and_the_context_before_it(xp):
    steps = np.arange(23)
    cuts = [0, 1, 1, 9, 10, 23]
    chunks = [(xp.asarray(steps[a:b]), xp.asarray(steps[a:b])) for a, b in pairwise(cuts)]
    for k1, k2, burn_in in ((4, 4, 0), (4, 7, 0), (3, 12, 5), (30, 30, 0), (1, 5, 23)):
        start, fresh = 0, []
        for w in windows(iter(chunks), k1, k2, burn_in):
            x = xp.to_numpy(w.x)
            assert x[0] == start
            np.testing.assert_array_equal(x, np.arange(start, start + len(x)))
            assert w.target is None or len(x) <= k2
            if w.target is not None:
                np.testing.assert_array_equal(xp.to_numpy(w.target), x[-w.new_steps :])
                fresh += x[-w.new_steps :].tolist()
            start += w.stride
        assert fresh == steps[burn_in:].tolist()


@pytest.mark.parametrize("name", LAYERS)
def test_a_window_as_long_as_the_sequence_is_full_back_propagation(xp, rng, name):
    layer = LAYERS[name]()
    x = xp.asarray(rng.standard_normal((9, 2, 3)))
    target = xp.asarray(rng.standard_normal((9, 2, layer.output_size)))
    params = layer.init(rng, like=x)
    y, _, tape = layer.forward(params, x)
    _, dy = xprnn.mse(y, target, reduction="sum")
    whole = layer.backward(tape, dy).dparams
    # k2 = T: each window goes back to the start, so the windows' gradients add up to the whole one.
    state, total = None, dict.fromkeys(params, 0)
    for w in windows([(x, target)], k1=3, k2=9):
        _, dparams, state = window_gradients(layer, params, w, state, lambda y, t: xprnn.mse(y, t, reduction="sum"))
        total = {k: total[k] + dparams[k] for k in total}
    xp.assert_close(total, whole, condition=256)


def test_a_gradient_goes_back_k2_steps_and_no_further(rng):
    layer = xprnn.RNN(1, 3)
    params = layer.init(rng, like=np.zeros(0))
    x, target = rng.standard_normal((8, 1, 1)), rng.standard_normal((8, 1, 3))
    state, found = None, None
    for w in windows([(x, target)], k1=2, k2=5):
        value, found, state = window_gradients(layer, params, w, state, xprnn.mse)
    # The last window: steps 3 to 7 from the state after step 2, loss of steps 6 and 7.
    _, before = layer(params, x[:3])
    y, _, tape = layer.forward(params, x[3:], before)
    wanted, dlast = xprnn.mse(y[3:], target[6:])
    expected = layer.backward(tape, np.concatenate((np.zeros((3, 1, 3)), dlast))).dparams
    np.testing.assert_allclose(value, wanted, rtol=1e-14)
    for key in params:
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-12, atol=1e-15)


def test_burn_in_settles_the_state(rng):
    model = xprnn.Sequential(rnn=xprnn.GRU(2, 3), head=xprnn.Linear(3, 1))
    params = model.init(rng, like=np.zeros(0))
    x, target = rng.standard_normal((10, 2, 2)), rng.standard_normal((10, 2, 1))
    results, state = [], None
    for w in windows([(x, target)], k1=3, burn_in=4):
        value, dparams, state = window_gradients(model, params, w, state, xprnn.mse)
        results.append(value)
        assert (value is None) == (dparams is None) == (w.target is None)
    assert [r is None for r in results] == [True, True, False, False]
    whole, final = model(params, x)
    np.testing.assert_allclose(results[2], xprnn.mse(whole[4:7], target[4:7])[0], rtol=1e-12)
    np.testing.assert_allclose(state, final, rtol=1e-12)


def test_memory_does_not_grow_with_the_length_of_a_stream(rng):
    layer = xprnn.RNN(1, 16)
    params = layer.init(rng, like=np.zeros(0))

    def peak(count: int) -> int:
        stream = ((np.ones((150, 32, 1)), np.zeros((150, 32, 16))) for _ in range(count))
        state = None
        tracemalloc.start()
        for w in windows(stream, k1=64, k2=128):
            _, _, state = window_gradients(layer, params, w, state, xprnn.mse)
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return high

    peak(1)
    # How chunks and windows meet moves the peak by a few steps, Python's pools of small objects by 0.1 MB.
    assert peak(40) < 1.2 * peak(10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: windows([], 0), "k1 must be an integer >= 1, found 0"),
        (lambda: windows([], 4, 3), "k2 must be an integer >= k1, found 3"),
        (lambda: windows([], 4, burn_in=-1), "burn_in must be an integer >= 0, found -1"),
        (lambda: list(windows([np.zeros(3)], 2)), r"each chunk must be a pair \(x, target\), found ndarray"),
        (lambda: list(windows([(np.zeros(3), np.zeros(4))], 2)), "3 steps of x but 4 of target"),
    ],
)
def test_bad_windows_are_refused(call, message):
    with pytest.raises(xprnn.InputError, match=f"^windows: .*{message}"):
        call()


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_a_state_can_be_saved_and_a_stream_goes_on(xp, rng, tmp_path, ending):
    model = xprnn.Sequential(rnn=xprnn.LSTM(2, (3, 4), num_layers=2), head=xprnn.Linear(4, 1))
    x = xp.asarray(rng.standard_normal((6, 2, 2)))
    params = model.init(rng, like=x)
    _, state = model(params, x[:3, ...])
    with xp.allow_host_conversion():
        xprnn.save_state(tmp_path / f"state.{ending}", state)
        again = xprnn.load_state(tmp_path / f"state.{ending}", like=x)
    xp.assert_like(again, x)
    y, _ = model(params, x[3:, ...], again)
    xp.assert_close(y, model(params, x[3:, ...], state)[0], condition=0)


def test_a_state_file_of_another_kind_is_refused(tmp_path):
    layer = xprnn.RNN(2, 3)
    xprnn.save(tmp_path / "m.npz", layer, layer.init(np.random.default_rng(0), like=np.zeros(0)))
    with pytest.raises(xprnn.InputError, match="holds no state"):
        xprnn.load_state(tmp_path / "m.npz")
    with pytest.raises(xprnn.InputError, match="found object"):
        xprnn.save_state(tmp_path / "s.npz", object())
