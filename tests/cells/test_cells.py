"""Cells: every activation in every gate, the ONNX variants, and user-defined cells, on every array library."""

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

uses_differences = pytest.mark.not_on(
    "strict:no_float64", "strict:device1", "numpy:readonly", reason="one variant of a library is enough"
)

# name -> (alpha, beta), None if the function does not have the constant; no constant is a default of ONNX.
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
for_each_activation = pytest.mark.parametrize("name", CONSTANTS)


def library_activation(name):
    return xprnn.activation(name, *CONSTANTS[name])


@for_each_activation
def test_activation_values_and_derivatives(xp, dtype, name):
    f, derivative = library_activation(name).build(xp.xp)
    x = np.linspace(-4, 4, 101)  # the only kink on this grid is 0, which is left out below
    x_xp = xp.asarray(x, dtype)
    expected = naive.activation(name, *CONSTANTS[name])
    y = f(x_xp)
    xp.assert_close(y, expected(x), condition=8)
    h = 1e-6
    numeric = (expected(x + h) - expected(x - h)) / (2 * h)
    smooth = np.abs(x) > 1e-9
    dy_dx = xp.to_numpy(derivative(y) + 0.0 * y)
    np.testing.assert_allclose(dy_dx[smooth], numeric[smooth], rtol=0, atol=1e-8 if dtype == "float64" else 5e-6)


@pytest.mark.parametrize("name", DEFAULTS)
def test_default_constants_are_those_of_onnx(xp, name):
    x = np.linspace(-3, 3, 41)
    f, _ = xprnn.activation(name).build(xp.xp)
    xp.assert_close(f(xp.asarray(x)), naive.activation(name, *DEFAULTS[name])(x), condition=8)


@for_each_activation
def test_activations_do_not_overflow(xp, dtype, name):
    """On NumPy an overflow in an intermediate result raises (fixture float_errors_raise)."""
    f, derivative = library_activation(name).build(xp.xp)
    x = xp.asarray(np.array([-1e4, -100.0, 100.0, 1e4]), dtype)
    y = f(x)
    assert np.isfinite(xp.to_numpy(y)).all()
    assert np.isfinite(xp.to_numpy(derivative(y) + 0.0 * y)).all()


def elman(f):
    return recurrent_factory(cells.elman(library_activation(f))), naive.elman(reference_activation(f))


def lstm(gate, candidate, output):
    cell = cells.lstm(*map(library_activation, (gate, candidate, output)))
    return recurrent_factory(cell), naive.lstm(*map(reference_activation, (gate, candidate, output)))


def gru(gate, candidate):
    cell = cells.gru(library_activation(gate), library_activation(candidate))
    return recurrent_factory(cell), naive.gru(reference_activation(gate), reference_activation(candidate))


def original_gru(gate, candidate):
    cell = cells.gru_reset_before(library_activation(gate), library_activation(candidate))
    reference = naive.gru(reference_activation(gate), reference_activation(candidate), reset_after=False)
    return recurrent_factory(cell), reference


def reference_activation(name):
    return naive.activation(name, *CONSTANTS[name])


# role -> (function that builds the cell, number of its activations, position of this role among them)
ROLES = {
    "elman": (elman, 1, 0),
    "lstm gate": (lstm, 3, 0),
    "lstm candidate": (lstm, 3, 1),
    "lstm output": (lstm, 3, 2),
    "gru gate": (gru, 2, 0),
    "gru candidate": (gru, 2, 1),
    "original gru gate": (original_gru, 2, 0),
    "original gru candidate": (original_gru, 2, 1),
}


