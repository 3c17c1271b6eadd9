"""Every elementwise function: its value, and its derivative in terms of its output, on both sides of each kink."""

from __future__ import annotations

import math

import numpy as np
import pytest

import xprnn
from xprnn import Activation, InputError, activation

# name -> (constants, the function of one number as ONNX defines it, where it has kinks)
FUNCTIONS = {
    "tanh": ((), math.tanh, []),
    "sigmoid": ((), lambda x: 1 / (1 + math.exp(-x)), []),
    "relu": ((), lambda x: max(x, 0.0), [0.0]),
    "identity": ((), lambda x: x, []),
    "softsign": ((), lambda x: x / (1 + abs(x)), []),
    "softplus": ((), lambda x: math.log(1 + math.exp(x)), []),
    "affine": ((0.7, -0.3), lambda x: 0.7 * x - 0.3, []),
    "scaledtanh": ((1.7, 0.6), lambda x: 1.7 * math.tanh(0.6 * x), []),
    "leakyrelu": ((0.2, None), lambda x: x if x >= 0 else 0.2 * x, [0.0]),
    "thresholdedrelu": ((0.5, None), lambda x: x if x > 0.5 else 0.0, [0.5]),
    "hardsigmoid": ((0.3, 0.4), lambda x: min(max(0.3 * x + 0.4, 0.0), 1.0), [-4 / 3, 2.0]),
    "elu": ((0.8, None), lambda x: x if x >= 0 else 0.8 * (math.exp(x) - 1), [0.0]),
}


def points(rng, kinks):
    """Random places from -4 to 4, none within 0.01 of a kink."""
    x = np.concatenate((rng.uniform(-4, 4, 60), [k + d for k in kinks for d in (-0.02, 0.02)]))
    return x[np.all([np.abs(x - k) > 0.01 for k in kinks], axis=0)] if kinks else x


@pytest.mark.parametrize("name", FUNCTIONS)
def test_value_and_slope(xp, dtype, rng, name):
    constants, formula, kinks = FUNCTIONS[name]
    x = points(rng, kinks).astype(dtype).astype("float64")
    f, slope = activation(name, *constants).build(xp.xp)
    given = xp.asarray(x, dtype)
    y = f(given)
    xp.assert_close(y, np.asarray([formula(v) for v in x]), condition=16)
    h = 1e-6
    wanted = np.asarray([(formula(v + h) - formula(v - h)) / (2 * h) for v in x])
    got = slope(y)
    np.testing.assert_allclose(xp.to_numpy(got) + 0 * x, wanted, atol=1e-8 + xp.rtol(dtype, 60))
    xp.assert_home((y, got), given)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_far_out_nothing_overflows(xp, dtype, name):
    """float_errors_raise: an exp that overflows on the way would raise on NumPy."""
    constants, _, _ = FUNCTIONS[name]
    f, slope = activation(name, *constants).build(xp.xp)
    y = f(xp.asarray(np.asarray([-1e4, -200.0, 200.0, 1e4]), dtype))
    for array in (y, slope(y)):
        assert np.isfinite(xp.to_numpy(array)).all()


@pytest.mark.needs("torch")
@pytest.mark.parametrize("name", ["tanh", "sigmoid", "relu", "softsign", "softplus", "leakyrelu", "elu"])
def test_values_and_slopes_are_torchs(rng, name):
    import torch

    constants, _, kinks = FUNCTIONS[name]
    x = points(rng, kinks)
    leaf = torch.tensor(x, requires_grad=True)
    functional = torch.nn.functional
    constant = {"leakyrelu": lambda v: functional.leaky_relu(v, 0.2), "elu": lambda v: functional.elu(v, 0.8)}
    theirs = (constant.get(name) or getattr(functional, name))(leaf)
    theirs.sum().backward()
    f, slope = activation(name, *constants).build(np)
    np.testing.assert_allclose(f(x), theirs.detach().numpy(), atol=1e-14)
    np.testing.assert_allclose(slope(f(x)) + 0 * x, leaf.grad.numpy(), atol=1e-14)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_network_of_it_has_the_right_gradients(rng, name):
    constants, _, _ = FUNCTIONS[name]
    layer = xprnn.RNN(3, 5, nonlinearity=activation(name, *constants))
    params = layer.init(rng, like=np.zeros(0))

    def forward(params, x):
        y, _, tape = layer.forward(params, x)
        return y, tape

    def backward(tape, dy):
        dx, _, dparams = layer.backward(tape, dy)
        return dparams, dx

    worst = xprnn.check_gradients(forward, backward, (params, rng.normal(size=(4, 2, 3))), rng=rng)
    assert max(worst.values()) < 1e-6


def test_one_object_for_each_function():
    assert activation("Tanh") is activation("tanh")
    assert activation("LeakyRelu", 0.5) is activation("leakyrelu", 0.5) is not activation("leakyrelu")
    own = Activation("own", lambda xp: (xp.sin, xp.cos))
    assert activation(own) is own


@pytest.mark.parametrize(
    ("name", "constants"),
    [("swish", ()), ("tanh", (1.0,)), (3, ()), ("leakyrelu", (-0.1,)), ("scaledtanh", (0.0,)), ("elu", (-1.0,))],
)
def test_unknown_functions_and_constants(name, constants):
    with pytest.raises(InputError, match=r"^activation: ") as caught:
        activation(name, *constants)
    assert str(name if not constants else constants[0]) in str(caught.value) or "constants" in str(caught.value)
