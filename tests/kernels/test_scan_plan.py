"""Plans of compiled scans: bitwise equal to the unplanned scan, and used only for the arrays they support."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import xprnn
from xprnn.engine import stack
from xprnn.kernels.jit import scan_plan
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
        for name, plan in (("forward", scan_plan.ForwardPlan), ("backward", scan_plan.BackwardPlan)):
            monkeypatch.setattr(plan, "__call__", self._wrap(name, plan.__call__))

    def _wrap(self, name, run):
        def call(*args):
            result = None if self.disabled else run(*args)
            self.counts[name] += result is not None
            return result

        return call


@pytest.fixture
def plans(monkeypatch):
    return PlanCounter(monkeypatch)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("shape", [(1, 1), (4, 3), (300, 1), (70, 9)], ids=str)
def test_plans_are_bitwise_equal_to_the_unplanned_scan(rng, plans, name, options, shape, dtype):
    """300 steps are more than a block of the backward kernel; 9 rows are more than a tile of matmul."""
    layer = LAYERS[name](**options)
    params, x, dy, state = make_problem(rng, layer, shape, dtype)
    plans.counts["forward"] = 0

    def run():
        y, final, tape = layer.forward(params, x, state)
        zero, end, other = layer.forward(params, x)
        dstates = [tuple(np.ones_like(s) for s in one) for one in tape.states()]
        results = [y, final, zero, end, *tape.states(), layer.backward(tape, dy), layer.backward(other, dy, state)]
        results += stack.forward(layer, params, x, state, record_tape=False)[:2]
        return [*results, layer.backward(tape, dy, state, dstates=dstates), layer.backward(tape, None, state)]

    results, num_scans = run(), layer.num_layers * layer.num_directions
    assert plans.counts["forward"] == 3 * num_scans
    assert plans.counts["backward"] >= 2 * num_scans
    plans.disabled = True
    assert_equal(results, run())


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
    "unaligned": unaligned,
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "subclass": lambda a: a.view(ArraySubclass),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["x", "dy", "weight_ih_l0", "weight_hh_l0", "bias_hh_l0", "h"])
def test_other_memory_layouts_give_equal_results(rng, layout, which):
    layer = xprnn.LSTM(3, 5)
    params, x, dy, state = make_problem(rng, layer, (6, 2))

    def run(params, x, dy, h):
        y, final, tape = layer.forward(params, x, (h, state[1]))
        return y, final, layer.backward(tape, dy, (h, state[1]))

    arguments = {"params": params, "x": x, "dy": dy, "h": state[0]}
    want = run(**arguments)
    if which in params:
        arguments["params"] = params | {which: LAYOUTS[layout](params[which])}
    else:
        arguments[which] = LAYOUTS[layout](arguments[which])
    assert_equal(run(**arguments), want)


def test_no_plan_for_masks_resets_integers_and_empty_arrays(rng, plans):
    layer = xprnn.GRU(3, 5)
    params, x, _, state = make_problem(rng, layer, (6, 2))
    mask = np.ones((6, 2), bool)
    plans.counts["forward"] = 0
    layer.forward(params, x, state, lengths=[6, 3])
    layer.forward(params, x, state, mask=mask)
    layer.forward(params, x, state, reset=mask)
    layer.forward(params, np.zeros((6, 2), int))
    layer.forward(params, x[:0], state)
    layer.forward(params, x[:, :0])
    assert plans.counts["forward"] == 0
    layer.forward(params, x, state, checkpoint=2)
    assert plans.counts["forward"] == 3  # one per checkpoint segment


def test_forward_plan_is_threaded_and_threaded_backward_is_unplanned(rng, plans, monkeypatch):
    layer = xprnn.LSTM(64, 128)
    params, x, dy, state = make_problem(rng, layer, (40, 32))
    threads = 1
    monkeypatch.setattr("xprnn.kernels.jit.threads.max_threads", lambda: threads)
    y, final, tape = layer.forward(params, x, state)
    grads = layer.backward(tape, dy)
    inference = layer(params, x, state)
    assert plans.counts["forward"] > 1
    assert plans.counts["backward"] == 1
    threads, split_sizes = 2, []
    monkeypatch.setattr(
        scan_plan, "parallel_map", lambda fn, items: split_sizes.append(len(items)) or parallel_map(fn, items)
    )
    assert_equal(layer(params, x, state), inference)
    assert_equal(layer.forward(params, x, state)[:2], (y, final))
    # Two threads read a tape that one thread wrote, and add the gradient sums in another order.
    for one, two in zip(tree_leaves(list(grads)), tree_leaves(list(layer.backward(tape, dy))), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4 * np.abs(one).max())
    assert split_sizes == [2, 2]
    assert plans.counts["backward"] == 1


def test_inference_results_share_no_memory(rng):
    layer = xprnn.LSTM(30, 100)  # too large for the sequence kernel
    params, x, _, state = make_problem(rng, layer, (6, 2))
    y, final = layer(params, x, state)
    want = copy.deepcopy((y, final))
    outputs = [y, *final]
    for k, a in enumerate(outputs):
        assert a.flags.c_contiguous
        assert not any(np.shares_memory(a, b) for b in (x, *params.values(), *state, *outputs[:k]))
        a[...] = 7
    assert_equal(layer(params, x, state), want)
    assert_equal(layer.forward(params, x, state)[:2], want)


@pytest.mark.parametrize("name", LAYERS)
def test_editing_results_does_not_change_the_tape(rng, name):
    """Results of forward and backward are writable copies, except y and tape.states(), which are read-only."""
    layer = LAYERS[name]()
    params, x, dy, state = make_problem(rng, layer, (6, 2))
    y, final, tape = layer.forward(params, x, state)
    assert not y.flags.writeable
    assert not any(s.flags.writeable for s in tree_leaves(tape.states()))
    gradients = layer.backward(tape, dy, state)
    want = copy.deepcopy(gradients)
    arrays = tree_leaves(list(gradients))
    assert not any(np.shares_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])
    for a in (*tree_leaves(final), *arrays):
        a[...] = 7
    assert_equal(list(layer.backward(tape, dy, state)), list(want))
