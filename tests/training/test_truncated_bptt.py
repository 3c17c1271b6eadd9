"""Windows for truncated back-propagation, activation checkpointing, and bounded memory of both."""

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


def leaves(tree: Any) -> list[Any]:
    if isinstance(tree, (tuple, list)):
        return [a for t in tree for a in leaves(t)]
    return [] if tree is None else [tree]


def tree_map(tree: Any, make: Any) -> Any:
    return tuple(tree_map(t, make) for t in tree) if isinstance(tree, tuple) else make(tree)


def forward_and_backward(xp: Any, layer: Any, inputs: Any, checkpoint: Any) -> list[Any]:
    """All outputs, states and gradients of forward and backward with one checkpoint setting."""
    x, options = inputs
    params = xp.asarray({n: xp.to_numpy(a) for n, a in layer.init(np.random.default_rng(1), like=x).items()})
    masks = np.random.default_rng(5) if layer.dropout else None
    y, state, tape = layer.forward(params, x, rng=masks, checkpoint=checkpoint, **options)
    rng = np.random.default_rng(7)

    def draw(a: Any) -> Any:
        return xp.asarray(rng.standard_normal(tuple(a.shape)))

    states = tape.states()
    g = layer.backward(tape, draw(y), tree_map(state, draw), dstates=tree_map(states, draw))
    return [y, *leaves(state), g.dx, *leaves(g.dstate), *g.dparams.values(), *leaves(states)]


@pytest.mark.parametrize(
    ("options", "masked"),
    [
        ({}, False),
        ({"num_layers": 2, "dropout": 0.3}, True),
        ({"num_layers": 2, "bidirectional": True, "dropout": 0.3}, True),
        ({"num_layers": 2, "reverse": True, "dropout": 0.3}, True),
    ],
    ids=["one layer", "stack", "bidirectional", "reverse"],
)
@pytest.mark.parametrize("name", LAYERS)
def test_checkpoints_do_not_change_results(xp, rng, name, options, masked):
    layer = LAYERS[name](**options)
    x, masks = xp.asarray(rng.standard_normal((11, 3, 3))), {}
    if masked:
        masks = {"mask": xp.asarray(rng.random((11, 3)) < 0.8), "reset": xp.asarray(rng.random((11, 3)) < 0.2)}
        masks["lengths"] = [11, 4, 0]
    expected = forward_and_backward(xp, layer, (x, masks), None)
    for checkpoint in (3, "sqrt", "50KB") if xp.library == "numpy" else (4,):
        for a, b in zip(forward_and_backward(xp, layer, (x, masks), checkpoint), expected, strict=True):
            xp.assert_close(a, b, condition=64)


@pytest.mark.parametrize("bad", [0, -1, True, 2.5, "many", "10", "MB", "1B", ""])
def test_invalid_checkpoint_raises(bad):
    layer = xprnn.RNN(3, 4)
    params = layer.init(np.random.default_rng(0), like=np.zeros(0))
    with pytest.raises(xprnn.InputError, match=r"RNN.forward: checkpoint.*found|RNN.forward: checkpoint.*at least"):
        layer.forward(params, np.zeros((5, 2, 3)), checkpoint=bad)


def test_peak_memory_stays_within_the_checkpoint_budget():
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
        # The budget is for the tape: dx and the buffer that joins its segments are not part of it.
        return high - before - 2 * x.nbytes

    peak(500)  # fills the caches of compiled kernels and plans
    full, small, large = peak(None), peak("2MB"), peak("6MB")
    assert small <= 2e6, small
    assert small < large <= 6e6, large
    assert full > 3 * large


def test_windows_have_every_step_once_with_its_context(xp):
    steps = np.arange(23)
    bounds = [0, 1, 1, 9, 10, 23]
    chunks = [(xp.asarray(steps[a:b]), xp.asarray(steps[a:b])) for a, b in pairwise(bounds)]
    for k1, k2, burn_in in ((4, 4, 0), (4, 7, 0), (3, 12, 5), (30, 30, 0), (1, 5, 23)):
        start, new_steps = 0, []
        for w in windows(iter(chunks), k1, k2, burn_in):
            x = xp.to_numpy(w.x)
            assert x[0] == start
            np.testing.assert_array_equal(x, np.arange(start, start + len(x)))
            assert w.target is None or len(x) <= k2
            if w.target is not None:
                np.testing.assert_array_equal(xp.to_numpy(w.target), x[-w.new_steps :])
                new_steps += x[-w.new_steps :].tolist()
            start += w.stride
        assert new_steps == steps[burn_in:].tolist()