@pytest.mark.parametrize("role", ROLES)
@for_each_activation
def test_every_activation_in_every_role(rng, name, role):
    """Compare forward with the reference and backward with central differences, on NumPy's generated kernels.

    The other activations of the cell are the adjacent entries of CONSTANTS. All activations of a cell then differ, and
    the tests of one cell in different roles share its generated kernels.
    """
    build, count, k = ROLES[role]
    names = list(CONSTANTS)
    case = LayerCase(*build(*(names[(names.index(name) + i - k) % len(names)] for i in range(count))))
    layer = case.make(2, 3)
    p = random_inputs(rng, layer, T=3, N=2, scale=0.4)
    y, final, _ = layer.forward(p.params, p.x, p.state)
    for actual, expected in zip(leaves((y, final)), leaves(reference_outputs(case, layer, p)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-13)
    check_layer(layer, p.params, p.x, p.state)


def leaves(tree):
    return [a for branch in tree for a in leaves(branch)] if isinstance(tree, tuple) else [tree]


def test_clip_bounds_pre_activations_and_zeroes_their_gradient(rng):
    """All pre-activations lie far outside: the output is that of the bound, and all parameter gradients are zero."""
    layer = xprnn.Recurrent(2, 3, cell=cells.lstm(clip=0.5))
    params = {k: np.zeros(s) for k, s in layer.shapes().items()}
    params["bias_ih_l0"] += 100.0
    y, (_, c), tape = layer.forward(params, rng.normal(size=(1, 2, 2)), None)
    s, t = 1 / (1 + np.exp(-0.5)), np.tanh(0.5)
    np.testing.assert_allclose(c, s * t, rtol=1e-14)
    np.testing.assert_allclose(y, s * np.tanh(s * t), rtol=1e-14)
    assert not any(g.any() for g in layer.backward(tape, np.ones_like(y)).dparams.values())


def test_coupled_lstm_ignores_the_rows_of_the_forget_gate(rng):
    """The parameters keep the layout of four gates; the rows of the forget gate have no influence."""
    layer = xprnn.Recurrent(2, 3, cell=cells.lstm(coupled=True))
    p = random_inputs(rng, layer)
    y, _, tape = layer.forward(p.params, p.x)
    y_inference, _ = layer(p.params, p.x)
    grads = layer.backward(tape, rng.normal(size=y.shape)).dparams
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        assert not grads[name][3:6].any()
        assert grads[name][:3].all()
        p.params[name][3:6] += 1.0
    np.testing.assert_array_equal(layer(p.params, p.x)[0], y_inference)
    np.testing.assert_array_equal(layer.forward(p.params, p.x)[0], y)


def test_leaky_units_decay_at_their_rates(xp):
    """Without input, the state of each unit is multiplied by (1 - rate) in each step."""
    layer = xprnn.Recurrent(1, 3, cell=LEAKY_CELL, bias=False)
    params = {k: xp.asarray(np.zeros(s)) for k, s in layer.shapes().items()}
    rates = np.array([0.1, 0.5, 0.9])
    params["rate_l0"] = xp.asarray(np.log(rates / (1 - rates)))
    initial = xp.asarray(np.ones((1, 1, 3)))
    y, _ = layer(params, xp.asarray(np.zeros((4, 1, 1))), initial)
    xp.assert_close(y, (1 - rates) ** np.arange(1, 5)[:, None, None], condition=32)


@uses_differences
def test_user_defined_cell_passes_check_layer(xp, rng):
    layer = CASES["leaky"].make(1, 2, 2, bidirectional=True)
    params, x, state, flags = inputs_on(xp, random_inputs(rng, layer, T=3, N=2, flags="lmr"), "float64")
    worst = check_layer(layer, params, x, state, **flags)
    assert "params['rate_l1_reverse']" in worst
    assert max(worst.values()) < 1e-6


def test_user_defined_cell_works_in_a_sequential_and_in_step(xp, rng):
    model = xprnn.Sequential(rnn=xprnn.Recurrent(2, 3, cell=LEAKY_CELL), head=xprnn.Linear(3, 2))
    params = model.init(rng, like=xp.asarray(np.zeros(0)))
    x = xp.asarray(rng.normal(size=(4, 3, 2)))
    y, state, tape = model.forward(params, x)
    gradients = model.backward(tape, xp.xp.ones_like(y))
    assert gradients.dparams.keys() == params.keys()
    step_state = None
    for t in range(4):
        step_y, step_state = model.step(params, x[t, ...], step_state)
    xp.assert_close((step_y, step_state), (xp.to_numpy(y[3, ...]), xp.to_numpy(state)), condition=16)


def rotor(error_factor=1.0):
    """Return a cell whose two states read each other, which tests that kernels do not overwrite a state too early.

    A factor other than 1 plants a wrong term in the adjoint.
    """

    def build(xp):
        def step(x, h, state, p):
            a, b = state
            gate = xp.tanh(x[0] + h[0])
            new = (0.8 * a - 0.6 * b + gate * (x[1] + h[1]), 0.6 * a + 0.8 * b + a**2 * p[0])
            return new, (gate, x[1] + h[1])

        def backward(dstate, saved, state, p):
            (da, db), (gate, drive), (a, _) = dstate, saved, state
            d = (da * (drive * (1.0 - gate * gate)), da * gate)
            da_prev = 0.8 * da + 0.6 * db + db * (2.0 * a * p[0])
            return d, d, (da_prev, 0.8 * db - error_factor * (0.6 * da)), (db * a**2,)

        return step, backward

    return xprnn.Cell("rotor", 2, build, ("h", "v"), ("bend",))


@uses_differences
def test_cell_with_two_coupled_states_passes_check_layer(xp, rng):
    layer = xprnn.Recurrent(1, 2, cell=rotor(), bidirectional=True)
    params, x, state, flags = inputs_on(xp, random_inputs(rng, layer, T=3, N=2, flags="lmr", scale=0.3), "float64")
    check_layer(layer, params, x, state, **flags)


@uses_differences
def test_wrong_adjoint_of_a_user_defined_cell_is_detected(xp, rng):
    layer = xprnn.Recurrent(2, 3, cell=rotor(error_factor=0.99))
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer, T=3, N=2, scale=0.3), "float64")
    with pytest.raises(xprnn.GradientError, match="backward says"):
        check_layer(layer, params, x, state)


@pytest.mark.parametrize(("name", "alpha"), [("tanhh", None), (3, None), ("tanh", 0.5)])
def test_activation_rejects_unknown_names_and_superfluous_constants(name, alpha):
    with pytest.raises(xprnn.InputError, match="expected one of tanh"):
        xprnn.activation(name, alpha)


@pytest.mark.parametrize(("name", "alpha"), [("leakyrelu", -0.1), ("elu", -1.0), ("scaledtanh", 0.0)])
def test_activation_rejects_constants_without_an_inverse(name, alpha):
    with pytest.raises(xprnn.InputError, match="needs alpha"):
        xprnn.activation(name, alpha)
