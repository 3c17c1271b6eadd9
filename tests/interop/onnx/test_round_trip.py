"""Around every loop with random configurations: the framework's own outputs come out at the other end."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.layer_cases import random_state
from support.torch_networks import build_layer, build_network, property_settings, recurrent_layers

import xprnn

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
FLOAT32 = np.zeros(0, np.float32)


def states(state):
    return state if isinstance(state, tuple) else (state,)


def runtime(proto):
    """A session of ONNX Runtime, which runs the recurrent operators in float32 alone."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # it warns of inputs that have a value of their own
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(session, x, state):
    """y and the final states of an ONNX model."""
    names = ("initial_h", "initial_c")[: len(states(state))]
    feeds = {"x": x} | {name: a.astype(np.float32) for name, a in zip(names, states(state), strict=True)}
    return session.run(["y", *(name.replace("initial", "final") for name in names)], feeds)


@pytest.mark.needs("torch", "onnx", "onnxruntime")
@pytest.mark.filterwarnings("ignore:LSTM with projections")  # which torch's oneDNN has not
@property_settings
@given(recurrent_layers(), st.sampled_from([0, 7]), st.sampled_from([0, 5]))
def test_torch_here_onnx_and_onnx_runtime(rng, case, embedding, outputs):
    """torch -> xprnn -> ONNX -> ONNX Runtime, and the ONNX file -> xprnn -> torch: always torch's numbers."""
    import torch

    name, arguments = case
    module = build_network(build_layer(name, arguments), embedding, outputs)
    module = module.float()
    model, params = xprnn.from_torch(module)
    lead = (3, 4) if arguments["batch_first"] else (4, 3)
    floats = rng.normal(size=(*lead, arguments["input_size"])).astype(np.float32)
    x = rng.integers(0, embedding, lead) if embedding else floats
    state = random_state(rng, model.layers["rnn"], 3)
    given_ = tuple(torch.tensor(s, dtype=torch.float32) for s in states(state))
    with torch.no_grad():
        want, final = module(torch.tensor(x), given_ if len(given_) > 1 else given_[0])
    wanted = [want.numpy(), *(s.numpy() for s in states(final))]
    proto = xprnn.to_onnx(model, params)
    for have, expected in zip(run(runtime(proto), x, state), wanted, strict=True):
        np.testing.assert_allclose(have, expected, **CLOSE)
    again, read = xprnn.from_onnx(proto)
    assert again == model
    for key, value in params.items():
        np.testing.assert_array_equal(read[key], value)
    state_dict, _ = xprnn.to_torch(again, read)
    module.load_state_dict(state_dict)
    with torch.no_grad():
        np.testing.assert_array_equal(module(torch.tensor(x), given_ if len(given_) > 1 else given_[0])[0], want)


@pytest.mark.needs("torch", "onnx", "onnxruntime")
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@property_settings
@given(recurrent_layers(), st.sampled_from([0, 5]))
def test_files_in_between(tmp_path, rng, case, outputs):
    """torch's file -> ours -> ONNX -> torch's, by the command line, to the bit."""
    import torch

    from xprnn.cli import main

    name, arguments = case
    module = build_network(build_layer(name, arguments), 0, outputs).float()
    first = {key: value.numpy() for key, value in module.state_dict().items()}
    torch.save(module.state_dict(), tmp_path / "0.pt")
    hints = ["--batch-first"] * arguments["batch_first"]
    hints += ["--nonlinearity", arguments["nonlinearity"]] if name == "RNN" else []
    for source, target, more in (("0.pt", "1.npz", hints), ("1.npz", "2.onnx", []), ("2.onnx", "3.pt", [])):
        assert main.main(["convert", str(tmp_path / source), str(tmp_path / target), *more]) == 0
    last = torch.load(io.BytesIO((tmp_path / "3.pt").read_bytes()), weights_only=True)
    assert last.keys() == first.keys()
    for key, value in last.items():
        np.testing.assert_array_equal(value.numpy(), first[key])
    x = rng.normal(size=(4, 3, arguments["input_size"])).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    assert (
        main.main(["run", str(tmp_path / "2.onnx"), str(tmp_path / "x.npy"), "--output", str(tmp_path / "y.npy")]) == 0
    )
    with torch.no_grad():
        np.testing.assert_allclose(np.load(tmp_path / "y.npy"), module(torch.tensor(x))[0].numpy(), **CLOSE)
