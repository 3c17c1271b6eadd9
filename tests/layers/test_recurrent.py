"""Recurrent layers of every cell on every array library: values against plain loops, gradients against differences."""

from __future__ import annotations

import numpy as np
import pytest
from support.layer_cases import (
    CASES,
    MAIN_CASES,
    SLOW_LIBRARIES,
    inputs_on,
    random_cotangents,
    random_inputs,
    random_state,
    reference_outputs,
    to_backend,
)

import xprnn
from xprnn.gradcheck import check_layer

# The excluded variants run the same code on the same numbers; test_gradients_equal_those_of_numpy covers them.
differences = pytest.mark.not_on(
    "strict:no_float64", "strict:device1", "numpy:readonly", reason="differences are taken on the plain variant"
)
every_case = pytest.mark.parametrize("name", CASES)
main_cases = pytest.mark.parametrize("name", MAIN_CASES)


@every_case
def test_equals_reference_loops(xp, dtype, rng, name):
    case = CASES[name]
    layer = case.make(3, 4, 2, bidirectional=True)
    p = random_inputs(rng, layer)
    params, x, state, _ = inputs_on(xp, p, dtype)
    y, final, _ = layer.forward(params, x, state)
    expected_y, expected_final = reference_outputs(case, layer, p)
    xp.assert_close(y, expected_y, condition=64)
    xp.assert_close(final, expected_final, condition=64)
    y_inference, final_inference = layer(params, x, state)
    xp.assert_close(y_inference, xp.to_numpy(y), condition=0)
    xp.assert_close(final_inference, expected_final, condition=64)


@differences
@every_case
@pytest.mark.applies_if(
    lambda xp, name: xp.library not in SLOW_LIBRARIES or name in MAIN_CASES,
    reason="the main cells are enough on the slowest libraries",
)
def test_gradients(xp, rng, name):
    layer = CASES[name].make(2, 3, bidirectional=True)
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer, T=4, N=2), "float64")
    assert max(check_layer(layer, params, x, state).values()) < 1e-6


@differences
@main_cases
@pytest.mark.not_on(*SLOW_LIBRARIES, reason="the slowest libraries: one layer is enough")
def test_gradients_of_two_layers(xp, rng, name):
    layer = CASES[name].make(2, 3, 2)
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer, T=3, N=2), "float64")
    check_layer(layer, params, x, state)


@every_case
def test_gradients_equal_those_of_numpy(xp, dtype, rng, name):
    """Differences test NumPy's gradients; every library and dtype must give the same numbers."""
    layer = CASES[name].make(2, 3, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=4, flags="lmr")
    y, final, tape = layer.forward(p.params, p.x, p.state, **p.flags)
    dy, dstate = random_cotangents(rng, y), random_cotangents(rng, final)
    expected = layer.backward(tape, dy, dstate)
    params, x, state, flags = inputs_on(xp, p, dtype)
    y, _, tape = layer.forward(params, x, state, **flags)
    grads = layer.backward(tape, to_backend(xp, dy, dtype), to_backend(xp, dstate, dtype))
    xp.assert_like((y, *grads), x)
    xp.assert_close(tuple(grads), tuple(expected), condition=500)


@differences
@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True, "bidirectional": True},
        {"bias": False, "bidirectional": True},
        {"learned_state": True, "bidirectional": True},
        {"learned_state": True, "num_layers": 2, "hidden_size": (3, 2), "bidirectional": True},
        {"hidden_size": (3, 2), "num_layers": 2, "bidirectional": True},
        {"dropout": 0.4, "num_layers": 3},
    ],
    ids=lambda o: "-".join(map(str, o)),
)
@pytest.mark.parametrize("kind", [xprnn.RNN, xprnn.LSTM, xprnn.GRU])
@pytest.mark.applies_if(
    lambda xp, kind: xp.library not in SLOW_LIBRARIES or kind is xprnn.RNN,
    reason="one kind is enough on the slowest libraries",
)
def test_gradients_of_options(xp, rng, kind, options):
    options = {"num_layers": 1, "hidden_size": 3} | options
    layer = kind(2, options.pop("hidden_size"), options.pop("num_layers"), **options)
    # T = N, so that the same x fits a batch-first layer.
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer, T=3, N=3), "float64")
    deterministic = _SeededDropout(layer) if layer.dropout else layer
    check_layer(deterministic, params, x, None if layer.learned_state else state)


