"""User-defined cells: comparisons, several states, vectors, and errors for wrong results of their functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.layer_cases import initial_params

import xprnn

pytestmark = pytest.mark.regression


def build_leaky_relu(xp: Any) -> Any:
    """Save the pre-activation; `backward` compares again."""

    def step(x: Any, h: Any, state: Any, p: Any) -> Any:
        a = x[0] + h[0]
        return (xp.where(a > 0, a, 0.1 * a),), (a,)

    def backward(dstate: Any, saved: Any, state: Any, p: Any) -> Any:
        positive = saved[0] > 0
        da = xp.where(positive, dstate[0], 0.1 * dstate[0])
        return (da,), (da,), (None,), ()

    return step, backward


def build_leaky_relu_saving_booleans(xp: Any) -> Any:
    """Save the boolean result of the comparison."""

    def step(x: Any, h: Any, state: Any, p: Any) -> Any:
        a = x[0] + h[0]
        return (xp.where(a > 0, a, 0.1 * a),), (a > 0,)

    def backward(dstate: Any, saved: Any, state: Any, p: Any) -> Any:
        da = xp.where(saved[0], dstate[0], 0.1 * dstate[0])
        return (da,), (da,), (None,), ()

    return step, backward


@pytest.mark.parametrize("build", [build_leaky_relu, build_leaky_relu_saving_booleans])
def test_cell_may_compare_values(build, rng):
    layer = xprnn.Recurrent(3, 4, cell=xprnn.Cell("leaky relu", gates=1, build=build))
    params, x = layer.init(rng, like=np.zeros(0)), rng.standard_normal((5, 2, 3))
    assert max(xprnn.check_layer(layer, params, x).values()) < 1e-6
    y, _ = layer(params, x)
    expected, _ = xprnn.RNN(3, 4, nonlinearity=xprnn.activation("leakyrelu", 0.1))(params, x)
    np.testing.assert_allclose(y, expected, rtol=1e-14)


@pytest.mark.parametrize(("gates", "build"), [(0, build_leaky_relu), (1, None), ("two", build_leaky_relu)])
def test_invalid_cell_options_raise_input_error(gates, build):
    with pytest.raises(xprnn.InputError, match=r"^Cell c: (gates|build) must be"):
        xprnn.Cell("c", gates=gates, build=build)


def step(x: Any, h: Any, state: Any, p: Any) -> Any:
    """Accumulate c' = c + x + h and return h' = rate * c'."""
    c = state[1] + x[0] + h[0]
    return (p[0] * c, c), (c,)


def backward(dstate: Any, saved: Any, state: Any, p: Any) -> Any:
    da = dstate[0] * p[0] + dstate[1]
    return (da,), (da,), (None, da), (dstate[0] * saved[0],)


def make_cell(*functions: Any, pregates: int = 0) -> xprnn.Cell:
    return xprnn.Cell("mine", 1 + pregates, lambda xp: functions, ("h", "c"), ("rate",), pregates)


WRONG_STEPS = {
    "state of 1": (lambda x, h, s, p: ((x[0] + h[0],), ()), r"state that step returns .* of 2, found 1"),
    "state not a tuple": (lambda x, h, s, p: (x[0], ()), r"state that step returns must be a tuple, found \w+"),
    "an array": (lambda x, h, s, p: x[0] + h[0], r"step must return \(state, saved\), found \w+"),
    "saved not a tuple": (lambda x, h, s, p: (s, x[0]), r"saved that step returns must be a tuple, found \w+"),
}
WRONG_BACKWARDS = {
    "two results": (
        lambda d, v, s, p: ((d[0],), (d[0],)),
        r"backward must return \(dx, dh, dstate_prev, dp\) of 4, found 2",
    ),
    "None": (lambda d, v, s, p: None, r"backward must return \(dx, dh, dstate_prev, dp\), found NoneType"),
    "dx": (
        lambda d, v, s, p: ((), (d[0],), (None, d[1]), (d[0],)),
        "dx that backward returns must be a tuple of 1, found 0",
    ),
    "dstate": (
        lambda d, v, s, p: ((d[0],), (d[0],), (None,), (d[0],)),
        "dstate_prev that backward returns .* of 2, found 1",
    ),
    "dp": (
        lambda d, v, s, p: ((d[0],), (d[0],), (None, d[1]), ()),
        "dp that backward returns must be a tuple of 1, found 0",
    ),
}


@pytest.mark.parametrize("name", WRONG_STEPS)
def test_wrong_results_of_step_raise_input_error(name, xp, rng):
    function, message = WRONG_STEPS[name]
    layer = xprnn.Recurrent(3, 4, cell=make_cell(function, backward))
    params, x = xp.asarray(initial_params(layer)), xp.asarray(rng.standard_normal((5, 2, 3)))
    for call in (layer, layer.forward, lambda p, x: layer.step(p, x[0, ...])):
        with pytest.raises(xprnn.InputError, match=f"^Cell mine: {message}$"):
            call(params, x)


@pytest.mark.parametrize("name", WRONG_BACKWARDS)
def test_wrong_results_of_backward_raise_input_error(name, xp, rng):
    function, message = WRONG_BACKWARDS[name]
    layer = xprnn.Recurrent(3, 4, cell=make_cell(step, function))
    y, _, tape = layer.forward(xp.asarray(initial_params(layer)), xp.asarray(rng.standard_normal((5, 2, 3))))
    with pytest.raises(xprnn.InputError, match=f"^Cell mine: {message}$"):
        layer.backward(tape, y)


@pytest.mark.parametrize(
    ("cell", "found"),
    [
        (xprnn.Cell("mine", 1, lambda xp: None), "NoneType"),
        (xprnn.Cell("mine", 1, lambda xp: step), "function"),
        (xprnn.Cell("mine", 1, lambda xp: (step,)), "1 of them"),
        (make_cell(step, 3), "2 of them"),
        (make_cell(step, backward, pregates=1), "2 of them"),
        (make_cell(step, backward, step, backward), "4 of them"),
    ],
)
def test_wrong_results_of_build_raise_input_error(cell, found):
    layer = xprnn.Recurrent(3, 4, cell=cell)
    with pytest.raises(xprnn.InputError, match=rf"^Cell mine: build must return the functions \(.*\), found {found}$"):
        layer(initial_params(layer), np.zeros((5, 2, 3)))


def test_cell_with_two_states_and_a_vector_equals_a_loop(xp, rng):
    layer = xprnn.Recurrent(3, 4, cell=make_cell(step, backward))
    params, x = initial_params(layer), rng.standard_normal((5, 2, 3))
    params["rate_l0"] = rng.standard_normal(4)
    assert max(xprnn.check_layer(layer, params, x).values()) < 1e-6
    c, h, outputs = np.zeros((2, 4)), np.zeros((2, 4)), []
    w, u, bias = params["weight_ih_l0"], params["weight_hh_l0"], params["bias_ih_l0"] + params["bias_hh_l0"]
    for x_t in x:
        c = c + x_t @ w.T + h @ u.T + bias
        h = params["rate_l0"] * c
        outputs.append(h)
    y, _ = layer(xp.asarray(params), xp.asarray(x))
    xp.assert_close(y, xp.asarray(np.stack(outputs)))
