"""Configurations of cells and activations: those of the library round-trip, user-defined ones are rejected."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.layer_cases import CASES, random_inputs

import xprnn
from xprnn import cells
from xprnn.arrays.namespace import InputError
from xprnn.layers.sequential import from_config

numbers = st.floats(0.01, 3.0)
names = st.sampled_from(["tanh", "sigmoid", "relu", "identity", "softsign", "softplus"])
constants = st.builds(xprnn.activation, st.sampled_from(["affine", "scaledtanh", "elu", "leakyrelu"]), numbers, numbers)
functions = names | constants | st.builds(xprnn.activation, names)
clips = st.none() | numbers
library_cells = st.one_of(
    st.builds(cells.elman, functions, clips),
    st.builds(cells.lstm, functions, functions, functions, st.booleans(), st.booleans(), clips),
    st.builds(cells.gru, functions, functions, clip=clips),
    st.builds(cells.gru_reset_before, candidate=functions, clip=clips),
)


def through_json(layer):
    return from_config(json.loads(json.dumps(layer.config())))


@settings(deadline=None, max_examples=60)
@given(library_cells, st.integers(1, 2), st.booleans())
def test_layer_with_any_library_cell_round_trips(cell, num_layers, bidirectional):
    layer = xprnn.Recurrent(3, 2, num_layers, bidirectional=bidirectional, cell=cell)
    restored = through_json(layer)
    assert restored == layer
    assert restored.resolved_cell is cell


@settings(deadline=None, max_examples=20)
@given(functions)
def test_rnn_with_any_nonlinearity_round_trips(f):
    layer = xprnn.RNN(3, 2, nonlinearity=f)
    restored = through_json(layer)
    assert restored == layer
    assert restored.resolved_cell is layer.resolved_cell


def test_equal_options_give_the_same_cell_object():
    assert cells.lstm() is cells.lstm("Sigmoid", candidate=xprnn.activation("tanh"), clip=None)
    assert cells.gru(clip=1) is cells.gru("sigmoid", clip=1.0)
    assert cells.gru() != cells.gru(clip=1.0)
    assert xprnn.RNN(1, 1).resolved_cell is xprnn.RNN(1, 1).resolved_cell


SERIALIZABLE_CASES = [name for name in CASES if name != "leaky"]


@pytest.mark.parametrize("name", SERIALIZABLE_CASES)
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_saved_layer_gives_the_same_outputs(tmp_path, rng, name, suffix):
    layer = CASES[name].make(3, 4, 2)
    p = random_inputs(rng, layer)
    path = tmp_path / f"model{suffix}"
    xprnn.save(path, xprnn.Sequential(rnn=layer), {f"rnn.{k}": a for k, a in p.params.items()})
    model, params = xprnn.load(path)
    assert model.layers["rnn"] == layer
    np.testing.assert_array_equal(model(params, p.x, p.state)[0], layer(p.params, p.x, p.state)[0])


def test_configuration_without_a_cell_is_read():
    """Early versions wrote no `cell` entry; RNN, LSTM and GRU with their default cell still write none."""
    old = {"type": "LSTM", "input_size": 3, "hidden_size": 4, "num_layers": 2, "bias": True, "batch_first": False}
    assert from_config(old) == xprnn.LSTM(3, 4, 2)
    assert from_config(
        {"type": "RNN", "input_size": 3, "hidden_size": 4, "nonlinearity": "relu"}
    ).resolved_cell is cells.elman("relu")
    assert "cell" not in xprnn.LSTM(3, 4).config()


def test_user_defined_activations_and_cells_have_no_configuration():
    cube = xprnn.Activation("cube", lambda xp: (lambda x: x**3, lambda y: 3 * abs(y) ** (2 / 3)))
    other_tanh = xprnn.Activation("tanh", cube.build)
    for f in (cube, other_tanh):
        with pytest.raises(InputError, match="RNN: a user-defined nonlinearity has no file form"):
            xprnn.RNN(3, 4, nonlinearity=f).config()
        with pytest.raises(InputError, match="LSTM: a layer with a user-defined cell has no file form"):
            xprnn.LSTM(3, 4, cell=cells.lstm(output=f)).config()
    with pytest.raises(InputError, match="Recurrent: a layer with a user-defined cell has no file form"):
        CASES["leaky"].make(3, 4).config()


def recurrent_config(**changes):
    return {"type": "Recurrent", "input_size": 3, "hidden_size": 4, **changes}


INVALID_CONFIGS = {
    "no cell": (recurrent_config(), "Recurrent: a cell is needed"),
    "text": (
        recurrent_config(cell="lstm"),
        "cell: expected a dict whose type is one of elman, lstm, gru, gru_reset_before",
    ),
    "unknown": (recurrent_config(cell={"type": "sru"}), "cell: expected a dict whose type is one of"),
    "list as type": (recurrent_config(cell={"type": ["lstm"]}), "cell: expected a dict whose type is one of"),
    "option": (
        recurrent_config(cell={"type": "gru", "output": "tanh", "x": 1}),
        "cell gru: expected .*, found output, x",
    ),
    "flag": (recurrent_config(cell={"type": "lstm", "peepholes": 1}), "lstm: peepholes must be True or False, found 1"),
    "clip": (recurrent_config(cell={"type": "gru", "clip": -1.0}), "gru: clip must be None or a number above 0"),
    "clip inf": (
        recurrent_config(cell={"type": "gru", "clip": float("inf")}),
        "gru: clip must be None or a number above 0",
    ),
    "clip text": (recurrent_config(cell={"type": "gru", "clip": "1"}), "gru: clip must be None or a number above 0"),
    "name": (recurrent_config(cell={"type": "gru", "gate": "tan"}), "activation: expected one of tanh"),
    "function": (recurrent_config(cell={"type": "gru", "gate": 3}), "activation: expected a name, or a dict"),
    "entry": (
        recurrent_config(cell={"type": "gru", "gate": {"name": "elu", "gamma": 1}}),
        "activation: expected a name, or a dict",
    ),
    "alpha": (
        recurrent_config(cell={"type": "gru", "gate": {"name": "elu", "alpha": "1"}}),
        "activation elu: alpha must be a num",
    ),
    "alpha nan": (
        recurrent_config(cell={"type": "gru", "gate": {"name": "elu", "alpha": float("nan")}}),
        "alpha must be a number",
    ),
    "nonlinearity": (
        {**recurrent_config(), "type": "RNN", "nonlinearity": {"name": 3}},
        "activation: expected a name, or a dict",
    ),
}


@pytest.mark.parametrize("case", INVALID_CONFIGS)
def test_invalid_configurations_raise(case):
    config, message = INVALID_CONFIGS[case]
    with pytest.raises(InputError, match=message):
        from_config(config)


@pytest.mark.parametrize("kind", ["LSTM", "RNN"])
def test_file_with_more_layers_than_arrays_raises(tmp_path, kind):
    """Without the check, the list of parameter names for 10**15 layers would fill the memory."""
    config = {"type": "Sequential", "layers": {"rnn": {**recurrent_config(num_layers=10**15), "type": kind}}}
    path = tmp_path / "model.npz"
    xprnn.io.archive.write_arrays(path, {"rnn.weight_ih_l0": np.zeros((4, 3))}, {"model": config, "metadata": {}})
    with pytest.raises(InputError, match="num_layers is 1000000000000000 but there are 1 arrays"):
        xprnn.load(path)
