"""`to_torch`: the round trip with `from_torch` is exact; unsupported models raise one error with all reasons."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.torch_networks import build_layer, build_network, property_settings, recurrent_layers

import xprnn
from xprnn.arrays.namespace import InputError

pytestmark = pytest.mark.needs("torch")
FLOAT64 = np.zeros(0)


def build_module(state_dict, constructor):
    """Build the torch module from the result of `to_torch`, and load its state_dict."""
    import torch

    if isinstance(constructor, tuple):
        name, arguments = constructor
        module = getattr(torch.nn, name)(**arguments)
    else:
        module = torch.nn.ModuleDict({k: getattr(torch.nn, name)(**a) for k, (name, a) in constructor.items()})
    module.load_state_dict(state_dict)
    return module


@property_settings
@given(recurrent_layers(), st.sampled_from([0, 7]), st.sampled_from([0, 5]))
def test_round_trip_is_exact(case, embedding, outputs):
    name, arguments = case
    for source in (build_layer(name, arguments), build_network(build_layer(name, arguments), embedding, outputs)):
        model, params = xprnn.from_torch(source)
        state_dict, constructor = xprnn.to_torch(model, params)
        module = build_module(state_dict, constructor)
        converted, converted_params = xprnn.from_torch(module)
        assert converted == model
        assert converted_params.keys() == params.keys()
        assert all(
            np.array_equal(converted_params[k], params[k]) and converted_params[k].dtype == np.float64 for k in params
        )


UNSUPPORTED = {
    "reset": (xprnn.GRU(3, 4, reset_after=False), "torch has no cell gru_reset_before"),
    "peepholes": (xprnn.LSTM(3, 4, cell=xprnn.cells.lstm(peepholes=True)), "torch has no cell lstm .*peepholes=True"),
    "sizes": (xprnn.LSTM(3, (4, 2), 2), r"one hidden_size for all layers, found \[4, 2\]"),
    "state": (xprnn.LSTM(3, 4, learned_state=True), "no learned_state"),
    "reverse": (xprnn.LSTM(3, 4, reverse=True), "no reverse=True without bidirectional"),
    "nonlinearity": (xprnn.RNN(3, 4, nonlinearity="softsign"), "no cell elman f=softsign"),
    "both": (
        xprnn.Sequential(
            a=xprnn.GRU(3, 4, reset_after=False), b=xprnn.ContextShift(2), c=xprnn.RNN(4, 4, reverse=True)
        ),
        "a: torch has no cell gru_reset_before; b: torch.nn has no equivalent of ContextShift; c: torch has no reverse",
    ),
    "activation": (xprnn.ActivationLayer(xprnn.activation("hardsigmoid")), "torch.nn has no activation hardsigmoid"),
    "two constants": (xprnn.ActivationLayer(xprnn.activation("leakyrelu", 0.1, 0.3)), "no activation leakyrelu"),
    "no model": (3, "model must be a layer or Sequential, found int"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_models_raise(case):
    model, message = UNSUPPORTED[case]
    with pytest.raises(InputError, match=message):
        xprnn.to_torch(model, {})


def test_params_of_another_model_raise(rng):
    layer = xprnn.GRU(3, 4)
    params = layer.init(rng, like=FLOAT64)
    with pytest.raises(InputError, match="to_torch: params: missing bias_ih_l0"):
        xprnn.to_torch(layer, {k: v for k, v in params.items() if k != "bias_ih_l0"})
    with pytest.raises(InputError, match=r"to_torch: weight_ih_l0 must have shape \(12, 3\), found \(12, 4\)"):
        xprnn.to_torch(layer, {**params, "weight_ih_l0": np.zeros((12, 4))})
    layer = xprnn.Recurrent(3, 4, cell=xprnn.cells.lstm())
    _, (name, arguments) = xprnn.to_torch(layer, layer.init(rng, like=FLOAT64))
    assert name == "LSTM"
    assert arguments["hidden_size"] == 4
