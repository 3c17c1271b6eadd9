"""The commands that take models of every format: the same numbers whatever the way, and one line for what is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from support.paths import DATA

import xprnn
from xprnn.cli import main
from xprnn.layers import model_file


@pytest.fixture
def model():
    return xprnn.Sequential(emb=xprnn.Embedding(7, 3), rnn=xprnn.GRU(3, 4, 2), head=xprnn.Linear(4, 5))


@pytest.fixture
def params(model, rng):
    return model.init(rng, like=np.zeros(1, np.float32))


def files(tmp_path, model, params):
    """The model in each format that NumPy alone can write."""
    xprnn.save(tmp_path / "m.npz", model, params, {"vocabulary": "abc"})
    xprnn.save(tmp_path / "m.safetensors", model, params, {"vocabulary": "abc"})
    safetensors.numpy.save_file(params, tmp_path / "theirs.safetensors")
    return ["m.npz", "m.safetensors", "theirs.safetensors"]


def run(capsys, *args):
    """The exit code, stdout and stderr of one command."""
    code = main.main([str(a) for a in args])
    told = capsys.readouterr()
    return code, told.out, told.err


def same(have, want):
    assert have.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(have[name], array)


@pytest.mark.parametrize("target", ["out.npz", "out.safetensors"])
def test_convert_between_our_own_formats_and_state_dicts(tmp_path, capsys, model, params, target):
    for source in files(tmp_path, model, params):
        code, out, err = run(capsys, "convert", tmp_path / source, tmp_path / target)
        assert (code, err) == (0, "")
        assert f"-> {tmp_path / target}: {sum(p.size for p in params.values())} parameters, float32" in out
        again, read = xprnn.load(tmp_path / target)
        assert again == model
        same(read, params)
        assert model_file.load_metadata(tmp_path / target) == ({} if "theirs" in source else {"vocabulary": "abc"})


@pytest.mark.needs("torch")
def test_convert_to_torch_and_back(tmp_path, capsys, model, params):
    import torch

    files(tmp_path, model, params)
    assert run(capsys, "convert", tmp_path / "m.npz", tmp_path / "m.pt")[0] == 0
    state_dict = torch.load(tmp_path / "m.pt", weights_only=True)
    same({name: value.numpy() for name, value in state_dict.items()}, params)
    assert run(capsys, "convert", tmp_path / "m.pt", tmp_path / "again.npz")[0] == 0
    again, read = xprnn.load(tmp_path / "again.npz")
    assert again == model
    same(read, params)


def test_convert_with_what_a_state_dict_does_not_say(tmp_path, capsys, rng):
    arrays = {f"{n}.weight_{k}h_l0": rng.normal(size=(4, 4)) for n in "ab" for k in "ih"}
    safetensors.numpy.save_file(arrays, tmp_path / "in.safetensors")
    hints = ["--nonlinearity", "relu", "--batch-first", "--order", "b", "a", "--dtype", "float32"]
    assert run(capsys, "convert", tmp_path / "in.safetensors", tmp_path / "out.npz", *hints)[0] == 0
    model, params = xprnn.load(tmp_path / "out.npz")
    layer = xprnn.RNN(4, 4, nonlinearity="relu", bias=False, batch_first=True)
    assert model == xprnn.Sequential(b=layer, a=layer)
    assert {p.dtype.name for p in params.values()} == {"float32"}


def test_info_says_layers_shapes_parameters_and_dtype(tmp_path, capsys, model, params):
    for name in files(tmp_path, model, params):
        code, out, _ = run(capsys, "info", tmp_path / name)
        assert code == 0
        total = sum(p.size for p in params.values())
        kind = "torch" if "theirs" in name else "xprnn"
        assert out.startswith(f"{tmp_path / name} ({kind}): {total} parameters, float32\n")
        for part in ("emb: Embedding(num_embeddings=7, embedding_dim=3, ", "rnn: GRU(input_size=3, ", "head: Linear("):
            assert f"  {part}" in out
        for key, array in params.items():
            assert f"  {key:24} {array.shape!s:16} float32\n" in out
        assert ("vocabulary = 'abc'" in out) == (kind == "xprnn")


CASES = {
    "ids": (xprnn.Sequential(emb=xprnn.Embedding(7, 3), rnn=xprnn.LSTM(3, 4)), (6, 2), True),
    "one row of ids": (xprnn.Sequential(emb=xprnn.Embedding(7, 3), rnn=xprnn.LSTM(3, 4)), (6,), True),
    "features": (xprnn.GRU(3, 4), (6, 2, 3), False),
    "one sequence": (xprnn.GRU(3, 4), (6, 3), False),
    "batch first": (xprnn.Sequential(rnn=xprnn.RNN(3, 4, batch_first=True), head=xprnn.Linear(4, 2)), (2, 6, 3), False),
    "one, batch first": (xprnn.RNN(3, 4, batch_first=True), (6, 3), False),
    "one-hot": (xprnn.RNN(3, 4), (6, 2), True),
    "no steps": (xprnn.RNN(3, 4), (0, 2, 3), False),
    "whole features": (xprnn.RNN(3, 4), (6, 2, 3), True),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_run_gives_what_a_call_gives(tmp_path, capsys, rng, case, stream):
    model, shape, whole = CASES[case]
    params = model.init(rng, like=np.zeros(1, np.float32))
    x = rng.integers(0, 3, shape) if whole else rng.normal(size=shape)
    xprnn.save(tmp_path / "m.npz", model, params)
    np.save(tmp_path / "x.npy", x)
    given = x if whole and len(shape) < 3 else x.astype(np.float32)
    if case.startswith("one") and case != "one-hot":
        given = given[None] if "batch first" in case else given[:, None]
    want, _ = model(params, given)
    more = ["--stream"] * stream
    code, out, err = run(capsys, "run", tmp_path / "m.npz", tmp_path / "x.npy", "--output", tmp_path / "y.npy", *more)
    assert (code, out) == (0, "")
    assert f"x.npy {given.shape} {given.dtype}: " in err
    have = np.load(tmp_path / "y.npy")
    assert have.dtype == want.dtype == np.float32
    np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-6)
    code, out, _ = run(capsys, "run", tmp_path / "m.npz", tmp_path / "x.npy", *more)
    assert code == 0
    assert out.startswith(f"y {want.shape} float32\n")


RECORDED = DATA
FOREIGN = [
    ("lstm_alone.keras", "Keras", "LSTM(input_size=3, hidden_size=4"),
    ("lstm_stack.keras", "Keras", "LSTM("),
    ("torch_old_lstm_2_layers_bidirectional.onnx", "ONNX", "LSTM("),
    ("torch_old_rnn.onnx", "ONNX", "RNN("),
]


@pytest.mark.needs("onnx", "h5py")
@pytest.mark.parametrize(("name", "kind", "layer"), FOREIGN)
def test_what_keras_and_onnx_wrote(tmp_path, capsys, rng, name, kind, layer):
    """info, convert and run say and do what from_keras and from_onnx give."""
    path = RECORDED / ("keras_files" if kind == "Keras" else "onnx_files") / name
    model, params = (xprnn.from_keras if kind == "Keras" else xprnn.from_onnx)(path)
    code, out, _ = run(capsys, "info", path)
    assert code == 0
    assert out.startswith(f"{path} ({kind}): {sum(p.size for p in params.values()):,} parameters, float")
    assert layer in out
    assert run(capsys, "convert", path, tmp_path / "m.npz")[0] == 0
    again, read = xprnn.load(tmp_path / "m.npz")
    assert again == model
    same(read, params)
    width = next(iter(params.values())).shape[1]
    x = rng.normal(size=(2, 2, width)).astype(next(iter(params.values())).dtype)
    np.save(tmp_path / "x.npy", x)
    for source in (path, tmp_path / "m.npz"):
        assert run(capsys, "run", source, tmp_path / "x.npy", "--output", tmp_path / "y.npy")[0] == 0
        np.testing.assert_allclose(np.load(tmp_path / "y.npy"), model(params, x)[0], rtol=1e-6)


@pytest.mark.needs("onnx")
def test_a_general_graph_is_run_and_not_converted(tmp_path, capsys):
    path = RECORDED / "onnx_files" / "keras_masking_lstm.onnx"
    graph, params = xprnn.from_onnx(path)
    with np.load(path.with_suffix(".npz")) as found:
        x = next(found[name] for name in found.files if name.startswith(("x", "in")))
    np.save(tmp_path / "x.npy", x)
    assert "only run, since" in run(capsys, "info", path)[1]
    code, _, err = run(capsys, "convert", path, tmp_path / "m.npz")
    assert code == 2
    assert "this ONNX graph is only run, not converted, since" in err
    assert run(capsys, "run", path, tmp_path / "x.npy", "--output", tmp_path / "y.npy")[0] == 0
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), graph(params, x))


@pytest.mark.needs("onnx")
def test_convert_to_onnx(tmp_path, capsys, model, params):
    files(tmp_path, model, params)
    code, _, err = run(capsys, "convert", tmp_path / "m.npz", tmp_path / "m.onnx")
    assert code == 0
    assert err == "xprnn convert: .onnx has no place for its vocabulary\n"
    again, read = xprnn.from_onnx(tmp_path / "m.onnx")
    assert again == model
    same(read, params)
    _, _, err = run(capsys, "convert", tmp_path / "theirs.safetensors", tmp_path / "m.onnx", "--dtype", "float64")
    assert err == "xprnn convert: ONNX Runtime has no recurrent layers in float64: --dtype float32\n"
    _, read = xprnn.from_onnx(tmp_path / "m.onnx")
    assert read["rnn.weight_ih_l0"].dtype == np.float64


@pytest.mark.parametrize("library", ["onnx", "h5py", "torch"])
def test_a_library_that_is_not_there(tmp_path, capsys, monkeypatch, model, params, library):
    files(tmp_path, model, params)
    monkeypatch.setitem(sys.modules, library, None)
    name, extra = {"onnx": ("m.onnx", "onnx"), "h5py": ("m.weights.h5", "keras"), "torch": ("m.pt", "torch")}[library]
    code, _, err = run(capsys, "info", rubbish(tmp_path, name))
    assert code == 2
    assert f'pip install "xprnn[{extra}]"' in err
    if library != "h5py":
        code, _, err = run(capsys, "convert", tmp_path / "m.npz", tmp_path / f"out{Path(name).suffix}")
        assert code == 2
        assert f'pip install "xprnn[{extra}]"' in err


def test_weights_of_keras_with_their_architecture(tmp_path, capsys):
    pytest.importorskip("h5py")
    folder = RECORDED / "keras_files"
    config = ["--config", folder / "lstm_stack.json"]
    assert run(capsys, "convert", folder / "lstm_stack.weights.h5", tmp_path / "m.npz", *config)[0] == 0
    assert xprnn.load(tmp_path / "m.npz")[0] == xprnn.from_keras(folder / "lstm_stack.keras")[0]
    code, _, err = run(capsys, "info", folder / "lstm_stack.weights.h5")
    assert code == 2
    assert "give config=" in err


def npy(tmp, content):
    path = tmp / "x.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    return path


def lying(shape):
    """A `.npy` file with nothing behind its header."""
    text = repr({"descr": "<f4", "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text


def rubbish(tmp, name):
    (tmp / name).write_bytes(b"once upon a time there was a model")
    return tmp / name


BAD = {
    "no model": (lambda t: ["info", t / "no.npz"], "there is no such model"),
    "ending": (lambda t: ["convert", t / "m.npz", t / "m.txt"], "ending in .safetensors, .npz, .pt, .pth or .onnx"),
    "keras out": (lambda t: ["convert", t / "m.npz", t / "m.keras"], "Keras's files are only read"),
    "ending in": (lambda t: ["info", npy(t, np.zeros(3))], "expected a name ending in .safetensors, .npz, .pt"),
    "hints": (lambda t: ["info", t / "m.npz", "--batch-first"], "a file of xprnn needs no batch_first: leave that out"),
    "other hints": (
        lambda t: ["info", t / "theirs.safetensors", "--config", "m.json"],
        "a file of torch needs no config",
    ),
    "onnx": (lambda t: ["info", rubbish(t, "m.onnx")], "m.onnx"),
    "keras": (lambda t: ["info", rubbish(t, "m.keras")], "m.keras"),
    "h5": (lambda t: ["info", rubbish(t, "m.weights.h5")], "m.weights.h5"),
    "pt": (lambda t: ["info", rubbish(t, "m.pt")], "m.pt"),
    "damaged": (lambda t: ["run", t / "m.npz", npy(t, b"\x93NUMPYrubbish")], "damaged, or not a .npy file"),
    "short": (lambda t: ["run", t / "m.npz", npy(t, lying((10**12,)))], "damaged, or not a .npy file"),
    "negative": (lambda t: ["run", t / "m.npz", npy(t, lying((-1, -1)))], "damaged, or not a .npy file"),
    "text": (lambda t: ["run", t / "m.npz", npy(t, np.array(["a"]))], "expected one array of numbers"),
    "pickle": (lambda t: ["run", t / "m.npz", npy(t, b"\x80\4]\x94.")], "damaged, or not a .npy file"),
    "no input": (lambda t: ["run", t / "m.npz", t / "no.npy"], "cannot be read (No such file"),
    "output": (
        lambda t: ["run", t / "m.npz", npy(t, np.zeros((4, 1), int)), "--output", t / "y.txt"],
        "ending in .npy",
    ),
    "shape": (lambda t: ["run", t / "m.npz", npy(t, np.zeros((4, 1, 1, 1)))], "x must be integers in 0..6"),
    "number": (lambda t: ["run", t / "m.npz", npy(t, np.full((4, 1), 9))], "must hold integers in 0..6, found 9"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_line_for_what_is_wrong(tmp_path, capsys, model, params, case):
    files(tmp_path, model, params)
    command, message = BAD[case]
    code, out, err = run(capsys, *command(tmp_path))
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("y.*"))


def test_a_layer_that_cannot_stream_says_so(tmp_path, capsys, rng):
    layer = xprnn.RNN(3, 4, bidirectional=True)
    xprnn.save(tmp_path / "m.npz", layer, layer.init(rng, like=np.zeros(0)))
    x = npy(tmp_path, np.zeros((4, 1, 3)))
    code, _, err = run(capsys, "run", tmp_path / "m.npz", x, "--stream")
    assert code == 2
    assert "a bidirectional layer needs the whole sequence" in err
