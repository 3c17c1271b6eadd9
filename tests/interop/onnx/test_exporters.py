"""Files of the exporters of torch (old and new) and Keras: they run, and become models of xprnn where they can.

tests/data/onnx_files has exported networks and the outputs of the exporting framework (tests/data/record_onnx.py). If
torch is installed, its exporters also run in the tests.
"""

from __future__ import annotations

import numpy as np
import pytest
from support.onnx_cases import outputs_by_name
from support.paths import DATA

import xprnn
from xprnn.cli.main import main
from xprnn.interop.onnx.graph_model import GraphModel

pytestmark = pytest.mark.needs("onnx")
FILES = sorted((DATA / "onnx_files").glob("*.onnx"))
# Graphs that are models of xprnn -> the layers of the model.
LAYERS = {
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
LAYERS |= {name.replace("_new_", "_old_"): layers for name, layers in LAYERS.items() if "_new_" in name}
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def recorded_arrays(path):
    """The inputs and the outputs that the exporting framework computed."""
    arrays = np.load(path.with_suffix(".npz"))
    return [[arrays[k] for k in sorted(arrays) if k.startswith(kind)] for kind in ("in", "out")]


def run(model, params, inputs):
    """Call a model with the inputs of the graph; its outputs in the order of the graph."""
    if isinstance(model, GraphModel):
        return list(outputs_by_name(model, model(params, *inputs)).values())
    x, *state = inputs
    y, final = model(params, x, (state[0] if len(state) == 1 else tuple(state)) if state else None)
    return [y, *(final if isinstance(final, tuple) else (final,))]


@each_file
def test_outputs_equal_those_of_exporting_framework(xp, path):
    inputs, outputs = recorded_arrays(path)
    model, params = xprnn.from_onnx(path, like=xp.asarray(np.zeros(1, np.float32)))
    found = run(model, params, [xp.asarray(a) for a in inputs])
    for a, expected in zip(found, outputs, strict=False):
        np.testing.assert_allclose(xp.to_numpy(a), expected, rtol=0, atol=2e-6)
        assert a.dtype == xp.asarray(np.zeros(1, np.float32)).dtype


@each_file
def test_graph_becomes_expected_layers_or_graph_model(path):
    model, params = xprnn.from_onnx(path)
    if path.stem not in LAYERS:
        assert isinstance(model, GraphModel)
        with pytest.raises(xprnn.InputError, match=r"GraphModel\.forward: this ONNX graph can only be called, since "):
            model.forward(params, np.zeros((2, 2, 3), np.float32))
        return
    assert tuple(model.layers.values()) == LAYERS[path.stem]
    assert model.shapes() == {k: a.shape for k, a in params.items()}
    inputs, _ = recorded_arrays(path)
    y, state, tape = model.forward(params, inputs[0])
    assert model.backward(tape, y, state).dparams.keys() == params.keys()


def test_recorded_files_are_complete():
    assert len(FILES) == 22
    assert {path.stem for path in FILES} >= LAYERS.keys()


def test_no_array_is_copied_from_device_to_host(monkeypatch):
    """Shapes are computed on the host, so that a GPU is not synchronised; for a batch sorted by lengths too."""
    from xprnn.interop.onnx import graph_model, node

    def raise_error(a):
        raise AssertionError(f"an array of shape {a.shape} was copied to the host")

    monkeypatch.setattr(graph_model, "to_numpy", raise_error)
    monkeypatch.setattr(node, "to_numpy", raise_error)
    for path in FILES:
        inputs, _ = recorded_arrays(path)
        model, params = xprnn.from_onnx(path, like=np.zeros(1, np.float32))
        run(model, params, inputs)


@pytest.mark.parametrize("name", ["keras_gru", "torch_old_rnn", "torch_old_lstm_lengths"])
def test_commands_info_run_and_convert(name, tmp_path, capsys):
    """A GraphModel runs, but is not converted."""
    path = DATA / "onnx_files" / f"{name}.onnx"
    inputs, outputs = recorded_arrays(path)
    np.save(tmp_path / "x.npy", inputs[0])
    assert main(["info", str(path)]) == 0
    assert "GraphModel(" in capsys.readouterr().out or name in LAYERS
    status = main(["run", str(path), str(tmp_path / "x.npy"), "--output", str(tmp_path / "y.npy")])
    if len(inputs) > 1:
        assert "missing h" in capsys.readouterr().err
        return
    assert status == 0
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), outputs[0], rtol=0, atol=2e-6)
    assert (main(["convert", str(path), str(tmp_path / "out.onnx")]) == 0) == (name in LAYERS)
    assert name in LAYERS or "only run" in capsys.readouterr().err


def test_layer_names_are_those_of_torch_modules():
    model, _ = xprnn.from_onnx(DATA / "onnx_files" / "torch_old_gru_embedding.onnx")
    assert list(model.layers) == ["embed", "rnn", "head"]


@pytest.mark.needs("torch")
@pytest.mark.parametrize(
    "new",
    [
        pytest.param(True, id="new exporter", marks=pytest.mark.needs("onnxscript")),
        pytest.param(False, id="old exporter"),
    ],
)
@pytest.mark.parametrize("name", ["rnn", "lstm_2_layers_bidirectional", "gru_embedding", "lstm_states"])
@pytest.mark.filterwarnings("ignore")  # torch's exporters issue deprecation warnings
def test_live_torch_export_equals_torch(name, new, tmp_path):
    import torch
    from data import record_onnx

    class_name, options, extra = record_onnx.TORCH_CASES[name]
    module = record_onnx.torch_network(class_name, options, extra)
    args = record_onnx.torch_inputs(options, extra)
    record_onnx.export(module, args, str(tmp_path / "net.onnx"), new=new)
    with torch.no_grad():
        outputs = module(*args)
    model, params = xprnn.from_onnx(tmp_path / "net.onnx", like=args[-1] if "embedding" not in extra else None)
    if "embedding" in extra:
        params = {k: torch.asarray(a) for k, a in params.items()}
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for a, expected in zip(run(model, params, args), outputs, strict=False):
        torch.testing.assert_close(a, expected, rtol=0, atol=2e-6)
    # The new exporter unrolls an nn.RNN for the T of its example input.
    assert isinstance(model, GraphModel) == (new and name == "rnn")


@pytest.mark.needs("torch", "onnxscript")
@pytest.mark.parametrize("options", [{}, {"nonlinearity": "relu", "num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_live_torch_export_with_dynamic_shapes(options, tmp_path):
    """The new exporter unrolls an nn.RNN with SplitToSequence, for the T of the example input and any N."""
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
            outputs = module(x)
        for a, expected in zip(run(model, params, [x]), outputs, strict=True):
            torch.testing.assert_close(a, expected, rtol=0, atol=2e-6)
    with pytest.raises(xprnn.InputError, match="position 5 is outside a sequence of length 5"):
        model(params, torch.randn(5, 2, 3))
