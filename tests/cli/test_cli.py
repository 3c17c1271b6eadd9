"""Commands train, sample and info: files and output, errors, interruption and resuming."""

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


def test_train_writes_model_curve_and_report(tmp_path, text, capsys):
    assert main.main(["train", text, "--out", str(tmp_path / "run"), *QUICK_ARGUMENTS]) == 0
    out = capsys.readouterr().out
    with (tmp_path / "run" / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(float(row["step"])) for row in rows] == list(range(1, 21))
    metadata = model_file.load_metadata(tmp_path / "run" / model_file.MODEL_FILENAME)
    assert metadata["vocabulary"] == "".join(sorted(set(TEXT)))
    assert metadata["bits_per_character"] == pytest.approx(float(rows[-1]["bits_per_character"]), abs=1e-4)
    assert f"this network          {metadata['bits_per_character']:.3f}" in out
    assert "n-gram, order 3" in out
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.needs("matplotlib")
def test_train_writes_curve_png_without_pyplot(trained):
    assert (trained / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "matplotlib.pyplot" not in sys.modules or "xprnn" not in repr(sys.modules["matplotlib.pyplot"].get_fignums())


def test_train_without_matplotlib_names_the_plot_extra(tmp_path, text, capsys, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main.main(["train", text, "--out", str(tmp_path / "run"), *QUICK_ARGUMENTS]) == 0
    out = capsys.readouterr().out
    assert out.count('pip install ".[plot]"') == 1
    assert out.index('pip install ".[plot]"') < out.index("held-out bits per character")
    assert not (tmp_path / "run" / "curve.png").exists()
    assert (tmp_path / "run" / model_file.MODEL_FILENAME).exists()


def test_train_uses_the_first_unused_directory(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main.main(["train", text, *QUICK_ARGUMENTS]) == 0
    assert (tmp_path / "xprnn-run" / model_file.MODEL_FILENAME).exists()
    assert (tmp_path / "xprnn-run-2" / model_file.MODEL_FILENAME).exists()


def test_sample_is_reproducible_for_a_seed(trained, capsys):
    def sample(*options):
        assert main.main(["sample", str(trained), "--prompt", "It was", "--length", "40", *options]) == 0
        return capsys.readouterr().out

    text = sample("--seed", "1")
    assert text.startswith("It was")
    assert len(text) == 6 + 40 + 1
    assert text == sample("--seed", "1")
    assert text != sample("--seed", "2")
    assert sample("--temperature", "0", "--seed", "1") == sample("--top-k", "1", "--seed", "2")


def test_info_prints_parameters_and_metadata(trained, capsys):
    assert main.main(["info", str(trained)]) == 0
    out = capsys.readouterr().out
    assert "rnn.weight_hh_l0" in out
    assert "(8, 8)" in out
    assert "vocabulary" in out


def test_interrupted_run_resumes_bit_for_bit(tmp_path, text, capsys, monkeypatch):
    uninterrupted, stopped = tmp_path / "uninterrupted", tmp_path / "stopped"
    assert main.main(["train", text, "--out", str(uninterrupted), *QUICK_ARGUMENTS]) == 0
    steps = 0

    def interrupting(*args):
        nonlocal steps
        for state in trainer.train(*args):
            steps += 1
            if steps == 7:
                signal.raise_signal(signal.SIGINT)
            yield state

    monkeypatch.setattr(training_run, "train", interrupting)
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.chdir(tmp_path)
    assert main.main(["train", "text.txt", "--out", str(stopped), *QUICK_ARGUMENTS]) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert f"python -m xprnn train --resume {stopped}" in capsys.readouterr().out
    assert steps == 7
    monkeypatch.chdir("/")  # --resume finds the text from any directory
    assert main.main(["train", "--resume", str(stopped)]) == 0
    assert steps == 20
    _, expected = xprnn.load(uninterrupted / model_file.MODEL_FILENAME)
    _, params = xprnn.load(stopped / model_file.MODEL_FILENAME)
    for name in expected:
        np.testing.assert_array_equal(params[name], expected[name])
    curves = [np.loadtxt(d / "curve.csv", delimiter=",", skiprows=1) for d in (uninterrupted, stopped)]
    np.testing.assert_array_equal(curves[0][:, [0, 2, 3]], curves[1][:, [0, 2, 3]])


def test_finished_run_can_be_extended(trained):
    assert main.main(["train", "--resume", str(trained), "--steps", "30", "--backend", "numpy"]) == 0
    assert model_file.load_metadata(trained / model_file.MODEL_FILENAME)["step"] == 30


def test_ctrl_c_saves_and_prints_the_resume_command(tmp_path, text):
    out = tmp_path / "run"
    arguments = [
        sys.executable,
        "-m",
        "xprnn",
        "train",
        text,
        "--out",
        str(out),
        *QUICK_ARGUMENTS[:6],
        "--minutes",
        "0.5",
    ]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(2)]
    assert lines[1].startswith("model"), process.stderr and process.stderr.read()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out_text, errors = process.communicate(timeout=20)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert f"python -m xprnn train --resume {out}" in out_text
    xprnn.load(out / model_file.MODEL_FILENAME)


def test_closed_output_pipe_is_not_an_error(trained):
    arguments = [sys.executable, "-m", "xprnn", "sample", str(trained), "--length", "200000"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
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
    arguments = ["train", text, "--out", str(tmp_path / "run"), *QUICK_ARGUMENTS]
    thread = threading.Thread(target=lambda: codes.append(main.main(arguments)))
    thread.start()
    thread.join()
    assert codes == [0]


def with_file(name: str, content: bytes, *options: str, command: str = "train"):
    """Arguments of a command whose first argument is a new file, as a function of the directory."""
    return lambda tmp: [command, write_file(tmp, name, content), *options]


def write_file(tmp, name: str, content: bytes) -> str:
    (tmp / name).write_bytes(content)
    return str(tmp / name)


VALID_TEXT = TEXT.encode()
INVALID_COMMANDS = {
    "empty text": (with_file("t", b""), "empty file"),
    "one character": (with_file("t", b"a"), "at least two different characters"),
    "short text": (with_file("t", b"abcdefgh" * 4), "too short"),
    "few characters": (with_file("t", b"abc"), "too short: it has 3 characters"),
    "text shorter than a window": (
        with_file("t", b"abcdef" * 10),
        "it has 60 characters; a tenth is held out, which leaves 54 for training",
    ),
    "empty out": (with_file("t", VALID_TEXT, "--out", ""), "argument --out: expected a directory, found ''"),
    "empty resume": (with_file("t", VALID_TEXT, "--resume", ""), "argument --resume: expected a directory, found ''"),
    "null character in a name": (lambda _: ["train", "a\0b"], "cannot be read"),
    "binary": (with_file("t", b"\x00\x01abc"), "binary file"),
    "latin-1": (with_file("t", b"na\xefve"), "expected UTF-8 text, found byte 0xef"),
    "missing text": (lambda tmp: ["train", str(tmp / "no.txt")], "cannot be read (No such file"),
    "text is a directory": (lambda tmp: ["train", str(tmp)], "cannot be read"),
    "out is a file": (
        lambda tmp: ["train", write_file(tmp, "t", VALID_TEXT), "--out", write_file(tmp, "o", b"")],
        "--out",
    ),
    "out below a file": (
        lambda tmp: ["train", write_file(tmp, "t", VALID_TEXT), "--out", write_file(tmp, "o", b"") + "/x"],
        "cannot be written",
    ),
    "backend": (with_file("t", VALID_TEXT, "--backend", "tpu"), "invalid choice: 'tpu'"),
    "cell": (with_file("t", VALID_TEXT, "--cell", "rwkv"), "invalid choice: 'rwkv'"),
    "hidden": (with_file("t", VALID_TEXT, "--hidden", "0"), "expected a whole number of at least 1, found 0"),
    "rate": (with_file("t", VALID_TEXT, "--learning-rate", "nan"), "expected a number above 0, found nan"),
    "steps and minutes": (with_file("t", VALID_TEXT, "--steps", "1", "--minutes", "1"), "not allowed with"),
    "no memory": (with_file("t", VALID_TEXT, "--hidden", "100000000"), "GiB for parameters"),
    "option": (with_file("t", VALID_TEXT, "--hiden", "5"), "unrecognized arguments"),
    "resume nothing": (lambda tmp: ["train", "--resume", str(tmp)], "checkpoint.safetensors: cannot be read"),
    "sample nothing": (lambda tmp: ["sample", str(tmp)], "no such model file"),
    "sample a text": (with_file("t.txt", VALID_TEXT, command="sample"), "expected a .safetensors or .npz file"),
    "sample damaged": (with_file("m.safetensors", VALID_TEXT, command="sample"), "damaged"),
    "info damaged": (with_file("m.npz", VALID_TEXT, command="info"), "damaged"),
    "info nothing": (lambda tmp: ["info", str(tmp / "no")], "no such model file"),
    "temperature": (lambda tmp: ["sample", str(tmp), "--temperature", "-1"], "of at least 0, found -1"),
    "unknown command": (lambda tmp: ["translate"], "invalid choice: 'translate'"),
}


def run_invalid(arguments, capsys) -> str:
    """The one-line error of a command that exits with 2."""
    try:
        code = main.main(arguments)
    except SystemExit as stop:
        code = stop.code
    errors = capsys.readouterr().err
    assert code == 2
    assert errors.startswith("xprnn")
    assert errors.count("\n") == 1, errors
    return errors


@pytest.mark.parametrize("case", INVALID_COMMANDS)
def test_invalid_command_prints_one_line_and_writes_nothing(tmp_path, capsys, monkeypatch, case):
    make_arguments, message = INVALID_COMMANDS[case]
    monkeypatch.chdir(tmp_path)
    arguments = make_arguments(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert message in run_invalid(arguments, capsys)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("installed", [False, True])
def test_backend_cupy_without_a_gpu_raises_and_auto_uses_numpy(text, tmp_path, capsys, monkeypatch, installed):
    class Cupy:
        class cuda:  # noqa: N801  (the name in CuPy)
            @staticmethod
            def is_available():
                return False

    monkeypatch.setitem(sys.modules, "cupy", Cupy if installed else None)
    problem = "no CUDA GPU found" if installed else 'pip install ".[cuda12]"'
    assert problem in run_invalid(["train", text, "--out", str(tmp_path / "run"), "--backend", "cupy"], capsys)
    assert not (tmp_path / "run").exists()
    assert type(charlm_model.backend_array("auto")) is np.ndarray


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden", "9"], "--hidden cannot change when a run is resumed"),
        (["--learning-rate", "1"], "--learning-rate cannot change when a run is resumed"),
    ],
)
def test_fixed_options_cannot_change_on_resume(trained, capsys, arguments, message):
    assert message in run_invalid(["train", "--resume", str(trained), *arguments], capsys)


def test_resume_with_another_text_raises(trained, tmp_path, capsys):
    other = write_file(tmp_path, "other.txt", VALID_TEXT[::-1])
    assert "is not the text that this run was trained on" in run_invalid(
        ["train", other, "--resume", str(trained)], capsys
    )


def test_prompt_with_an_unknown_character_raises(trained, capsys):
    error = run_invalid(["sample", str(trained), "--prompt", "Ié"], capsys)
    assert error.startswith("xprnn sample: --prompt: character 'é' at position 1 is not among the ")


def test_sample_of_a_model_without_vocabulary_raises(tmp_path, capsys):
    model = xprnn.Sequential(rnn=xprnn.RNN(3, 2), head=xprnn.Linear(2, 3))
    xprnn.save(tmp_path / "m.npz", model, model.init(np.random.default_rng(0), like=np.zeros(1)))
    assert "found no vocabulary" in run_invalid(["sample", str(tmp_path / "m.npz")], capsys)
