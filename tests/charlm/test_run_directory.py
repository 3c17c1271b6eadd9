"""A run claims its directory: a second run is refused, and a process that died holds no claim."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.paths import ROOT
from support.tiny_text import QUICK_ARGUMENTS

from xprnn.arrays.namespace import InputError
from xprnn.charlm import training_run
from xprnn.charlm.run_directory import claim_directory
from xprnn.cli import main
from xprnn.layers import model_file

pytestmark = pytest.mark.regression


def run_beside(monkeypatch, arguments, second):
    """Run the command, and the function `second` after its first step; return both results."""
    results = []

    def training(*args):
        for state in train(*args):
            if not results:
                results.append(second())
            yield state

    train = training_run.train
    monkeypatch.setattr(training_run, "train", training)
    return main.main(arguments), *results


def test_second_run_into_the_same_directory_is_refused(tmp_path, text, capsys, monkeypatch):
    out = tmp_path / "run"
    arguments = ["train", text, "--out", str(out), *QUICK_ARGUMENTS]

    def second():
        capsys.readouterr()
        return main.main(arguments), capsys.readouterr().err

    code, (second_code, message) = run_beside(monkeypatch, arguments, second)
    expected = f"xprnn train: --out {out}: another process is training the run in it; use another --out\n"
    assert (code, second_code, message) == (0, 2, expected)
    assert model_file.load_metadata(out / model_file.MODEL_FILENAME)["step"] == 20


def test_resuming_a_run_in_progress_is_refused(tmp_path, text, capsys, monkeypatch):
    out = tmp_path / "run"
    assert main.main(["train", text, "--out", str(out), *QUICK_ARGUMENTS]) == 0
    arguments = ["train", "--resume", str(out), "--steps", "30"]

    def second():
        capsys.readouterr()
        return main.main(arguments), capsys.readouterr().err

    code, (second_code, message) = run_beside(monkeypatch, arguments, second)
    expected = f"xprnn train: --resume {out}: another process is training the run in it; wait for its end\n"
    assert (code, second_code, message) == (0, 2, expected)
    assert model_file.load_metadata(out / model_file.MODEL_FILENAME)["step"] == 30


def test_run_that_ended_meanwhile_is_not_overwritten(tmp_path, text, capsys, monkeypatch):
    """The first check of the directory is before the model is built, when the other run has saved nothing yet."""
    out = tmp_path / "run"

    def slow_build(*args):
        out.mkdir()
        (out / model_file.MODEL_FILENAME).write_bytes(b"hours of work")
        return build_model(*args)

    build_model = training_run.build_model
    monkeypatch.setattr(training_run, "build_model", slow_build)
    assert main.main(["train", text, "--out", str(out), *QUICK_ARGUMENTS]) == 2
    assert f"--out {out}: already holds a run" in capsys.readouterr().err
    assert (out / model_file.MODEL_FILENAME).read_bytes() == b"hours of work"


def test_runs_without_out_that_start_together_use_different_directories(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    barrier, codes = threading.Barrier(2), []
    create = training_run._create_unused_directory

    def create_together(name):
        barrier.wait()
        return create(name)

    monkeypatch.setattr(training_run, "_create_unused_directory", create_together)
    threads = [
        threading.Thread(target=lambda: codes.append(main.main(["train", text, *QUICK_ARGUMENTS]))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0, 0]
    for name in ("xprnn-run", "xprnn-run-2"):
        assert model_file.load_metadata(tmp_path / name / model_file.MODEL_FILENAME)["step"] == 20


@pytest.mark.skipif(sys.platform == "win32", reason="kills a process with a POSIX signal")
def test_killed_process_holds_no_claim(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from xprnn.charlm.run_directory import claim_directory\n"
        "with claim_directory(Path(sys.argv[1]), '--out'):\n"
        "    print('claimed', flush=True)\n"
        "    time.sleep(60)\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    assert process.stdout.readline() == "claimed\n"
    with pytest.raises(InputError, match="another process is training the run in it"), claim(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=20)
    process.stdout.close()
    with claim(tmp_path) as created:
        assert not created


def claim(path: Path):
    return claim_directory(path, "--out")


def test_claim_ends_with_its_block_and_leaves_no_file(tmp_path):
    for created in (True, False):
        with claim(tmp_path / "new") as result:
            assert result is created
    assert not list((tmp_path / "new").iterdir())


def test_bidirectional_model_of_two_layers_raises_without_internal_names(tmp_path, text, capsys):
    options = ["--out", str(tmp_path / "run"), "--bidirectional", "--layers", "2", *QUICK_ARGUMENTS]
    assert main.main(["train", text, *options]) == 2
    assert capsys.readouterr().err.startswith("xprnn train: a bidirectional model has 1 layer, found 2: ")