class _SeededDropout:
    """A layer with the same dropout masks in every call, so that differences can be taken."""

    def __init__(self, layer):
        self.layer, self.backward = layer, layer.backward

    def forward(self, *args, **flags):
        return self.layer.forward(*args, **flags, rng=np.random.default_rng(5))


@differences
@pytest.mark.parametrize("name", ["rnn", "lstm", "gru-before"])
def test_class_numbers_equal_one_hot_vectors(xp, rng, name):
    layer = CASES[name].make(5, 3, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=4, N=3, flags="lm")
    ids = rng.integers(0, 5, size=(4, 3))
    params, _, state, flags = inputs_on(xp, p, "float64")
    x_ids, x = xp.asarray(ids), xp.asarray(np.eye(5)[ids])
    y, final, tape = layer.forward(params, x_ids, state, **flags)
    expected_y, expected_final, expected_tape = layer.forward(params, x, state, **flags)
    dy, dstate = to_backend(xp, random_cotangents(rng, y)), to_backend(xp, random_cotangents(rng, final))
    grads, expected = layer.backward(tape, dy, dstate), layer.backward(expected_tape, dy, dstate)
    assert grads.dx is None
    xp.assert_close((y, final), tree_to_numpy(xp, (expected_y, expected_final)), condition=16)
    xp.assert_close(tuple(grads[1:]), tree_to_numpy(xp, tuple(expected[1:])), condition=100)
    if xp.library not in SLOW_LIBRARIES:
        check_layer(layer, params, x_ids, state, **flags)


def tree_to_numpy(xp, tree):
    return tuple(tree_to_numpy(xp, a) for a in tree) if isinstance(tree, tuple) else xp.to_numpy(tree)


@pytest.mark.parametrize(("T", "N", "H"), [(0, 2, 3), (2, 0, 3), (0, 0, 2), (1, 1, 1), (3, 1, 1), (2, 2, 1)])
@pytest.mark.parametrize("flags", ["", "lmr"])
@main_cases
def test_edge_shapes(xp, rng, name, T, N, H, flags):
    H = max(H, 3) if name == "lstm-proj" else H
    case = CASES[name]
    layer = case.make(2, H, 2, bidirectional=True)
    p = random_inputs(rng, layer, T, N, flags)
    params, x, state, backend_flags = inputs_on(xp, p)
    y, final, tape = layer.forward(params, x, state, **backend_flags)
    xp.assert_close((y, final), reference_outputs(case, layer, p), condition=64)
    xp.assert_close(layer(params, x, state, **backend_flags), tree_to_numpy(xp, (y, final)), condition=0)
    dy, dstate = to_backend(xp, random_cotangents(rng, y)), to_backend(xp, random_cotangents(rng, final))
    grads = layer.backward(tape, dy, dstate)
    xp.assert_like(tuple(grads), x)
    assert tuple(grads.dx.shape) == (T, N, 2)
    assert {k: tuple(v.shape) for k, v in grads.dparams.items()} == layer.shapes()
    if T == 0:  # the final state is the initial state, and so are their cotangents
        xp.assert_close(final, tree_to_numpy(xp, state), condition=0)
        xp.assert_close(grads.dstate, tree_to_numpy(xp, dstate), condition=0)
        xp.assert_close(grads.dparams, {k: np.zeros(s) for k, s in layer.shapes().items()}, condition=0)


@differences
@main_cases
def test_gradients_of_one_row_and_one_unit(xp, rng, name):
    layer = CASES[name].make(1, 3 if name == "lstm-proj" else 1)
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer, T=2, N=1), "float64")
    check_layer(layer, params, x, state)


