"""`python -m xprnn bench`: the tables, peers that are missing or wrong, the figures. No time is judged."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness import contenders, measure, peers, report, short, step_latency, timing, worker_pool
from benchmarks.harness.problem import FORWARD, FORWARD_BACKWARD
from xprnn.cli import main

SMALL = (2, 3, 2, 4)
TASK = measure.DEFAULT_TASK | {"cells": ["lstm"], "shapes": [SMALL], "seconds": 0.0, "least": 1, "most": 1, "peers": []}
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")


@pytest.fixture(autouse=True)
def small_and_short(monkeypatch):
    monkeypatch.setattr(timing, "GEMM_SIZE", 8)
    monkeypatch.setattr(timing, "MIN_TURN_S", 1e-7)
    for name in ("WARM", "TURN"):
        monkeypatch.setattr(worker_pool, name, 0.0)


def collected(task):
    """A run, and what it returned."""
    run = measure.new_run()
    return measure.measure_task(task, run, lambda _: None), run


def agreed(cell, names, order="C", shape=SMALL):
    """In this process: what is wrong with each, compared with the first."""
    known, wrong = {}, {}
    for name in names:
        found = contenders.make_implementation(name, cell, shape, order, 1).results()
        wrong[name] = contenders.mismatches(known, found, contenders.TOLERANCE)
    return wrong


def row(core, others, *, shape=SMALL, which="forward", aside=0, cell="gru"):
    seconds = {
        k: {"median": v, "q1": 0.9 * v, "q3": 1.1 * v, "rounds": 3} for k, v in ({"core": core} | others).items()
    }
    ratios = {"core": {k: v / core for k, v in others.items()}}
    out = {"cell": cell, "threads": 1, "shape": list(shape), "pass": which, "seconds": seconds, "discarded": aside}
    return out | {"times_faster": ratios, "gemm_rate": 1e9, "gemm_share": 0.5, "disagree": []}


def test_means_are_geometric_over_undisturbed_rows_and_the_article_is_no_peer():
    rows = [row(1.0, {"torch": 2.0, "jax": 8.0, "article": 0.5}), row(1.0, {"torch": 8.0, "jax": 4.0, "article": 0.5})]
    rows.append(row(1.0, {"torch": 1e6, "jax": 1e6, "article": 1e6}, aside=-1))
    means = report.geometric_means(rows)["gru", 1, "forward"]
    assert means["torch"] == pytest.approx(4.0)
    assert means["best peer"] == pytest.approx(8**0.5)  # 2 of torch's, 4 of JAX's
    assert report.best_peer_ratio(rows[0]) == 2.0


def test_a_line_of_the_table():
    (line,) = report.grid_table([row(0.5e-3, {"torch": 1e-3})])[2:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["(2, 3, 2, 4)", "forward", "0.500 ±10%", "1.00 ±10% (2.00)", "2.00", "50%"]


def test_without_peers_there_is_no_best_peer():
    text = "\n".join(
        report.grid_table([row(0.5e-3, {"article": 1e-3})]) + report.geometric_mean_lines([row(0.5e-3, {})])
    )
    assert "nan" not in text
    assert "best peer," not in text


def test_goals_name_the_row_the_peer_and_the_figure():
    rows = [row(1.0, {"torch": 0.8, "jax": 2.0}), row(1.0, {"torch": 1.2, "article": 0.1}, which="forward+backward")]
    rows.append(row(1.0, {"torch": 0.1}, aside=-1))  # disturbed: says nothing
    assert report.goals(rows) == [
        {"what": "gru (2, 3, 2, 4) forward, 1 thread(s), against torch", "value": 0.8, "least": 1.0},
        {"what": "gru (2, 3, 2, 4) forward+backward, 1 thread(s), against torch", "value": 1.2, "least": 1.0},
        {
            "what": "gru, geometric mean of forward+backward, 1 thread(s), against the best peer",
            "value": pytest.approx(1.2),
            "least": 1.5,
        },
    ]
    assert not report.goals([row(1.0, {"article": 0.5})])
    assert report.inconclusive(rows) == ["gru (2, 3, 2, 4) forward, 1 thread(s)"]


def test_a_paired_ratio_is_the_median_of_the_rounds_own():
    assert timing.paired_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == 3.0
    assert timing.quartile_summary([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "rounds": 5}


def test_every_contender_has_its_turn_in_each_round():
    seen = timing.time_interleaved({name: lambda: None for name in "ab"}, 3)
    assert {name: len(times) for name, times in seen.items()} == {"a": 3, "b": 3}


def test_tables_are_aligned_for_a_terminal():
    text = report.align_columns(
        "head\n| a | long |\n|---|---|\n| bbb | c |\n| | **refused: someone for a reason** | |\nend"
    )
    assert text.splitlines() == [
        "head",
        "a    long",
        "---  ----",
        "bbb  c",
        "     **refused: someone for a reason**",
        "end",
    ]


@pytest.mark.parametrize("cell", ["elman", "lstm", "gru"])
def test_ours_and_the_article_agree(cell):
    for order in "CF":
        names = contenders.eligible_names(cell, SMALL, True, [])
        assert len(names) == (4 if cell == "elman" else 1)
        assert not any(agreed(cell, names, order).values())


@pytest.mark.needs("torch")
@pytest.mark.parametrize("cell", ["elman", "lstm", "gru"])
def test_torch_agrees(cell):
    assert not any(agreed(cell, ["core", "torch"]).values())
    assert not step_latency.measure_latency(cell, 3, ["torch"], 5)["disagree"]


@pytest.mark.needs("torch", "onnxruntime", "onnx")
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("cell", "who"), [("lstm-proj", "torch"), ("gru-before", "onnxruntime")])
def test_who_has_a_rarer_cell_agrees(cell, who):
    names = contenders.eligible_names(cell, SMALL, False, list(peers.PEERS))
    assert names == ["core", who]
    assert not any(agreed(cell, names).values())


@pytest.mark.needs("jax")
@pytest.mark.parametrize("cell", ["elman", "lstm", "gru"])
def test_jax_agrees(cell):
    assert not any(agreed(cell, ["core", "jax"]).values())


@pytest.mark.needs("numba")
@pytest.mark.parametrize("cell", ["elman", "lstm", "gru"])
@pytest.mark.parametrize("shape", [(1, 3, 1, 40), (3, 6, 1, 7)])
def test_the_compiled_loop_agrees(cell, shape):
    assert contenders.eligible_names(cell, shape, False, ["loop"])[-1] == "loop"
    wrong = agreed(cell, ["core", "loop"], shape=shape)
    assert not any(wrong.values())


def test_the_compiled_loop_has_nothing_for_a_batch():
    assert "loop" not in contenders.eligible_names("gru", SMALL, False, ["loop"])


def test_a_player_without_its_library_is_left_out_and_the_reason_said(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "torch", ("no_such_module",))
    monkeypatch.setitem(sys.modules, "no_such_module", None)
    assert peers.missing_reason("torch").startswith("ModuleNotFoundError: import of no_such_module")


def test_a_peer_that_is_no_peer_is_noted_and_the_others_are_measured():
    code, run = collected(TASK | {"peers": ["nobody"], "steps": 3, "stream_sizes": [2]})
    assert code == 0
    assert run["notes"] == ["nobody: left out (KeyError: 'nobody')"]
    assert [(r["pass"], list(r["seconds"]), r["disagree"]) for r in run["rows"]] == [
        (FORWARD, ["core"], []),
        (FORWARD_BACKWARD, ["core"], []),
    ]
    (stream,) = run["streams"]
    assert list(stream["microseconds"]) == ["core"]
    assert set(stream["microseconds"]["core"]) == {"p50", "p99", "p99.9"}


def test_a_refused_peer_is_not_timed_and_the_table_says_so():
    # Its player raises when it sits down; nobody has checked whether it is there.
    with worker_pool.WorkerPool() as company, tempfile.TemporaryDirectory() as folder:
        rows = list(measure._grid_rows(company, TASK, ["nobody"], Path(folder)))
    assert [list(r["seconds"]) for r in rows] == [["core"], ["core"]]
    assert "refused: nobody raises" in "\n".join(report.grid_table(rows))


def test_without_the_core_a_task_is_given_up_and_the_reason_said():
    code, run = collected(TASK | {"order": "C", "shapes": [(2, 3, 2)]})
    assert code == 1
    assert not run["rows"]
    (note,) = run["notes"]
    assert note.startswith("1 thread(s): given up, ")


def test_the_command_prints_its_tables_and_writes_its_figures(tmp_path, capsys, monkeypatch):
    for name in ("FULL", "QUICK"):
        monkeypatch.setitem(getattr(short, name), "steps", 20)
        monkeypatch.setitem(getattr(short, name), "seconds", 0.0)
    file = tmp_path / "figures.json"
    words = ["bench", "--quick", "--cell", "lstm", "--rows", "2,3,2,4", "1,2,1,3", "--peers", "--json", str(file)]
    assert main.main(words) == 0
    out = capsys.readouterr().out
    assert "### LSTM (xprnn.LSTM), 1 thread" in out
    assert "(1, 2, 1, 3)" in out
    assert "microseconds" in out
    run = json.loads(file.read_text(encoding="utf-8"))
    assert [(r["shape"], r["pass"]) for r in run["rows"]] == [
        (shape, which) for shape in ([2, 3, 2, 4], [1, 2, 1, 3]) for which in ("forward", "forward+backward")
    ]
    assert run["machines"][0]["threads"] == 1
    assert run["machines"][0]["versions"]["numpy"] == np.__version__
    assert run["streams"][0]["hidden"] == 16


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--rows", "1,2,3"], "expected D,H,N,T, four positive integers, found '1,2,3'"),
        (["--rows", "1,2,0,3"], "expected D,H,N,T, four positive integers, found '1,2,0,3'"),
        (["--threads", "0"], "expected a whole number of at least 1, found 0"),
        (["--threads", "99999"], "core(s), found 99999"),
        (["--cell", "rnn"], "invalid choice: 'rnn'"),
        (["--json", str(Path("nowhere") / "at" / "all.json")], "nowhere"),
    ],
)
def test_bad_words_are_one_line(words, problem, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main.main(["bench", "--quick", *words])
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(said) == 1
    assert problem in said[0]


@pytest.fixture
def interruptible():
    """A shell ignores Ctrl-C for what it runs in the background, and so would all that is started from there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@posix
