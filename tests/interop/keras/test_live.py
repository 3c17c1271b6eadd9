"""Comparison with live Keras on JAX: random architectures, masks in the middle of rows, all options, gradients."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import given as drawn
from hypothesis import strategies as st
from support import keras_models

import xprnn

pytestmark = [
    pytest.mark.needs("keras", "jax"),
    # Keras warns of NumPy 2's copy keyword, and that nested models lose masks (the tests show that they do not).
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask:UserWarning"),
]
N, T, D, V = keras_models.N, keras_models.T, keras_models.D, keras_models.V
ACTIVATIONS = ("tanh", "sigmoid", "linear", "softsign", "softplus", "hard_sigmoid", "elu", "celu", "relu", "leaky_relu")


@pytest.fixture(scope="module")
def keras():
    """Keras on JAX, in float64."""
    return keras_models.keras_on_jax()


@st.composite
def recurrent_layers(draw, sequences):
    """Strategy for a recurrent layer: (class name, options, merge_mode of its Bidirectional or None)."""
    class_name = draw(st.sampled_from(["SimpleRNN", "LSTM", "GRU"]))
    options = {
        "units": draw(st.integers(1, 3)),
        "return_sequences": sequences,
        "go_backwards": draw(st.booleans()),
        "zero_output_for_mask": draw(st.booleans()),
        "use_bias": draw(st.booleans()),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "stateful": False,
    }
    if class_name != "SimpleRNN":
        options["recurrent_activation"] = draw(st.sampled_from(["sigmoid", "hard_sigmoid", "tanh"]))
    if class_name == "GRU":
        options["reset_after"] = draw(st.booleans())
    merge_mode = draw(st.sampled_from([None, None, "concat", "sum", "mul", "ave"]))
    return class_name, options, merge_mode


@st.composite
def architectures(draw):
    """Strategy for (source of input and mask, recurrent layers, layers in the middle, activation of the head, seed)."""
    source = draw(st.sampled_from(["plain", "masking", "embedding", "embedding_mask"]))
    count = draw(st.integers(1, 2))
    ends_with_last_step = draw(st.booleans())
    layers = [draw(recurrent_layers(sequences=k < count - 1 or not ends_with_last_step)) for k in range(count)]
    middle = draw(st.sampled_from(["nothing", "dense", "nested", "distributed", "relu", "dropout"]))
    head = draw(st.sampled_from([None, "softmax", "log_softmax", "sigmoid", "linear"]))
    return source, layers, middle, head, draw(st.integers(0, 2**16))


def build_model(keras, source, layers, middle, head):
    """Build a Sequential from a result of `architectures`."""
    L = keras.layers
    stack = [L.Input((None,), dtype="int32") if source.startswith("embedding") else L.Input((None, D))]
    stack += {
        "plain": [],
        "masking": [L.Masking()],
        "embedding": [L.Embedding(V, D)],
        "embedding_mask": [L.Embedding(V, D, mask_zero=True)],
    }[source]
    for class_name, options, merge_mode in layers:
        if merge_mode:
            layer = getattr(L, class_name)(**{**options, "go_backwards": False})
            stack.append(L.Bidirectional(layer, merge_mode=merge_mode))
        else:
            stack.append(getattr(L, class_name)(**options))
        if len(stack) == 3 and options["return_sequences"]:
            stack += {
                "nothing": [],
                "dense": [L.Dense(2)],
                "nested": [keras.Sequential([L.Dense(2, activation="tanh"), keras.Sequential([L.ELU(0.5)])])],
                "distributed": [L.TimeDistributed(L.Dense(2, activation="relu"))],
                "relu": [L.ReLU(negative_slope=0.2)],
                "dropout": [L.SpatialDropout1D(0.3), L.GaussianNoise(0.2)],
            }[middle]
    return keras.Sequential(stack + ([L.Dense(2, activation=head)] if head else []))


def random_input(rng, source):
    """Random ids or features in which about 40 % of the steps, and all steps of row 2, are masked."""
    masked = rng.random((N, T)) < 0.4
    masked[2] = True
    if source.startswith("embedding"):
        return np.where(masked, 0, rng.integers(1, V, size=(N, T))).astype("int32")
    return np.where(masked[..., None], 0.0, rng.normal(size=(N, T, D)))


@pytest.mark.parametrize("example_seed", range(5))  # several small tests, so that pytest-xdist can distribute them
def test_random_architectures_equal_keras(keras, example_seed):
    @seed(example_seed)
    @settings(
        max_examples=6,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @drawn(architectures())
    def check(architecture):
        source, layers, middle, head, drawn_seed = architecture
        rng = np.random.default_rng(drawn_seed)
        model = build_model(keras, source, layers, middle, head)
        keras_models.randomize_weights(rng, model)
        converted, params = xprnn.from_keras(model)
        x = random_input(rng, source)
        y, _ = converted(params, x)
        expected = np.asarray(model(x))
        np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-10)
        assert y.dtype == expected.dtype == np.float64

    check()


@pytest.mark.parametrize("name", ["gru_masked_backwards", "pair_with_states"])
def test_gradients_equal_keras(keras, rng, name):
    model = keras_models.build_model(keras, name)
    keras_models.randomize_weights(rng, model)
    results = keras_models.keras_results(keras, model, keras_models.random_inputs(rng, name, "float64"), rng)
    keras_models.assert_matches_keras(*xprnn.from_keras(model), results, 1e-10)


def test_returned_state_replaces_stateful_layers(keras, rng):
    """Keras saves the state between calls; with xprnn the caller passes the returned state to the next call."""
    L = keras.layers
    layers = [L.Input(batch_shape=(N, T, D)), L.LSTM(3, stateful=True, return_sequences=True), L.GRU(2, stateful=True)]
    keras_model = keras.Sequential(layers)
    keras_models.randomize_weights(rng, keras_model)
    model, params = xprnn.from_keras(keras_model)
    state = None
    for _ in range(3):
        x = rng.normal(size=(N, T, D))
        y, state = model(params, x, state)
        np.testing.assert_allclose(y, np.asarray(keras_model(x)), rtol=1e-10, atol=1e-12)


def test_files_of_the_installed_keras_are_read(keras, rng, tmp_path):
    """The recorded files are from an older version of Keras."""
    for name in ("bidirectional", "stacked_cells"):
        model = keras_models.build_model(keras, name)
        keras_models.randomize_weights(rng, model)
        model.compile("adam", "mse")
        model.save(tmp_path / "m.keras")
        model.save_weights(tmp_path / "m.weights.h5")
        x = keras_models.random_inputs(rng, name, "float64")
        expected = np.asarray(model(x))
        for source, config in ((tmp_path / "m.keras", None), (tmp_path / "m.weights.h5", model.to_json())):
            converted, params = xprnn.from_keras(source, config=config)
            np.testing.assert_allclose(converted(params, x)[0], expected, rtol=1e-10, atol=1e-10)


def test_all_unsupported_layers_are_listed_in_one_error(keras):
    L = keras.layers

    @keras.saving.register_keras_serializable("mine")
    class Dense(L.Dense):
        """A user-defined layer with the name of a Keras layer."""

    keras_model = keras.Sequential(
        [L.Input((8, 3)), L.Conv1D(4, 2), L.LSTM(3, activation="gelu"), Dense(2), L.Lambda(lambda x: x)]
    )
    with pytest.raises(xprnn.InputError) as error:
        xprnn.from_keras(keras_model)
    for reason in ("(Conv1D): has no equivalent", "activation 'gelu'", "mine>Dense", "(Lambda): has no equivalent"):
        assert reason in str(error.value)


def test_functional_models_that_are_not_a_chain_raise(keras):
    L = keras.layers
    x = keras.Input((None, D))
    shared, lstm = L.GRU(D, return_sequences=True), L.LSTM(2, return_state=True)
    y, h, c = lstm(x)
    called_twice = keras.Model(x, shared(shared(x)))
    branched = keras.Model(x, L.Add()([L.Dense(2)(x), L.Dense(2)(x)]))
    with_initial_state = keras.Model(x, L.LSTM(2)(x, initial_state=[h, c]))
    mask = keras.Input((None,), dtype="bool")
    with_mask_input = keras.Model([x, mask], L.GRU(2)(x, mask=mask))
    for model, message in (
        (called_twice, "is called 2 times, expected once"),
        (branched, "expected the first output of one layer as its input"),
        (with_initial_state, "initial state"),
        (with_mask_input, "expected one input"),
        (keras.Model(x, [h, y]), "expected one input"),
    ):
        with pytest.raises(xprnn.InputError, match=message):
            xprnn.from_keras(model)


def test_model_without_weights_raises(keras):
    with pytest.raises(xprnn.InputError, match="no weights yet: call it on an input first"):
        xprnn.from_keras(keras.Sequential([keras.layers.LSTM(3)]))


@st.composite
def onnx_chains(draw):
    """Strategy for recurrent layers with activations of ONNX's operators, and the size of a Dense (0: none)."""
    options = {"return_sequences": True}
    layers = []
    for _ in range(draw(st.integers(1, 2))):
        class_name = draw(st.sampled_from(["SimpleRNN", "LSTM", "GRU"]))
        layer_options = options | {"units": draw(st.integers(1, 3)), "use_bias": draw(st.booleans())}
        layer_options["activation"] = draw(st.sampled_from(["tanh", "sigmoid", "softsign", "hard_sigmoid", "relu"]))
        if class_name == "GRU":
            layer_options["reset_after"] = draw(st.booleans())
        layers.append((class_name, layer_options, draw(st.booleans())))
    return layers, draw(st.integers(0, 3))


