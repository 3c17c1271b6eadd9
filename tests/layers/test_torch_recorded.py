"""torch's recorded outputs and gradients (recorded/record.py): torch's word where torch is not installed."""

from __future__ import annotations

import runpy

import numpy as np
import pytest
from support.paths import DATA

import xprnn

FOLDER = DATA
# The layers as record.py made them; it cannot be imported for the list, for it imports torch.
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
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def under(arrays, prefix):
    return {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}


def test_every_recording_is_compared():
    assert {path.stem for path in FOLDER.glob("*.npz")} == LAYERS.keys()


@pytest.mark.parametrize("name", LAYERS)
def test_torchs_recorded_numbers(xp, name):
    layer, file = LAYERS[name], recorded(name)
    want = under(file, "want.")
    given = xp.asarray(file, xp.float_dtypes[0])
    pair = isinstance(layer, xprnn.LSTM)
    state, dstate = (
        ((given["state"], given["cell"]), (given["dstate"], given["dcell"]))
        if pair
        else (
            given["state"],
            given["dstate"],
        )
    )
    y, final, tape = layer.forward(under(given, "params."), given["x"], state)
    dx, dinitial, dparams = layer.backward(tape, given["dy"], dstate)
    xp.assert_close(y, want["y"], condition=60)
    xp.assert_close(final, (want["state"], want["cell"]) if pair else want["state"], condition=60)
    xp.assert_close(dx, want["dx"], condition=200)
    xp.assert_close(dinitial, (want["dstate"], want["dcell"]) if pair else want["dstate"], condition=200)
    xp.assert_close(dparams, under(want, "dparams."), condition=200)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("name", LAYERS)
def test_the_recordings_are_what_the_script_records(name):
    script = runpy.run_path(str(FOLDER / "record.py"))
    again, file = script["record"](*script["CASES"][name]), recorded(name)
    assert again.keys() == file.keys()
    for key, value in file.items():
        np.testing.assert_allclose(again[key], value, atol=1e-13, err_msg=key)
