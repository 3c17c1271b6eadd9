"""What someone found who had the command line and files of others: wrong reasons, silence, and reading without end."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from support.paths import DATA

import xprnn
from xprnn.arrays.namespace import InputError
from xprnn.cli.main import main

RECORDED = DATA
GRU = {"weight_ih_l0": np.zeros((12, 3)), "weight_hh_l0": np.zeros((12, 4))}
NEEDED = {".pt": "torch", ".onnx": "onnx", ".keras": "h5py", ".h5": "h5py"}


def said(capsys, *argv):
    """The one line of an error."""
    assert main(list(map(str, argv))) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


@pytest.mark.needs("onnx")
def test_the_reason_of_a_graph_that_sorts_its_batch_by_lengths():
    model, _ = xprnn.from_onnx(RECORDED / "onnx_files" / "torch_old_lstm_lengths.onnx")
    assert model.reason == "Shape '/Shape' computes with lengths or states ('/Cast_output_0')"


@pytest.mark.needs("h5py")
def test_a_file_that_is_not_there_is_not_damaged():
    with pytest.raises(InputError, match=r"^from_keras nope.keras: cannot be read \(No such file or directory\)$"):
        xprnn.from_keras("nope.keras")


@pytest.mark.parametrize("wrong", [None, 3, np.zeros(3)])
def test_from_torch_says_all_that_it_takes(wrong):
    with pytest.raises(InputError, match=r"expected a path, a state_dict \(a dict\) or an nn.Module, found"):
        xprnn.from_torch(wrong)


@pytest.mark.needs("torch")
def test_a_pickled_module_is_refused_in_own_words(tmp_path):
    import torch

    torch.save(torch.nn.GRU(3, 4), tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"torch\.save\(model\.state_dict\(\), path\)$") as error:
        xprnn.from_torch(tmp_path / "m.pt")
    assert "\x1b" not in str(error.value)
    assert "weights_only" not in str(error.value)


def test_numpys_advice_to_allow_pickles_is_not_passed_on(tmp_path, capsys):
    layer = xprnn.GRU(3, 4)
    xprnn.save(tmp_path / "m.npz", layer, layer.init(np.random.default_rng(0), like=np.zeros(0)))
    (tmp_path / "x.npy").write_bytes(b"garbage" * 9)
    assert "damaged, or not a .npy file" in said(capsys, "run", tmp_path / "m.npz", tmp_path / "x.npy")
    np.save(tmp_path / "o.npy", np.array([{}], object))
    for name in ("x.npy", "o.npy"):
        message = said(capsys, "run", tmp_path / "m.npz", tmp_path / name)
        assert "allow_pickle" not in message
    assert "it holds Python objects, which are not read" in message


def test_hints_that_say_nothing_are_refused():
    with pytest.raises(InputError, match="the source is a single layer: leave order out"):
        xprnn.from_torch(GRU, order=["a", "b"])
    with pytest.raises(InputError, match=r"nonlinearity applies to nn\.RNN only, and the source has none"):
        xprnn.from_torch(GRU, nonlinearity="relu")


def device(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    return path


@pytest.mark.skipif(not Path("/dev/zero").exists() or not hasattr(os, "mkfifo"), reason="a system without them")
@pytest.mark.parametrize("kind", ["pipe", "link to a device"])
@pytest.mark.parametrize("name", ["m.npz", "m.safetensors", "m.pt", "m.onnx", "m.keras", "m.weights.h5", "x.txt"])
def test_what_has_no_end_is_not_read(tmp_path, capsys, name, kind):
    pytest.importorskip(NEEDED.get(Path(name).suffix, "numpy"))
    path = device(tmp_path, name, kind)
    argv = ["train", path, "--out", tmp_path / "run"] if name == "x.txt" else ["info", path]
    assert "expected a regular file, found a device, pipe or socket" in said(capsys, *argv)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without them")
def test_an_input_without_an_end_is_not_read(tmp_path, capsys):
    layer = xprnn.GRU(3, 4)
    xprnn.save(tmp_path / "m.npz", layer, layer.init(np.random.default_rng(0), like=np.zeros(0)))
    path = device(tmp_path, "x.npy", "pipe")
    assert "expected a regular file" in said(capsys, "run", tmp_path / "m.npz", path)


def test_dir_shows_what_is_meant_to_be_seen():
    assert dir(xprnn) == sorted(xprnn.__all__)


@pytest.mark.needs("torch")
def test_a_forward_of_its_own_is_compared():
    import torch

    class Net(torch.nn.Module):
        def __init__(self, how):
            super().__init__()
            self.rnn, self.head, self.how = torch.nn.GRU(4, 4), torch.nn.Linear(4, 4), how

        def forward(self, x):
            return self.how(self, x)

    in_a_row = Net(lambda m, x: (m.head(m.rnn(x)[0]), None))
    before = torch.get_rng_state()
    xprnn.from_torch(in_a_row)
    assert in_a_row.training
    assert bool((torch.get_rng_state() == before).all())
    for how in (
        lambda m, x: m.head(m.rnn(x)[0].relu()),
        lambda m, x: m.head(m.rnn(x)[0] + x),
        lambda m, x: m.head(m.rnn(x)[0][-1]),
        lambda m, x: m.rnn(m.head(x))[0],
    ):
        with pytest.raises(InputError, match="outputs differ from those of its layers"):
            xprnn.from_torch(Net(how))
    xprnn.from_torch(Net(lambda m, x: m.rnn(m.head(x))[0]), order=["head", "rnn"])
    with pytest.warns(UserWarning, match="its outputs were not compared"):
        xprnn.from_torch(Net(lambda m, x: x.nothing))
