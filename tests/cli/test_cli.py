"""The command line as a user meets it: what it writes, what it refuses, and how it stops and goes on."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from support.tiny_text import QUICK_ARGUMENTS, TEXT

import xprnn
from xprnn.charlm import model as charlm_model
from xprnn.charlm import trainer, training_run
from xprnn.cli import main
from xprnn.layers import model_file


@pytest.fixture
def trained(tmp_path, text, capsys):
    assert main.main(["train", text, "--out", str(tmp_path / "run"), *QUICK_ARGUMENTS]) == 0
    capsys.readouterr()
    return tmp_path / "run"


def test_train_writes_model_curve_and_figures(tmp_path, text, capsys):
    assert main.main(["train", text, "--out", str(tmp_path / "run"), *QUICK_ARGUMENTS]) == 0
    out = capsys.readouterr().out
    with (tmp_path / "run" / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(float(row["step"])) for row in rows] == list(range(1, 21))
    metadata = model_file.load_metadata(tmp_path / "run" / model_file.MODEL_FILENAME)
    assert metadata["vocabulary"] == "".join(sorted(set(TEXT)))
    assert metadata["bits_per_character"] == pytest.approx(float(rows[-1]["bits_per_character"]), abs=1e-4)
    assert f"this network          {metadata['bits_per_character']:.3f}" in out
    assert "counting, order 3" in out
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.needs("matplotlib")
def test_train_draws_its_curve(trained):
    assert (trained / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "matplotlib.pyplot" not in sys.modules or "xprnn" not in repr(sys.modules["matplotlib.pyplot"].get_fignums())


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, text, capsys, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main.main(["train", text, "--out", str(tmp_path / "run"), *QUICK_ARGUMENTS]) == 0
    out = capsys.readouterr().out
    assert out.count('pip install "xprnn[plot]"') == 1
    assert out.index('pip install "xprnn[plot]"') < out.index("held-out bits per character")
    assert not (tmp_path / "run" / "curve.png").exists()
    assert (tmp_path / "run" / model_file.MODEL_FILENAME).exists()


def test_the_first_free_directory_is_taken(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main.main(["train", text, *QUICK_ARGUMENTS]) == 0
    assert (tmp_path / "xprnn-run" / model_file.MODEL_FILENAME).exists()
    assert (tmp_path / "xprnn-run-2" / model_file.MODEL_FILENAME).exists()


def test_sample_is_streamed_and_the_same_for_a_seed(trained, capsys):
    def sample(*more):
        assert main.main(["sample", str(trained), "--prompt", "It was", "--length", "40", *more]) == 0
        return capsys.readouterr().out

    text = sample("--seed", "1")
    assert text.startswith("It was")
    assert len(text) == 6 + 40 + 1
    assert text == sample("--seed", "1")
    assert text != sample("--seed", "2")
    assert sample("--temperature", "0", "--seed", "1") == sample("--top-k", "1", "--seed", "2")


def test_info_says_what_is_in_a_model(trained, capsys):
    assert main.main(["info", str(trained)]) == 0
    out = capsys.readouterr().out
    assert "rnn.weight_hh_l0" in out
    assert "(8, 8)" in out
    assert "vocabulary" in out


def test_a_run_interrupted_goes_on_as_if_never_stopped(tmp_path, text, capsys, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main.main(["train", text, "--out", str(whole), *QUICK_ARGUMENTS]) == 0
    steps = 0

    def interrupting(*args):
        nonlocal steps
        for now in trainer.train(*args):
            steps += 1
            if steps == 7:
                signal.raise_signal(signal.SIGINT)
            yield now

    monkeypatch.setattr(training_run, "train", interrupting)
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.chdir(tmp_path)
    assert main.main(["train", "text.txt", "--out", str(stopped), *QUICK_ARGUMENTS]) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert f"python -m xprnn train --resume {stopped}" in capsys.readouterr().out
    assert steps == 7
    monkeypatch.chdir("/")  # the text is found from anywhere
    assert main.main(["train", "--resume", str(stopped)]) == 0
    assert steps == 20
    _, one = xprnn.load(whole / model_file.MODEL_FILENAME)
    _, two = xprnn.load(stopped / model_file.MODEL_FILENAME)
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])
    curves = [np.loadtxt(d / "curve.csv", delimiter=",", skiprows=1) for d in (whole, stopped)]
    np.testing.assert_array_equal(curves[0][:, [0, 2, 3]], curves[1][:, [0, 2, 3]])


def test_a_finished_run_can_be_made_longer(trained):
    assert main.main(["train", "--resume", str(trained), "--steps", "30", "--backend", "numpy"]) == 0
    assert model_file.load_metadata(trained / model_file.MODEL_FILENAME)["step"] == 30


def test_a_real_ctrl_c_saves_and_says_how_to_go_on(tmp_path, text):
    out = tmp_path / "run"
    words = [sys.executable, "-m", "xprnn", "train", text, "--out", str(out), *QUICK_ARGUMENTS[:6], "--minutes", "0.5"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(2)]
    assert lines[1].startswith("model"), process.stderr and process.stderr.read()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    told, errors = process.communicate(timeout=20)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert f"python -m xprnn train --resume {out}" in told
    xprnn.load(out / model_file.MODEL_FILENAME)


def test_a_reader_that_has_seen_enough_is_no_error(trained):
    words = [sys.executable, "-m", "xprnn", "sample", str(trained), "--length", "200000"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=20) == 0
    assert errors == b""


def test_training_works_outside_the_main_thread(tmp_path, text):
    codes = []
    words = ["train", text, "--out", str(tmp_path / "run"), *QUICK_ARGUMENTS]
    thread = threading.Thread(target=lambda: codes.append(main.main(words)))
    thread.start()
    thread.join()
    assert codes == [0]


def bad(name: str, content: bytes, *words: str, command: str = "train"):
    return lambda tmp: [command, place(tmp, name, content), *words]


def place(tmp, name: str, content: bytes) -> str:
    (tmp / name).write_bytes(content)
    return str(tmp / name)


GOOD = TEXT.encode()
BAD_COMMANDS = {
    "empty text": (bad("t", b""), "empty file"),
    "one character": (bad("t", b"a"), "at least two different characters"),
    "short text": (bad("t", b"abcdefgh" * 4), "too short"),
    "few characters": (bad("t", b"abc"), "too short: it has 3 characters"),
    "text shorter than a window": (
        bad("t", b"abcdef" * 10),
        "it has 60 characters; a tenth is held out, which leaves 54 to learn from",
    ),
    "no out": (bad("t", GOOD, "--out", ""), "argument --out: expected a directory, found ''"),
    "resume no name": (bad("t", GOOD, "--resume", ""), "argument --resume: expected a directory, found ''"),
    "zero in a name": (lambda _: ["train", "a\0b"], "cannot be read"),
    "binary": (bad("t", b"\x00\x01abc"), "binary file"),
    "latin-1": (bad("t", b"na\xefve"), "expected UTF-8 text, found byte 0xef"),
    "no text": (lambda tmp: ["train", str(tmp / "no.txt")], "cannot be read (No such file"),
    "text is a directory": (lambda tmp: ["train", str(tmp)], "cannot be read"),
    "out is a file": (lambda tmp: ["train", place(tmp, "t", GOOD), "--out", place(tmp, "o", b"")], "--out"),
    "out below a file": (
        lambda tmp: ["train", place(tmp, "t", GOOD), "--out", place(tmp, "o", b"") + "/x"],
        "cannot be written",
    ),
    "backend": (bad("t", GOOD, "--backend", "tpu"), "invalid choice: 'tpu'"),
    "cell": (bad("t", GOOD, "--cell", "rwkv"), "invalid choice: 'rwkv'"),
    "hidden": (bad("t", GOOD, "--hidden", "0"), "expected a whole number of at least 1, found 0"),
    "rate": (bad("t", GOOD, "--learning-rate", "nan"), "expected a number above 0, found nan"),
    "steps and minutes": (bad("t", GOOD, "--steps", "1", "--minutes", "1"), "not allowed with"),
    "no memory": (bad("t", GOOD, "--hidden", "100000000"), "GiB for parameters"),
    "option": (bad("t", GOOD, "--hiden", "5"), "unrecognized arguments"),
    "resume nothing": (lambda tmp: ["train", "--resume", str(tmp)], "checkpoint.safetensors: cannot be read"),
    "sample nothing": (lambda tmp: ["sample", str(tmp)], "there is no such model"),
    "sample a text": (bad("t.txt", GOOD, command="sample"), "expected a .safetensors or .npz file"),
    "sample rubbish": (bad("m.safetensors", GOOD, command="sample"), "damaged"),
    "info rubbish": (bad("m.npz", GOOD, command="info"), "damaged"),
    "info nothing": (lambda tmp: ["info", str(tmp / "no")], "there is no such model"),
    "temperature": (lambda tmp: ["sample", str(tmp), "--temperature", "-1"], "of at least 0, found -1"),
    "unknown command": (lambda tmp: ["translate"], "invalid choice: 'translate'"),
}


def refused(words, capsys) -> str:
    try:
        code = main.main(words)
    except SystemExit as stop:
        code = stop.code
    errors = capsys.readouterr().err
    assert code == 2
    assert errors.startswith("xprnn")
    assert errors.count("\n") == 1, errors
    return errors


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_commands_say_one_line_exit_2_and_leave_nothing(tmp_path, capsys, monkeypatch, case):
    words, message = BAD_COMMANDS[case]
    monkeypatch.chdir(tmp_path)
    words = words(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert message in refused(words, capsys)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("installed", [False, True])
def test_cupy_without_a_gpu_is_refused_and_auto_takes_numpy(text, tmp_path, capsys, monkeypatch, installed):
    class Cupy:
        class cuda:  # noqa: N801  (CuPy's own spelling)
            @staticmethod
            def is_available():
                return False

    monkeypatch.setitem(sys.modules, "cupy", Cupy if installed else None)
    problem = "no CUDA GPU found" if installed else 'pip install "xprnn[cuda12]"'
    assert problem in refused(["train", text, "--out", str(tmp_path / "run"), "--backend", "cupy"], capsys)
    assert not (tmp_path / "run").exists()
    assert type(charlm_model.backend_array("auto")) is np.ndarray


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hidden", "9"], "--hidden cannot change when a run is resumed"),
        (["--learning-rate", "1"], "--learning-rate cannot change when a run is resumed"),
    ],
)
def test_what_cannot_change_on_resume(trained, capsys, words, message):
    assert message in refused(["train", "--resume", str(trained), *words], capsys)


def test_a_run_resumed_with_another_text_is_refused(trained, tmp_path, capsys):
    other = place(tmp_path, "other.txt", GOOD[::-1])
    assert "is not the text this run has learnt from" in refused(["train", other, "--resume", str(trained)], capsys)


def test_a_prompt_with_an_unknown_character_is_refused(trained, capsys):
    assert "character 'é' at position 1" in refused(["sample", str(trained), "--prompt", "Ié"], capsys)


def test_a_model_without_a_vocabulary_is_no_writer(tmp_path, capsys):
    model = xprnn.Sequential(rnn=xprnn.RNN(3, 2), head=xprnn.Linear(2, 3))
    xprnn.save(tmp_path / "m.npz", model, model.init(np.random.default_rng(0), like=np.zeros(1)))
    assert "found no vocabulary" in refused(["sample", str(tmp_path / "m.npz")], capsys)
