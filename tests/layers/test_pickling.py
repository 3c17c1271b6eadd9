"""Layers, cells and activations can be pickled; a tape cannot, and its error says what to keep instead."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest

import xprnn
from xprnn import cells

UNPICKLABLE = "neither pickled nor copied: keep params, x and the state, and run forward again"
TAPE_MODELS = {
    "layer": xprnn.LSTM(3, 4, 2),
    "bidirectional": xprnn.GRU(3, 4, bidirectional=True),
    "model": xprnn.Sequential(head=xprnn.Linear(3, 3), rnn=xprnn.RNN(3, 4)),
    "nested": xprnn.Sequential(inner=xprnn.Sequential(last=xprnn.LastStep()), head=xprnn.Linear(3, 2)),
}
LAYERS = {
    "cell": xprnn.Recurrent(3, 4, cell=cells.elman("relu")),
    "options": xprnn.Recurrent(3, 4, cell=cells.lstm(peepholes=True, clip=3)),
    "constants": xprnn.RNN(3, 4, nonlinearity=xprnn.activation("elu", 0.5)),
    "constants in a cell": xprnn.Recurrent(3, 4, cell=cells.gru(candidate=xprnn.activation("elu", 0.5))),
    "activation": xprnn.ActivationLayer(xprnn.activation("leakyrelu", 0.3)),
    "model": xprnn.Sequential(rnn=xprnn.GRU(3, 4, reset_after=False), head=xprnn.Linear(4, 2)),
}


@pytest.mark.parametrize("name", TAPE_MODELS)
@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.deepcopy], ids=["pickle", "deepcopy"])
def test_tape_cannot_be_pickled_or_deep_copied(rng, name, duplicate):
    model = TAPE_MODELS[name]
    params = model.init(rng, like=np.zeros(0))
    y, _, tape = model.forward(params, rng.standard_normal((5, 2, 3)))
    with pytest.raises(TypeError, match=UNPICKLABLE):
        duplicate(tape)
    with pytest.raises(TypeError, match=UNPICKLABLE):
        duplicate({"epoch": 1, "tape": tape})
    expected, of_copy = (model.backward(t, y).dparams for t in (tape, copy.copy(tape)))
    for key, value in expected.items():
        np.testing.assert_array_equal(of_copy[key], value)


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.deepcopy], ids=["pickle", "deepcopy"])
def test_article_caches_cannot_be_pickled_or_deep_copied(rng, duplicate):
    shapes = {"Wax": (5, 3), "Waa": (5, 5), "Wya": (2, 5), "ba": (5, 1), "by": (2, 1)}
    parameters = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    _, _, caches = xprnn.rnn_forward(rng.standard_normal((3, 2, 4)), np.zeros((5, 2)), parameters)
    with pytest.raises(TypeError, match=UNPICKLABLE):
        duplicate(caches)


@pytest.mark.parametrize("name", LAYERS)
def test_pickles_and_deep_copies_of_layers_are_equal(name):
    layer = LAYERS[name]
    for protocol in range(2, 6):
        assert pickle.loads(pickle.dumps(layer, protocol)) == layer
    assert copy.deepcopy(layer) == layer


def test_another_process_runs_a_pickled_layer(rng):
    layer, x = LAYERS["options"], rng.standard_normal((5, 2, 3))
    params = layer.init(rng, like=np.zeros(0))
    code = "import pickle, sys; f, p, x = pickle.load(sys.stdin.buffer); pickle.dump(f(p, x)[0], sys.stdout.buffer)"
    request = pickle.dumps((layer, params, x))
    process = subprocess.run([sys.executable, "-c", code], input=request, stdout=subprocess.PIPE, check=True)
    np.testing.assert_array_equal(pickle.loads(process.stdout), layer(params, x)[0])


def test_user_defined_activation_with_a_library_name_is_not_pickled_by_name():
    """A user-defined activation is pickled by its functions, and a lambda cannot be pickled."""
    user_tanh = xprnn.Activation("tanh", lambda xp: (lambda x: x, lambda y: 1.0 + 0.0 * y))
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(user_tanh)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(xprnn.RNN(3, 4, nonlinearity=user_tanh))
