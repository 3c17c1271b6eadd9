"""Two directions on text: training to restore characters, resuming it, restoring blanks, what it shows and refuses."""

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
QUICK = ["--hidden", "8", "--batch", "4", "--window", "16", "--steps", "20", "--backend", "numpy"]


def cut(batch: int = 4, window: int = 9) -> BatchedText:
    inputs, _ = batchify(IDS, batch, window)
    return BatchedText(inputs, inputs, window)


def small(cell: str = "elman"):
    model = build_model(cell, len(VOCABULARY), 12, bidirectional=True)
    return model, init_train_state(model, np.random.default_rng(3), LIKE)


def last(snapshots):
    return deque(snapshots, maxlen=1).pop()


@pytest.fixture(scope="module")
def learnt():
    model, start = small("gru")
    return model, last(train(model, start, cut(), TrainConfig(steps=400, learning_rate=0.01)))


@pytest.mark.parametrize("cell", ["elman", "lstm"])
def test_steps_carry_the_forward_state_only(cell):
    model, start = small(cell)
    s, schedule = cut(), TrainConfig(steps=20)
    got = list(train(model, start, s, schedule))
    params, moments, state = start.params, start.optimizer_state, None
    for step in range(20):
        x, _ = s.batch(step)
        logits, state, tape = model.forward(params, x, None if step % s.windows_per_epoch == 0 else state)
        state = next_window_state(state)
        gradients = model.backward(tape, xprnn.cross_entropy(logits, x)[1])[2]
        gradients, _ = xprnn.clip_by_global_norm(gradients, 1.0)
        params, moments = xprnn.adam(schedule.learning_rate_at(got[step]._replace(step=step))).update(
            params, gradients, moments
        )
        for name in params:
            np.testing.assert_allclose(got[step].params[name], params[name], rtol=1e-10, atol=1e-12)
        for part in got[step].recurrent_state if cell == "lstm" else (got[step].recurrent_state,):
            assert part[0].any()
            assert not part[1].any()


@pytest.mark.parametrize("cell", ["elman", "lstm"])
@pytest.mark.parametrize("stop", [1, 7])
def test_resuming_is_the_same_as_never_having_stopped(tmp_path, cell, stop):
    model, start = small(cell)
    schedule = TrainConfig(steps=20)
    whole = last(train(model, start, cut(), schedule))
    half = last(islice(train(model, start, cut(), schedule), stop))
    save_checkpoint(tmp_path / "run.safetensors", model, half, {})
    again, restored = load_checkpoint(tmp_path / "run.safetensors", like=LIKE)
    assert again == model
    end = last(train(again, restored, cut(), schedule))
    for name in whole.params:
        np.testing.assert_array_equal(end.params[name], whole.params[name])
    np.testing.assert_array_equal(np.asarray(end.recurrent_state), np.asarray(whole.recurrent_state))


