"""`python -m xprnn bench`: the tables, peers that are missing or wrong, the figures. No time is judged."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from xprnn import cli
from xprnn.bench import measure, ours, peers, short, streams, tables, timing, worker
from xprnn.bench.problem import Contender, Problem

SMALL = (2, 3, 2, 4)
TASK = measure.TASK | {"cells": ["lstm"], "shapes": [SMALL], "seconds": 0.0, "least": 1, "most": 1}


@pytest.fixture(autouse=True)
def small_gemm(monkeypatch):
    monkeypatch.setattr(timing, "GEMM_SIZE", 8)
    monkeypatch.setattr(timing, "SHORTEST", 1e-7)


@pytest.fixture
def run_worker(monkeypatch, capsys):
    """What a measuring process says, without the process."""

    def run(task):
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(task)))
        worker.main()
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def row(core, others, *, shape=SMALL, which="forward", aside=0, cell="gru"):
    seconds = {
        k: {"median": v, "q1": 0.9 * v, "q3": 1.1 * v, "rounds": 3} for k, v in ({"core": core} | others).items()
    }
    ratios = {"core": {k: v / core for k, v in others.items()}}
    out = {"cell": cell, "threads": 1, "shape": list(shape), "pass": which, "seconds": seconds, "set_aside": aside}
    return out | {"times_faster": ratios, "gemm_rate": 1e9, "gemm_share": 0.5, "disagree": []}


def test_means_are_geometric_over_undisturbed_rows_and_the_article_is_no_peer():
    rows = [row(1.0, {"torch": 2.0, "jax": 8.0, "article": 0.5}), row(1.0, {"torch": 8.0, "jax": 4.0, "article": 0.5})]
    rows.append(row(1.0, {"torch": 1e6, "jax": 1e6, "article": 1e6}, aside=-1))
    means = tables.geometric_means(rows)["gru", 1, "forward"]
    assert means["torch"] == pytest.approx(4.0)
    assert means["best peer"] == pytest.approx(8**0.5)  # 2 of torch's, 4 of JAX's
    assert tables.best_peer(rows[0]) == 2.0


def test_a_line_of_the_table():
    (line,) = tables.table([row(0.5e-3, {"torch": 1e-3})])[2:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["(2, 3, 2, 4)", "forward", "0.500 ±10%", "1.00 ±10% (2.00)", "2.00", "50%"]


def test_without_peers_there_is_no_best_peer():
    text = "\n".join(tables.table([row(0.5e-3, {"article": 1e-3})]) + tables.means_line([row(0.5e-3, {})]))
    assert "nan" not in text
    assert "best peer," not in text


def test_goals_name_the_row_the_peer_and_the_figure():
    rows = [row(1.0, {"torch": 0.8, "jax": 2.0}), row(1.0, {"torch": 1.2, "article": 0.1}, which="forward+backward")]
    rows.append(row(1.0, {"torch": 0.1}, aside=-1))  # disturbed: says nothing
    assert tables.goals(rows) == [
        {"what": "gru (2, 3, 2, 4) forward, 1 thread(s), against torch", "value": 0.8, "least": 1.0},
        {"what": "gru (2, 3, 2, 4) forward+backward, 1 thread(s), against torch", "value": 1.2, "least": 1.0},
        {
            "what": "gru, geometric mean of forward+backward, 1 thread(s), against the best peer",
            "value": pytest.approx(1.2),
            "least": 1.5,
        },
    ]
    assert not tables.goals([row(1.0, {"article": 0.5})])
    assert tables.undecided(rows) == ["gru (2, 3, 2, 4) forward, 1 thread(s)"]


def test_a_paired_ratio_is_the_median_of_the_rounds_own():
    assert timing.paired_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == 3.0
    assert timing.summary([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "rounds": 5}


def test_every_contender_has_its_turn_in_each_round():
    calls = {name: [] for name in "ab"}
    seen, aside = timing.interleave({n: lambda n=n: calls[n].append(1) for n in calls}, 0.0, 3, 5, 0.0)
    assert (len(seen["a"]), len(seen["b"]), aside) == (3, 3, 0)


def test_tables_are_aligned_for_a_terminal():
    text = tables.aligned("head\n| a | long |\n|---|---|\n| bbb | c |\n| | **refused: someone for a reason** | |\nend")
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
        running, wrong = worker.checked(worker.contenders(Problem(cell, SMALL, order), TASK | {"published": True}, []))
        assert not wrong
        assert len(running) == (4 if cell == "elman" else 1)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("cell", ["elman", "lstm", "gru"])
def test_torch_agrees(cell):
    running, wrong = worker.checked(worker.contenders(Problem(cell, SMALL), TASK, ["torch"]))
    assert not wrong
    assert "torch" in [c.name for c in running]
    assert not streams.measure(cell, 3, ["torch"], 5)["disagree"]


@pytest.mark.needs("torch", "onnxruntime", "onnx")
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("cell", "who"), [("lstm-proj", "torch"), ("gru-before", "onnxruntime")])
def test_who_has_a_rarer_cell_agrees(cell, who):
    running, wrong = worker.checked(worker.contenders(Problem(cell, SMALL), TASK, ["torch", "jax", "onnxruntime"]))
    assert not wrong
    assert [c.name for c in running] == ["core", who]


@pytest.mark.needs("jax")
@pytest.mark.parametrize("cell", ["elman", "lstm", "gru"])
def test_jax_agrees(cell):
    running, wrong = worker.checked(worker.contenders(Problem(cell, SMALL), TASK, ["jax"]))
    assert not wrong
    assert "jax" in [c.name for c in running]


def test_who_disagrees_or_raises_is_named_and_refused():
    problem = Problem("gru", SMALL)
    good = ours.core(problem)
    wrong = good.results()
    wrong["dx"] = wrong["dx"] * 1.01
    wrong["y"] = wrong["y"][:-1]

    def broken():
        raise OSError("no licence")

    liar, lazy = (
        Contender(name, good.forward, good.both, f) for name, f in (("liar", lambda: wrong), ("lazy", broken))
    )
    nans = Contender("nans", good.forward, good.both, lambda: {"dx": wrong["dx"] * np.nan})
    running, said = worker.checked([good, liar, lazy, nans])
    assert [c.name for c in running] == ["core"]
    assert said == [
        "liar: y is off by inf",
        "liar: dx is off by 1.0e-02",
        "lazy raises OSError: no licence",
        "nans: dx is off by nan",
    ]


def test_a_refused_peer_is_not_timed_and_the_table_says_so(run_worker, monkeypatch):
    def impostor(problem, names, threads):
        core = ours.core(problem)
        return [Contender("torch", core.forward, core.both, lambda: {"y": core.results()["y"] + 1})]

    monkeypatch.setattr(peers, "peers", impostor)
    rows = [heard["row"] for heard in run_worker(TASK | {"peers": []}) if "row" in heard]
    assert [list(r["seconds"]) for r in rows] == [["core"], ["core"]]
    assert "refused: torch: y is off by" in "\n".join(tables.table(rows))


def test_a_missing_peer_is_left_out_and_the_reason_said(run_worker, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # an import then fails
    monkeypatch.setattr(peers, "PEERS", {"torch": ("torch",)})
    heard = run_worker(TASK | {"peers": ["torch"], "steps": 3, "stream_sizes": [2]})
    (note,) = [h["note"] for h in heard if "note" in h]
    assert note.startswith("torch: left out (ModuleNotFoundError")
    assert [list(h["row"]["seconds"]) for h in heard if "row" in h] == [["core"], ["core"]]
    (stream,) = [h["stream"] for h in heard if "stream" in h]
    assert list(stream["microseconds"]) == ["core"]
    assert set(stream["microseconds"]["core"]) == {"p50", "p99", "p99.9"}


def test_the_command_prints_its_tables_and_writes_its_figures(tmp_path, capsys, monkeypatch):
    for name in ("FULL", "QUICK"):
        monkeypatch.setitem(getattr(short, name), "steps", 20)
        monkeypatch.setitem(getattr(short, name), "seconds", 0.0)
    file = tmp_path / "figures.json"
    words = ["bench", "--quick", "--cell", "lstm", "--rows", "2,3,2,4", "1,2,1,3", "--peers", "--json", str(file)]
    assert cli.main(words) == 0
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
        code = cli.main(["bench", "--quick", *words])
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(said) == 1
    assert problem in said[0]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
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
    assert everything.shortfalls(parts) == [
        "1 of 4 goals are met.",
        "",
        "- behind: 0.75, at least 1.0 wanted",
        "- slow: 62.00, at most 50.0 wanted",
        "- broken: nan, at most 1.0 wanted",
        "- a row: not judged, other processes kept the cores busy",
        "- **Import: ended with code 3**",
    ]
