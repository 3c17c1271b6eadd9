"""Live Keras as the oracle: random architectures, masks with holes, every option; gradients by JAX through Keras."""

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
    # Keras's own: NumPy 2's copy keyword, and masks that it says a nested model loses (they go on: see the tests).
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
def recurrents(draw, sequences):
    """(kind, options, wrapped) of a recurrent layer."""
    kind = draw(st.sampled_from(["SimpleRNN", "LSTM", "GRU"]))
    options = {
        "units": draw(st.integers(1, 3)),
        "return_sequences": sequences,
        "go_backwards": draw(st.booleans()),
        "zero_output_for_mask": draw(st.booleans()),
        "use_bias": draw(st.booleans()),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "stateful": False,
    }
    if kind != "SimpleRNN":
        options["recurrent_activation"] = draw(st.sampled_from(["sigmoid", "hard_sigmoid", "tanh"]))
    if kind == "GRU":
        options["reset_after"] = draw(st.booleans())
    wrapped = draw(st.sampled_from([None, None, "concat", "sum", "mul", "ave"]))
    return kind, options, wrapped


@st.composite
def architectures(draw):
    """A source of masks, recurrent layers, what may stand between and behind, and a seed."""
    source = draw(st.sampled_from(["plain", "masking", "embedding", "embedding_mask"]))
    count = draw(st.integers(1, 2))
    ends = draw(st.booleans())
    layers = [draw(recurrents(sequences=k < count - 1 or not ends)) for k in range(count)]
    between = draw(st.sampled_from(["nothing", "dense", "nested", "distributed", "relu", "dropout"]))
    head = draw(st.sampled_from([None, "softmax", "log_softmax", "sigmoid", "linear"]))
    return source, layers, between, head, draw(st.integers(0, 2**16))


def built(keras, source, layers, between, head):
    L = keras.layers
    out = [L.Input((None,), dtype="int32") if source.startswith("embedding") else L.Input((None, D))]
    out += {
        "plain": [],
        "masking": [L.Masking()],
        "embedding": [L.Embedding(V, D)],
        "embedding_mask": [L.Embedding(V, D, mask_zero=True)],
    }[source]
    for kind, options, wrapped in layers:
        if wrapped:
            layer = getattr(L, kind)(**{**options, "go_backwards": False})
            out.append(L.Bidirectional(layer, merge_mode=wrapped))
        else:
            out.append(getattr(L, kind)(**options))
        if len(out) == 3 and options["return_sequences"]:
            out += {
                "nothing": [],
                "dense": [L.Dense(2)],
                "nested": [keras.Sequential([L.Dense(2, activation="tanh"), keras.Sequential([L.ELU(0.5)])])],
                "distributed": [L.TimeDistributed(L.Dense(2, activation="relu"))],
                "relu": [L.ReLU(negative_slope=0.2)],
                "dropout": [L.SpatialDropout1D(0.3), L.GaussianNoise(0.2)],
            }[between]
    return keras.Sequential(out + ([L.Dense(2, activation=head)] if head else []))


def data(rng, source):
    skipped = rng.random((N, T)) < 0.4
    skipped[2] = True
    if source.startswith("embedding"):
        return np.where(skipped, 0, rng.integers(1, V, size=(N, T))).astype("int32")
    return np.where(skipped[..., None], 0.0, rng.normal(size=(N, T, D)))


