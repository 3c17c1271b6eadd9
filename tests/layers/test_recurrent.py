"""Every cell as a layer, on every array library: values against the naive reference, gradients against differences."""

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

# The left-out variants run the same code on the same numbers: test_gradients_agree_with_numpy holds them to those.
differences = pytest.mark.not_on(
    "strict:no_float64", "strict:device1", "numpy:readonly", reason="differences are taken on the plain variant"
)
every_case = pytest.mark.parametrize("name", CASES)
main_cases = pytest.mark.parametrize("name", MAIN_CASES)


@every_case
def test_equals_the_naive_reference(xp, dtype, rng, name):
    case = CASES[name]
    layer = case.make(3, 4, 2, bidirectional=True)
    p = random_inputs(rng, layer)
    params, x, state, _ = inputs_on(xp, p, dtype)
    y, final, _ = layer.forward(params, x, state)
    want_y, want_final = reference_outputs(case, layer, p)
    xp.assert_close(y, want_y, condition=64)
    xp.assert_close(final, want_final, condition=64)
    again, final_again = layer(params, x, state)
    xp.assert_close(again, xp.to_numpy(y), condition=0)
    xp.assert_close(final_again, want_final, condition=64)


@differences
@every_case
def test_gradients(xp, rng, name):
    if xp.library in SLOW_LIBRARIES and name not in MAIN_CASES:
        pytest.skip("the main cells are enough on the slowest libraries")
    layer = CASES[name].make(2, 3, bidirectional=True)
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer, T=4, N=2), "float64")
    assert max(check_layer(layer, params, x, state).values()) < 1e-6


@differences
@main_cases
@pytest.mark.not_on(*SLOW_LIBRARIES, reason="the slowest libraries: one layer is enough")
def test_gradients_of_a_stack(xp, rng, name):
    layer = CASES[name].make(2, 3, 2)
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer, T=3, N=2), "float64")
    check_layer(layer, params, x, state)


@every_case
def test_gradients_agree_with_numpy(xp, dtype, rng, name):
    """The differences prove NumPy's; here every library, also float32, is held to the same numbers."""
    layer = CASES[name].make(2, 3, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=4, flags="lmr")
    y, final, tape = layer.forward(p.params, p.x, p.state, **p.flags)
    dy, dstate = random_cotangents(rng, y), random_cotangents(rng, final)
    want = layer.backward(tape, dy, dstate)
    params, x, state, flags = inputs_on(xp, p, dtype)
    y, _, tape = layer.forward(params, x, state, **flags)
    got = layer.backward(tape, to_backend(xp, dy, dtype), to_backend(xp, dstate, dtype))
    xp.assert_like((y, *got), x)
    xp.assert_close(tuple(got), tuple(want), condition=500)


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
def test_gradients_of_options(xp, rng, kind, options):
    if xp.library in SLOW_LIBRARIES and kind is not xprnn.RNN:
        pytest.skip("one kind is enough on the slowest libraries")
    options = {"num_layers": 1, "hidden_size": 3} | options
    layer = kind(2, options.pop("hidden_size"), options.pop("num_layers"), **options)
    # With as many rows as steps, x may be read either way round.
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer, T=3, N=3), "float64")
    seeded = _Seeded(layer) if layer.dropout else layer
    check_layer(seeded, params, x, None if layer.learned_state else state)


class _Seeded:
    """The same dropout masks in every call: a function, so that it has a gradient."""

    def __init__(self, layer):
        self.layer, self.backward = layer, layer.backward

    def forward(self, *args, **flags):
        return self.layer.forward(*args, **flags, rng=np.random.default_rng(5))


@differences
@pytest.mark.parametrize("name", ["rnn", "lstm", "gru-before"])
def test_one_hot_numbers_are_one_hot_vectors(xp, rng, name):
    layer = CASES[name].make(5, 3, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=4, N=3, flags="lm")
    ids = rng.integers(0, 5, size=(4, 3))
    params, _, state, flags = inputs_on(xp, p, "float64")
    x_ids, x = xp.asarray(ids), xp.asarray(np.eye(5)[ids])
    y, final, tape = layer.forward(params, x_ids, state, **flags)
    want_y, want_final, want_tape = layer.forward(params, x, state, **flags)
    dy, dstate = to_backend(xp, random_cotangents(rng, y)), to_backend(xp, random_cotangents(rng, final))
    got, want = layer.backward(tape, dy, dstate), layer.backward(want_tape, dy, dstate)
    assert got.dx is None
    xp.assert_close((y, final), xp_numpy(xp, (want_y, want_final)), condition=16)
    xp.assert_close(tuple(got[1:]), xp_numpy(xp, tuple(want[1:])), condition=100)
    # The differences of a sum over ids are those of the look-up.
    if xp.library not in SLOW_LIBRARIES:
        check_layer(layer, params, x_ids, state, **flags)


