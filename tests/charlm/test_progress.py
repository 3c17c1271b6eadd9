"""Progress of a run: a bar that fits the terminal, plain lines elsewhere, and the message of a finished run."""

from __future__ import annotations

import io
import re

import pytest
from support.tiny_text import QUICK_ARGUMENTS

from xprnn.charlm.progress import show_progress
from xprnn.cli import main

pytestmark = pytest.mark.regression


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        """Return True."""
        return True


def written(stream, measurements=20):
    with show_progress(1000, 0, stream) as display:
        for step in range(1, measurements + 1):
            display.advance(step, step / measurements)
            display.measured(step, step / measurements, 3.25, 12.125)
    return stream.getvalue()


@pytest.mark.parametrize("columns", [30, 80, 109, 110, 200])
def test_bar_fits_the_terminal_and_names_its_unit(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    last = re.split(r"[\r\n]", written(Terminal()).strip())[-1].rstrip()
    assert len(last) <= columns
    assert last.startswith("100%")
    if columns >= 110:
        assert "training 3.250, held-out 12.125 bits per character" in last
        assert "char/s" in last
    else:
        assert last == "100%, held-out 12.125 bits"


def test_progress_outside_a_terminal_is_a_line_for_each_measurement():
    text = written(io.StringIO())
    lines = text.splitlines()
    assert len(lines) == 20
    assert "\r" not in text
    assert "\x1b" not in text
    assert lines[0].startswith("  5%  step 1: training 3.250, held-out 12.125 bits per character, ")
    assert lines[-1].startswith("100%  step 20: ")
    assert all(re.fullmatch(r".* [\d,]+ characters/s", line) for line in lines)


def test_train_writes_twenty_plain_lines_to_a_pipe(tmp_path, text, capsys):
    assert main.main(["train", text, "--out", str(tmp_path / "run"), *QUICK_ARGUMENTS[:6], "--steps", "200"]) == 0
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 20
    assert "\r" not in errors
    assert all("bits per character" in line for line in errors.splitlines())


@pytest.mark.parametrize("steps", [[], ["--steps", "5"]])
def test_resuming_a_finished_run_says_so(tmp_path, text, capsys, steps):
    assert main.main(["train", text, "--out", str(tmp_path / "run"), *QUICK_ARGUMENTS]) == 0
    capsys.readouterr()
    assert main.main(["train", "--resume", str(tmp_path / "run"), *steps]) == 0
    out, err = capsys.readouterr()
    assert "This run is finished: it has trained for 20 steps. To train on, add a larger --steps" in out
    assert "characters/s" not in out
    assert err == ""
    assert f"saved in {tmp_path / 'run'}" in out