@main_cases
def test_tape_is_reusable_and_cotangents_are_optional(xp, rng, name):
    """None stands for a zero cotangent. Backward is linear, so gradients of single cotangents add up."""
    layer = CASES[name].make(2, 3, 2, bidirectional=True)
    params, x, state, flags = inputs_on(xp, random_inputs(rng, layer, flags="r"))
    y, final, tape = layer.forward(params, x, state, **flags)
    dy, dstate = to_backend(xp, random_cotangents(rng, y)), to_backend(xp, random_cotangents(rng, final))
    both = layer.backward(tape, dy, dstate)
    xp.assert_close(tuple(layer.backward(tape, dy, dstate)), tree_to_numpy(xp, tuple(both)), condition=0)
    of_dy, of_dstate = layer.backward(tape, dy), layer.backward(tape, None, dstate)
    xp.assert_close(of_dy.dx + of_dstate.dx, xp.to_numpy(both.dx), condition=64)
    sums = {k: of_dy.dparams[k] + of_dstate.dparams[k] for k in params}
    xp.assert_close(sums, xp.to_numpy(both.dparams), condition=200)
    if isinstance(dstate, tuple):
        of_c, of_h = layer.backward(tape, None, (None, dstate[1])), layer.backward(tape, None, (dstate[0], None))
        xp.assert_close(of_c.dx + of_h.dx, xp.to_numpy(of_dstate.dx), condition=64)
    of_none = layer.backward(tape, None)
    assert not np.any(xp.to_numpy(of_none.dx))
    assert not any(np.any(g) for g in xp.to_numpy(of_none.dparams).values())


@main_cases
def test_tape_states_equal_reference_at_every_step(xp, rng, name):
    case = CASES[name]
    layer = case.make(2, 3, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=4, flags="lm")
    params, x, state, flags = inputs_on(xp, p)
    _, final, tape = layer.forward(params, x, state, **flags)
    states = tape.states()
    assert [len(s) for s in states] == [len(layer.resolved_cell.states)] * 4
    finals = (final,) if not isinstance(final, tuple) else final
    for k, direction_states in enumerate(states):
        for s, f in zip(direction_states, finals, strict=True):
            xp.assert_close(s[0 if k % 2 else -1, ...], xp.to_numpy(f[k, ...]), condition=0)
    for t in range(4):  # the state of layer 0, forward, after step t is the final state of a run over t+1 steps
        prefix = p._replace(x=p.x[: t + 1], flags={"mask": p.flags["mask"][: t + 1]})
        prefix.flags["lengths"] = np.minimum(p.flags["lengths"], t + 1)
        _, expected = reference_outputs(case, layer, prefix)
        expected = expected if isinstance(expected, tuple) else (expected,)
        xp.assert_close(tuple(s[t, ...] for s in states[0]), tuple(e[0] for e in expected), condition=64)


@differences
@pytest.mark.parametrize("flags", ["", "lmr"])
@main_cases
@pytest.mark.applies_if(
    lambda xp, name, flags: xp.library not in SLOW_LIBRARIES or (name, flags) == ("lstm", "lmr"),
    reason="one case, an LSTM with all flags, is enough on the slowest libraries",
)
def test_gradients_of_cotangents_at_every_state(xp, rng, name, flags):
    layer = CASES[name].make(2, 3, bidirectional=True)
    params, x, state, backend_flags = inputs_on(xp, random_inputs(rng, layer, T=3, N=2, flags=flags), "float64")

    def forward(params, x, state):
        y, final, tape = layer.forward(params, x, state, **backend_flags)
        return (y, final, tape.states()), tape

    def backward(tape, cotangents):
        dy, dstate, dstates = cotangents
        dx, dinitial, dparams = layer.backward(tape, dy, dstate, dstates=dstates)
        return dparams, dx, dinitial

    xprnn.check_gradients(forward, backward, (params, x, state), names=("params", "x", "state"), directions=1)


