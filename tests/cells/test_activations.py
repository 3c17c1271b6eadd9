"""Activations: values and derivatives, compared with formulas, central differences and torch."""

from __future__ import annotations

import math

import numpy as np
import pytest

import xprnn
from xprnn import Activation, InputError, activation

# name -> (constants, function of one number as ONNX, torch or Keras defines it, positions of its kinks)
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
    "celu": ((0.75, None), lambda x: x if x >= 0 else 0.75 * (math.exp(x / 0.75) - 1), [0.0]),
    "selu": ((), lambda x: 1.0507009873554805 * (x if x >= 0 else 1.6732632423543772 * (math.exp(x) - 1)), [0.0]),
    "relu6": ((), lambda x: min(max(x, 0.0), 6.0), [0.0, 6.0]),
    "hardtanh": ((), lambda x: min(max(x, -1.0), 1.0), [-1.0, 1.0]),
    "exponential": ((), math.exp, []),
    "logsigmoid": ((), lambda x: -math.log(1 + math.exp(-x)), []),
    "squareplus": ((3.0, None), lambda x: (x + math.sqrt(x * x + 3)) / 2, []),
    "sparseplus": ((), lambda x: 0.0 if x <= -1 else x if x >= 1 else (x + 1) ** 2 / 4, [-1.0]),
    "softshrink": ((0.4, None), lambda x: x - 0.4 if x > 0.4 else x + 0.4 if x < -0.4 else 0.0, [-0.4, 0.4]),
    "hardshrink": ((0.4, None), lambda x: x if abs(x) > 0.4 else 0.0, [-0.4, 0.4]),
}


def normal_cdf(x):
    return (1 + math.erf(x / math.sqrt(2))) / 2


def gelu_tanh(x):
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# Activations whose derivative needs the input: name -> (function of one number, positions of its kinks)
FROM_INPUT = {
    "silu": (lambda x: x / (1 + math.exp(-x)), []),
    "gelu": (lambda x: x * normal_cdf(x), []),
    "gelutanh": (gelu_tanh, []),
    "mish": (lambda x: x * math.tanh(math.log(1 + math.exp(x))), []),
    "hardswish": (lambda x: x * min(max(x + 3, 0.0), 6.0) / 6, [-3.0, 3.0]),
    "tanhshrink": (lambda x: x - math.tanh(x), []),
}


def points(rng, kinks):
    """Return random points from -4 to 4 and points on both sides of each kink, none within 0.01 of a kink."""
    x = np.concatenate((rng.uniform(-4, 4, 60), [k + d for k in kinks for d in (-0.02, 0.02)]))
    return x[np.all([np.abs(x - k) > 0.01 for k in kinks], axis=0)] if kinks else x


@pytest.mark.parametrize("name", FUNCTIONS)
def test_value_and_derivative_from_output(xp, dtype, rng, name):
    constants, formula, kinks = FUNCTIONS[name]
    x = points(rng, kinks).astype(dtype).astype("float64")
    f, derivative = activation(name, *constants).build(xp.xp)
    x_xp = xp.asarray(x, dtype)
    y = f(x_xp)
    xp.assert_close(y, np.asarray([formula(v) for v in x]), condition=16)
    h = 1e-6
    expected = np.asarray([(formula(v + h) - formula(v - h)) / (2 * h) for v in x])
    dy_dx = derivative(y)
    np.testing.assert_allclose(xp.to_numpy(dy_dx) + 0 * x, expected, atol=1e-8 + xp.rtol(dtype, 60))
    xp.assert_like((y, dy_dx), x_xp)


@pytest.mark.parametrize("name", FROM_INPUT)
def test_value_and_derivative_from_input(xp, dtype, rng, name):
    formula, kinks = FROM_INPUT[name]
    x = np.concatenate((points(rng, kinks), [0.0, -9.0, 9.0])).astype(dtype).astype("float64")
    f, derivative = activation(name).build(xp.xp)
    x_xp = xp.asarray(x, dtype)
    xp.assert_close(f(x_xp), np.asarray([formula(v) for v in x]), condition=30)
    h = 1e-6
    expected = np.asarray([(formula(v + h) - formula(v - h)) / (2 * h) for v in x])
    np.testing.assert_allclose(xp.to_numpy(derivative(x_xp)), expected, atol=1e-8 + xp.rtol(dtype, 60))
    xp.assert_like((f(x_xp), derivative(x_xp)), x_xp)


