"""`python -m xprnn bench`: its table, its figures, its errors, and Ctrl-C. No time is judged."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import xprnn
from xprnn.cli import bench, main

SHAPES = [(2, 3, 2, 4), (1, 2, 1, 3)]


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    monkeypatch.setattr(bench, "MIN_TURN_S", 1e-7)
    monkeypatch.setattr(bench, "QUICK_ROUNDS", 3)


def test_table_and_json_hold_every_cell_shape_and_pass(tmp_path, capsys):
    file = tmp_path / "figures.json"
    rows = [",".join(map(str, shape)) for shape in SHAPES]
    assert main.main(["bench", "--quick", "--cell", "lstm", "gru", "--rows", *rows, "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    heading, *lines = out.partition("\n\n")[2].splitlines()
    assert " ".join(heading.split()) == "cell D,H,N,T forward, ms forward+backward, ms step, µs kernels"
    assert [line.split()[:2] for line in lines] == [[cell, row] for cell in ("lstm", "gru") for row in rows]
    assert err.splitlines() == [f"{cell} {row}: measured" for cell in ("lstm", "gru") for row in rows]
    run = json.loads(file.read_text(encoding="utf-8"))
    keys = [(r["cell"], tuple(r["shape"]), r["pass"], r["threads"]) for r in run["rows"]]
    passes = ("forward", "forward+backward", "step")
    assert keys == [(cell, shape, name, 1) for cell in ("lstm", "gru") for shape in SHAPES for name in passes]
    assert all(0 < r["seconds"]["q1"] <= r["seconds"]["median"] <= r["seconds"]["q3"] for r in run["rows"])
    assert {r["seconds"]["rounds"] for r in run["rows"]} == {3}
    assert run["machine"]["versions"]["xprnn"] == xprnn.__version__
    assert run["machine"]["versions"]["numpy"] == np.__version__


@pytest.mark.needs("numba")
@pytest.mark.parametrize(("jit", "kernels"), [(True, "compiled by numba"), (False, "NumPy in place")])
def test_kernels_that_ran_are_named(capsys, jit, kernels):
    with xprnn.kernels.config.allow_jit(jit):
        assert main.main(["bench", "--quick", "--cell", "elman", "--rows", "2,3,2,4"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(kernels)


def test_without_rows_the_default_shapes_are_timed(monkeypatch, capsys):
    monkeypatch.setattr(bench, "SHAPES", [(1, 2, 1, 3), (1, 2, 2, 3), (1, 2, 3, 3)])
    assert main.main(["bench", "--quick", "--cell", "gru"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[-2:]] == ["1,2,1,3", "1,2,2,3"]


def test_every_call_has_its_turn_in_each_round():
    times = bench.time_interleaved({name: lambda: None for name in "ab"}, 3)
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}


def test_a_timer_replaces_the_host_clock():
    calls = []

    def timer(call):
        call()
        return 7.0

    times = bench.time_interleaved({"a": lambda: calls.append("a")}, 3, timers={"a": timer})
    assert times == {"a": [7.0] * 3}
    assert calls == ["a"] * 3


def test_rounds_stop_when_the_time_is_used_up():
    assert len(bench.time_interleaved({"a": lambda: None}, 100, max_s=0.0)["a"]) == bench.MIN_ROUNDS


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--rows", "1,2,3"], "expected D,H,N,T, four positive integers, found '1,2,3'"),
        (["--rows", "1,2,0,3"], "expected D,H,N,T, four positive integers, found '1,2,0,3'"),
        (["--rows", "1,2,x,3"], "expected D,H,N,T, four positive integers, found '1,2,x,3'"),
        (["--threads", "0"], "--threads: expected 1 to "),
        (["--threads", "99999"], "the cores of this process, found 99999"),
        (["--cell", "rnn"], "invalid choice: 'rnn'"),
        (["--json", str(Path("nowhere") / "at" / "all.json")], "nowhere"),
    ],
)
def test_bad_options_are_refused_in_one_line(words, problem, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main.main(["bench", "--quick", *words])
    except SystemExit as stopped:
        code = stopped.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1
    assert problem in lines[0]


@pytest.fixture
def default_sigint():
    """A shell ignores Ctrl-C for a background job, and so would every process started from there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform == "win32", reason="the signals of this test are POSIX's")
@pytest.mark.usefixtures("default_sigint")
def test_ctrl_c_ends_the_command_without_a_traceback():
    words = [sys.executable, "-m", "xprnn", "bench", "--cell", "gru", "--rows", "1,4,1,10", "512,1024,64,50"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert first == "gru 1,4,1,10: measured\n"
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not out