@pytest.mark.parametrize("name", LAYERS)
def test_windows_with_full_context_sum_to_the_full_gradient(xp, rng, name):
    layer = LAYERS[name]()
    x = xp.asarray(rng.standard_normal((9, 2, 3)))
    target = xp.asarray(rng.standard_normal((9, 2, layer.output_size)))
    params = layer.init(rng, like=x)
    y, _, tape = layer.forward(params, x)
    _, dy = xprnn.mse(y, target, reduction="sum")
    expected = layer.backward(tape, dy).dparams
    # k2 = T: each window goes back to the first step, so the gradients of the windows sum to the full gradient.
    state, total = None, dict.fromkeys(params, 0)
    for w in windows([(x, target)], k1=3, k2=9):
        _, dparams, state = window_gradients(layer, params, w, state, lambda y, t: xprnn.mse(y, t, reduction="sum"))
        total = {k: total[k] + dparams[k] for k in total}
    xp.assert_close(total, expected, condition=256)


def test_gradient_goes_back_k2_steps(rng):
    layer = xprnn.RNN(1, 3)
    params = layer.init(rng, like=np.zeros(0))
    x, target = rng.standard_normal((8, 1, 1)), rng.standard_normal((8, 1, 3))
    state, found = None, None
    for w in windows([(x, target)], k1=2, k2=5):
        value, found, state = window_gradients(layer, params, w, state, xprnn.mse)
    # The last window has steps 3 to 7 and starts from the state after step 2; its loss is that of steps 6 and 7.
    _, initial_state = layer(params, x[:3])
    y, _, tape = layer.forward(params, x[3:], initial_state)
    expected_value, dlast = xprnn.mse(y[3:], target[6:])
    expected = layer.backward(tape, np.concatenate((np.zeros((3, 1, 3)), dlast))).dparams
    np.testing.assert_allclose(value, expected_value, rtol=1e-14)
    for key in params:
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-12, atol=1e-15)


def test_burn_in_advances_the_state_without_loss(rng):
    model = xprnn.Sequential(rnn=xprnn.GRU(2, 3), head=xprnn.Linear(3, 1))
    params = model.init(rng, like=np.zeros(0))
    x, target = rng.standard_normal((10, 2, 2)), rng.standard_normal((10, 2, 1))
    values, state = [], None
    for w in windows([(x, target)], k1=3, burn_in=4):
        value, dparams, state = window_gradients(model, params, w, state, xprnn.mse)
        values.append(value)
        assert (value is None) == (dparams is None) == (w.target is None)
    assert [v is None for v in values] == [True, True, False, False]
    y, final = model(params, x)
    np.testing.assert_allclose(values[2], xprnn.mse(y[4:7], target[4:7])[0], rtol=1e-12)
    np.testing.assert_allclose(state, final, rtol=1e-12)


def test_memory_is_independent_of_sequence_length(rng):
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
    # The alignment of chunks and windows changes the peak by a few steps, Python's small-object pools by 0.1 MB.
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
def test_invalid_windows_raise(call, message):
    with pytest.raises(xprnn.InputError, match=f"^windows: .*{message}"):
        call()


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_saved_state_continues_the_sequence(xp, rng, tmp_path, ending):
    model = xprnn.Sequential(rnn=xprnn.LSTM(2, (3, 4), num_layers=2), head=xprnn.Linear(4, 1))
    x = xp.asarray(rng.standard_normal((6, 2, 2)))
    params = model.init(rng, like=x)
    _, state = model(params, x[:3, ...])
    with xp.allow_host_conversion():
        xprnn.save_state(tmp_path / f"state.{ending}", state)
        loaded = xprnn.load_state(tmp_path / f"state.{ending}", like=x)
    xp.assert_like(loaded, x)
    y, _ = model(params, x[3:, ...], loaded)
    xp.assert_close(y, model(params, x[3:, ...], state)[0], condition=0)


def test_file_without_a_state_raises(tmp_path):
    layer = xprnn.RNN(2, 3)
    xprnn.save(tmp_path / "m.npz", layer, layer.init(np.random.default_rng(0), like=np.zeros(0)))
    with pytest.raises(xprnn.InputError, match="holds no state"):
        xprnn.load_state(tmp_path / "m.npz")
    with pytest.raises(xprnn.InputError, match="found object"):
        xprnn.save_state(tmp_path / "s.npz", object())