def test_dstates_entries_may_be_none(xp, rng):
    layer = xprnn.LSTM(2, 3, 2)
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer, T=3))
    _, _, tape = layer.forward(params, x, state)
    dc = to_backend(xp, rng.normal(size=(3, 3, 3)))
    with_none = layer.backward(tape, None, dstates=[None, (None, dc)])
    zero = xp.xp.zeros_like(dc)
    with_zeros = layer.backward(tape, None, dstates=[(zero, zero), (zero, dc)])
    xp.assert_close(with_none.dx, xp.to_numpy(with_zeros.dx), condition=0)
    assert np.all(np.any(xp.to_numpy(with_none.dx), axis=-1))


def test_batch_first_gives_the_transposed_numbers(xp, rng):
    batch_major, time_major = xprnn.GRU(2, 3, batch_first=True, bidirectional=True), xprnn.GRU(2, 3, bidirectional=True)
    p = random_inputs(rng, time_major, T=4, N=3, flags="lmr")
    transposed = p._replace(
        x=np.swapaxes(p.x, 0, 1),
        flags={k: v if k == "lengths" else v.T for k, v in p.flags.items()},
    )
    params, x, state, flags = inputs_on(xp, p)
    y, final, tape = time_major.forward(params, x, state, **flags)
    dy, dfinal = random_cotangents(rng, y), to_backend(xp, random_cotangents(rng, final))
    expected = time_major.backward(tape, to_backend(xp, dy), dfinal)
    params, x, state, flags = inputs_on(xp, transposed)
    y_batch_major, final_batch_major, tape = batch_major.forward(params, x, state, **flags)
    grads = batch_major.backward(tape, to_backend(xp, np.swapaxes(dy, 0, 1)), dfinal)
    swapped = tuple(np.swapaxes(xp.to_numpy(a), 0, 1) for a in (y, expected.dx))
    xp.assert_close((y_batch_major, grads.dx), swapped, condition=0)
    xp.assert_close((final_batch_major, grads.dstate), tree_to_numpy(xp, (final, expected.dstate)), condition=0)


@pytest.mark.parametrize("sizes", [3, (3, 4)])
def test_learned_state_is_used_for_state_none(xp, rng, sizes):
    layer = xprnn.LSTM(2, sizes, 2, learned_state=True, bidirectional=True)
    p = random_inputs(rng, layer, T=3, N=4)
    uniform = isinstance(sizes, int)
    rows = {k: np.repeat(v[:, None], 4, axis=1) for k, v in p.params.items() if k.startswith("initial_")}
    h_and_c = [rows[f"initial_{s}"] if uniform else (rows[f"initial_{s}_l0"], rows[f"initial_{s}_l1"]) for s in "hc"]
    params, x, state, _ = inputs_on(xp, p._replace(state=tuple(h_and_c)))
    y, final, tape = layer.forward(params, x)
    expected_y, expected_final, expected_tape = layer.forward(params, x, state)
    xp.assert_close((y, final), tree_to_numpy(xp, (expected_y, expected_final)), condition=0)
    dy = to_backend(xp, random_cotangents(rng, y))
    learned, explicit = layer.backward(tape, dy), layer.backward(expected_tape, dy)
    dh = explicit.dstate[0] if uniform else explicit.dstate[0][1]
    key = "initial_h" if uniform else "initial_h_l1"
    xp.assert_close(learned.dparams[key], xp.to_numpy(dh).sum(axis=1), condition=16)
    assert not np.any(xp.to_numpy(explicit.dparams[key]))
    assert np.any(xp.to_numpy(learned.dparams[key]))


def test_random_state_has_the_structure_of_a_final_state(xp, rng):
    """The states that these tests generate have the shapes that a layer returns."""
    for sizes in (3, (3, 2)):
        layer = xprnn.LSTM(2, sizes, 2, bidirectional=True)
        params = layer.init(rng, like=xp.asarray(np.zeros(0)))
        _, final = layer(params, xp.asarray(rng.normal(size=(2, 3, 2))))
        shapes = [tuple(a.shape) for a in _flatten(final)]
        assert shapes == [a.shape for a in _flatten(random_state(rng, layer, 3))]


def _flatten(tree):
    return [a for branch in tree for a in _flatten(branch)] if isinstance(tree, tuple) else [tree]
