"""Planned forward and backward: the results of the reference scan; other arguments take the checked path."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from support.fast_paths import XP, as_dtype, check_planned_pass, planned_call, reference_call, state_arrays
from support.layer_cases import CASES, RARE_CASES, random_inputs

import xprnn
from xprnn.engine import call_cache, stack
from xprnn.kernels.config import reference_only
from xprnn.kernels.jit import threads

pytestmark = pytest.mark.needs("numba")
MAKERS = {name: case.make for name, case in CASES.items()} | RARE_CASES


@pytest.mark.parametrize("pass_state", [True, False])
@pytest.mark.parametrize("name", MAKERS)
def test_planned_pass_equals_reference_scan_for_every_cell(rng, name, pass_state):
    for steps, n in ((7, 1), (20, 2), (1, 5), (0, 2), (3, 0)):
        layer = MAKERS[name](3, 5, 1)
        p = random_inputs(rng, layer, min(steps, 7) if name in RARE_CASES else steps, N=n, scale=0.3)
        dy = rng.standard_normal(reference_call(layer, p.params, p.x, p.state)[0].shape)
        check_planned_pass(layer, p.params, p.x, p.state if pass_state else None, dy)


OPTIONS = [{"bias": False}, {"reverse": True}, {"dropout": 0.5}, {"num_layers": 3}, {"batch_first": True}]
OPTIONS += [
    {"learned_state": True},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "learned_state": True},
]
OPTIONS += [{"num_layers": 2, "batch_first": True, "reverse": True, "bias": False, "dropout": 0.5}]
OPTIONS += [{"num_layers": 3, "bidirectional": True, "batch_first": True, "bias": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["rnn", "lstm", "lstm-proj", "gru", "gru-before", "lstm-peepholes"])
def test_planned_pass_equals_reference_scan_for_every_option(rng, dtype, name, options):
    """With and without lengths, with features and with class numbers; a plan runs each of them, on compiled kernels."""
    options = dict(options)
    layer = CASES[name].make(3, 19, options.pop("num_layers", 1), **options)
    p = random_inputs(rng, layer, 6, N=3, scale=0.3)
    params, x, state = as_dtype((p.params, p.x, p.state), dtype)
    y = reference_call(layer, params, x.swapaxes(0, 1) if layer.batch_first else x, state)[0]
    dy = rng.standard_normal(y.shape).astype(dtype)
    for inputs in (x, rng.integers(0, 3, (6, 3))):
        time_first = inputs.swapaxes(0, 1) if layer.batch_first else inputs
        for lengths in (None, [4, 0, 6], np.array([6, 6, 6])):
            for initial in (state, None):
                _, _, tape = check_planned_pass(layer, params, time_first, initial, dy, lengths)
                lines = tape.explain().splitlines()
                assert len(lines) == (layer.num_layers * 2 if layer.bidirectional else 1)
                assert all(line.endswith("compiled by numba") for line in lines)
                checked = stack.forward(layer, params, time_first, initial, lengths=lengths, record_tape=True)
                np.testing.assert_equal(tape.states(), checked[2].states())  # the same kernels, so the same bits
    assert len(layer._calls.plans) == 4


@pytest.mark.parametrize("name", ["lstm", "lstm-proj"])
def test_directions_on_two_threads_give_the_same_bits(rng, monkeypatch, name):
    layer = CASES[name].make(3, 19, 2, bidirectional=True)
    p = random_inputs(rng, layer, 6, N=3)

    def run():
        y, final, tape = layer.forward(p.params, p.x, p.state, lengths=[3, 6, 1])
        return y, final, tape.states(), tuple(layer.backward(tape, y, final))

    expected, splits, parallel_map = run(), [], threads.parallel_map
    monkeypatch.setattr(call_cache, "_MIN_DIRECTION_WORK", 0)
    monkeypatch.setattr(call_cache, "max_threads", lambda: 2)
    monkeypatch.setattr(
        call_cache, "parallel_map", lambda fn, items: splits.append(len(items)) or parallel_map(fn, items)
    )
    np.testing.assert_equal(run(), expected)
    assert splits == [2, 2]


def test_forward_runs_the_plan(rng):
    layer = xprnn.LSTM(3, 5)
    p = random_inputs(rng, layer, 6, N=2)
    y, final, tape = layer.forward(p.params, p.x, p.state)
    assert isinstance(tape, call_cache.KernelTape)
    assert tape.explain() == "lstm x 1, forward: compiled by numba"
    planned = planned_call(layer, p.params, p.x, p.state, record_tape=True)
    np.testing.assert_array_equal(y, planned[0])
    np.testing.assert_equal(final, planned[1])
    checked = stack.forward(layer, p.params, p.x, p.state, record_tape=True)
    np.testing.assert_array_equal(y, checked[0])
    np.testing.assert_equal(layer(p.params, p.x, p.state), (y, final))
    dy = rng.standard_normal(y.shape)
    np.testing.assert_equal(layer.backward(tape, dy), layer.backward(checked[2], dy))
    assert layer == pickle.loads(pickle.dumps(layer))


def test_sparse_gradient_of_class_numbers_equals_the_dense_one(rng):
    dense, sparse = (xprnn.GRU(50, 5, sparse=flag) for flag in (False, True))
    p = random_inputs(rng, dense, 6, N=2)
    ids = rng.integers(0, 50, (6, 2))
    grads = []
    for layer in (dense, sparse):
        y, _, tape = planned_call(layer, p.params, ids, p.state, [4, 6], record_tape=True)
        grads.append(layer.backward(tape, np.cos(y)).dparams)
    assert isinstance(grads[1]["weight_ih_l0"], xprnn.SparseGradient)
    dense_again = grads[1]["weight_ih_l0"].to_dense()
    np.testing.assert_allclose(dense_again, grads[0]["weight_ih_l0"], rtol=0, atol=1e-12)


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
    np.testing.assert_equal(xprnn.LSTM(3, 5).backward(tape, dy, p.state), grads)  # by an equal layer


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2, "batch_first": True}], ids=str)
def test_backward_takes_cotangents_of_all_states(rng, options):
    layer = xprnn.LSTM(3, 5, **options)
    p = random_inputs(rng, layer, 6, N=2)
    x = p.x.swapaxes(0, 1) if layer.batch_first else p.x
    y, final, tape = layer.forward(p.params, x, p.state, lengths=[6, 4])
    dstates = [tuple(rng.standard_normal(s.shape) for s in states) for states in tape.states()]
    with reference_only():
        expected = layer.forward(p.params, x, p.state, lengths=[6, 4])[2]
    for dy, dstate in ((y, final), (None, final), (None, None), (y, (None, final[1]))):
        for cotangents in (dstates, None):
            got = layer.backward(tape, dy, dstate, dstates=cotangents)
            XP.assert_close(tuple(got), tuple(layer.backward(expected, dy, dstate, dstates=cotangents)), condition=256)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"batch_first": True}], ids=str)
def test_wrong_cotangents_raise(rng, options):
    layer = xprnn.LSTM(3, 5, **options)
    p = random_inputs(rng, layer, 6, N=2)
    y, (h, c), tape = layer.forward(p.params, p.x.swapaxes(0, 1) if layer.batch_first else p.x, p.state)
    expected = layer.backward(tape, y, (None, c))
    for dy, dstate in (
        (y[:-1], None),
        (y.astype("float32"), None),
        (y.astype(object), None),
        (np.ma.masked_array(y), None),
        (y.tolist(), None),
        (y[0, 0, 0].reshape(()), None),
        (y, h),
        (y, (h, c, c)),
        (y, (h, c[0])),
        (y, (h, c[:, :1])),
        (y, (h, c.astype("float32"))),
    ):
        with pytest.raises(xprnn.InputError, match=r"LSTM\.backward"):
            layer.backward(tape, dy, dstate)
    XP.assert_close(layer.backward(tape, np.asfortranarray(y), (np.zeros_like(h), c)), expected)
    other = xprnn.LSTM(3, 6, **options)
    with pytest.raises(xprnn.InputError, match="tape must be what this layer's forward returned"):
        other.backward(tape, y)


@pytest.mark.parametrize("layout", [np.asfortranarray, lambda a: np.flip(np.flip(a).copy()), np.ascontiguousarray])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"batch_first": True}], ids=str)
def test_backward_accepts_every_memory_layout(rng, layout, options):
    layer = xprnn.LSTM(3, 9, 2, **options)
    p = random_inputs(rng, layer, 6, N=2)
    y, final, tape = layer.forward(p.params, p.x.swapaxes(0, 1) if layer.batch_first else p.x, p.state)
    dy, dfinal = rng.standard_normal(y.shape), tuple(rng.standard_normal(s.shape) for s in final)
    expected = layer.backward(tape, dy, dfinal)
    for lengths in (None, [6, 6]):
        tape = layer.forward(p.params, tape.x.swapaxes(0, 1) if layer.batch_first else tape.x, p.state, lengths)[2]
        XP.assert_close(
            tuple(layer.backward(tape, layout(dy), tuple(map(layout, dfinal)))), tuple(expected), condition=64
        )
    spread = np.broadcast_to(dy[:, :1, :1], dy.shape)  # strides of 0
    XP.assert_close(tuple(layer.backward(tape, spread)), tuple(layer.backward(tape, spread.copy())), condition=64)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}], ids=str)
@pytest.mark.parametrize("lengths", [None, [6, 4]])
def test_editing_results_does_not_change_the_tape(rng, options, lengths):
    """Results of forward and backward are writable copies, except y and tape.states(), which are read-only."""
    layer = xprnn.LSTM(3, 5, **options)
    p = random_inputs(rng, layer, 6, N=2)
    y, final, tape = layer.forward(p.params, p.x, p.state, lengths)
    assert not y.flags.writeable
    assert not any(s.flags.writeable for states in tape.states() for s in states)
    gradients = layer.backward(tape, np.sin(y), p.state)
    want = copy.deepcopy(tuple(gradients))
    arrays = [gradients.dx, *gradients.dstate, *gradients.dparams.values()]
    assert not any(np.shares_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])
    for a in (*state_arrays(final), *arrays):
        a[...] = 7
    np.testing.assert_equal(tuple(layer.backward(tape, np.sin(y), p.state)), want)
