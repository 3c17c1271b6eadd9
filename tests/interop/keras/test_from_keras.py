"""Recorded Keras 3 files are read without Keras: outputs and gradients equal the recorded results of Keras."""

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


def recorded_results(stem):
    with np.load(FILES / f"{stem}.npz") as file:
        return dict(file)


def test_every_model_is_recorded():
    assert sorted([*keras_models.MODEL_NAMES, "lstm_stack_float32"]) == STEMS


@pytest.mark.parametrize("stem", STEMS)
def test_outputs_and_gradients_equal_keras(stem):
    model, params = xprnn.from_keras(FILES / f"{stem}.keras")
    keras_models.assert_matches_keras(
        model, params, recorded_results(stem), 2e-6 if stem.endswith("float32") else 1e-10
    )


@pytest.mark.parametrize("stem", STEMS)
def test_outputs_equal_keras_on_every_array_library(xp, stem):
    dtype = "float32" if stem.endswith("float32") else xp.float_dtypes[0]
    recorded, like = recorded_results(stem), xp.asarray(np.zeros(1), dtype)
    model, params = xprnn.from_keras(str(FILES / f"{stem}.keras"), like=like)
    xp.assert_like(params, like)
    has_ids = recorded["x"].dtype.kind == "i"
    y, _ = model(params, xp.asarray(recorded["x"], None if has_ids else dtype))
    expected = tuple(recorded[f"y{k}"] for k in range(2)) if isinstance(y, tuple) else recorded["y0"]
    xp.assert_close(y, expected, condition=200)


@pytest.mark.parametrize("config", ["text", "dict", "json file", "keras file"])
def test_weights_file_with_each_kind_of_config(config):
    text = (FILES / "lstm_stack.json").read_text(encoding="utf-8")
    config_argument = {
        "text": text,
        "dict": json.loads(text),
        "json file": FILES / "lstm_stack.json",
        "keras file": str(FILES / "lstm_stack.keras"),
    }[config]
    model, params = xprnn.from_keras(FILES / "lstm_stack.weights.h5", config=config_argument)
    keras_models.assert_matches_keras(model, params, recorded_results("lstm_stack"), 1e-10)


@pytest.mark.parametrize("stem", STEMS)
def test_converted_model_can_be_saved_and_initialized(rng, tmp_path, stem):
    model, params = xprnn.from_keras(FILES / f"{stem}.keras")
    xprnn.save(tmp_path / "m.safetensors", model, params)
    loaded, loaded_params = xprnn.load(tmp_path / "m.safetensors")
    assert loaded == model
    keras_models.assert_matches_keras(
        loaded, loaded_params, recorded_results(stem), 2e-6 if stem.endswith("float32") else 1e-10
    )
    initialized = model.init(rng, like=np.zeros(0))
    assert {k: a.shape for k, a in initialized.items()} == {k: a.shape for k, a in params.items()}


def test_single_layer_is_not_wrapped_in_a_sequential(rng):
    model, params = xprnn.from_keras(FILES / "lstm_alone.keras")
    assert model == xprnn.LSTM(3, 4, bias=False, batch_first=True)
    assert params.keys() == {"weight_ih_l0", "weight_hh_l0"}
    x, state = rng.normal(size=(2, 4, 3)), None
    all_steps, _ = model(params, x)
    for t in range(4):
        y, state = model.step(params, x[:, t], state)
        np.testing.assert_allclose(y, all_steps[:, t], rtol=1e-12)


def test_layers_have_keras_names_and_suffixes():
    model, _ = xprnn.from_keras(FILES / "gru_masked_backwards.keras")
    classes = [type(layer).__name__ for layer in model.layers.values()]
    assert classes == [
        "Masking",
        "GRU",
        "HoldLastOutput",
        "ReverseTime",
        "GRU",
        "HoldLastOutput",
        "Linear",
        "ActivationLayer",
    ]
    first, second = (layer for layer in model.layers.values() if isinstance(layer, xprnn.GRU))
    assert (first.reverse, first.reset_after, second.reverse, second.reset_after) == (True, True, False, False)
    names = list(model.layers)
    assert names[2] == f"{names[1]}_hold"
    assert names[3] == f"{names[1]}_order"
    assert names[-1] == f"{names[-2]}_activation"


def test_converted_model_trains(rng):
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
