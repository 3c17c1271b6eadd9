"""Plans of calls: bitwise equal to the checked path, for arrays of any memory layout and on several threads."""

from __future__ import annotations

import numpy as np
import pytest
from support.fast_paths import XP

import xprnn
from xprnn.engine.call_cache import LayerCalls
from xprnn.kernels.jit import scan
from xprnn.kernels.jit.threads import parallel_map

pytestmark = pytest.mark.needs("numba")
LAYERS = {
    "rnn": lambda **k: xprnn.RNN(3, 5, **k),
    "relu": lambda **k: xprnn.RNN(3, 5, nonlinearity="relu", **k),
    "lstm": lambda **k: xprnn.LSTM(3, 5, **k),
    "gru": lambda **k: xprnn.GRU(3, 5, **k),
    "gru-before": lambda **k: xprnn.GRU(3, 5, reset_after=False, **k),
    "peepholes": lambda **k: xprnn.LSTM(3, 5, cell=xprnn.cells.lstm(peepholes=True), **k),
}
OPTIONS = [{}, {"reverse": True}, {"bias": False}, {"bidirectional": True, "num_layers": 2}]


def tree_leaves(tree):
    """Return the arrays of nested tuples, lists and dicts."""
    children = tree.values() if isinstance(tree, dict) else tree
    return [a for c in children for a in tree_leaves(c)] if isinstance(tree, (tuple, list, dict)) else [tree]


def assert_equal(a, b):
    """Check that two trees have the same arrays, bit for bit."""
    for one, other in zip(tree_leaves(a), tree_leaves(b), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other, strict=True)


def make_problem(rng, layer, shape, dtype=np.float32):
    """Return parameters, x, dy, and a random tree of the structure of the state."""
    params = layer.init(rng, like=np.zeros(0, dtype))
    x = rng.standard_normal((*shape, layer.input_size)).astype(dtype)
    y, state = layer(params, x)
    dy = rng.standard_normal(y.shape).astype(dtype)
    states = [rng.standard_normal(a.shape).astype(dtype) for a in tree_leaves(state)]
    return params, x, dy, tuple(states) if isinstance(state, tuple) else states[0]


class PlanCounter:
    """Counts the passes that a plan ran. If `disabled`, no plan runs."""

    def __init__(self, monkeypatch):
        self.counts, self.disabled = {"forward": 0, "backward": 0}, False
        for name in self.counts:
            monkeypatch.setattr(LayerCalls, name, self._wrap(name, getattr(LayerCalls, name)))

    def _wrap(self, name, run):
        def call(*args, **options):
            result = None if self.disabled else run(*args, **options)
            self.counts[name] += result is not None
            return result

        return call


@pytest.fixture
def plans(monkeypatch):
    return PlanCounter(monkeypatch)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("shape", [(1, 1), (4, 3), (300, 1), (70, 9)], ids=str)
def test_plans_are_bitwise_equal_to_the_checked_path(rng, plans, name, options, shape, dtype):
    """300 steps are more than a block of the backward kernel; 9 rows are more than a tile of matmul."""
    layer = LAYERS[name](**options)
    params, x, dy, state = make_problem(rng, layer, shape, dtype)
    lengths = rng.integers(0, shape[0] + 1, shape[1])
    plans.counts["forward"] = 0

    def run():
        y, final, tape = layer.forward(params, x, state)
        zero, end, other = layer.forward(params, x)
        short, early, masked = layer.forward(params, x, state, lengths)
        results = [y, final, zero, end, short, early, *tape.states(), *masked.states(), *layer(params, x, state)]
        results += [layer.backward(tape, dy), layer.backward(other, dy, state), layer.backward(masked, dy, state)]
        return [*results, layer.backward(tape, dy, state), layer.backward(tape, None, state)]

    results = run()
    assert plans.counts == {"forward": 4, "backward": 4}  # a plan needs dy
    plans.disabled = True
    if layer.bidirectional:  # a plan adds the second direction's dx inside the product, which rounds in another way
        XP.assert_close(tuple(tree_leaves(results)), tuple(tree_leaves(run())), condition=512)
    else:
        assert_equal(results, run())
    assert plans.counts == {"forward": 4, "backward": 4}


def unaligned(a):
    memory = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype)
    memory[...] = a.ravel()
    return memory.reshape(a.shape)


class ArraySubclass(np.ndarray):
    """A subclass of ndarray."""


LAYOUTS = {
    "columns": np.asfortranarray,
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "reversed": lambda a: a[::-1].copy()[::-1],
    "reversed units": lambda a: a[..., ::-1].copy()[..., ::-1],
    "unaligned": unaligned,
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "subclass": lambda a: a.view(ArraySubclass),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["x", "dy", "weight_ih_l0", "weight_hh_l0", "bias_hh_l0", "weight_pi_l0", "h"])
@pytest.mark.parametrize("lengths", [None, [6, 6], [3, 5]])
def test_other_memory_layouts_give_the_same_bits(rng, layout, which, lengths):
    layer = xprnn.LSTM(3, 5, cell=xprnn.cells.lstm(peepholes=True))
    params, x, dy, state = make_problem(rng, layer, (6, 2))

    def run(params, x, dy, h):
        y, final, tape = layer.forward(params, x, (h, state[1]), lengths)
        return y, final, layer.backward(tape, dy, (h, state[1]))

    arguments = {"params": params, "x": x, "dy": dy, "h": state[0]}
    want = run(**arguments)
    if which in params:
        arguments["params"] = params | {which: LAYOUTS[layout](params[which])}
    else:
        arguments[which] = LAYOUTS[layout](arguments[which])
    assert_equal(run(**arguments), want)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}], ids=str)
def test_planned_passes_run_on_several_threads(rng, plans, monkeypatch, options):
    layer = xprnn.LSTM(64, 128, **options)
    params, x, dy, state = make_problem(rng, layer, (40, 32))
    count, splits, directions = 1, [], 1 + layer.bidirectional
    monkeypatch.setattr("xprnn.kernels.jit.threads.max_threads", lambda: count)
    monkeypatch.setattr(scan, "parallel_map", lambda fn, items: splits.append(len(items)) or parallel_map(fn, items))
    y, final, tape = layer.forward(params, x, state)
    grads = layer.backward(tape, dy)
    inference = layer(params, x, state)
    assert set(splits) <= {1}
    splits.clear()
    plans.counts.update(forward=0, backward=0)
    count = 2
    assert_equal(layer(params, x, state), inference)
    assert_equal(layer.forward(params, x, state)[:2], (y, final))
    # Two threads read a tape that one thread wrote, and add the gradient sums in another order.
    for one, two in zip(tree_leaves(list(grads)), tree_leaves(list(layer.backward(tape, dy))), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4 * np.abs(one).max())
    assert splits == [2, 2, 2] * directions
    assert plans.counts == {"forward": 2, "backward": 1}
