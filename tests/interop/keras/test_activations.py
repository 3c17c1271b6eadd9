"""Elementwise activations of Keras: values and gradients equal those of Keras on JAX; export to ONNX."""

from __future__ import annotations

import numpy as np
import pytest
from support import keras_models

import xprnn

pytestmark = [
    pytest.mark.needs("keras", "jax"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # NumPy 2's copy keyword
]
N, T, D = keras_models.N, keras_models.T, keras_models.D
COMMON = (  # test_live.py tests these in random architectures
    *("tanh", "sigmoid", "linear", "softsign", "softplus", "hard_sigmoid", "elu", "celu", "relu", "leaky_relu"),
)
INVERTIBLE = (  # the derivative follows from the output: recurrent layers accept them
    *("selu", "relu6", "hard_tanh", "log_sigmoid", "sparse_plus", "sparse_sigmoid", "squareplus", "soft_shrink"),
    *("hard_shrink", "exponential"),
)
# The derivative needs the input: only Dense and Activation layers accept them.
FROM_INPUT = ("silu", "swish", "gelu", "mish", "hard_silu", "hard_swish", "tanh_shrink")
NOT_ELEMENTWISE = {"glu", "softmax", "log_softmax", "sparsemax", "threshold"}  # along an axis, or with arguments


@pytest.fixture(scope="module")
def keras():
    """Keras on JAX, in float64."""
    return keras_models.keras_on_jax()


def assert_same_as_keras(rng, keras, keras_model, save=None):
    """Compare the outputs and the gradient of the input; return the model, its parameters, x and y."""
    import jax

    keras_models.randomize_weights(rng, keras_model)
    model, params = xprnn.from_keras(keras_model if save is None else save(keras_model))
    x = rng.normal(size=(N, T, D))
    y, _, tape = model.forward(params, x)
    expected, vjp = jax.vjp(keras_model, jax.numpy.asarray(x))
    np.testing.assert_allclose(y, np.asarray(expected), rtol=1e-10, atol=1e-10)
    dy = rng.normal(size=y.shape)
    (dx,) = vjp(jax.numpy.asarray(dy))
    np.testing.assert_allclose(model.backward(tape, dy).dx, np.asarray(dx), rtol=1e-9, atol=1e-10)
    return model, params, x, y


def test_every_keras_activation_is_listed(keras):
    tools = {"get", "serialize", "deserialize"}
    names = {name for name in dir(keras.activations) if not name.startswith("_")} - tools
    assert names == {*COMMON, *INVERTIBLE, *FROM_INPUT} | NOT_ELEMENTWISE


def parametrize_in_threes(names):
    """Three activations per test: most of the time is compilation by Keras, which depends little on their number."""
    return pytest.mark.parametrize("names", [names[k : k + 3] for k in range(0, len(names), 3)], ids="-".join)


@parametrize_in_threes((*INVERTIBLE, *FROM_INPUT))
def test_dense_and_activation_layers_equal_keras(keras, rng, tmp_path, names):
    L = keras.layers
    layers = [layer for name in names for layer in (L.Dense(5, activation=name), L.Activation(name))]
    keras_model = keras.Sequential([L.Input((None, D)), L.SimpleRNN(4, return_sequences=True), *layers])

    def save(model):
        model.save(tmp_path / "m.keras")
        return tmp_path / "m.keras"

    assert_same_as_keras(rng, keras, keras_model, save)


@parametrize_in_threes(INVERTIBLE[:-1])  # without exponential, which overflows in a recurrence
def test_recurrent_layers_equal_keras(keras, rng, names):
    L = keras.layers
    layer_classes = (L.SimpleRNN, lambda *args, **options: L.GRU(*args, **options, reset_after=False), L.LSTM)
    layers = [
        layer_class(3, return_sequences=True, activation=n) for layer_class, n in zip(layer_classes, names, strict=True)
    ]
    assert_same_as_keras(rng, keras, keras.Sequential([L.Input((None, D)), *layers]))


# swish and hard_swish are other names of silu and hard_silu.
@pytest.mark.parametrize("name", [name for name in FROM_INPUT if "swish" not in name])
def test_activations_from_input_raise_in_recurrent_layers(keras, name):
    L = keras.layers
    keras_model = keras.Sequential([L.Input((None, D)), L.SimpleRNN(3, activation=name)])
    with pytest.raises(
        xprnn.InputError, match=f"activation {name!r} is not supported in a recurrent layer: its derivative cannot"
    ):
        xprnn.from_keras(keras_model)


def test_relu_layer_with_max_value_6_equals_keras(keras, rng):
    L = keras.layers
    keras_model = keras.Sequential([L.Input((None, D)), L.SimpleRNN(3, return_sequences=True), L.ReLU(max_value=6.0)])
    model, *_ = assert_same_as_keras(rng, keras, keras_model)
    assert list(model.layers.values())[-1] == xprnn.ActivationLayer("relu6")


@pytest.mark.needs("onnx", "onnxruntime")
@pytest.mark.parametrize("name", ["selu", "gelu"])  # interop/onnx tests all of them without Keras
def test_export_to_onnx_equals_keras_and_reads_back(keras, rng, name):
    """Keras -> xprnn -> ONNX -> ONNX Runtime, and back."""
    from support.onnx_cases import run_onnxruntime

    L = keras.layers
    cell_options = {"activation": name} if name in INVERTIBLE[:-1] else {}
    keras_model = keras.Sequential(
        [L.Input((None, D)), L.LSTM(4, return_sequences=True, **cell_options), L.Dense(5, activation=name)]
    )
    model, params, x, y = assert_same_as_keras(rng, keras, keras_model)
    float32_params = {k: a.astype(np.float32) for k, a in params.items()}
    proto = xprnn.to_onnx(model, float32_params)
    scale = max(1.0, float(np.abs(y).max()))
    np.testing.assert_allclose(run_onnxruntime(proto, {"x": x})["y"], y, atol=2e-5 * scale)
    read_model, read_params = xprnn.from_onnx(proto)
    assert read_model == model
    assert all(np.array_equal(read_params[k], a) for k, a in float32_params.items())
