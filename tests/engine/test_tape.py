"""Tapes: views of their arrays are read-only, and backward rejects the tape of another layer."""

from __future__ import annotations

import pytest
from support.layer_cases import initial_params

import xprnn

pytestmark = pytest.mark.regression


def test_arrays_of_the_tape_are_read_only(rng):
    layer = xprnn.RNN(2, 3)
    y, _, tape = layer.forward(initial_params(layer), rng.standard_normal((4, 1, 2)))
    for view in (y, tape.states()[0][0]):
        with pytest.raises(ValueError, match="read-only"):
            view[...] = 9


def test_tape_of_another_layer_raises_input_error(rng):
    layer, other = xprnn.LSTM(3, 4), xprnn.GRU(3, 4)
    y, _, tape = layer.forward(initial_params(layer), rng.standard_normal((4, 2, 3)))
    model = xprnn.Sequential(rnn=layer, head=xprnn.Linear(4, 2))
    for wrong_layer in (other, xprnn.LSTM(3, 5), model, xprnn.Linear(3, 4)):
        with pytest.raises(xprnn.InputError, match="tape must be what"):
            wrong_layer.backward(tape, y)
    for wrong_tape in (None, "tape", {}):
        with pytest.raises(xprnn.InputError, match=r"LSTM.backward: tape must be what"):
            layer.backward(wrong_tape, y)
