"""Fast forward and backward: the results of the reference scan; other arguments take the validated path."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from support.fast_paths import XP
from support.layer_cases import CASES, random_inputs

import xprnn
from xprnn.engine import stack
from xprnn.kernels.config import allow_jit, reference_only

pytestmark = pytest.mark.needs("numba")
FAST_CASES = [name for name in CASES if "before" not in name and "proj" not in name]


def reference_results(layer, params, x, state, dy):
    """y, final state, states and gradients by the validated path and the reference scan."""
    with reference_only():
        y, final, tape = stack.forward(layer, params, x, state, record_tape=True)
        return y, final, tape.states(), layer.backward(tape, dy)


def check_fast_forward(layer, p, state, dy, condition=256):
    """Assert that fast forward and backward apply, equal the reference scan, and return arrays that share no memory."""
    result = layer._fast_forward(p.params, p.x, state)
    assert result is not None
    y, final, tape = result
    grads = layer.backward(tape, dy)
    expected = reference_results(layer, p.params, p.x, state, dy)
    XP.assert_close((y, final, tape.states(), grads), expected, condition=condition)
    assert list(grads.dparams) == list(p.params)
    np.testing.assert_equal(layer.backward(tape, dy), grads)  # a tape may be used again
    finals = final if isinstance(final, tuple) else (final,)
    inputs = [p.x, *p.params.values(), *(() if state is None else state if isinstance(state, tuple) else (state,))]
    for a in finals:
        assert a.flags.writeable
        assert not any(np.shares_memory(a, b) for b in (*inputs, *tape.states()[0]))
    assert not y.flags.writeable
    return result


@pytest.mark.parametrize("pass_state", [True, False])
@pytest.mark.parametrize("name", FAST_CASES)
def test_fast_forward_equals_reference_scan_for_every_cell(rng, name, pass_state):
    for steps, n in ((7, 1), (40, 2), (1, 5)):
        layer = CASES[name].make(3, 5, 1)
        p = random_inputs(rng, layer, steps, N=n)
        check_fast_forward(layer, p, p.state if pass_state else None, rng.standard_normal((steps, n, 5)))


OPTIONS = [{"bias": False}, {"reverse": True}, {"dropout": 0.5}, {"num_layers": 3}, {"batch_first": True}]
OPTIONS += [{"num_layers": 2, "batch_first": True, "reverse": True, "bias": False, "dropout": 0.5}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_fast_forward_equals_reference_scan_for_every_option(rng, kind, options):
    layer = getattr(xprnn, kind)(3, 19, **options)
    p = random_inputs(rng, layer, 6, N=2)
    dy = rng.standard_normal((6, 2, 19))
    if layer.batch_first:
        p, dy = p._replace(x=p.x.swapaxes(0, 1)), dy.swapaxes(0, 1).copy()
    for state in (p.state, None):
        check_fast_forward(layer, p, state, dy)
    assert layer._fast_inference(p.params, p.x, None) is not None
    np.testing.assert_equal(
        layer._fast_inference(p.params, p.x, p.state)[:2], layer.forward(p.params, p.x, p.state)[:2]
    )


def test_forward_runs_the_fast_forward(rng):
    layer = xprnn.LSTM(3, 5)
    p = random_inputs(rng, layer, 6, N=2)
    y, final, tape = layer.forward(p.params, p.x, p.state)
    assert tape.explain() == "lstm x 1, forward: compiled by numba"
    fast = layer._fast_forward(p.params, p.x, p.state)
    np.testing.assert_array_equal(y, fast[0])
    np.testing.assert_equal(final, fast[1])
    validated = stack.forward(layer, p.params, p.x, p.state, record_tape=True)
    np.testing.assert_array_equal(y, validated[0])  # the same kernel, so the same bits
    dy = rng.standard_normal(y.shape)
    np.testing.assert_equal(layer.backward(tape, dy), layer.backward(validated[2], dy))
    assert layer == pickle.loads(pickle.dumps(layer))


def test_wrong_arguments_of_forward_raise(rng):
    layer = xprnn.GRU(3, 5)
    p = random_inputs(rng, layer, 6, N=2)
    right, x = p.params, p.x
    for params, wrong_x, state in (
        (right, x.astype("float32"), None),
        (right, x[..., :2], None),
        (right, x[0], None),
        (right, np.ma.masked_array(x), None),
        ({**right, "weight_hh_l0": right["weight_hh_l0"].T}, x, None),
        ({**right, "bias_hh_l0": right["bias_hh_l0"][None]}, x, None),
        ({k: v for k, v in right.items() if "bias" not in k}, x, None),
        (right, x, np.zeros((1, 3, 5))),
        (right, x, np.zeros((1, 2, 5), "float32")),
        (right, x, (np.zeros((1, 2, 5)),)),
    ):
        assert layer._fast_forward(params, wrong_x, state) is None
        with pytest.raises(xprnn.InputError):
            layer.forward(params, wrong_x, state)


def test_fast_forward_does_not_apply_to_other_layers_and_without_jit(rng):
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


def test_scan_tapes_are_built_at_first_access(rng):
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
    np.testing.assert_equal(
        xprnn.LSTM(3, 5).backward(tape, dy, p.state), grads
    )  # a tape may be used with an equal layer


def test_wrong_cotangents_raise(rng):
    layer = xprnn.LSTM(3, 5)
    p = random_inputs(rng, layer, 6, N=2)
    y, (h, c), tape = layer.forward(p.params, p.x, p.state)
    expected = layer.backward(tape, y, (None, c))
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
    XP.assert_close(layer.backward(tape, np.asfortranarray(y), (np.zeros_like(h), c)), expected)