def test_erf_has_a_relative_error_of_at_most_1e_15(rng):
    from xprnn.cells.activations_from_input import erf

    x = np.concatenate((np.linspace(-7, 7, 4001), 0.5 * rng.standard_normal(1000), [0.0, 0.46875, -0.46875, 40.0]))
    np.testing.assert_allclose(erf(np)(x), [math.erf(v) for v in x], rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", [name for name in (*FUNCTIONS, *FROM_INPUT) if name != "exponential"])
def test_large_inputs_do_not_overflow(xp, dtype, name):
    """On NumPy an overflow in an intermediate result raises (fixture float_errors_raise)."""
    constants, *_ = FUNCTIONS.get(name, [()])
    f, derivative = activation(name, *constants).build(xp.xp)
    x = xp.asarray(np.asarray([-1e4, -200.0, 200.0, 1e4]), dtype)
    y = f(x)
    for array in (y, derivative(x if name in FROM_INPUT else y)):
        assert np.isfinite(xp.to_numpy(array)).all()


@pytest.mark.needs("torch")
@pytest.mark.parametrize(
    "name",
    [
        *("tanh", "sigmoid", "relu", "softsign", "softplus", "leakyrelu", "elu", "celu", "selu", "relu6", "hardtanh"),
        *("logsigmoid", "softshrink", "hardshrink", *FROM_INPUT),
    ],
)
def test_values_and_derivatives_equal_torchs(rng, name):
    import torch

    constants, _, kinks = FUNCTIONS.get(name) or ((), *FROM_INPUT[name])
    x = 2 * points(rng, [k / 2 for k in kinks])
    leaf = torch.tensor(x, requires_grad=True)
    functional = torch.nn.functional
    torch_functions = {
        "leakyrelu": lambda v: functional.leaky_relu(v, 0.2),
        "gelutanh": lambda v: functional.gelu(v, approximate="tanh"),
        "elu": lambda v: functional.elu(v, 0.8),
        "celu": lambda v: functional.celu(v, 0.75),  # 0.75 is exact in float32, to which torch rounds alpha
        **{k: lambda v, k=k: getattr(functional, k)(v, 0.4) for k in ("softshrink", "hardshrink")},
    }
    y = (torch_functions.get(name) or getattr(functional, name))(leaf)
    y.sum().backward()
    f, derivative = activation(name, *constants).build(np)
    np.testing.assert_allclose(f(x), y.detach().numpy(), atol=1e-14)
    np.testing.assert_allclose(derivative(x if name in FROM_INPUT else f(x)) + 0 * x, leaf.grad.numpy(), atol=1e-14)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rnn_with_activation_passes_check_gradients(rng, name):
    constants, _, _ = FUNCTIONS[name]
    layer = xprnn.RNN(3, 5, nonlinearity=activation(name, *constants))
    scale = 0.2 if name == "exponential" else 1.0  # larger weights let the state overflow
    params = {k: scale * a for k, a in layer.init(rng, like=np.zeros(0)).items()}

    def forward(params, x):
        y, _, tape = layer.forward(params, x)
        return y, tape

    def backward(tape, dy):
        dx, _, dparams = layer.backward(tape, dy)
        return dparams, dx

    worst = xprnn.check_gradients(forward, backward, (params, rng.normal(size=(4, 2, 3))), rng=rng)
    assert max(worst.values()) < 1e-6


@pytest.mark.applies_if(lambda xp: "float64" in xp.float_dtypes, reason="central differences need float64")
@pytest.mark.parametrize("name", FROM_INPUT)
def test_activation_layer_gradient_equals_central_differences(xp, rng, name):
    layer = xprnn.ActivationLayer(name)
    x = points(rng, FROM_INPUT[name][1]).reshape(-1, 1, 1)
    _, _, tape = layer.forward({}, xp.asarray(x))
    dy = rng.normal(size=x.shape)
    dx = layer.backward(tape, xp.asarray(dy)).dx
    h = 1e-6
    plus, minus = (xp.to_numpy(layer({}, xp.asarray(x + d))[0]) for d in (h, -h))
    np.testing.assert_allclose(xp.to_numpy(dx), dy * (plus - minus) / (2 * h), rtol=1e-7, atol=1e-8)
    assert xprnn.layers.sequential.from_config(layer.config()) == layer


@pytest.mark.parametrize("name", FROM_INPUT)
def test_cells_reject_activations_whose_derivative_needs_the_input(name):
    for make in (
        xprnn.cells.elman,
        xprnn.cells.lstm,
        xprnn.cells.gru,
        lambda f: xprnn.RNN(2, 3, nonlinearity=f).resolved_cell,
    ):
        with pytest.raises(InputError, match=f"={name}: its derivative needs the input"):
            make(name)


def test_equal_names_and_constants_give_the_same_object():
    assert activation("Tanh") is activation("tanh")
    assert activation("LeakyRelu", 0.5) is activation("leakyrelu", 0.5) is not activation("leakyrelu")
    custom = Activation("custom", lambda xp: (xp.sin, xp.cos))
    assert activation(custom) is custom


@pytest.mark.parametrize(
    ("name", "constants"),
    [
        *(("swish", ()), ("tanh", (1.0,)), (3, ()), ("leakyrelu", (-0.1,)), ("scaledtanh", (0.0,)), ("elu", (-1.0,))),
        *(("silu", (1.0,)), ("celu", (0.0,)), ("squareplus", (0.0,)), ("softshrink", (-0.5,))),
    ],
)
def test_unknown_names_and_invalid_constants_raise(name, constants):
    with pytest.raises(InputError, match=r"^activation: ") as error:
        activation(name, *constants)
    assert str(name if not constants else constants[0]) in str(error.value) or "constants" in str(error.value)
