"""Plain passes take a shorter way to the compiled kernels: the same bits, and what is not for it goes the long way."""

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


def arrays_of(found):
    parts = found.values() if isinstance(found, dict) else found
    return [a for p in parts for a in arrays_of(p)] if isinstance(found, (tuple, list, dict)) else [found]


def assert_same(a, b):
    for one, other in zip(arrays_of(a), arrays_of(b), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other, strict=True)


def made(rng, layer, shape, dtype=np.float32):
    """Parameters, x, dy and both adjoints and values of a state."""
    params = layer.init(rng, like=np.zeros(0, dtype))
    x = rng.standard_normal((*shape, layer.input_size)).astype(dtype)
    y, state = layer(params, x)
    dy = rng.standard_normal(y.shape).astype(dtype)
    given = [rng.standard_normal(a.shape).astype(dtype) for a in arrays_of(state)]
    return params, x, dy, tuple(given) if isinstance(state, tuple) else given[0]


class Counted:
    """How often the short way was taken, forward and backward; with `closed`, never."""

    def __init__(self, monkeypatch):
        self.counts, self.closed = {"forward": 0, "backward": 0}, False
        for name, way in (("forward", scan_plan.ForwardPlan), ("backward", scan_plan.BackwardPlan)):
            monkeypatch.setattr(way, "__call__", self._watched(name, way.__call__))

    def _watched(self, name, run):
        def watch(*args):
            done = None if self.closed else run(*args)
            self.counts[name] += done is not None
            return done

        return watch


@pytest.fixture
def short(monkeypatch):
    return Counted(monkeypatch)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("shape", [(1, 1), (4, 3), (300, 1), (70, 9)], ids=str)
def test_the_same_bits(rng, short, name, options, shape, dtype):
    """300 steps are more than a block of backward's, 9 rows more than a tile."""
    layer = LAYERS[name](**options)
    params, x, dy, state = made(rng, layer, shape, dtype)
    short.counts["forward"] = 0

    def run():
        y, final, tape = layer.forward(params, x, state)
        zero, end, other = layer.forward(params, x)
        inner = [tuple(np.ones_like(s) for s in one) for one in tape.states()]
        found = [y, final, zero, end, *tape.states(), layer.backward(tape, dy), layer.backward(other, dy, state)]
        found += stack.forward(layer, params, x, state, record_tape=False)[:2]
        return [*found, layer.backward(tape, dy, state, dstates=inner), layer.backward(tape, None, state)]

    found, ways = run(), layer.num_layers * layer.num_directions
    assert short.counts["forward"] == 3 * ways
    assert short.counts["backward"] >= 2 * ways
    short.closed = True
    assert_same(found, run())


def unaligned(a):
    memory = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype)
    memory[...] = a.ravel()
    return memory.reshape(a.shape)


class Own(np.ndarray):
    """A subclass."""


OTHERS = {
    "columns": np.asfortranarray,
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "backwards": lambda a: a[::-1].copy()[::-1],
    "unaligned": unaligned,
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "subclass": lambda a: a.view(Own),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("which", ["x", "dy", "weight_ih_l0", "weight_hh_l0", "bias_hh_l0", "h"])
def test_other_arrays(rng, kind, which):
    layer = xprnn.LSTM(3, 5)
    params, x, dy, state = made(rng, layer, (6, 2))

    def run(params, x, dy, h):
        y, final, tape = layer.forward(params, x, (h, state[1]))
        return y, final, layer.backward(tape, dy, (h, state[1]))

    given = {"params": params, "x": x, "dy": dy, "h": state[0]}
    want = run(**given)
    if which in params:
        given["params"] = params | {which: OTHERS[kind](params[which])}
    else:
        given[which] = OTHERS[kind](given[which])
    assert_same(run(**given), want)


def test_what_takes_the_long_way(rng, short):
    layer = xprnn.GRU(3, 5)
    params, x, _, state = made(rng, layer, (6, 2))
    mask = np.ones((6, 2), bool)
    short.counts["forward"] = 0
    layer.forward(params, x, state, lengths=[6, 3])
    layer.forward(params, x, state, mask=mask)
    layer.forward(params, x, state, reset=mask)
    layer.forward(params, np.zeros((6, 2), int))
    layer.forward(params, x[:0], state)
    layer.forward(params, x[:, :0])
    assert short.counts["forward"] == 0
    layer.forward(params, x, state, checkpoint=2)
    assert short.counts["forward"] == 3  # segments


def test_several_threads_share_a_forward_and_take_the_long_way_back(rng, short, monkeypatch):
    layer = xprnn.LSTM(64, 128)
    params, x, dy, state = made(rng, layer, (40, 32))
    threads = 1
    monkeypatch.setattr("xprnn.kernels.jit.threads.max_threads", lambda: threads)
    y, final, tape = layer.forward(params, x, state)
    grads = layer.backward(tape, dy)
    inference = layer(params, x, state)
    assert short.counts["forward"] > 1
    assert short.counts["backward"] == 1
    threads, shared = 2, []
    monkeypatch.setattr(
        scan_plan, "parallel_map", lambda walk, those: shared.append(len(those)) or parallel_map(walk, those)
    )
    assert_same(layer(params, x, state), inference)
    assert_same(layer.forward(params, x, state)[:2], (y, final))
    # A tape that one thread wrote, read by two: their sums are added up in another order.
    for one, two in zip(arrays_of(list(grads)), arrays_of(list(layer.backward(tape, dy))), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4 * np.abs(one).max())
    assert shared == [2, 2]
    assert short.counts["backward"] == 1


def test_what_inference_returns_is_the_callers(rng):
    layer = xprnn.LSTM(30, 100)  # too large for the compiled walk
    params, x, _, state = made(rng, layer, (6, 2))
    y, final = layer(params, x, state)
    want = copy.deepcopy((y, final))
    fresh = [y, *final]
    for k, a in enumerate(fresh):
        assert a.flags.c_contiguous
        assert not any(np.shares_memory(a, b) for b in (x, *params.values(), *state, *fresh[:k]))
        a[...] = 7
    assert_same(layer(params, x, state), want)
    assert_same(layer.forward(params, x, state)[:2], want)


@pytest.mark.parametrize("name", LAYERS)
def test_the_tape_is_nobodys(rng, name):
    """What forward and backward return may be written into, but for y and the states that the tape shows."""
    layer = LAYERS[name]()
    params, x, dy, state = made(rng, layer, (6, 2))
    y, final, tape = layer.forward(params, x, state)
    assert not y.flags.writeable
    assert not any(s.flags.writeable for s in arrays_of(tape.states()))
    first = layer.backward(tape, dy, state)
    want = copy.deepcopy(first)
    each = arrays_of(list(first))
    assert not any(np.shares_memory(a, b) for i, a in enumerate(each) for b in each[:i])
    for a in (*arrays_of(final), *each):
        a[...] = 7
    assert_same(list(layer.backward(tape, dy, state)), list(want))
