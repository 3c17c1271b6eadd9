"""Every elementwise activation that Keras has: values and gradients are Keras's, on JAX, and go out to ONNX."""

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
OLD = (  # which random architectures try too (test_keras_live)
    *("tanh", "sigmoid", "linear", "softsign", "softplus", "hard_sigmoid", "elu", "celu", "relu", "leaky_relu"),
)
TELLING = (  # their slope: cells take them
    *("selu", "relu6", "hard_tanh", "log_sigmoid", "sparse_plus", "sparse_sigmoid", "squareplus", "soft_shrink"),
    *("hard_shrink", "exponential"),
)
SILENT = ("silu", "swish", "gelu", "mish", "hard_silu", "hard_swish", "tanh_shrink")
OTHERS = {"glu", "softmax", "log_softmax", "sparsemax", "threshold"}  # along an axis, or with arguments


@pytest.fixture(scope="module")
def keras():
    """Keras on JAX, in float64."""
    return keras_models.keras_on_jax()


def compare(rng, keras, theirs, source=None):
    """Outputs and the gradient of the input are Keras's; the model and its parameters."""
    import jax

    keras_models.randomize_weights(rng, theirs)
    model, params = xprnn.from_keras(theirs if source is None else source(theirs))
    x = rng.normal(size=(N, T, D))
    y, _, tape = model.forward(params, x)
    want, vjp = jax.vjp(theirs, jax.numpy.asarray(x))
    np.testing.assert_allclose(y, np.asarray(want), rtol=1e-10, atol=1e-10)
    dy = rng.normal(size=y.shape)
    (dx,) = vjp(jax.numpy.asarray(dy))
    np.testing.assert_allclose(model.backward(tape, dy).dx, np.asarray(dx), rtol=1e-9, atol=1e-10)
    return model, params, x, y


def test_all_of_keras_are_here(keras):
    tools = {"get", "serialize", "deserialize"}
    assert {n for n in dir(keras.activations) if not n.startswith("_")} - tools == {*OLD, *TELLING, *SILENT} | OTHERS


def threes(names):
    """Some at a time: what costs is Keras's run, not the number of layers."""
    return pytest.mark.parametrize("names", [names[k : k + 3] for k in range(0, len(names), 3)], ids="-".join)


@threes((*TELLING, *SILENT))
def test_behind_products_and_alone(keras, rng, tmp_path, names):
    L = keras.layers
    ends = [layer for name in names for layer in (L.Dense(5, activation=name), L.Activation(name))]
    theirs = keras.Sequential([L.Input((None, D)), L.SimpleRNN(4, return_sequences=True), *ends])

    def filed(model):
        model.save(tmp_path / "m.keras")
        return tmp_path / "m.keras"

    compare(rng, keras, theirs, filed)


@threes(TELLING[:-1])  # an exponential of exponentials explodes
def test_in_cells(keras, rng, names):
    L = keras.layers
    kinds = (L.SimpleRNN, lambda *args, **more: L.GRU(*args, **more, reset_after=False), L.LSTM)
    layers = [kind(3, return_sequences=True, activation=n) for kind, n in zip(kinds, names, strict=True)]
    compare(rng, keras, keras.Sequential([L.Input((None, D)), *layers]))


@pytest.mark.parametrize("name", [name for name in SILENT if "swish" not in name])  # which are names of silu
def test_cells_say_why_they_do_not_take_the_others(keras, name):
    L = keras.layers
    theirs = keras.Sequential([L.Input((None, D)), L.SimpleRNN(3, activation=name)])
    with pytest.raises(
        xprnn.InputError, match=f"activation {name!r} is not supported in a recurrent layer: its derivative cannot"
    ):
        xprnn.from_keras(theirs)


def test_layers_of_activations(keras, rng):
    L = keras.layers
    theirs = keras.Sequential([L.Input((None, D)), L.SimpleRNN(3, return_sequences=True), L.ReLU(max_value=6.0)])
    model, *_ = compare(rng, keras, theirs)
    assert list(model.layers.values())[-1] == xprnn.ActivationLayer("relu6")


@pytest.mark.needs("onnx", "onnxruntime")
@pytest.mark.parametrize("name", ["selu", "gelu"])  # all of them, without Keras: test_onnx_scan
def test_goes_out_to_onnx(keras, rng, name):
    """Keras -> xprnn -> ONNX -> ONNX Runtime, and back."""
    from support.onnx_cases import run_onnxruntime

    L = keras.layers
    inner = {"activation": name} if name in TELLING[:-1] else {}
    theirs = keras.Sequential(
        [L.Input((None, D)), L.LSTM(4, return_sequences=True, **inner), L.Dense(5, activation=name)]
    )
    model, params, x, y = compare(rng, keras, theirs)
    single = {k: a.astype(np.float32) for k, a in params.items()}
    proto = xprnn.to_onnx(model, single)
    scale = max(1.0, float(np.abs(y).max()))
    np.testing.assert_allclose(run_onnxruntime(proto, {"x": x})["y"], y, atol=2e-5 * scale)
    back, found = xprnn.from_onnx(proto)
    assert back == model
    assert all(np.array_equal(found[k], a) for k, a in single.items())