def test_held_out_bits_know_nothing_of_the_character_itself():
    """On noise, a network that saw its answer would need no bits; one that does not needs all of them."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, size=(2000, 8))
    model = build_model("gru", 4, 16, bidirectional=True)
    start = init_train_state(model, rng, LIKE)
    now = last(train(model, start, BatchedText(ids, ids, 16), TrainConfig(steps=120, learning_rate=0.02)))
    fresh = rng.integers(4, size=(600, 8))
    assert bits_per_character(model, now.params, fresh, fresh) > 1.99


def test_the_passage_shown_is_the_wordiest():
    vocabulary = Vocabulary(" -ab")
    ids = vocabulary.encode("--- --- abba ab - a --")
    assert vocabulary.decode(report._most_text_window(ids, vocabulary, 7)) == "abba ab"
    assert report._most_text_window(ids, vocabulary, 99).tolist() == ids.tolist()


def test_blanks_are_restored_from_both_sides(learnt):
    model, now = learnt
    blank = np.arange(len(IDS)) % 6 == 5
    restored = infill(model, now.params, IDS, blank)
    np.testing.assert_array_equal(restored[~blank], IDS[~blank])
    # Only "cat|dog" and "mat|log" can be in doubt, and only where the blank hides what tells them apart.
    assert (restored == IDS)[blank].mean() > 0.9


def test_what_stood_in_a_blank_is_never_read(learnt):
    model, now = learnt
    blank = np.arange(len(IDS)) % 4 == 1
    other = np.where(blank, (IDS + 1) % len(VOCABULARY), IDS)
    np.testing.assert_array_equal(infill(model, now.params, IDS, blank), infill(model, now.params, other, blank))
    np.testing.assert_array_equal(infill(model, now.params, IDS, blank & False), IDS)
    assert infill(model, now.params, IDS, blank | True).shape == IDS.shape


def test_the_same_restoration_on_every_array_library(xp, learnt):
    model, now = learnt
    ids, blank = IDS[:30], np.arange(30) % 6 == 5
    params = {name: xp.asarray(array, "float32") for name, array in now.params.items()}
    with xp.allow_host_conversion():
        restored = infill(model, params, ids, blank)
    np.testing.assert_array_equal(restored, infill(model, now.params, ids, blank))


def test_a_model_that_reads_ahead_cannot_write(learnt):
    model, now = learnt
    with pytest.raises(InputError, match="restores characters between known ones"):
        generate(model, now.params, VOCABULARY, "the")


def test_two_layers_of_two_directions_are_refused():
    with pytest.raises(InputError, match="would see the character it is to predict"):
        build_model("gru", 5, 4, 2, bidirectional=True)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 3, encoding="utf-8")
    return str(path)


def refused(words, capsys) -> str:
    assert main.main(words) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1, errors
    return errors


def test_the_command_says_what_its_figure_means(tmp_path, text, capsys):
    out = tmp_path / "run"
    assert main.main(["train", text, "--bidirectional", "--out", str(out), *QUICK]) == 0
    said = capsys.readouterr().out
    assert "8 units in each of two directions" in said
    assert "held-out bits per character, each restored from both sides" in said
    assert "not to be compared with runs without --bidirectional" in said
    assert "counting, both sides" in said
    assert "counting, order 3" not in said
    assert "every 6th character hidden and restored" in said
    assert "xprnn sample" not in said
    with (out / "curve.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 20
    assert main.main(["info", str(out)]) == 0
    said = capsys.readouterr().out
    assert "bidirectional=True" in said
    assert "around: ContextShift(hidden_size=8)" in said
    assert "task = 'each character from both sides'" in said
    assert "a bidirectional model restores" in refused(["sample", str(out)], capsys)
    assert "--bidirectional cannot change" in refused(["train", "--resume", str(out), "--bidirectional"], capsys)


def test_two_layers_are_refused_before_anything_is_written(tmp_path, text, capsys):
    out = tmp_path / "run"
    words = ["train", text, "--bidirectional", "--layers", "2", "--out", str(out)]
    assert "a bidirectional model has 1 layer, found 2" in refused(words, capsys)
    assert not out.exists()


def test_an_interrupted_run_goes_on_to_the_last_bit(tmp_path, text, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    words = ["train", text, "--bidirectional", "--cell", "lstm", *QUICK]
    assert main.main([*words, "--out", str(whole)]) == 0

    def interrupting(*args):
        for now in train(*args):
            if now.step == 7:
                signal.raise_signal(signal.SIGINT)
            yield now

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "train", interrupting)
        assert main.main([*words, "--out", str(stopped)]) == 130
    assert main.main(["train", "--resume", str(stopped)]) == 0
    one, two = (xprnn.load(d / model_file.MODEL_FILENAME)[1] for d in (whole, stopped))
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


def test_without_a_command_the_help_is_shown(capsys):
    assert main.main([]) == 2
    told = capsys.readouterr().err
    assert "usage: xprnn" in told
    assert "python -m xprnn train" in told


@pytest.mark.parametrize("command", main.COMMANDS)
def test_the_help_of_every_command_has_examples(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main.main([command, "--help"])
    assert stop.value.code == 0
    assert f"python -m xprnn {command} " in capsys.readouterr().out


def test_a_terminal_without_the_characters_is_no_error(tmp_path):
    path, out = tmp_path / "text.txt", tmp_path / "run"
    path.write_text("Ä ö ü ß é " * 100, encoding="utf-8")
    assert main.main(["train", str(path), "--out", str(out), *QUICK]) == 0
    words = [sys.executable, "-X", "utf8=0", "-m", "xprnn", "sample", str(out), "--length", "30"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert b"?" in done.stdout
