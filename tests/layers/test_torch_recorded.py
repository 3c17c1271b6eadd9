"""Comparison with torch's recorded outputs and gradients (data/record.py), which needs no torch."""

from __future__ import annotations

import runpy

import numpy as np
import pytest
from support.paths import DATA

import xprnn

# The layers of data/record.py, which cannot be imported here because it imports torch.
LAYERS = {
    "rnn_tanh": xprnn.RNN(4, 3),
    "rnn_relu_2_layers": xprnn.RNN(4, 3, 2, nonlinearity="relu"),
    "rnn_bidirectional_batch_first": xprnn.RNN(4, 3, bidirectional=True, batch_first=True),
    "lstm_2_layers_bidirectional": xprnn.LSTM(4, 3, 2, bidirectional=True),
    "lstm_projected": xprnn.LSTM(4, 3, proj_size=2),
    "gru_2_layers": xprnn.GRU(4, 3, 2),
    "gru_bidirectional_no_bias": xprnn.GRU(4, 3, bidirectional=True, bias=False),
}


def recorded(name):
    with np.load(DATA / f"{name}.npz") as file:
        return dict(file)


def without_prefix(arrays, prefix):
    return {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}


def test_every_recorded_file_has_a_layer():
    assert {path.stem for path in DATA.glob("*.npz")} == LAYERS.keys()


@pytest.mark.parametrize("name", LAYERS)
def test_results_equal_recorded_torch_results(xp, name):
    layer, file = LAYERS[name], recorded(name)
    expected = without_prefix(file, "want.")
    inputs = xp.asarray(file, xp.float_dtypes[0])
    is_lstm = isinstance(layer, xprnn.LSTM)
    state, dstate = (
        ((inputs["state"], inputs["cell"]), (inputs["dstate"], inputs["dcell"]))
        if is_lstm
        else (
            inputs["state"],
            inputs["dstate"],
        )
    )
    y, final, tape = layer.forward(without_prefix(inputs, "params."), inputs["x"], state)
    dx, dinitial, dparams = layer.backward(tape, inputs["dy"], dstate)
    xp.assert_close(y, expected["y"], condition=60)
    xp.assert_close(final, (expected["state"], expected["cell"]) if is_lstm else expected["state"], condition=60)
    xp.assert_close(dx, expected["dx"], condition=200)
    xp.assert_close(dinitial, (expected["dstate"], expected["dcell"]) if is_lstm else expected["dstate"], condition=200)
    xp.assert_close(dparams, without_prefix(expected, "dparams."), condition=200)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("name", LAYERS)
def test_recording_script_reproduces_the_files(name):
    script = runpy.run_path(str(DATA / "record.py"))
    new, file = script["record"](*script["CASES"][name]), recorded(name)
    assert new.keys() == file.keys()
    for key, value in file.items():
        np.testing.assert_allclose(new[key], value, atol=1e-13, err_msg=key)
