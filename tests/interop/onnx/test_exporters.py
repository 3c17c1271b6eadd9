"""What torch's two exporters and Keras's write runs, and learns where it is one of xprnn's own models.

The files in tests/recorded hold the exporting framework's own answers; in the torch session its exporters run live.
"""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
from support.onnx_cases import outputs_by_name
from support.paths import DATA

import xprnn
from xprnn.cli.main import main
from xprnn.interop.onnx.graph_model import GraphModel

pytestmark = pytest.mark.needs("onnx")
RECORDED = DATA
FILES = sorted((RECORDED / "onnx_files").glob("*.onnx"))
# Where the graph is one of ours: the model that must come out of it.
OWN = {
    "keras_lstm_dense": (xprnn.LSTM(3, 4, batch_first=True), xprnn.Linear(4, 2, bias=False)),
    "keras_lstm_last": (
        xprnn.LSTM(3, 4, batch_first=True),
        xprnn.LastStep(batch_first=True),
        xprnn.Linear(4, 2, bias=False),
        xprnn.Softmax(),
    ),
    "torch_new_lstm_2_layers_bidirectional": (
        xprnn.LSTM(3, 4, 2, batch_first=True, bidirectional=True),
        xprnn.Linear(8, 2),
    ),
    "torch_new_lstm_states": (xprnn.LSTM(3, 4, 2), xprnn.Linear(4, 2)),
    "torch_new_gru_embedding": (xprnn.Embedding(11, 3), xprnn.GRU(3, 4, bias=False), xprnn.Linear(4, 2)),
    "torch_new_gru_last_softmax": (
        xprnn.GRU(3, 4, batch_first=True),
        xprnn.LastStep(batch_first=True),
        xprnn.Linear(4, 2),
        xprnn.Softmax(),
    ),
    "torch_old_rnn": (xprnn.RNN(3, 4), xprnn.Linear(4, 2)),
    "torch_old_rnn_relu_2_layers_bidirectional": (
        xprnn.RNN(3, 4, 2, nonlinearity="relu", bidirectional=True),
        xprnn.Linear(8, 2),
    ),
}
OWN |= {n.replace("_new_", "_old_"): parts for n, parts in OWN.items() if "_new_" in n}


def named(path):
    return path.stem


def recorded(path):
    arrays = np.load(path.with_suffix(".npz"))
    return [[arrays[k] for k in sorted(arrays) if k.startswith(kind)] for kind in ("in", "out")]


def answers(model, params, inputs):
    """y and the final states, or the graph's outputs."""
    if isinstance(model, GraphModel):
        return list(outputs_by_name(model, model(params, *inputs)).values())
    x, *state = inputs
    y, final = model(params, x, (state[0] if len(state) == 1 else tuple(state)) if state else None)
    return [y, *(final if isinstance(final, tuple) else (final,))]


@pytest.mark.parametrize("path", FILES, ids=named)
def test_recorded_graphs_answer_as_their_framework_did(xp, path):
    inputs, outputs = recorded(path)
    model, params = xprnn.from_onnx(path, like=xp.asarray(np.zeros(1, np.float32)))
    got = answers(model, params, [xp.asarray(a) for a in inputs])
    for have, want in zip(got, outputs, strict=False):
        np.testing.assert_allclose(xp.to_numpy(have), want, rtol=0, atol=2e-6)
        assert have.dtype == xp.asarray(np.zeros(1, np.float32)).dtype


@pytest.mark.parametrize("path", FILES, ids=named)
def test_graphs_of_ours_become_models_of_ours(path):
    model, params = xprnn.from_onnx(path)
    if named(path) not in OWN:
        assert isinstance(model, GraphModel)
        with pytest.raises(xprnn.InputError, match=r"GraphModel\.forward: this ONNX graph can only be called, since "):
            model.forward(params, np.zeros((2, 2, 3), np.float32))
        return
    assert tuple(model.layers.values()) == OWN[named(path)]
    assert model.shapes() == {k: a.shape for k, a in params.items()}
    inputs, _ = recorded(path)
    y, state, tape = model.forward(params, inputs[0])
    assert model.backward(tape, y, state).dparams.keys() == params.keys()


def test_every_recorded_kind_is_there():
    assert len(FILES) == 22
    assert {named(p) for p in FILES} >= OWN.keys()


