"""Arguments of optimisers and clipping: NumPy scalars, and Gradients in place of a dict."""

from __future__ import annotations

import numpy as np
import pytest
from support.layer_cases import initial_params

import xprnn

pytestmark = pytest.mark.regression


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rmsprop", "adam", "adamw"])
@pytest.mark.parametrize("rate", [np.float64(0.1), np.float32(0.1), lambda step: np.float64(0.1)])
def test_numpy_scalars_do_not_change_the_dtype_of_parameters(name, rate):
    grads = {"w": np.ones(3, np.float32)}
    optimizer = getattr(xprnn, name)(rate)
    params, _ = optimizer.update(grads, grads, optimizer.init(grads))
    assert params["w"].dtype == np.float32
    assert xprnn.clip_by_global_norm(grads, np.float64(1))[0]["w"].dtype == np.float32
    assert xprnn.clip_by_value(grads, np.float64(0.5))["w"].dtype == np.float32


def test_gradients_tuple_instead_of_dparams_raises_input_error(rng):
    layer = xprnn.RNN(3, 4)
    params = initial_params(layer)
    y, _, tape = layer.forward(params, rng.standard_normal((5, 2, 3)))
    gradients, adam = layer.backward(tape, y), xprnn.adam()
    for call in (
        lambda: xprnn.clip_by_global_norm(gradients, 1.0),
        lambda: xprnn.clip_by_value(gradients, 1.0),
        lambda: adam.update(params, gradients, adam.init(params)),
    ):
        with pytest.raises(xprnn.InputError, match=r"grads must be a dict of arrays, found Gradients: .*\.dparams"):
            call()
