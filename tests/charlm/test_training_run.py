"""The train command with an occupied directory, a diverging loss, or Ctrl-C during import."""

from __future__ import annotations

import runpy
import sys

import numpy as np
import pytest
from support.tiny_text import QUICK_ARGUMENTS, TEXT

import xprnn
from xprnn.charlm import training_run
from xprnn.cli import main
from xprnn.layers import model_file


@pytest.mark.parametrize(
    "files",
    [
        (model_file.MODEL_FILENAME,),
        (training_run.CHECKPOINT_FILE,),
        (model_file.MODEL_FILENAME, training_run.CHECKPOINT_FILE),
    ],
)
def test_existing_run_is_not_overwritten(tmp_path, text, capsys, files):
    out = tmp_path / "run"
    out.mkdir()
    for name in files:
        (out / name).write_bytes(b"hours of work")
    assert main.main(["train", text, "--out", str(out), *QUICK_ARGUMENTS]) == 2
    errors = capsys.readouterr().err
    assert errors == f"xprnn train: --out {out}: already holds a run; use another --out, or --resume {out}\n"
    assert sorted(path.name for path in out.iterdir()) == sorted(files)
    assert all((out / name).read_bytes() == b"hours of work" for name in files)


def test_nan_loss_keeps_the_last_good_model(tmp_path, text, capsys, monkeypatch):
    def diverging(*args):
        for state in train(*args):
            nan_params = {k: v * np.nan for k, v in state.params.items()}
            yield state if state.step < 8 else state._replace(params=nan_params)

    train = training_run.train
    monkeypatch.setattr(training_run, "train", diverging)
    out = tmp_path / "run"
    assert main.main(["train", text, "--out", str(out), *QUICK_ARGUMENTS]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("xprnn train: the held-out loss became nan at step 8; lower --learning-rate")
    assert f"the last good model, of step 7, is in {out}" in line
    assert model_file.load_metadata(out / model_file.MODEL_FILENAME)["step"] == 7
    _, params = xprnn.load(out / model_file.MODEL_FILENAME)
    assert all(np.isfinite(array).all() for array in params.values())


def test_divergence_before_the_first_measurement_leaves_no_directory(tmp_path, text, capsys):
    out = tmp_path / "run"
    arguments = ["train", text, "--out", str(out), *QUICK_ARGUMENTS[:6], "--steps", "5000", "--learning-rate", "1e38"]
    assert main.main([*arguments, "--backend", "numpy"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("xprnn train: the loss became")
    assert not out.exists()


@pytest.mark.parametrize("options", [[], ["--bidirectional"]])
def test_huge_loss_ends_the_run(tmp_path, text, capsys, options):
    out = tmp_path / "run"
    arguments = ["train", text, "--out", str(out), *QUICK_ARGUMENTS, "--learning-rate", "1e9", *options]
    assert main.main(arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("xprnn train: the held-out loss became ")
    assert line.endswith(" bits per character at step 1; lower --learning-rate (it is 1e+09)")
    assert not out.exists()


def test_huge_loss_keeps_the_last_good_model(tmp_path, text, capsys, monkeypatch):
    def exploding(*args):
        for state in train(*args):
            yield state if state.step < 8 else state._replace(params={k: v * 1e6 for k, v in state.params.items()})

    train = training_run.train
    monkeypatch.setattr(training_run, "train", exploding)
    out = tmp_path / "run"
    assert main.main(["train", text, "--out", str(out), *QUICK_ARGUMENTS]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "bits per character at step 8; lower --learning-rate" in line
    assert f"the last good model, of step 7, is in {out}" in line
    assert model_file.load_metadata(out / model_file.MODEL_FILENAME)["step"] == 7
    _, params = xprnn.load(out / model_file.MODEL_FILENAME)
    assert max(np.abs(array).max() for array in params.values()) < 100


def test_held_out_text_in_another_alphabet_is_not_divergence(tmp_path, capsys):
    path, out = tmp_path / "text.txt", tmp_path / "run"
    path.write_text(TEXT + "\u044f\u0436\u0448" * 60, encoding="utf-8")
    options = ["--hidden", "16", "--batch", "4", "--window", "16", "--steps", "600", "--learning-rate", "0.2"]
    assert main.main(["train", str(path), "--out", str(out), *options, "--backend", "numpy"]) == 0
    bits = model_file.load_metadata(out / model_file.MODEL_FILENAME)["bits_per_character"]
    assert bits > 2 * np.log2(len(set(TEXT)) + 3) + 10, "expected a held-out loss above the divergence bound"


def test_version_option_prints_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"xprnn {xprnn.__version__}\n"


def test_train_help_names_the_plot_extra(capsys):
    with pytest.raises(SystemExit):
        main.main(["train", "--help"])
    assert 'pip install ".[plot]"' in capsys.readouterr().out


def test_ctrl_c_during_import_exits_with_130(monkeypatch):
    class Interrupting:
        @staticmethod
        def find_spec(name, *_):
            if name == "xprnn.cli.main":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "xprnn.cli.main")
    monkeypatch.setattr(sys, "meta_path", [Interrupting, *sys.meta_path])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("xprnn", run_name="__main__")
    assert stop.value.code == 130