def xp_numpy(xp, tree):
    return tuple(xp_numpy(xp, a) for a in tree) if isinstance(tree, tuple) else xp.to_numpy(tree)


@pytest.mark.parametrize(("T", "N", "H"), [(0, 2, 3), (2, 0, 3), (0, 0, 2), (1, 1, 1), (3, 1, 1), (2, 2, 1)])
@pytest.mark.parametrize("flags", ["", "lmr"])
@main_cases
def test_edge_shapes(xp, rng, name, T, N, H, flags):
    H = max(H, 3) if name == "lstm-proj" else H
    case = CASES[name]
    layer = case.make(2, H, 2, bidirectional=True)
    p = random_inputs(rng, layer, T, N, flags)
    params, x, state, on_flags = inputs_on(xp, p)
    y, final, tape = layer.forward(params, x, state, **on_flags)
    xp.assert_close((y, final), reference_outputs(case, layer, p), condition=64)
    xp.assert_close(layer(params, x, state, **on_flags), xp_numpy(xp, (y, final)), condition=0)
    dy, dstate = to_backend(xp, random_cotangents(rng, y)), to_backend(xp, random_cotangents(rng, final))
    got = layer.backward(tape, dy, dstate)
    xp.assert_like(tuple(got), x)
    assert tuple(got.dx.shape) == (T, N, 2)
    assert {k: tuple(v.shape) for k, v in got.dparams.items()} == layer.shapes()
    if T == 0:  # nothing happened: the final state is the initial one, and so is its adjoint
        xp.assert_close(final, xp_numpy(xp, state), condition=0)
        xp.assert_close(got.dstate, xp_numpy(xp, dstate), condition=0)
        xp.assert_close(got.dparams, {k: np.zeros(s) for k, s in layer.shapes().items()}, condition=0)


@differences
@main_cases
def test_gradients_of_one_row_and_one_unit(xp, rng, name):
    layer = CASES[name].make(1, 3 if name == "lstm-proj" else 1)
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer, T=2, N=1), "float64")
    check_layer(layer, params, x, state)


@main_cases
def test_a_tape_can_be_replayed_and_cotangents_left_out(xp, rng, name):
    """None stands for zero, and a backward is linear: the parts add up to the whole."""
    layer = CASES[name].make(2, 3, 2, bidirectional=True)
    params, x, state, flags = inputs_on(xp, random_inputs(rng, layer, flags="r"))
    y, final, tape = layer.forward(params, x, state, **flags)
    dy, dstate = to_backend(xp, random_cotangents(rng, y)), to_backend(xp, random_cotangents(rng, final))
    both = layer.backward(tape, dy, dstate)
    xp.assert_close(tuple(layer.backward(tape, dy, dstate)), xp_numpy(xp, tuple(both)), condition=0)
    ones, others = layer.backward(tape, dy), layer.backward(tape, None, dstate)
    xp.assert_close(ones.dx + others.dx, xp.to_numpy(both.dx), condition=64)
    sums = {k: ones.dparams[k] + others.dparams[k] for k in params}
    xp.assert_close(sums, xp.to_numpy(both.dparams), condition=200)
    if isinstance(dstate, tuple):
        alone = layer.backward(tape, None, (None, dstate[1])).dx + layer.backward(tape, None, (dstate[0], None)).dx
        xp.assert_close(alone, xp.to_numpy(others.dx), condition=64)
    nothing = layer.backward(tape, None)
    assert not np.any(xp.to_numpy(nothing.dx))
    assert not any(np.any(g) for g in xp.to_numpy(nothing.dparams).values())


@main_cases
def test_states_are_the_states_at_every_step(xp, rng, name):
    case = CASES[name]
    layer = case.make(2, 3, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=4, flags="lm")
    params, x, state, flags = inputs_on(xp, p)
    _, final, tape = layer.forward(params, x, state, **flags)
    states = tape.states()
    assert [len(s) for s in states] == [len(layer.resolved_cell.states)] * 4
    finals = (final,) if not isinstance(final, tuple) else final
    for k, one in enumerate(states):
        for s, f in zip(one, finals, strict=True):
            xp.assert_close(s[0 if k % 2 else -1, ...], xp.to_numpy(f[k, ...]), condition=0)
    for t in range(4):  # after t+1 steps the forward direction of the first layer is where a shorter run ends
        short = p._replace(x=p.x[: t + 1], flags={"mask": p.flags["mask"][: t + 1]})
        short.flags["lengths"] = np.minimum(p.flags["lengths"], t + 1)
        _, want = reference_outputs(case, layer, short)
        want = want if isinstance(want, tuple) else (want,)
        xp.assert_close(tuple(s[t, ...] for s in states[0]), tuple(w[0] for w in want), condition=64)