def test_shapes_never_leave_the_host(monkeypatch):
    """No array is read back: on a GPU that would be a wait. Sequences sorted by their lengths are no exception."""
    from xprnn.interop.onnx import graph_model, node

    def refuse(a):
        raise AssertionError(f"an array {a.shape} was read back")

    monkeypatch.setattr(graph_model, "to_numpy", refuse)
    monkeypatch.setattr(node, "to_numpy", refuse)
    for path in FILES:
        inputs, _ = recorded(path)
        model, params = xprnn.from_onnx(path, like=np.zeros(1, np.float32))
        answers(model, params, inputs)


@pytest.mark.parametrize("name", ["keras_gru", "torch_old_rnn", "torch_old_lstm_lengths"])
def test_the_command_line_knows_them(name, tmp_path, capsys):
    """info and run on each; a graph that is only run is not converted."""
    path = RECORDED / "onnx_files" / f"{name}.onnx"
    inputs, outputs = recorded(path)
    np.save(tmp_path / "x.npy", inputs[0])
    assert main(["info", str(path)]) == 0
    assert "GraphModel(" in capsys.readouterr().out or name in OWN
    status = main(["run", str(path), str(tmp_path / "x.npy"), "--output", str(tmp_path / "y.npy")])
    if len(inputs) > 1:
        assert "missing h" in capsys.readouterr().err
        return
    assert status == 0
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), outputs[0], rtol=0, atol=2e-6)
    assert (main(["convert", str(path), str(tmp_path / "out.onnx")]) == 0) == (name in OWN)
    assert name in OWN or "only run" in capsys.readouterr().err


def test_names_follow_torchs_modules():
    model, _ = xprnn.from_onnx(RECORDED / "onnx_files" / "torch_old_gru_embedding.onnx")
    assert list(model.layers) == ["embed", "rnn", "head"]


@pytest.mark.needs("torch")
@pytest.mark.parametrize("new", [True, False], ids=["new exporter", "old exporter"])
@pytest.mark.parametrize("name", ["rnn", "lstm_2_layers_bidirectional", "gru_embedding", "lstm_states"])
@pytest.mark.filterwarnings("ignore")  # torch's exporters warn of themselves
def test_torch_exports_live(name, new, tmp_path):
    if new and importlib.util.find_spec("onnxscript") is None:
        pytest.skip("onnxscript is not installed")
    import torch

    sys.path.insert(0, str(RECORDED))
    try:
        from data import record_onnx as recorder
    finally:
        sys.path.pop(0)
    kind, options, extra = recorder.TORCH[name]
    module, args = recorder.network(kind, options, extra), recorder.arguments(options, extra)
    recorder.export(module, args, str(tmp_path / "net.onnx"), new=new)
    with torch.no_grad():
        want = module(*args)
    model, params = xprnn.from_onnx(tmp_path / "net.onnx", like=args[-1] if "embedding" not in extra else None)
    if "embedding" in extra:
        params = {k: torch.asarray(a) for k, a in params.items()}
    for have, expected in zip(answers(model, params, args), want if isinstance(want, tuple) else (want,), strict=False):
        torch.testing.assert_close(have, expected, rtol=0, atol=2e-6)
    assert isinstance(model, GraphModel) == (new and name == "rnn")  # unrolled for one T


@pytest.mark.needs("torch")
@pytest.mark.parametrize("options", [{}, {"nonlinearity": "relu", "num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_torchs_new_exporter_with_free_sizes(options, tmp_path):
    """It unrolls an nn.RNN by sequences then, for the T that it saw and any N."""
    if importlib.util.find_spec("onnxscript") is None:
        pytest.skip("onnxscript is not installed")
    import torch

    torch.manual_seed(2)
    module, free = torch.nn.RNN(3, 4, **options).eval(), torch.export.Dim.AUTO
    x = torch.randn(6, 2, 3)
    sizes = ({0: free, 1: free},)
    torch.onnx.export(module, (x,), tmp_path / "net.onnx", dynamo=True, verbose=False, dynamic_shapes=sizes)
    model, params = xprnn.from_onnx(tmp_path / "net.onnx", like=x)
    for rows in (2, 5):
        x = torch.randn(6, rows, 3)
        with torch.no_grad():
            want = module(x)
        for have, expected in zip(answers(model, params, [x]), want, strict=True):
            torch.testing.assert_close(have, expected, rtol=0, atol=2e-6)
    with pytest.raises(xprnn.InputError, match="position 5 is outside a sequence of length 5"):
        model(params, torch.randn(5, 2, 3))
