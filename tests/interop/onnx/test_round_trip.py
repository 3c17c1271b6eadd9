"""Random torch networks converted to xprnn, ONNX and back: every step computes the outputs of torch."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.layer_cases import random_state
from support.torch_networks import build_layer, build_network, property_settings, recurrent_layers

import xprnn

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def as_tuple(state):
    return state if isinstance(state, tuple) else (state,)


def make_session(proto):
    """An InferenceSession of ONNX Runtime with one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only: it warns of inputs with a default value
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(session, x, state):
    """[y, final states] of an ONNX model."""
    names = ("initial_h", "initial_c")[: len(as_tuple(state))]
    feeds = {"x": x} | {name: a.astype(np.float32) for name, a in zip(names, as_tuple(state), strict=True)}
    return session.run(["y", *(name.replace("initial", "final") for name in names)], feeds)


@pytest.mark.needs("torch", "onnx", "onnxruntime")
@pytest.mark.filterwarnings("ignore:LSTM with projections")  # oneDNN does not support them
@property_settings
@given(recurrent_layers(), st.sampled_from([0, 7]), st.sampled_from([0, 5]))
def test_torch_to_onnx_and_back_to_torch(rng, case, embedding, outputs):
    """torch -> xprnn -> ONNX, run by ONNX Runtime; then ONNX -> xprnn -> torch. y and states equal torch's."""
    import torch

    name, arguments = case
    module = build_network(build_layer(name, arguments), embedding, outputs)
    module = module.float()
    model, params = xprnn.from_torch(module)
    lead = (3, 4) if arguments["batch_first"] else (4, 3)
    floats = rng.normal(size=(*lead, arguments["input_size"])).astype(np.float32)
    x = rng.integers(0, embedding, lead) if embedding else floats
    state = random_state(rng, model.layers["rnn"], 3)
    states = tuple(torch.tensor(s, dtype=torch.float32) for s in as_tuple(state))
    torch_state = states if len(states) > 1 else states[0]
    with torch.no_grad():
        y, final = module(torch.tensor(x), torch_state)
    proto = xprnn.to_onnx(model, params)
    for found, expected in zip(run(make_session(proto), x, state), [y, *as_tuple(final)], strict=True):
        np.testing.assert_allclose(found, expected.numpy(), **TOLERANCE)
    loaded_model, loaded = xprnn.from_onnx(proto)
    assert loaded_model == model
    for key, value in params.items():
        np.testing.assert_array_equal(loaded[key], value)
    state_dict, _ = xprnn.to_torch(loaded_model, loaded)
    module.load_state_dict(state_dict)
    with torch.no_grad():
        np.testing.assert_array_equal(module(torch.tensor(x), torch_state)[0], y)


@pytest.mark.needs("torch", "onnx", "onnxruntime")
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@property_settings
@given(recurrent_layers(), st.sampled_from([0, 5]))
def test_convert_command_keeps_bits_through_all_formats(tmp_path, rng, case, outputs):
    """.pt -> .npz -> .onnx -> .pt; then `run` on the ONNX file equals torch."""
    import torch

    from xprnn.cli import main

    name, arguments = case
    module = build_network(build_layer(name, arguments), 0, outputs).float()
    original = {key: value.numpy() for key, value in module.state_dict().items()}
    torch.save(module.state_dict(), tmp_path / "0.pt")
    hints = ["--batch-first"] * arguments["batch_first"]
    hints += ["--nonlinearity", arguments["nonlinearity"]] if name == "RNN" else []
    for source, target, options in (("0.pt", "1.npz", hints), ("1.npz", "2.onnx", []), ("2.onnx", "3.pt", [])):
        assert main.main(["convert", str(tmp_path / source), str(tmp_path / target), *options]) == 0
    converted = torch.load(io.BytesIO((tmp_path / "3.pt").read_bytes()), weights_only=True)
    assert converted.keys() == original.keys()
    for key, value in converted.items():
        np.testing.assert_array_equal(value.numpy(), original[key])
    x = rng.normal(size=(4, 3, arguments["input_size"])).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    command = ["run", str(tmp_path / "2.onnx"), str(tmp_path / "x.npy"), "--output", str(tmp_path / "y.npy")]
    assert main.main(command) == 0
    with torch.no_grad():
        np.testing.assert_allclose(np.load(tmp_path / "y.npy"), module(torch.tensor(x))[0].numpy(), **TOLERANCE)
