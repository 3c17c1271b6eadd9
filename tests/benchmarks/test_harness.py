"""The benchmark harness and the grid: agreement of all implementations, tables, goals. No time is judged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.paths import ROOT

from benchmarks import run_all
from benchmarks.cpu import grid, grid_report, step_implementations, step_latency, training
from benchmarks.features import questions, table
from benchmarks.harness import agreement, peers, report, timing, worker_pool
from benchmarks.harness.problem import FORWARD, FORWARD_BACKWARD, Problem, matmul_flops
from benchmarks.harness.report import Goal
from xprnn.cli import bench

SMALL = (2, 3, 2, 4)
TASK = grid.GridTask(cells=["lstm"], shapes=[SMALL], peers=[], seconds=0.0, min_rounds=1, max_rounds=1)


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    monkeypatch.setattr(timing, "GEMM_SIZE", 8)
    monkeypatch.setattr(bench, "MIN_TURN_S", 1e-7)
    for name in ("WARMUP_S", "MIN_TURN_S"):
        monkeypatch.setattr(worker_pool, name, 0.0)


def run_task(**changes):
    """Measure TASK with some changes. Return whether it was complete, and the run."""
    run = grid.new_run()
    return grid.measure_task(grid.GridTask(**(vars(TASK) | changes)), run), run


def differences(cell, names, order="C", shape=SMALL):
    """Compare implementations in this process: name -> where it disagrees with those before it."""
    expected, problems = {}, {}
    for name in names:
        results = peers.make_implementation(name, cell, shape, order).results()
        problems[name] = agreement.mismatches(expected, results)
        expected = results | expected
    return problems


def row(layer, others, *, article=None, shape=SMALL, pass_name=FORWARD, discarded=0, cell="gru"):
    """A row of the grid with these seconds of the layer, its peers, the article API, and its peers."""
    all_seconds = {"layer": layer} | others | (article or {})
    seconds = {k: {"median": v, "q1": 0.9 * v, "q3": 1.1 * v, "rounds": 3} for k, v in all_seconds.items()}
    ratios = {"layer": {k: v / layer for k, v in others.items()}}
    if article:
        own = article["article_api"]
        ratios["article_api"] = {k: v / own for k, v in article.items() if k != "article_api"}
    key = {"cell": cell, "threads": 1, "shape": list(shape), "pass": pass_name, "discarded": discarded}
    return key | {"seconds": seconds, "times_faster": ratios, "gemm_rate": 1e9, "gemm_share": 0.5, "disagree": []}


def test_geometric_means_leave_out_disturbed_rows_and_the_compiled_loop_is_no_best_peer():
    rows = [
        row(1.0, {"torch": 2.0, "jax": 8.0, "loop": 0.5}),
        row(1.0, {"torch": 8.0, "jax": 4.0, "loop": 0.5}),
        row(1.0, {"torch": 1e6, "jax": 1e6, "loop": 1e6}, discarded=-1),
    ]
    means = grid_report.geometric_means(rows)["gru", 1, FORWARD]
    assert means["torch"] == pytest.approx(4.0)
    assert means["best peer"] == pytest.approx(8**0.5)  # torch's 2 and JAX's 4
    assert grid_report.best_peer_ratio(rows[0]) == 2.0


def test_openvino_counts_as_the_best_peer():
    rows = [row(1.0, {"torch": 2.0, "openvino": 1.2}), row(1.0, {"torch": 2.0, "openvino": 0.3})]
    assert grid_report.best_peer_ratio(rows[0]) == 1.2
    means = grid_report.geometric_means(rows)["gru", 1, FORWARD]
    assert means == pytest.approx({"torch": 2.0, "openvino": 0.6, "best peer": 0.6})
    assert grid_report.goals(rows)[-1] == Goal(
        "gru, geometric mean of forward, 1 thread(s), against the best peer", pytest.approx(0.6), least=1.5
    )


def test_the_article_api_is_compared_with_implementations_that_compute_y_pred():
    assert {
        name: peer.counterpart for name, peer in peers.PEERS.items() if peer.counterpart != "layer"
    } == dict.fromkeys(("article_loop", "article_loop_float64", "torch_head", "torch_article"), "article_api")
    article = {"article_api": 2e-3, "article_loop": 1e-3, "torch_head": 3e-3, "torch_article": 4e-3}
    measured = row(1e-3, {"torch": 0.5e-3}, article=article, cell="elman")
    assert grid_report.best_peer_ratio(measured, "article_api") == 1.5
    assert [goal for goal in grid_report.goals([measured]) if "article" in goal.what] == [
        Goal("elman (2, 3, 2, 4) forward, 1 thread(s), article API, against torch with output layer", 1.5, least=1.0)
    ]
    headings, _, line = grid_report.grid_table([measured], "article_api")
    assert (
        "| article API | article loop | torch with output layer | torch with output layer, article's arrays |"
        in headings
    )
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2:] == ["2.00 ±10%", "1.00 ±10% (0.50)", "3.00 ±10% (1.50)", "4.00 ±10% (2.00)", "1.50"]
    assert "article" not in "\n".join(grid_report.grid_table([measured]))


def test_a_row_is_measured_against_the_peers_of_each_implementation():
    complete, run = run_task(cells=["elman"])
    assert complete
    assert {name: list(ratios) for name, ratios in run["rows"][0]["times_faster"].items()} == {
        "layer": [],
        "article_api": ["article_loop"],
    }
    text = "\n".join(grid_report.grid_report(run))
    assert text.count("| article API | article loop |") == 1
    assert "C-ordered arrays (features, m, T_x)" in text


def test_a_line_of_the_grid_table():
    (line,) = grid_report.grid_table([row(0.5e-3, {"torch": 1e-3})])[2:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["(2, 3, 2, 4)", "forward", "0.500 ±10%", "1.00 ±10% (2.00)", "2.00", "50%"]


def test_without_frameworks_there_is_no_best_peer():
    rows = [row(0.5e-3, {"loop": 1e-3})]
    text = "\n".join(grid_report.grid_table(rows) + grid_report.geometric_mean_lines([row(0.5e-3, {})]))
    assert "nan" not in text
    assert "best peer," not in text


def test_goals_name_the_row_the_peer_and_the_figure():
    rows = [
        row(1.0, {"torch": 0.8, "jax": 2.0}),
        row(1.0, {"torch": 1.2}, pass_name=FORWARD_BACKWARD),
        row(1.0, {"torch": 0.1}, discarded=-1),  # disturbed: not judged
    ]
    assert grid_report.goals(rows) == [
        Goal("gru (2, 3, 2, 4) forward, 1 thread(s), against torch", 0.8, least=1.0),
        Goal("gru (2, 3, 2, 4) forward+backward, 1 thread(s), against torch", 1.2, least=1.0),
        Goal("gru, geometric mean of forward, 1 thread(s), against the best peer", pytest.approx(0.8), least=1.5),
        Goal(
            "gru, geometric mean of forward+backward, 1 thread(s), against the best peer",
            pytest.approx(1.2),
            least=1.5,
        ),
    ]
    assert grid_report.goals([row(1.0, {"loop": 0.5})]) == [
        Goal("gru (2, 3, 2, 4) forward, 1 thread(s), layer over compiled loop", 2.0, most=1.2)
    ]
    assert grid_report.inconclusive(rows) == ["gru (2, 3, 2, 4) forward, 1 thread(s)"]


def test_a_paired_ratio_is_the_median_of_the_ratios():
    assert timing.paired_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == 3.0
    assert timing.quartile_summary([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "rounds": 5}


def test_a_remark_stands_across_the_table():
    lines = report.markdown_table(["a", "b", "c"], [["1", "2", "3"], "torch disagrees"])
    assert lines == ["| a | b | c |", "|---|---|---|", "| 1 | 2 | 3 |", "| | **torch disagrees** | |"]


def test_flops_of_the_backward_pass_are_twice_those_of_the_forward_pass():
    assert matmul_flops("lstm", (2, 3, 4, 5)) == {FORWARD: 2 * 5 * 4 * 5 * 12, FORWARD_BACKWARD: 6 * 5 * 4 * 5 * 12}
    assert matmul_flops("lstm-proj", (2, 4, 1, 1))[FORWARD] == 2 * ((2 + 2) * 16 + 2 * 4)


@pytest.mark.parametrize("cell", ["elman", "lstm", "gru"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_layer_and_article_agree(cell, order):
    candidates = ["layer", "article_api", "article_loop", "article_loop_float64"]
    names = peers.eligible_names(cell, SMALL, candidates)
    assert len(names) == (4 if cell == "elman" else 1)
    assert not any(differences(cell, names, order).values())


@pytest.mark.needs("torch")
@pytest.mark.parametrize("cell", ["elman", "lstm", "gru"])
def test_torch_agrees(cell):
    assert not any(differences(cell, ["layer", "torch"]).values())
    factories = {"xprnn": step_implementations.xprnn_step, "torch": step_implementations.torch_step}
    latency = step_latency.compare_steps(factories, Problem(cell, (1, 3, 1, 1)), 5)
    assert not latency["disagree"]
    assert list(latency["microseconds"]) == ["xprnn", "torch"]
    assert set(latency["microseconds"]["xprnn"]) == {"p50", "p99", "p99.9"}


@pytest.mark.needs("torch")
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("peer", ["torch_head", "torch_article"])
def test_torch_with_output_layer_agrees_with_the_article(peer, order):
    assert not any(differences("elman", ["article_loop", "article_api", peer], order).values())
    assert peers.make_implementation(peer, "elman", SMALL, order).results().keys() == {
        *("y", "y (with a tape)", "y_pred", "dx", "dh0"),
        *("dweight_ih", "dweight_hh", "dbias_ih", "dbias_hh"),
    }
    assert peers.eligible_names("lstm", SMALL, [peer]) == []


@pytest.mark.needs("onnxruntime", "onnx")
@pytest.mark.parametrize("cell", ["elman", "lstm", "gru", "gru-before"])
def test_onnxruntime_agrees(cell):
    assert not any(differences(cell, ["layer", "onnxruntime"]).values())


@pytest.mark.needs("openvino", "onnx")
@pytest.mark.parametrize("cell", ["elman", "lstm", "gru", "gru-before"])
def test_openvino_agrees(cell):
    assert not any(differences(cell, ["layer", "openvino"]).values())
    assert list(peers.make_implementation("openvino", cell, SMALL).calls) == [FORWARD]


@pytest.mark.needs("onnx")
@pytest.mark.parametrize("cell", ["elman", "lstm", "gru"])
@pytest.mark.parametrize(
    "peer", [pytest.param(name, marks=pytest.mark.needs(name)) for name in ("onnxruntime", "openvino", "tract")]
)
def test_steps_of_onnx_runtimes_agree(cell, peer):
    factories = {"xprnn": step_implementations.xprnn_step, peer: step_latency.PEER_STEPS[peer]}
    latency = step_latency.compare_steps(factories, Problem(cell, (1, 3, 1, 1)), 5)
    assert not latency["disagree"]
    assert list(latency["microseconds"]) == ["xprnn", peer]


def test_the_step_table_names_peers_that_are_left_out(monkeypatch):
    monkeypatch.setattr(step_latency, "PEER_STEPS", {"tract": step_implementations.tract_step})
    monkeypatch.setattr(step_latency, "missing_reason", lambda name: "no wheel")
    rows, notes = step_latency.measure(["gru"], [3], 5)
    assert notes == ["tract: left out (no wheel)"]
    assert "tract" not in rows[0]["microseconds"]
    assert step_latency.report(rows, notes)[0] == "- tract: left out (no wheel)"


@pytest.mark.needs("torch", "onnxruntime", "onnx")
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("cell", "peer"), [("lstm-proj", "torch"), ("gru-before", "onnxruntime")])
def test_the_peer_that_has_a_rarer_cell_agrees(cell, peer):
    names = peers.eligible_names(cell, SMALL, ["layer", "article_api", *grid.PEER_NAMES])
    assert names == ["layer", peer, *["openvino"] * (cell == "gru-before")]
    assert not any(differences(cell, ["layer", peer]).values())


@pytest.mark.needs("jax")
@pytest.mark.parametrize("cell", ["elman", "lstm", "gru"])
def test_jax_agrees(cell):
    assert not any(differences(cell, ["layer", "jax"]).values())


@pytest.mark.needs("numba")
@pytest.mark.parametrize("cell", ["elman", "lstm", "gru"])
@pytest.mark.parametrize("shape", [(1, 3, 1, 40), (3, 6, 1, 7)])
def test_the_compiled_loop_agrees(cell, shape):
    assert peers.eligible_names(cell, shape, ["layer", "loop"])[-1] == "loop"
    assert not any(differences(cell, ["layer", "loop"], shape=shape).values())


def test_the_compiled_loop_cannot_run_a_batch():
    assert "loop" not in peers.eligible_names("gru", SMALL, ["loop"])


@pytest.mark.parametrize("cell", ["elman", "lstm", "gru"])
def test_the_numpy_floor_computes_the_step(cell):
    factories = {"xprnn": step_implementations.xprnn_step, "floor": step_implementations.numpy_floor}
    factories |= {"article": step_implementations.article_step} if cell == "elman" else {}
    latency = step_latency.compare_steps(factories, Problem(cell, (1, 3, 1, 1)), 5)
    assert not latency["disagree"]


def test_a_step_that_disagrees_or_raises_is_named_and_not_timed():
    def raising(problem):
        raise OSError("no licence")

    factories = {
        "xprnn": step_implementations.xprnn_step,
        "other": lambda problem: step_implementations.xprnn_step(Problem("elman", (1, 4, 1, 1))),
        "raising": raising,
    }
    latency = step_latency.compare_steps(factories, Problem("gru", (1, 3, 1, 1)), 5)
    assert list(latency["microseconds"]) == ["xprnn"]
    assert latency["disagree"] == ["other: y is off by inf", "raising raises OSError: no licence"]


def test_a_peer_whose_library_is_missing_has_a_reason(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "torch", peers.Peer("torch", ("no_such_module",)))
    monkeypatch.setitem(sys.modules, "no_such_module", None)
    assert peers.missing_reason("torch").startswith("ModuleNotFoundError: import of no_such_module")


def test_an_unknown_peer_is_noted_and_the_others_are_measured():
    complete, run = run_task(peers=["nobody"])
    assert complete
    assert run["notes"] == ["nobody: left out (KeyError: 'nobody')"]
    assert [(r["pass"], list(r["seconds"]), r["disagree"]) for r in run["rows"]] == [
        (FORWARD, ["layer"], []),
        (FORWARD_BACKWARD, ["layer"], []),
    ]
    assert run["machines"][0]["threads"] == 1
    assert run["machines"][0]["versions"]["numpy"] == np.__version__


def test_a_peer_that_raises_is_excluded_and_the_table_says_so(tmp_path, monkeypatch):
    # Known to this process only: its worker raises when it loads the implementation.
    monkeypatch.setitem(peers.PEERS, "nobody", peers.Peer("nobody"))
    with worker_pool.WorkerPool() as pool:
        rows = list(grid._grid_rows(pool, TASK, ["nobody"], tmp_path))
    assert [list(r["seconds"]) for r in rows] == [["layer"], ["layer"]]
    assert "excluded: nobody raises" in "\n".join(grid_report.grid_table(rows))


def test_a_task_without_the_layer_is_given_up_with_a_note():
    complete, run = run_task(shapes=[(2, 3, 2)])
    assert not complete
    assert not run["rows"]
    (note,) = run["notes"]
    assert note.startswith("1 thread(s): given up, ")


def test_unmet_goals_are_listed_with_their_figures():
    grid_goals = [Goal("ahead", 1.2, least=1.0), Goal("behind", 0.75, least=1.0)]
    import_goals = [Goal("slow", 62.0, most=50.0), Goal("broken", float("nan"), most=1.0)]
    results = {
        "grid": {"code": 0, "title": "Grid", "text": "### Table", "figures": {"inconclusive": ["a row"]}},
        "import_time": {"code": 3, "title": "Import", "text": "", "figures": {}},
    }
    results["grid"]["figures"]["goals"] = [goal._asdict() for goal in grid_goals]
    results["import_time"]["figures"]["goals"] = [goal._asdict() for goal in import_goals]
    machine = dict.fromkeys(("processor", "cores", "system", "python", "blas", "load"), "x") | {"versions": {}}
    lines = run_all.report_lines({"results": results, "machine": machine, "seconds": 60.0, "short": False})
    start = lines.index("### Unmet goals") + 2
    assert lines[start : start + 7] == [
        "1 of 4 goals are met.",
        "",
        "- behind: 0.75 (goal: at least 1.0)",
        "- slow: 62.00 (goal: at most 50.0)",
        "- broken: nan (goal: at most 1.0)",
        "- a row: not judged, other processes kept the cores busy",
        "- **Import: ended with code 3**",
    ]
    assert "#### Table" in lines


def test_training_rows_in_which_xprnn_failed_meet_no_goal():
    reason = "xprnn 1 raises MemoryError: none left"
    rates = {"torch 1": [1.0, 3.0], "torch 2": [6.0, 6.0], "xprnn 2": [12.0, 12.0]}
    failed = {"cell": "gru", "batch": 4, "rates": rates, "disagree": [reason], "discarded": 0}
    assert [goal.value for goal in training.goals([failed], [1, 2])] == [2.0]
    (goal,) = training.goals([failed], [1])
    assert np.isnan(goal.value)
    assert not goal.is_met
    assert training.rate_table([failed], [1, 2])[2:] == [
        "| gru | 4 | 1 |  | 2 |  |",
        "| gru | 4 | 2 | 12 | 6 (2.00; 2.00 to 2.00) |  |",
        f"| | **{reason}** | | | | |",
    ]


@pytest.mark.parametrize("peer", ["xprnn", "article"])
def test_every_question_of_the_feature_comparison_has_an_answer(peer):
    answers = {question: questions.answer(peer, question) for question in questions.QUESTIONS}
    allowed = ("yes", "no (", "outputs ", "NumPy")
    assert all(text.startswith(allowed) for text in answers.values()), answers
    assert answers["rnn"].startswith("outputs ")
    if peer == "xprnn":
        assert not any(text.startswith("no") for text in answers.values()), answers


def test_short_answers():
    assert table.short_answer("outputs 4e-16, gradients 3e-16") == "right to 3e-16"
    assert table.short_answer("no, its GRU is another: outputs 7e-02, gradients 3e-01") == "wrong by 3e-01"
    assert table.short_answer("no (its arguments: x, a0)") == "no"
    assert table.short_answer("import fails: ImportError: x") == "import fails"
    assert table.short_answer("NumPy, JAX") == "NumPy, JAX"


MODULES = [
    f"benchmarks.{'.'.join(path.relative_to(ROOT / 'benchmarks').with_suffix('').parts)}"
    for path in sorted((ROOT / "benchmarks").rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8") and path.name != "deployment_worker.py"
]


@pytest.mark.parametrize("module", MODULES)
def test_every_benchmark_runs_as_a_module(module):
    command = [sys.executable, "-m", module, "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "usage: " in run.stdout
    assert all(f"benchmarks.{benchmark.module}" in MODULES for benchmark in run_all.BENCHMARKS.values())
    assert Path(ROOT / "benchmarks" / "cpu" / "deployment_worker.py").is_file()
