"""Commands convert, info and run: equal numbers for every file format, and one-line errors."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from support.paths import DATA

import xprnn
from xprnn.cli import main, model_commands
from xprnn.layers import model_file


@pytest.fixture
def model():
    return xprnn.Sequential(emb=xprnn.Embedding(7, 3), rnn=xprnn.GRU(3, 4, 2), head=xprnn.Linear(4, 5))


@pytest.fixture
def params(model, rng):
    return model.init(rng, like=np.zeros(1, np.float32))


def write_model_files(tmp_path, model, params):
    """Write the model in every format that needs no other library, and return the file names."""
    xprnn.save(tmp_path / "m.npz", model, params, {"vocabulary": "abc"})
    xprnn.save(tmp_path / "m.safetensors", model, params, {"vocabulary": "abc"})
    safetensors.numpy.save_file(params, tmp_path / "state_dict.safetensors")
    return ["m.npz", "m.safetensors", "state_dict.safetensors"]


def run(capsys, *args):
    """The exit code, stdout and stderr of one command."""
    code = main.main([str(a) for a in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def assert_identical(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("target", ["out.npz", "out.safetensors"])
def test_convert_xprnn_files_and_state_dicts(tmp_path, capsys, model, params, target):
    for source in write_model_files(tmp_path, model, params):
        code, out, err = run(capsys, "convert", tmp_path / source, tmp_path / target)
        assert (code, err) == (0, "")
        assert f"-> {tmp_path / target}: {sum(p.size for p in params.values())} parameters, float32" in out
        loaded, loaded_params = xprnn.load(tmp_path / target)
        assert loaded == model
        assert_identical(loaded_params, params)
        assert model_file.load_metadata(tmp_path / target) == ({} if "state_dict" in source else {"vocabulary": "abc"})


@pytest.mark.needs("torch")
def test_convert_to_torch_and_back(tmp_path, capsys, model, params):
    import torch

    write_model_files(tmp_path, model, params)
    assert run(capsys, "convert", tmp_path / "m.npz", tmp_path / "m.pt")[0] == 0
    state_dict = torch.load(tmp_path / "m.pt", weights_only=True)
    assert_identical({name: value.numpy() for name, value in state_dict.items()}, params)
    assert run(capsys, "convert", tmp_path / "m.pt", tmp_path / "again.npz")[0] == 0
    loaded, loaded_params = xprnn.load(tmp_path / "again.npz")
    assert loaded == model
    assert_identical(loaded_params, params)


def test_convert_state_dict_with_hints(tmp_path, capsys, rng):
    arrays = {f"{n}.weight_{k}h_l0": rng.normal(size=(4, 4)) for n in "ab" for k in "ih"}
    safetensors.numpy.save_file(arrays, tmp_path / "in.safetensors")
    hints = ["--nonlinearity", "relu", "--batch-first", "--order", "b", "a", "--dtype", "float32"]
    assert run(capsys, "convert", tmp_path / "in.safetensors", tmp_path / "out.npz", *hints)[0] == 0
    model, params = xprnn.load(tmp_path / "out.npz")
    layer = xprnn.RNN(4, 4, nonlinearity="relu", bias=False, batch_first=True)
    assert model == xprnn.Sequential(b=layer, a=layer)
    assert {p.dtype.name for p in params.values()} == {"float32"}


def test_info_prints_layers_shapes_parameters_and_dtype(tmp_path, capsys, model, params):
    for name in write_model_files(tmp_path, model, params):
        code, out, _ = run(capsys, "info", tmp_path / name)
        assert code == 0
        total = sum(p.size for p in params.values())
        kind = "torch" if "state_dict" in name else "xprnn"
        assert out.startswith(f"{tmp_path / name} ({kind}): {total} parameters, float32\n")
        for layer in ("emb: Embedding(num_embeddings=7, embedding_dim=3, ", "rnn: GRU(input_size=3, ", "head: Linear("):
            assert f"  {layer}" in out
        for key, array in params.items():
            assert f"  {key:24} {array.shape!s:16} float32\n" in out
        assert ("vocabulary = 'abc'" in out) == (kind == "xprnn")


CASES = {
    "ids": (xprnn.Sequential(emb=xprnn.Embedding(7, 3), rnn=xprnn.LSTM(3, 4)), (6, 2), True),
    "one sequence of ids": (xprnn.Sequential(emb=xprnn.Embedding(7, 3), rnn=xprnn.LSTM(3, 4)), (6,), True),
    "features": (xprnn.GRU(3, 4), (6, 2, 3), False),
    "one sequence": (xprnn.GRU(3, 4), (6, 3), False),
    "batch first": (xprnn.Sequential(rnn=xprnn.RNN(3, 4, batch_first=True), head=xprnn.Linear(4, 2)), (2, 6, 3), False),
    "one sequence, batch first": (xprnn.RNN(3, 4, batch_first=True), (6, 3), False),
    "one-hot": (xprnn.RNN(3, 4), (6, 2), True),
    "no steps": (xprnn.RNN(3, 4), (0, 2, 3), False),
    "integer features": (xprnn.RNN(3, 4), (6, 2, 3), True),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_run_output_equals_a_call(tmp_path, capsys, rng, case, stream):
    model, shape, integers = CASES[case]
    params = model.init(rng, like=np.zeros(1, np.float32))
    x = rng.integers(0, 3, shape) if integers else rng.normal(size=shape)
    xprnn.save(tmp_path / "m.npz", model, params)
    np.save(tmp_path / "x.npy", x)
    prepared = x if integers and len(shape) < 3 else x.astype(np.float32)
    if case.startswith("one") and case != "one-hot":
        prepared = prepared[None] if "batch first" in case else prepared[:, None]
    expected, _ = model(params, prepared)
    options = ["--stream"] * stream
    code, out, err = run(
        capsys, "run", tmp_path / "m.npz", tmp_path / "x.npy", "--output", tmp_path / "y.npy", *options
    )
    assert (code, out) == (0, "")
    assert f"x.npy {prepared.shape} {prepared.dtype}: " in err
    y = np.load(tmp_path / "y.npy")
    assert y.dtype == expected.dtype == np.float32
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    code, out, _ = run(capsys, "run", tmp_path / "m.npz", tmp_path / "x.npy", *options)
    assert code == 0
    assert out.startswith(f"y {expected.shape} float32\n")


KERAS_AND_ONNX_FILES = [
    ("lstm_alone.keras", "Keras", "LSTM(input_size=3, hidden_size=4"),
    ("lstm_stack.keras", "Keras", "LSTM("),
    ("torch_old_lstm_2_layers_bidirectional.onnx", "ONNX", "LSTM("),
    ("torch_old_rnn.onnx", "ONNX", "RNN("),
]


@pytest.mark.needs("onnx", "h5py")
@pytest.mark.parametrize(("name", "kind", "layer"), KERAS_AND_ONNX_FILES)
def test_commands_on_keras_and_onnx_files_equal_the_readers(tmp_path, capsys, rng, name, kind, layer):
    """info, convert and run give the model and the numbers of from_keras and from_onnx."""
    path = DATA / ("keras_files" if kind == "Keras" else "onnx_files") / name
    model, params = (xprnn.from_keras if kind == "Keras" else xprnn.from_onnx)(path)
    code, out, _ = run(capsys, "info", path)
    assert code == 0
    assert out.startswith(f"{path} ({kind}): {sum(p.size for p in params.values()):,} parameters, float")
    assert layer in out
    assert run(capsys, "convert", path, tmp_path / "m.npz")[0] == 0
    loaded, loaded_params = xprnn.load(tmp_path / "m.npz")
    assert loaded == model
    assert_identical(loaded_params, params)
    width = next(iter(params.values())).shape[1]
    x = rng.normal(size=(2, 2, width)).astype(next(iter(params.values())).dtype)
    np.save(tmp_path / "x.npy", x)
    for source in (path, tmp_path / "m.npz"):
        assert run(capsys, "run", source, tmp_path / "x.npy", "--output", tmp_path / "y.npy")[0] == 0
        np.testing.assert_allclose(np.load(tmp_path / "y.npy"), model(params, x)[0], rtol=1e-6)


@pytest.mark.needs("onnx")
def test_general_onnx_graph_is_run_but_not_converted(tmp_path, capsys):
    path = DATA / "onnx_files" / "keras_masking_lstm.onnx"
    graph, params = xprnn.from_onnx(path)
    with np.load(path.with_suffix(".npz")) as recorded:
        x = next(recorded[name] for name in recorded.files if name.startswith(("x", "in")))
    np.save(tmp_path / "x.npy", x)
    assert "only run, not converted, since" in run(capsys, "info", path)[1]
    code, _, err = run(capsys, "convert", path, tmp_path / "m.npz")
    assert code == 2
    assert "this ONNX graph is only run, not converted, since" in err
    assert run(capsys, "run", path, tmp_path / "x.npy", "--output", tmp_path / "y.npy")[0] == 0
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), graph(params, x)[0])


@pytest.mark.needs("onnx")
def test_convert_to_onnx(tmp_path, capsys, model, params):
    write_model_files(tmp_path, model, params)
    code, _, err = run(capsys, "convert", tmp_path / "m.npz", tmp_path / "m.onnx")
    assert code == 0
    assert err == "xprnn convert: .onnx files store no metadata; left out: vocabulary\n"
    loaded, loaded_params = xprnn.from_onnx(tmp_path / "m.onnx")
    assert loaded == model
    assert_identical(loaded_params, params)
    _, _, err = run(capsys, "convert", tmp_path / "state_dict.safetensors", tmp_path / "m.onnx", "--dtype", "float64")
    assert err == "xprnn convert: ONNX Runtime has no float64 recurrent layers; use --dtype float32\n"
    _, loaded_params = xprnn.from_onnx(tmp_path / "m.onnx")
    assert loaded_params["rnn.weight_ih_l0"].dtype == np.float64


@pytest.mark.parametrize("library", ["onnx", "h5py", "torch"])
def test_missing_library_is_named_with_its_extra(tmp_path, capsys, monkeypatch, model, params, library):
    write_model_files(tmp_path, model, params)
    monkeypatch.setitem(sys.modules, library, None)
    name, extra = {"onnx": ("m.onnx", "onnx"), "h5py": ("m.weights.h5", "keras"), "torch": ("m.pt", "torch")}[library]
    code, _, err = run(capsys, "info", damaged_file(tmp_path, name))
    assert code == 2
    assert f'pip install ".[{extra}]"' in err
    if library != "h5py":
        code, _, err = run(capsys, "convert", tmp_path / "m.npz", tmp_path / f"out{Path(name).suffix}")
        assert code == 2
        assert f'pip install ".[{extra}]"' in err


@pytest.mark.needs("h5py")
def test_keras_weights_need_an_architecture(tmp_path, capsys):
    folder = DATA / "keras_files"
    config = ["--config", folder / "lstm_stack.json"]
    assert run(capsys, "convert", folder / "lstm_stack.weights.h5", tmp_path / "m.npz", *config)[0] == 0
    assert xprnn.load(tmp_path / "m.npz")[0] == xprnn.from_keras(folder / "lstm_stack.keras")[0]
    code, _, err = run(capsys, "info", folder / "lstm_stack.weights.h5")
    assert code == 2
    assert "pass config=" in err


def write_npy(tmp, content):
    """x.npy with an array, or with these bytes."""
    path = tmp / "x.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    return path


def header_only(shape):
    """The bytes of a `.npy` file that ends after its header."""
    text = repr({"descr": "<f4", "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text


def damaged_file(tmp, name):
    (tmp / name).write_bytes(b"once upon a time there was a model")
    return tmp / name


INVALID_COMMANDS = {
    "no model": (lambda t: ["info", t / "no.npz"], "no such model file"),
    "ending": (lambda t: ["convert", t / "m.npz", t / "m.txt"], "ending in .safetensors, .npz, .pt, .pth or .onnx"),
    "keras out": (lambda t: ["convert", t / "m.npz", t / "m.keras"], "Keras files can only be read"),
    "ending in": (lambda t: ["info", write_npy(t, np.zeros(3))], "expected a name ending in .safetensors, .npz, .pt"),
    "hints": (
        lambda t: ["info", t / "m.npz", "--batch-first"],
        "batch_first does not apply to xprnn files: leave it out",
    ),
    "other hints": (
        lambda t: ["info", t / "state_dict.safetensors", "--config", "m.json"],
        "config does not apply to torch files",
    ),
    "onnx": (lambda t: ["info", damaged_file(t, "m.onnx")], "m.onnx"),
    "keras": (lambda t: ["info", damaged_file(t, "m.keras")], "m.keras"),
    "h5": (lambda t: ["info", damaged_file(t, "m.weights.h5")], "m.weights.h5"),
    "pt": (lambda t: ["info", damaged_file(t, "m.pt")], "m.pt"),
    "damaged": (lambda t: ["run", t / "m.npz", write_npy(t, b"\x93NUMPYrubbish")], "damaged, or not a .npy file"),
    "short": (lambda t: ["run", t / "m.npz", write_npy(t, header_only((10**12,)))], "damaged, or not a .npy file"),
    "negative": (lambda t: ["run", t / "m.npz", write_npy(t, header_only((-1, -1)))], "damaged, or not a .npy file"),
    "text": (lambda t: ["run", t / "m.npz", write_npy(t, np.array(["a"]))], "expected one array of numbers"),
    "pickle": (lambda t: ["run", t / "m.npz", write_npy(t, b"\x80\4]\x94.")], "damaged, or not a .npy file"),
    "no input": (lambda t: ["run", t / "m.npz", t / "no.npy"], "cannot be read (No such file"),
    "output": (
        lambda t: ["run", t / "m.npz", write_npy(t, np.zeros((4, 1), int)), "--output", t / "y.txt"],
        "ending in .npy",
    ),
    "shape": (lambda t: ["run", t / "m.npz", write_npy(t, np.zeros((4, 1, 1, 1)))], "x must be integers in 0..6"),
    "number": (lambda t: ["run", t / "m.npz", write_npy(t, np.full((4, 1), 9))], "must hold integers in 0..6, found 9"),
}


@pytest.mark.parametrize("case", INVALID_COMMANDS)
def test_invalid_command_prints_one_line_and_writes_nothing(tmp_path, capsys, model, params, case):
    write_model_files(tmp_path, model, params)
    command, message = INVALID_COMMANDS[case]
    code, out, err = run(capsys, *command(tmp_path))
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("y.*"))


@pytest.mark.regression
@pytest.mark.parametrize(("dtype", "says"), [("float64", True), ("float32", False), ("int64", True)])
def test_run_says_that_it_casts_the_input(tmp_path, capsys, rng, dtype, says):
    layer = xprnn.RNN(3, 4)
    xprnn.save(tmp_path / "m.npz", layer, layer.init(rng, like=np.zeros(1, np.float32)))
    x = write_npy(tmp_path, np.ones((4, 1, 3), dtype))
    code, _, err = run(capsys, "run", tmp_path / "m.npz", x)
    assert code == 0
    assert (f"xprnn run: {x}: {dtype} cast to float32, the parameters' dtype\n" in err) is says


@pytest.mark.regression
@pytest.mark.parametrize(("limit", "calls"), [(20.0, 2), (0.0, 1)])
def test_run_reports_the_time_of_a_second_call(tmp_path, capsys, monkeypatch, rng, limit, calls):
    """The first call of a layer compiles its kernels; a call that takes long is not repeated."""
    layer = xprnn.RNN(3, 4)
    xprnn.save(tmp_path / "m.npz", layer, layer.init(rng, like=np.zeros(1, np.float32)))
    made, clock = [], iter([0.0, 4.0, 10.0, 10.5])
    run_sequence = model_commands._run_sequence
    monkeypatch.setattr(model_commands, "_run_sequence", lambda *args: made.append(1) or run_sequence(*args))
    monkeypatch.setattr(model_commands, "_LONGEST_REPEATED", limit)
    monkeypatch.setattr(model_commands.time, "perf_counter", lambda: next(clock))
    code, _, err = run(capsys, "run", tmp_path / "m.npz", write_npy(tmp_path, np.ones((4, 1, 3), "float32")))
    monkeypatch.undo()
    assert (code, len(made)) == (0, calls)
    first = "4e+03 ms, with the start-up of the kernels"
    assert err.endswith(f": 500 ms (first call {first})\n" if calls == 2 else f": {first}\n")


def test_streaming_a_bidirectional_layer_raises(tmp_path, capsys, rng):
    layer = xprnn.RNN(3, 4, bidirectional=True)
    xprnn.save(tmp_path / "m.npz", layer, layer.init(rng, like=np.zeros(0)))
    x = write_npy(tmp_path, np.zeros((4, 1, 3)))
    code, _, err = run(capsys, "run", tmp_path / "m.npz", x, "--stream")
    assert code == 2
    assert "a bidirectional layer needs the whole sequence" in err