@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_it_and_its_measuring_process():
    words = [sys.executable, "-m", "xprnn", "bench", "--peers", "--cell", "gru", "--rows", "1,4,1,10", "512,1024,64,50"]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(words, env=os.environ | {"PYTHONPATH": paths}, stdout=-1, stderr=-1, text=True) as process:
        first = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)  # it ends only when the measuring process has let go of stderr
    assert first.startswith("gru (1, 4, 1, 10) forward")
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not out


def test_the_report_names_what_falls_short_and_by_how_much(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    everything = importlib.import_module("everything")
    grid = [{"what": "ahead", "value": 1.2, "least": 1.0}, {"what": "behind", "value": 0.75, "least": 1.0}]
    more = [{"what": "slow", "value": 62.0, "most": 50.0}, {"what": "broken", "value": float("nan"), "most": 1.0}]
    parts = {
        "grid": {"goals": grid, "code": 0, "title": "Grid", "undecided": ["a row"]},
        "imports": {"goals": more, "code": 3, "title": "Import", "undecided": []},
    }
    assert everything.unmet_goal_lines(parts) == [
        "1 of 4 goals are met.",
        "",
        "- behind: 0.75, at least 1.0 wanted",
        "- slow: 62.00, at most 50.0 wanted",
        "- broken: nan, at most 1.0 wanted",
        "- a row: not judged, other processes kept the cores busy",
        "- **Import: ended with code 3**",
    ]


def test_training_goes_on_where_xprnn_itself_fails(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    training = importlib.import_module("training")
    why = "xprnn 1 raises MemoryError: none left"
    row = {"cell": "gru", "batch": 4, "rates": {"torch 1": [1.0, 3.0], "torch 2": [6.0, 6.0], "xprnn 2": [12.0, 12.0]}}
    row |= {"disagree": [why], "discarded": 0}
    assert [goal["value"] for goal in training.goals([row], [1, 2])] == [2.0]
    assert np.isnan([goal["value"] for goal in training.goals([row], [1])]).tolist() == [True]
    lines = training.table([row], [1, 2])
    assert lines[2:] == [
        "| gru | 4 | 1 |  | 2 |  |",
        "| gru | 4 | 2 | 12 | 6 (2.00; 2.00 to 2.00) |  |",
        f"| | **{why}** | | | | |",
    ]
