"""Files that Keras 3 wrote, read without it: outputs and gradients that Keras computed when they were recorded."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support import keras_models
from support.paths import DATA

import xprnn

pytestmark = pytest.mark.needs("h5py")
FILES = DATA / "keras_files"
STEMS = sorted(path.stem for path in FILES.glob("*.keras"))


def numbers(stem):
    with np.load(FILES / f"{stem}.npz") as found:
        return dict(found)


def test_every_model_is_recorded():
    assert sorted([*keras_models.MODEL_NAMES, "lstm_stack_float32"]) == STEMS


@pytest.mark.parametrize("stem", STEMS)
def test_outputs_and_gradients_are_those_of_keras(stem):
    model, params = xprnn.from_keras(FILES / f"{stem}.keras")
    keras_models.assert_matches_keras(model, params, numbers(stem), 2e-6 if stem.endswith("float32") else 1e-10)


@pytest.mark.parametrize("stem", STEMS)
def test_on_every_array_library(xp, stem):
    dtype = "float32" if stem.endswith("float32") else xp.float_dtypes[0]
    found, like = numbers(stem), xp.asarray(np.zeros(1), dtype)
    model, params = xprnn.from_keras(str(FILES / f"{stem}.keras"), like=like)
    xp.assert_like(params, like)
    ids = found["x"].dtype.kind == "i"
    y, _ = model(params, xp.asarray(found["x"], None if ids else dtype))
    wanted = tuple(found[f"y{k}"] for k in range(2)) if isinstance(y, tuple) else found["y0"]
    xp.assert_close(y, wanted, condition=200)


@pytest.mark.parametrize("config", ["text", "dict", "json file", "keras file"])
def test_weights_with_an_architecture_beside_them(config):
    text = (FILES / "lstm_stack.json").read_text(encoding="utf-8")
    given = {
        "text": text,
        "dict": json.loads(text),
        "json file": FILES / "lstm_stack.json",
        "keras file": str(FILES / "lstm_stack.keras"),
    }[config]
    model, params = xprnn.from_keras(FILES / "lstm_stack.weights.h5", config=given)
    keras_models.assert_matches_keras(model, params, numbers("lstm_stack"), 1e-10)


@pytest.mark.parametrize("stem", STEMS)
def test_files_of_our_own_and_fresh_weights(rng, tmp_path, stem):
    model, params = xprnn.from_keras(FILES / f"{stem}.keras")
    xprnn.save(tmp_path / "m.safetensors", model, params)
    again, read = xprnn.load(tmp_path / "m.safetensors")
    assert again == model
    keras_models.assert_matches_keras(again, read, numbers(stem), 2e-6 if stem.endswith("float32") else 1e-10)
    fresh = model.init(rng, like=np.zeros(0))
    assert {k: a.shape for k, a in fresh.items()} == {k: a.shape for k, a in params.items()}


def test_one_layer_alone_is_that_layer(rng):
    model, params = xprnn.from_keras(FILES / "lstm_alone.keras")
    assert model == xprnn.LSTM(3, 4, bias=False, batch_first=True)
    assert params.keys() == {"weight_ih_l0", "weight_hh_l0"}
    x, state = rng.normal(size=(2, 4, 3)), None
    whole, _ = model(params, x)
    for t in range(4):
        y, state = model.step(params, x[:, t], state)
        np.testing.assert_allclose(y, whole[:, t], rtol=1e-12)


def test_parts_have_keras_own_names():
    model, _ = xprnn.from_keras(FILES / "gru_masked_backwards.keras")
    kinds = [type(part).__name__ for part in model.layers.values()]
    assert kinds == [
        "Masking",
        "GRU",
        "HoldLastOutput",
        "ReverseTime",
        "GRU",
        "HoldLastOutput",
        "Linear",
        "ActivationLayer",
    ]
    first, second = (part for part in model.layers.values() if isinstance(part, xprnn.GRU))
    assert (first.reverse, first.reset_after, second.reverse, second.reset_after) == (True, True, False, False)
    names = list(model.layers)
    assert names[2] == f"{names[1]}_hold"
    assert names[3] == f"{names[1]}_order"
    assert names[-1] == f"{names[-2]}_activation"


def test_it_trains(rng):
    """What came from Keras goes on learning here."""
    model, params = xprnn.from_keras(FILES / "simple_rnn_last.keras")
    x, target = rng.normal(size=(8, 5, 3)), rng.normal(size=(8, 2))
    optimizer = xprnn.adam(0.03)
    moments, losses = optimizer.init(params), []
    for _ in range(60):
        y, _, tape = model.forward(params, x)
        loss, dy = xprnn.mse(y, target)
        losses.append(float(loss))
        params, moments = optimizer.update(params, model.backward(tape, dy).dparams, moments)
    assert losses[-1] < 0.3 * losses[0]
