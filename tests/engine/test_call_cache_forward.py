"""Quick passes: a small layer's forward with a tape is the scan's, and what does not fit goes the scan's way."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from engine.test_call_cache_step import XP
from support.layer_cases import CASES, random_inputs

import xprnn
from xprnn.engine import stack
from xprnn.kernels.config import allow_jit, reference_only

pytestmark = pytest.mark.needs("numba")
PASSED = [name for name in CASES if "before" not in name and "proj" not in name]


def scanned(layer, params, x, state, dy):
    """What the checked way says, by the generic scan."""
    with reference_only():
        y, final, tape = stack.forward(layer, params, x, state, record_tape=True)
        return y, final, tape.states(), layer.backward(tape, dy)


def agree(layer, p, state, dy, condition=256):
    found = layer._fast_forward(p.params, p.x, state)
    assert found is not None
    y, final, tape = found
    grads = layer.backward(tape, dy)
    XP.assert_close((y, final, tape.states(), grads), scanned(layer, p.params, p.x, state, dy), condition=condition)
    assert list(grads.dparams) == list(p.params)
    np.testing.assert_equal(layer.backward(tape, dy), grads)  # replayed
    fresh = final if isinstance(final, tuple) else (final,)
    given = [p.x, *p.params.values(), *(() if state is None else state if isinstance(state, tuple) else (state,))]
    for a in fresh:
        assert a.flags.writeable
        assert not any(np.shares_memory(a, b) for b in (*given, *tape.states()[0]))
    assert not y.flags.writeable
    return found


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", PASSED)
def test_every_cell_is_the_scan(rng, name, given):
    for steps, n in ((7, 1), (40, 2), (1, 5)):
        layer = CASES[name].make(3, 5, 1)
        p = random_inputs(rng, layer, steps, N=n)
        agree(layer, p, p.state if given else None, rng.standard_normal((steps, n, 5)))


OPTIONS = [{"bias": False}, {"reverse": True}, {"dropout": 0.5}, {"num_layers": 3}, {"batch_first": True}]
OPTIONS += [{"num_layers": 2, "batch_first": True, "reverse": True, "bias": False, "dropout": 0.5}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_every_option_is_the_scan(rng, kind, options):
    layer = getattr(xprnn, kind)(3, 19, **options)
    p = random_inputs(rng, layer, 6, N=2)
    dy = rng.standard_normal((6, 2, 19))
    if layer.batch_first:
        p, dy = p._replace(x=p.x.swapaxes(0, 1)), dy.swapaxes(0, 1).copy()
    for state in (p.state, None):
        agree(layer, p, state, dy)
    assert layer._fast_inference(p.params, p.x, None) is not None
    np.testing.assert_equal(
        layer._fast_inference(p.params, p.x, p.state)[:2], layer.forward(p.params, p.x, p.state)[:2]
    )


def test_it_is_the_way_that_forward_takes_and_says_so(rng):
    layer = xprnn.LSTM(3, 5)
    p = random_inputs(rng, layer, 6, N=2)
    y, final, tape = layer.forward(p.params, p.x, p.state)
    assert tape.explain() == "lstm x 1, forward: compiled by numba"
    quick = layer._fast_forward(p.params, p.x, p.state)
    np.testing.assert_array_equal(y, quick[0])
    np.testing.assert_equal(final, quick[1])
    checked = stack.forward(layer, p.params, p.x, p.state, record_tape=True)
    np.testing.assert_array_equal(y, checked[0])  # the same kernel: bit for bit
    dy = rng.standard_normal(y.shape)
    np.testing.assert_equal(layer.backward(tape, dy), layer.backward(checked[2], dy))
    assert layer == pickle.loads(pickle.dumps(layer))


def test_what_does_not_fit_goes_the_checked_way(rng):
    layer = xprnn.GRU(3, 5)
    p = random_inputs(rng, layer, 6, N=2)
    double, x = p.params, p.x
    for params, given, state in (
        (double, x.astype("float32"), None),
        (double, x[..., :2], None),
        (double, x[0], None),
        (double, np.ma.masked_array(x), None),
        ({**double, "weight_hh_l0": double["weight_hh_l0"].T}, x, None),
        ({**double, "bias_hh_l0": double["bias_hh_l0"][None]}, x, None),
        ({k: v for k, v in double.items() if "bias" not in k}, x, None),
        (double, x, np.zeros((1, 3, 5))),
        (double, x, np.zeros((1, 2, 5), "float32")),
        (double, x, (np.zeros((1, 2, 5)),)),
    ):
        assert layer._fast_forward(params, given, state) is None
        with pytest.raises(xprnn.InputError):
            layer.forward(params, given, state)


def test_other_layers_and_switched_off_kernels_have_none(rng):
    for layer in (xprnn.GRU(3, (5, 5), 2), xprnn.GRU(3, 5, bidirectional=True), xprnn.GRU(3, 5, learned_state=True)):
        p = random_inputs(rng, layer, 6, N=2)
        assert layer._fast_forward(p.params, p.x, p.state) is None
    layer = xprnn.GRU(3, 5)
    p = random_inputs(rng, layer, 6, N=2)
    for context in (reference_only(), allow_jit(False)):
        with context:
            assert layer._fast_forward(p.params, p.x, p.state) is None
    assert layer._fast_forward(p.params, p.x[:0], p.state) is None
    assert layer._fast_forward(p.params, rng.integers(0, 3, (6, 2)), p.state) is None


def test_records_are_made_when_asked_for(rng):
    layer = xprnn.LSTM(3, 5)
    p = random_inputs(rng, layer, 6, N=2)
    y, _, tape = layer.forward(p.params, p.x, p.state)
    dy = rng.standard_normal(y.shape)
    grads = layer.backward(tape, dy, p.state)
    assert "direction_stacks" not in vars(tape)
    states = tape.states()
    assert "direction_stacks" in vars(tape)
    np.testing.assert_array_equal(states[0][0], y)
    np.testing.assert_equal(layer.backward(tape, dy, p.state), grads)
    np.testing.assert_equal(xprnn.LSTM(3, 5).backward(tape, dy, p.state), grads)  # an equal layer


def test_adjoints_that_do_not_fit_are_explained(rng):
    layer = xprnn.LSTM(3, 5)
    p = random_inputs(rng, layer, 6, N=2)
    y, (h, c), tape = layer.forward(p.params, p.x, p.state)
    want = layer.backward(tape, y, (None, c))
    for dy, dstate in (
        (y[:-1], None),
        (y.astype("float32"), None),
        (y.astype(object), None),
        (np.ma.masked_array(y), None),
        (y, h),
        (y, (h, c, c)),
        (y, (h, c[0])),
        (y, (h, c.astype("float32"))),
    ):
        with pytest.raises(xprnn.InputError, match=r"LSTM\.backward"):
            layer.backward(tape, dy, dstate)
    XP.assert_close(layer.backward(tape, np.asfortranarray(y), (np.zeros_like(h), c)), want)
