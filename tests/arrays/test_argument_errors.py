"""Invalid arguments of public functions raise a one-line InputError instead of a wrong result or a traceback."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.layer_cases import initial_params

import xprnn

pytestmark = pytest.mark.regression


@pytest.mark.not_on("jax", "strict", "cupy", reason="reading integers there may wait for a device, so it is not done")
def test_integers_out_of_range_raise_where_reading_them_needs_no_device(xp):
    layer, table = xprnn.RNN(3, 4), xprnn.Embedding(5, 2)
    params = xp.asarray(initial_params(layer))
    negative, logits = xp.asarray(np.asarray([[-1]])), xp.asarray(np.zeros((3, 4)))
    with pytest.raises(xprnn.InputError, match=r"x must hold integers in 0\.\.2, found -1"):
        layer(params, negative)
    with pytest.raises(xprnn.InputError, match=r"x must hold integers in 0\.\.4, found -1"):
        table(xp.asarray(initial_params(table)), negative)
    with pytest.raises(xprnn.InputError, match=r"targets must hold integers in 0\.\.3, found 9"):
        xprnn.cross_entropy(logits, xp.asarray(np.asarray([0, 1, 9])))
    x = xp.asarray(np.zeros((4, 2, 3)))
    with pytest.raises(xprnn.InputError, match=r"lengths must be in 0\.\.T=4, found \[9, -3\]"):
        layer(params, x, lengths=xp.asarray(np.asarray([9, -3])))


def test_uint8_class_numbers_equal_int32_class_numbers(xp):
    layer = xprnn.RNN(3, 4)
    params, ids = xp.asarray(initial_params(layer)), np.asarray([[0, 2], [1, 1]], np.uint8)
    y, _, tape = layer.forward(params, xp.asarray(ids))
    y_int32, _, tape_int32 = layer.forward(params, xp.asarray(ids.astype(np.int32)))
    xp.assert_close(y, y_int32, condition=0)
    xp.assert_close(layer.backward(tape, y).dparams, layer.backward(tape_int32, y).dparams, condition=0)
    logits = xp.asarray(np.arange(6.0).reshape(2, 3))
    dy, dy_int32 = (xprnn.cross_entropy(logits, xp.asarray(ids[0].astype(d)))[1] for d in (np.uint8, np.int32))
    xp.assert_close(dy, dy_int32, condition=0)


def invalid_calls() -> dict[str, Any]:
    layer, head = xprnn.LSTM(3, 4), xprnn.Linear(4, 2)
    params, x, h = initial_params(layer), np.zeros((5, 2, 3)), np.zeros((1, 2, 4))
    shapes = {"Wax": (4, 3), "Waa": (4, 4), "Wya": (2, 4), "ba": (4, 1), "by": (2, 1)}
    article_params = {name: np.zeros(shape) for name, shape in shapes.items()}
    article_x, generator, like = np.zeros((3, 2, 5)), np.random.default_rng(0), np.zeros(0)
    return {
        "x None": lambda: layer.forward(params, None),
        "a parameter None": lambda: layer(params | {"bias_ih_l0": None}, x),
        "half a state": lambda: layer(params, x, (h, None)),
        "head without dy": lambda: head.backward(head.forward(initial_params(head), np.zeros((2, 4)))[2], None),
        "a0 None": lambda: xprnn.rnn_forward(article_x, None, article_params),
        "ba None": lambda: xprnn.rnn_forward(article_x, np.zeros((4, 2)), article_params | {"ba": None}),
        "nested lengths": lambda: layer(params, x, lengths=[[1], [1, 2]]),
        "axis 1.0": lambda: xprnn.softmax(x, axis=1.0),
        "radius nan": lambda: layer.init(generator, like, spectral_radius=float("nan")),
        "radius string": lambda: layer.init(generator, like, spectral_radius="a"),
        "bidirectional string": lambda: xprnn.LSTM(3, 4, bidirectional="no"),
    }


@pytest.mark.parametrize("name", invalid_calls())
def test_invalid_arguments_raise_one_line(name):
    with pytest.raises(xprnn.InputError) as caught:
        invalid_calls()[name]()
    message = str(caught.value)
    assert "\n" not in message
    assert "  " not in message
    assert "found" in message


def masked_array_calls() -> dict[str, Any]:
    layer, model = xprnn.LSTM(3, 4), xprnn.Sequential(rnn=xprnn.RNN(3, 4), head=xprnn.Linear(4, 2))
    params, model_params = initial_params(layer), initial_params(model)
    x, x_step = np.zeros((5, 2, 3)), np.zeros((2, 3))
    h, masked = np.zeros((1, 2, 4)), np.ma.masked_array
    return {
        "step": lambda: layer.step(params, masked(x_step, mask=x_step == 0)),
        "call": lambda: layer(params, masked(x, mask=x == 0)),
        "forward": lambda: layer.forward(params, masked(x)),
        "model": lambda: model(model_params, masked(x)),
        "model's step": lambda: model.step(model_params, masked(x_step)),
        "state": lambda: layer.forward(params, x, (h, masked(h))),
        "parameter": lambda: layer.forward(params | {"bias_ih_l0": masked(params["bias_ih_l0"])}, x),
        "integers": lambda: layer(params, masked(np.zeros((5, 2), int))),
        "lengths": lambda: layer(params, x, lengths=masked(np.asarray([2, 3]))),
        "mask": lambda: layer(params, x, mask=masked(np.ones((5, 2), bool))),
        "loss": lambda: xprnn.mse(x, masked(x)),
    }


@pytest.mark.parametrize("name", masked_array_calls())
def test_masked_arrays_raise_input_error(name):
    with pytest.raises(xprnn.InputError, match=r"must be a plain array, found a numpy\.ma one: .*mask="):
        masked_array_calls()[name]()
