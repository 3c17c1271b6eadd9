"""Bidirectional character models: training, resuming, infilling, the report of the command, and errors."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from collections import deque
from itertools import islice

import numpy as np
import pytest
from support.tiny_text import QUICK_ARGUMENTS

import xprnn
from xprnn.arrays.namespace import InputError
from xprnn.charlm import report, training_run
from xprnn.charlm.checkpoint import load_checkpoint, save_checkpoint
from xprnn.charlm.corpus import BatchedText, Vocabulary, batchify
from xprnn.charlm.generate import generate, infill
from xprnn.charlm.model import build_model
from xprnn.charlm.trainer import TrainConfig, bits_per_character, init_train_state, train
from xprnn.cli import main
from xprnn.layers import model_file
from xprnn.layers.context_shift import next_window_state

TEXT = "the cat sat on the mat; the dog sat on the log. " * 12
VOCABULARY = Vocabulary.from_text(TEXT)
IDS = VOCABULARY.encode(TEXT)
LIKE = np.zeros(1)


def batched_text(batch: int = 4, window: int = 9) -> BatchedText:
    inputs, _ = batchify(IDS, batch, window)
    return BatchedText(inputs, inputs, window)


def small_model(cell: str = "elman"):
    model = build_model(cell, len(VOCABULARY), 12, bidirectional=True)
    return model, init_train_state(model, np.random.default_rng(3), LIKE)


def last(states):
    return deque(states, maxlen=1).pop()


@pytest.fixture(scope="module")
def trained():
    model, start = small_model("gru")
    return model, last(train(model, start, batched_text(), TrainConfig(steps=400, learning_rate=0.01)))


@pytest.mark.parametrize("cell", ["elman", "lstm"])
def test_training_carries_only_the_forward_state(cell):
    model, start = small_model(cell)
    data, config = batched_text(), TrainConfig(steps=20)
    states = list(train(model, start, data, config))
    params, moments, state = start.params, start.optimizer_state, None
    for step in range(20):
        x, _ = data.batch(step)
        logits, state, tape = model.forward(params, x, None if step % data.windows_per_epoch == 0 else state)
        state = next_window_state(state)
        gradients = model.backward(tape, xprnn.cross_entropy(logits, x)[1])[2]
        gradients, _ = xprnn.clip_by_global_norm(gradients, 1.0)
        learning_rate = config.learning_rate_at(states[step]._replace(step=step))
        params, moments = xprnn.adam(learning_rate).update(params, gradients, moments)
        for name in params:
            np.testing.assert_allclose(states[step].params[name], params[name], rtol=1e-10, atol=1e-12)
        carried = states[step].recurrent_state
        for array in carried if cell == "lstm" else (carried,):
            assert array[0].any()
            assert not array[1].any()


@pytest.mark.parametrize("cell", ["elman", "lstm"])
@pytest.mark.parametrize("stop", [1, 7])
def test_resumed_training_equals_uninterrupted_training(tmp_path, cell, stop):
    model, start = small_model(cell)
    config = TrainConfig(steps=20)
    expected = last(train(model, start, batched_text(), config))
    stopped = last(islice(train(model, start, batched_text(), config), stop))
    save_checkpoint(tmp_path / "run.safetensors", model, stopped, {})
    loaded_model, loaded = load_checkpoint(tmp_path / "run.safetensors", like=LIKE)
    assert loaded_model == model
    resumed = last(train(loaded_model, loaded, batched_text(), config))
    for name in expected.params:
        np.testing.assert_array_equal(resumed.params[name], expected.params[name])
    np.testing.assert_array_equal(np.asarray(resumed.recurrent_state), np.asarray(expected.recurrent_state))


def test_prediction_does_not_see_the_predicted_character():
    """Noise of 4 symbols costs 2 bits per symbol, unless the network sees the symbol that it predicts."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, size=(2000, 8))
    model = build_model("gru", 4, 16, bidirectional=True)
    start = init_train_state(model, rng, LIKE)
    state = last(train(model, start, BatchedText(ids, ids, 16), TrainConfig(steps=120, learning_rate=0.02)))
    new_ids = rng.integers(4, size=(600, 8))
    assert bits_per_character(model, state.params, new_ids, new_ids) > 1.99


def test_passage_with_most_letters_is_selected():
    vocabulary = Vocabulary(" -ab")
    ids = vocabulary.encode("--- --- abba ab - a --")
    assert vocabulary.decode(report._most_text_window(ids, vocabulary, 7)) == "abba ab"
    assert report._most_text_window(ids, vocabulary, 99).tolist() == ids.tolist()


def test_infill_predicts_from_both_sides(trained):
    model, state = trained
    blank = np.arange(len(IDS)) % 6 == 5
    restored = infill(model, state.params, IDS, blank)
    np.testing.assert_array_equal(restored[~blank], IDS[~blank])
    # Only "cat|dog" and "mat|log" are ambiguous, and only if the blank hides the letter that distinguishes them.
    assert (restored == IDS)[blank].mean() > 0.9