@pytest.mark.parametrize("part", range(5))  # of one test's work, so that several processes can share it
def test_random_architectures(keras, part):
    @seed(part)
    @settings(
        max_examples=6,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @drawn(architectures())
    def check(architecture):
        source, layers, between, head, drawn_seed = architecture
        keras.backend.clear_session()
        rng = np.random.default_rng(drawn_seed)
        model = built(keras, source, layers, between, head)
        keras_models.randomize_weights(rng, model)
        ours, params = xprnn.from_keras(model)
        x = data(rng, source)
        y, _ = ours(params, x)
        want = np.asarray(model(x))
        np.testing.assert_allclose(y, want, rtol=1e-10, atol=1e-10)
        assert y.dtype == want.dtype == np.float64

    check()


@pytest.mark.parametrize("name", ["gru_masked_backwards", "pair_with_states"])
def test_gradients(keras, rng, name):
    model = keras_models.build_model(keras, name)
    keras_models.randomize_weights(rng, model)
    found = keras_models.keras_results(keras, model, keras_models.random_inputs(rng, name, "float64"), rng)
    keras_models.assert_matches_keras(*xprnn.from_keras(model), found, 1e-10)


def test_a_stateful_layer_is_handed_its_state(keras, rng):
    """What Keras keeps between calls is what the caller hands back in."""
    L = keras.layers
    layers = [L.Input(batch_shape=(N, T, D)), L.LSTM(3, stateful=True, return_sequences=True), L.GRU(2, stateful=True)]
    theirs = keras.Sequential(layers)
    keras_models.randomize_weights(rng, theirs)
    model, params = xprnn.from_keras(theirs)
    state = None
    for _ in range(3):
        x = rng.normal(size=(N, T, D))
        y, state = model(params, x, state)
        np.testing.assert_allclose(y, np.asarray(theirs(x)), rtol=1e-10, atol=1e-12)


def test_files_it_writes_now(keras, rng, tmp_path):
    """The recorded files may grow old: what the Keras of today writes is read too."""
    for name in ("bidirectional", "stacked_cells"):
        model = keras_models.build_model(keras, name)
        keras_models.randomize_weights(rng, model)
        model.compile("adam", "mse")
        model.save(tmp_path / "m.keras")
        model.save_weights(tmp_path / "m.weights.h5")
        x = keras_models.random_inputs(rng, name, "float64")
        want = np.asarray(model(x))
        for source, config in ((tmp_path / "m.keras", None), (tmp_path / "m.weights.h5", model.to_json())):
            ours, params = xprnn.from_keras(source, config=config)
            np.testing.assert_allclose(ours(params, x)[0], want, rtol=1e-10, atol=1e-10)


def test_what_has_no_counterpart_is_named_all_at_once(keras):
    L = keras.layers

    @keras.saving.register_keras_serializable("mine")
    class Dense(L.Dense):
        """Its name is Keras's, its code is not."""

    theirs = keras.Sequential(
        [L.Input((8, 3)), L.Conv1D(4, 2), L.LSTM(3, activation="gelu"), Dense(2), L.Lambda(lambda x: x)]
    )
    with pytest.raises(xprnn.InputError) as error:
        xprnn.from_keras(theirs)
    for part in ("(Conv1D): has no equivalent", "activation 'gelu'", "mine>Dense", "(Lambda): has no equivalent"):
        assert part in str(error.value)


def test_graphs_that_are_no_chain(keras):
    L = keras.layers
    x = keras.Input((None, D))
    shared, cell = L.GRU(D, return_sequences=True), L.LSTM(2, return_state=True)
    y, h, c = cell(x)
    twice = keras.Model(x, shared(shared(x)))
    added = keras.Model(x, L.Add()([L.Dense(2)(x), L.Dense(2)(x)]))
    seeded = keras.Model(x, L.LSTM(2)(x, initial_state=[h, c]))
    mask = keras.Input((None,), dtype="bool")
    given = keras.Model([x, mask], L.GRU(2)(x, mask=mask))
    for model, message in (
        (twice, "is called 2 times, expected once"),
        (added, "expected the first output of one layer as its input"),
        (seeded, "initial state"),
        (given, "expected one input"),
        (keras.Model(x, [h, y]), "expected one input"),
    ):
        with pytest.raises(xprnn.InputError, match=message):
            xprnn.from_keras(model)


def test_a_model_without_weights_yet(keras):
    with pytest.raises(xprnn.InputError, match="no weights yet: call it on an input first"):
        xprnn.from_keras(keras.Sequential([keras.layers.LSTM(3)]))


@st.composite
def chains(draw):
    """Recurrent layers and a Dense that ONNX's operators can say."""
    options = {"return_sequences": True}
    layers = []
    for _ in range(draw(st.integers(1, 2))):
        kind = draw(st.sampled_from(["SimpleRNN", "LSTM", "GRU"]))
        own = options | {"units": draw(st.integers(1, 3)), "use_bias": draw(st.booleans())}
        own["activation"] = draw(st.sampled_from(["tanh", "sigmoid", "softsign", "hard_sigmoid", "relu"]))
        if kind == "GRU":
            own["reset_after"] = draw(st.booleans())
        layers.append((kind, own, draw(st.booleans())))
    return layers, draw(st.integers(0, 3))


@pytest.mark.needs("onnxruntime")
@settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@drawn(chains())
def test_keras_here_onnx_and_onnx_runtime(keras, rng, case):
    """Keras -> xprnn -> ONNX -> ONNX Runtime: Keras's numbers come out."""
    import onnxruntime

    layers, outputs = case
    made = [keras.Input((None, D))]
    for kind, options, wrapped in layers:
        layer = getattr(keras.layers, kind)(**options)
        made.append(keras.layers.Bidirectional(layer) if wrapped else layer)
    made += [keras.layers.Dense(outputs)] if outputs else []
    source = keras.Sequential(made)
    for weight in source.weights:
        weight.assign(rng.normal(size=weight.shape))
    model, params = xprnn.from_keras(source, like=np.zeros(0, np.float32))
    proto = xprnn.to_onnx(model, params, optional=False, lengths=False)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x = rng.normal(size=(N, T, D)).astype("float32")
    feeds = {"x": x}
    for given_ in session.get_inputs()[1:]:
        feeds[given_.name] = np.zeros([n if isinstance(n, int) else N for n in given_.shape], "float32")
    (y,) = session.run(["y"], feeds)
    np.testing.assert_allclose(y, np.asarray(source(x.astype("float64"))), rtol=1e-4, atol=1e-5)