@pytest.mark.needs("onnxruntime")
@settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@drawn(onnx_chains())
def test_export_to_onnx_runtime_equals_keras(keras, rng, case):
    """The outputs of ONNX Runtime for Keras -> xprnn -> ONNX equal those of Keras."""
    import onnxruntime

    layers, outputs = case
    keras_layers = [keras.Input((None, D))]
    for class_name, options, bidirectional in layers:
        layer = getattr(keras.layers, class_name)(**options)
        keras_layers.append(keras.layers.Bidirectional(layer) if bidirectional else layer)
    keras_layers += [keras.layers.Dense(outputs)] if outputs else []
    keras_model = keras.Sequential(keras_layers)
    for weight in keras_model.weights:
        weight.assign(rng.normal(size=weight.shape))
    model, params = xprnn.from_keras(keras_model, like=np.zeros(0, np.float32))
    proto = xprnn.to_onnx(model, params, optional=False, lengths=False)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x = rng.normal(size=(N, T, D)).astype("float32")
    feeds = {"x": x}
    for session_input in session.get_inputs()[1:]:
        feeds[session_input.name] = np.zeros([n if isinstance(n, int) else N for n in session_input.shape], "float32")
    (y,) = session.run(["y"], feeds)
    np.testing.assert_allclose(y, np.asarray(keras_model(x.astype("float64"))), rtol=1e-4, atol=1e-5)
