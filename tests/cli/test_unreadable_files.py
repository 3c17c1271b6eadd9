"""Files that the command line cannot read or write: one line on stderr, and no endless read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.layer_cases import initial_params

import xprnn
from xprnn.cli.main import main

pytestmark = pytest.mark.regression

needs_onnx, needs_h5py, needs_torch = (pytest.mark.needs(module) for module in ("onnx", "h5py", "torch"))


def error_line(capsys, *argv):
    """Run a command that must fail, and return its one line on stderr."""
    assert main(list(map(str, argv))) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("x", [np.array(3), np.array(3.0)])
def test_zero_dimensional_input_fails_alike_with_and_without_stream(tmp_path, capsys, x, batch_first):
    layer = xprnn.RNN(3, 4, batch_first=batch_first)
    model, x_path = tmp_path / "model.safetensors", tmp_path / "x.npy"
    xprnn.save(model, layer, initial_params(layer))
    np.save(x_path, x)
    message = error_line(capsys, "run", model, x_path)
    assert error_line(capsys, "run", model, x_path, "--stream") == message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])  # the write fails at exit, or during the command
def test_full_disk_is_reported_in_one_line(tmp_path, unbuffered):
    layer = xprnn.RNN(3, 4)
    xprnn.save(tmp_path / "model.safetensors", layer, initial_params(layer))
    command = [sys.executable, "-m", "xprnn", "info", str(tmp_path / "model.safetensors")]
    paths = os.pathsep.join([str(Path(xprnn.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=env)
    assert process.returncode == 1
    assert process.stderr == "xprnn info: output: cannot be written or read (No space left on device)\n"


def save_gru(tmp_path):
    """Save a GRU, and return its path."""
    layer = xprnn.GRU(3, 4)
    xprnn.save(tmp_path / "m.npz", layer, initial_params(layer))
    return tmp_path / "m.npz"


def test_npy_errors_do_not_advise_to_allow_pickles(tmp_path, capsys):
    model = save_gru(tmp_path)
    (tmp_path / "x.npy").write_bytes(b"garbage" * 9)
    assert "damaged, or not a .npy file" in error_line(capsys, "run", model, tmp_path / "x.npy")
    np.save(tmp_path / "o.npy", np.array([{}], object))
    for name in ("x.npy", "o.npy"):
        message = error_line(capsys, "run", model, tmp_path / name)
        assert "allow_pickle" not in message
    assert "it holds Python objects, which are not read" in message


def make_endless_file(path, kind):
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.skipif(not Path("/dev/zero").exists() or not hasattr(os, "mkfifo"), reason="needs /dev/zero and mkfifo")
@pytest.mark.parametrize("kind", ["pipe", "link to a device"])
@pytest.mark.parametrize(
    "name",
    [
        "m.npz",
        "m.safetensors",
        pytest.param("m.pt", marks=needs_torch),
        pytest.param("m.onnx", marks=needs_onnx),
        pytest.param("m.keras", marks=needs_h5py),
        pytest.param("m.weights.h5", marks=needs_h5py),
        "x.txt",
    ],
)
def test_pipes_and_devices_are_not_read(tmp_path, capsys, name, kind):
    path = tmp_path / name
    make_endless_file(path, kind)
    argv = ["train", path, "--out", tmp_path / "run"] if name == "x.txt" else ["info", path]
    assert "expected a regular file, found a device, pipe or socket" in error_line(capsys, *argv)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs mkfifo")
def test_pipe_as_input_of_run_is_not_read(tmp_path, capsys):
    model, path = save_gru(tmp_path), tmp_path / "x.npy"
    make_endless_file(path, "pipe")
    assert "expected a regular file" in error_line(capsys, "run", model, path)