def test_infill_does_not_read_blank_positions(trained):
    model, state = trained
    blank = np.arange(len(IDS)) % 4 == 1
    other = np.where(blank, (IDS + 1) % len(VOCABULARY), IDS)
    np.testing.assert_array_equal(infill(model, state.params, IDS, blank), infill(model, state.params, other, blank))
    np.testing.assert_array_equal(infill(model, state.params, IDS, blank & False), IDS)
    assert infill(model, state.params, IDS, blank | True).shape == IDS.shape


def test_infill_is_equal_on_every_array_library(xp, trained):
    model, state = trained
    ids, blank = IDS[:30], np.arange(30) % 6 == 5
    params = {name: xp.asarray(array, "float32") for name, array in state.params.items()}
    with xp.allow_host_conversion():
        restored = infill(model, params, ids, blank)
    np.testing.assert_array_equal(restored, infill(model, state.params, ids, blank))


def test_generate_with_a_bidirectional_model_raises(trained):
    model, state = trained
    with pytest.raises(InputError, match="the model is bidirectional"):
        generate(model, state.params, VOCABULARY, "the")


def test_bidirectional_model_of_two_layers_raises():
    with pytest.raises(InputError, match="would see the character that it must predict"):
        build_model("gru", 5, 4, 2, bidirectional=True)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 3, encoding="utf-8")
    return str(path)


def run_invalid(arguments, capsys) -> str:
    """The one-line error of a command that exits with 2."""
    assert main.main(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1, errors
    return errors


def test_report_of_a_bidirectional_run(tmp_path, text, capsys):
    directory = tmp_path / "run"
    assert main.main(["train", text, "--bidirectional", "--out", str(directory), *QUICK_ARGUMENTS]) == 0
    out = capsys.readouterr().out
    assert "8 units in each of two directions" in out
    assert "held-out bits per character, each predicted from both sides" in out
    assert "do not compare with runs without --bidirectional" in out
    assert "n-gram, both sides" in out
    assert "n-gram, order 3" not in out
    assert "every 6th character hidden and filled in" in out
    assert "xprnn sample" not in out
    with (directory / "curve.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 20
    assert main.main(["info", str(directory)]) == 0
    out = capsys.readouterr().out
    assert "bidirectional=True" in out
    assert "around: ContextShift(hidden_size=8)" in out
    assert "task = 'each character from both sides'" in out
    assert "the model is bidirectional" in run_invalid(["sample", str(directory)], capsys)
    assert "--bidirectional cannot change" in run_invalid(
        ["train", "--resume", str(directory), "--bidirectional"], capsys
    )


def test_two_bidirectional_layers_raise_before_anything_is_written(tmp_path, text, capsys):
    out = tmp_path / "run"
    arguments = ["train", text, "--bidirectional", "--layers", "2", "--out", str(out)]
    assert "a bidirectional model has 1 layer, found 2" in run_invalid(arguments, capsys)
    assert not out.exists()


def test_interrupted_run_resumes_bit_for_bit(tmp_path, text, monkeypatch):
    uninterrupted, stopped = tmp_path / "uninterrupted", tmp_path / "stopped"
    arguments = ["train", text, "--bidirectional", "--cell", "lstm", *QUICK_ARGUMENTS]
    assert main.main([*arguments, "--out", str(uninterrupted)]) == 0

    def interrupting(*args):
        for state in train(*args):
            if state.step == 7:
                signal.raise_signal(signal.SIGINT)
            yield state

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "train", interrupting)
        assert main.main([*arguments, "--out", str(stopped)]) == 130
    assert main.main(["train", "--resume", str(stopped)]) == 0
    expected, params = (xprnn.load(d / model_file.MODEL_FILENAME)[1] for d in (uninterrupted, stopped))
    for name in expected:
        np.testing.assert_array_equal(params[name], expected[name])


def test_no_command_prints_the_help(capsys):
    assert main.main([]) == 2
    err = capsys.readouterr().err
    assert "usage: xprnn" in err
    assert "python -m xprnn train" in err


@pytest.mark.parametrize("command", main.COMMANDS)
def test_help_of_every_command_has_examples(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main.main([command, "--help"])
    assert stop.value.code == 0
    assert f"python -m xprnn {command} " in capsys.readouterr().out


def test_characters_unknown_to_the_terminal_print_as_question_marks(tmp_path):
    path, out = tmp_path / "text.txt", tmp_path / "run"
    path.write_text("Ä ö ü ß é " * 100, encoding="utf-8")
    assert main.main(["train", str(path), "--out", str(out), *QUICK_ARGUMENTS]) == 0
    arguments = [sys.executable, "-X", "utf8=0", "-m", "xprnn", "sample", str(out), "--length", "30"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    process = subprocess.run(arguments, capture_output=True, env=environment, check=False)
    assert process.returncode == 0, process.stderr
    assert b"?" in process.stdout