@differences
@pytest.mark.parametrize("flags", ["", "lmr"])
@main_cases
def test_gradients_injected_at_every_state(xp, rng, name, flags):
    if xp.library in SLOW_LIBRARIES and (name, flags) != ("lstm", "lmr"):
        pytest.skip("the richest one is enough on the slowest libraries")
    layer = CASES[name].make(2, 3, bidirectional=True)
    params, x, state, on_flags = inputs_on(xp, random_inputs(rng, layer, T=3, N=2, flags=flags), "float64")

    def forward(params, x, state):
        y, final, tape = layer.forward(params, x, state, **on_flags)
        return (y, final, tape.states()), tape

    def backward(tape, cotangents):
        dy, dstate, dstates = cotangents
        dx, dinitial, dparams = layer.backward(tape, dy, dstate, dstates=dstates)
        return dparams, dx, dinitial

    xprnn.check_gradients(forward, backward, (params, x, state), names=("params", "x", "state"), directions=1)


def test_injection_takes_none_anywhere(xp, rng):
    layer = xprnn.LSTM(2, 3, 2)
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer, T=3))
    _, _, tape = layer.forward(params, x, state)
    dc = to_backend(xp, rng.normal(size=(3, 3, 3)))
    only = layer.backward(tape, None, dstates=[None, (None, dc)])
    zero = xp.xp.zeros_like(dc)
    full = layer.backward(tape, None, dstates=[(zero, zero), (zero, dc)])
    xp.assert_close(only.dx, xp.to_numpy(full.dx), condition=0)
    assert np.all(np.any(xp.to_numpy(only.dx), axis=-1))


def test_batch_first_is_a_transposed_view_of_the_same_numbers(xp, rng):
    first, major = xprnn.GRU(2, 3, batch_first=True, bidirectional=True), xprnn.GRU(2, 3, bidirectional=True)
    p = random_inputs(rng, major, T=4, N=3, flags="lmr")
    turned = p._replace(
        x=np.swapaxes(p.x, 0, 1),
        flags={k: v if k == "lengths" else v.T for k, v in p.flags.items()},
    )
    params, x, state, flags = inputs_on(xp, p)
    y, final, tape = major.forward(params, x, state, **flags)
    dy, dfinal = random_cotangents(rng, y), to_backend(xp, random_cotangents(rng, final))
    want = major.backward(tape, to_backend(xp, dy), dfinal)
    params, x, state, flags = inputs_on(xp, turned)
    y_first, final_first, tape = first.forward(params, x, state, **flags)
    got = first.backward(tape, to_backend(xp, np.swapaxes(dy, 0, 1)), dfinal)
    xp.assert_close((y_first, got.dx), tuple(np.swapaxes(xp.to_numpy(a), 0, 1) for a in (y, want.dx)), condition=0)
    xp.assert_close((final_first, got.dstate), xp_numpy(xp, (final, want.dstate)), condition=0)


@pytest.mark.parametrize("sizes", [3, (3, 4)])
def test_a_learned_state_is_what_none_stands_for(xp, rng, sizes):
    layer = xprnn.LSTM(2, sizes, 2, learned_state=True, bidirectional=True)
    p = random_inputs(rng, layer, T=3, N=4)
    uniform = isinstance(sizes, int)
    rows = {k: np.repeat(v[:, None], 4, axis=1) for k, v in p.params.items() if k.startswith("initial_")}
    parts = [rows[f"initial_{s}"] if uniform else (rows[f"initial_{s}_l0"], rows[f"initial_{s}_l1"]) for s in "hc"]
    params, x, state, _ = inputs_on(xp, p._replace(state=tuple(parts)))
    got, want = layer.forward(params, x), layer.forward(params, x, state)
    xp.assert_close(got[:2], xp_numpy(xp, want[:2]), condition=0)
    dy = to_backend(xp, random_cotangents(rng, got[0]))
    learned, explicit = layer.backward(got[2], dy), layer.backward(want[2], dy)
    dh = explicit.dstate[0] if uniform else explicit.dstate[0][1]
    key = "initial_h" if uniform else "initial_h_l1"
    xp.assert_close(learned.dparams[key], xp.to_numpy(dh).sum(axis=1), condition=16)
    assert not np.any(xp.to_numpy(explicit.dparams[key]))
    assert np.any(xp.to_numpy(learned.dparams[key]))


def test_state_like_fits_what_init_promises(xp, rng):
    """The tests' own idea of a state's structure is the one that a layer returns."""
    for sizes in (3, (3, 2)):
        layer = xprnn.LSTM(2, sizes, 2, bidirectional=True)
        params = layer.init(rng, like=xp.asarray(np.zeros(0)))
        _, final = layer(params, xp.asarray(rng.normal(size=(2, 3, 2))))
        shapes = [tuple(a.shape) for a in _flat(final)]
        assert shapes == [a.shape for a in _flat(random_state(rng, layer, 3))]


def _flat(tree):
    return [a for part in tree for a in _flat(part)] if isinstance(tree, tuple) else [tree]
