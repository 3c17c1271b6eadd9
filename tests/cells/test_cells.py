"""Cells: activations in every place, the ONNX variants, and cells of a user's own, on every array library."""

from __future__ import annotations

import numpy as np
import pytest
from support import reference_cells as naive
from support.layer_cases import (
    CASES,
    LEAKY_CELL,
    LayerCase,
    inputs_on,
    random_inputs,
    recurrent_factory,
    reference_outputs,
)

import xprnn
from xprnn import cells
from xprnn.gradcheck import check_layer

differences = pytest.mark.not_on(
    "strict:no_float64", "strict:device1", "numpy:readonly", reason="differences are taken on the plain variant"
)

# name -> alpha, beta; those without constants have None. None of them is the standard's default.
CONSTANTS = {
    "tanh": (None, None),
    "sigmoid": (None, None),
    "relu": (None, None),
    "identity": (None, None),
    "softsign": (None, None),
    "softplus": (None, None),
    "affine": (0.7, 0.1),
    "scaledtanh": (1.5, 0.75),
    "leakyrelu": (0.2, None),
    "thresholdedrelu": (0.3, None),
    "hardsigmoid": (0.25, 0.37),
    "elu": (0.6, None),
}
DEFAULTS = {
    "affine": (1.0, 0.0),
    "scaledtanh": (1.0, 1.0),
    "leakyrelu": (0.01, None),
    "thresholdedrelu": (1.0, None),
    "hardsigmoid": (0.2, 0.5),
    "elu": (1.0, None),
}
each = pytest.mark.parametrize("name", CONSTANTS)


def made(name):
    return xprnn.activation(name, *CONSTANTS[name])


@each
def test_activation_values_and_slopes(xp, dtype, name):
    f, slope = made(name).build(xp.xp)
    x = np.linspace(-4, 4, 101)  # no kink lies on it, but 0, where a slope may be either side's
    given_x = xp.asarray(x, dtype)
    want = naive.activation(name, *CONSTANTS[name])
    y = f(given_x)
    xp.assert_close(y, want(x), condition=8)
    h = 1e-6
    numeric = (want(x + h) - want(x - h)) / (2 * h)
    smooth = np.abs(x) > 1e-9
    got = xp.to_numpy(slope(y) + 0.0 * y)
    np.testing.assert_allclose(got[smooth], numeric[smooth], rtol=0, atol=1e-8 if dtype == "float64" else 5e-6)


@pytest.mark.parametrize("name", DEFAULTS)
def test_default_constants_are_the_standards(xp, name):
    x = np.linspace(-3, 3, 41)
    f, _ = xprnn.activation(name).build(xp.xp)
    xp.assert_close(f(xp.asarray(x)), naive.activation(name, *DEFAULTS[name])(x), condition=8)


@each
def test_activations_do_not_overflow(xp, dtype, name):
    """Far out they are finite or as large as their input, and no float error is raised on the way (conftest)."""
    f, slope = made(name).build(xp.xp)
    far = xp.asarray(np.array([-1e4, -100.0, 100.0, 1e4]), dtype)
    y = f(far)
    assert np.isfinite(xp.to_numpy(y)).all()
    assert np.isfinite(xp.to_numpy(slope(y) + 0.0 * y)).all()


def elman(a):
    return recurrent_factory(cells.elman(made(a))), naive.elman(by_reference(a))


def lstm(gate, candidate, output):
    ours = cells.lstm(made(gate), made(candidate), made(output))
    return recurrent_factory(ours), naive.lstm(*map(by_reference, (gate, candidate, output)))


def gru(gate, candidate):
    return recurrent_factory(cells.gru(made(gate), made(candidate))), naive.gru(
        by_reference(gate), by_reference(candidate)
    )


def original_gru(gate, candidate):
    ours = cells.gru_reset_before(made(gate), made(candidate))
    return recurrent_factory(ours), naive.gru(by_reference(gate), by_reference(candidate), reset_after=False)


def by_reference(name):
    return naive.activation(name, *CONSTANTS[name])


# place -> the cell, and which of its activations the place is.
PLACES = {
    "elman": (elman, 1, 0),
    "lstm gate": (lstm, 3, 0),
    "lstm candidate": (lstm, 3, 1),
    "lstm output": (lstm, 3, 2),
    "gru gate": (gru, 2, 0),
    "gru candidate": (gru, 2, 1),
    "original gru gate": (original_gru, 2, 0),
    "original gru candidate": (original_gru, 2, 1),
}


@pytest.mark.parametrize("place", PLACES)
@each
def test_every_activation_in_every_place(rng, name, place):
    """On NumPy, whose programs are printed from the cell: the forward by the reference, the adjoint by differences.

    The other places have the list's neighbours: no two of a cell are the same, and each cell is printed and compiled
    once for all of its places.
    """
    build, count, k = PLACES[place]
    names = list(CONSTANTS)
    case = LayerCase(*build(*(names[(names.index(name) + i - k) % len(names)] for i in range(count))))
    layer = case.make(2, 3)
    p = random_inputs(rng, layer, T=3, N=2, scale=0.4)
    y, final, _ = layer.forward(p.params, p.x, p.state)
    for have, want in zip(leaves((y, final)), leaves(reference_outputs(case, layer, p)), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-12, atol=1e-13)
    check_layer(layer, p.params, p.x, p.state)


def leaves(tree):
    return [a for part in tree for a in leaves(part)] if isinstance(tree, tuple) else [tree]


