"""What goes into another process: configurations do, tapes say that they cannot."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest

import xprnn
from xprnn import cells

AGAIN = "neither pickled nor copied: keep params, x and the state, and run forward again"
MODELS = {
    "layer": xprnn.LSTM(3, 4, 2),
    "both ways": xprnn.GRU(3, 4, bidirectional=True),
    "model": xprnn.Sequential(head=xprnn.Linear(3, 3), rnn=xprnn.RNN(3, 4)),
    "nested": xprnn.Sequential(inner=xprnn.Sequential(last=xprnn.LastStep()), head=xprnn.Linear(3, 2)),
}
PARTS = {
    "cell": xprnn.Recurrent(3, 4, cell=cells.elman("relu")),
    "options": xprnn.Recurrent(3, 4, cell=cells.lstm(peepholes=True, clip=3)),
    "constants": xprnn.RNN(3, 4, nonlinearity=xprnn.activation("elu", 0.5)),
    "constants in a cell": xprnn.Recurrent(3, 4, cell=cells.gru(candidate=xprnn.activation("elu", 0.5))),
    "apply": xprnn.ActivationLayer(xprnn.activation("leakyrelu", 0.3)),
    "model": xprnn.Sequential(rnn=xprnn.GRU(3, 4, reset_after=False), head=xprnn.Linear(4, 2)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.deepcopy], ids=["pickle", "deepcopy"])
def test_a_tape_says_what_to_keep_instead(rng, name, duplicate):
    model = MODELS[name]
    params = model.init(rng, like=np.zeros(0))
    y, _, tape = model.forward(params, rng.standard_normal((5, 2, 3)))
    with pytest.raises(TypeError, match=AGAIN):
        duplicate(tape)
    with pytest.raises(TypeError, match=AGAIN):
        duplicate({"epoch": 1, "tape": tape})
    wanted, found = (model.backward(t, y).dparams for t in (tape, copy.copy(tape)))
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key], value)


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.deepcopy], ids=["pickle", "deepcopy"])
def test_the_articles_caches_say_so_too(rng, duplicate):
    shapes = {"Wax": (5, 3), "Waa": (5, 5), "Wya": (2, 5), "ba": (5, 1), "by": (2, 1)}
    parameters = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    _, _, caches = xprnn.rnn_forward(rng.standard_normal((3, 2, 4)), np.zeros((5, 2)), parameters)
    with pytest.raises(TypeError, match=AGAIN):
        duplicate(caches)


@pytest.mark.parametrize("name", PARTS)
def test_configurations_of_ours_are_pickled(name):
    part = PARTS[name]
    for protocol in range(2, 6):
        assert pickle.loads(pickle.dumps(part, protocol)) == part
    assert copy.deepcopy(part) == part


def test_another_process_reads_them(rng):
    layer, x = PARTS["options"], rng.standard_normal((5, 2, 3))
    params = layer.init(rng, like=np.zeros(0))
    read = "import pickle, sys; f, p, x = pickle.load(sys.stdin.buffer); pickle.dump(f(p, x)[0], sys.stdout.buffer)"
    job = pickle.dumps((layer, params, x))
    done = subprocess.run([sys.executable, "-c", read], input=job, stdout=subprocess.PIPE, check=True)
    np.testing.assert_array_equal(pickle.loads(done.stdout), layer(params, x)[0])


def test_a_name_of_ours_with_other_maths_is_not_taken_for_ours():
    """An activation of one's own goes where its functions go: here nowhere."""
    own = xprnn.Activation("tanh", lambda xp: (lambda x: x, lambda y: 1.0 + 0.0 * y))
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(own)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(xprnn.RNN(3, 4, nonlinearity=own))