def test_clipping_bounds_what_the_gate_sees_and_stops_its_gradient(rng):
    """All pre-activations far outside: the output is that of the bound, and nothing flows back into them."""
    layer = xprnn.Recurrent(2, 3, cell=cells.lstm(clip=0.5))
    params = {k: np.zeros(s) for k, s in layer.shapes().items()}
    params["bias_ih_l0"] += 100.0
    y, (_, c), tape = layer.forward(params, rng.normal(size=(1, 2, 2)), None)
    s, t = 1 / (1 + np.exp(-0.5)), np.tanh(0.5)
    np.testing.assert_allclose(c, s * t, rtol=1e-14)
    np.testing.assert_allclose(y, s * np.tanh(s * t), rtol=1e-14)
    assert not any(g.any() for g in layer.backward(tape, np.ones_like(y)).dparams.values())


def test_coupled_gates_have_one_gate_for_both(rng):
    """The forget gate's own rows are there, for files and layouts, and have no influence."""
    layer = xprnn.Recurrent(2, 3, cell=cells.lstm(coupled=True))
    p = random_inputs(rng, layer)
    y, _, tape = layer.forward(p.params, p.x)
    called, _ = layer(p.params, p.x)
    grads = layer.backward(tape, rng.normal(size=y.shape)).dparams
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        assert not grads[name][3:6].any()
        assert grads[name][:3].all()
        p.params[name][3:6] += 1.0
    np.testing.assert_array_equal(layer(p.params, p.x)[0], called)
    np.testing.assert_array_equal(layer.forward(p.params, p.x)[0], y)


# A user's own cell -------------------------------------------------------------------------------


def test_a_leaky_unit_remembers_at_its_own_rate(xp):
    """Without input the state decays by (1 - rate) in each step, each unit at its own rate."""
    layer = xprnn.Recurrent(1, 3, cell=LEAKY_CELL, bias=False)
    params = {k: xp.asarray(np.zeros(s)) for k, s in layer.shapes().items()}
    rates = np.array([0.1, 0.5, 0.9])
    params["rate_l0"] = xp.asarray(np.log(rates / (1 - rates)))
    start = xp.asarray(np.ones((1, 1, 3)))
    y, _ = layer(params, xp.asarray(np.zeros((4, 1, 1))), start)
    xp.assert_close(y, (1 - rates) ** np.arange(1, 5)[:, None, None], condition=32)


@differences
def test_an_own_cell_is_proven_like_any_other(xp, rng):
    layer = CASES["leaky"].make(1, 2, 2, bidirectional=True)
    params, x, state, flags = inputs_on(xp, random_inputs(rng, layer, T=3, N=2, flags="lmr"), "float64")
    worst = check_layer(layer, params, x, state, **flags)
    assert "params['rate_l1_reverse']" in worst
    assert max(worst.values()) < 1e-6


def test_an_own_cell_has_a_place_in_a_model_and_in_training(xp, rng):
    model = xprnn.Sequential(rnn=xprnn.Recurrent(2, 3, cell=LEAKY_CELL), head=xprnn.Linear(3, 2))
    params = model.init(rng, like=xp.asarray(np.zeros(0)))
    x = xp.asarray(rng.normal(size=(4, 3, 2)))
    y, state, tape = model.forward(params, x)
    got = model.backward(tape, xp.xp.ones_like(y))
    assert got.dparams.keys() == params.keys()
    stepped = None
    for t in range(4):
        last, stepped = model.step(params, x[t, ...], stepped)
    xp.assert_close((last, stepped), (xp.to_numpy(y[3, ...]), xp.to_numpy(state)), condition=16)


def rotor(slip=1.0):
    """Two states that both read and write each other, and a square: hard on the memory of a program."""

    def build(xp):
        def step(x, h, state, p):
            a, b = state
            gate = xp.tanh(x[0] + h[0])
            new = (0.8 * a - 0.6 * b + gate * (x[1] + h[1]), 0.6 * a + 0.8 * b + a**2 * p[0])
            return new, (gate, x[1] + h[1])

        def back(dstate, saved, state, p):
            (da, db), (gate, drive), (a, _) = dstate, saved, state
            d = (da * (drive * (1.0 - gate * gate)), da * gate)
            return d, d, (0.8 * da + 0.6 * db + db * (2.0 * a * p[0]), 0.8 * db - slip * (0.6 * da)), (db * a**2,)

        return step, back

    return xprnn.Cell("rotor", 2, build, ("h", "v"), ("bend",))


@differences
def test_two_states_that_read_each_other(xp, rng):
    layer = xprnn.Recurrent(1, 2, cell=rotor(), bidirectional=True)
    params, x, state, flags = inputs_on(xp, random_inputs(rng, layer, T=3, N=2, flags="lmr", scale=0.3), "float64")
    check_layer(layer, params, x, state, **flags)


@differences
def test_a_wrong_adjoint_of_an_own_cell_is_found(xp, rng):
    layer = xprnn.Recurrent(2, 3, cell=rotor(slip=0.99))
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer, T=3, N=2, scale=0.3), "float64")
    with pytest.raises(xprnn.GradientError, match="backward says"):
        check_layer(layer, params, x, state)


@pytest.mark.parametrize(("name", "alpha"), [("tanhh", None), (3, None), ("tanh", 0.5)])
def test_activation_refuses_what_it_does_not_know(name, alpha):
    with pytest.raises(xprnn.InputError, match="expected one of tanh"):
        xprnn.activation(name, alpha)


@pytest.mark.parametrize(("name", "alpha"), [("leakyrelu", -0.1), ("elu", -1.0), ("scaledtanh", 0.0)])
def test_activation_refuses_constants_it_could_not_invert(name, alpha):
    with pytest.raises(xprnn.InputError, match="needs alpha"):
        xprnn.activation(name, alpha)
