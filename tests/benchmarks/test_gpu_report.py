"""The GPU benchmark on the stand-in for CuPy: implementations, lower bounds, ratios, stopped and failing runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.backends import Backend
from support.paths import ROOT

from benchmarks.harness.problem import FORWARD, FORWARD_BACKWARD, Problem

pytestmark = pytest.mark.needs("cupy")
on_stand_in = pytest.mark.applies_if(
    lambda xp: xp is Backend.CUPY_FAKE, reason="on a GPU, `python -m benchmarks.gpu.grid` itself is the test"
)
SMALL = ["--hidden", "4", "--batch", "3", "--steps", "5", "--rounds", "5", "--seconds", "0.01", "--no-training"]
LIMITS = {"float32": 50e12, "tf32": 400e12, "bytes": 4e12, "clock": 2e9}


@pytest.fixture
def gpu(xp, monkeypatch, tmp_path):
    """The module benchmarks.gpu.grid, with limits that are measured quickly, writing into a folder of the test."""
    monkeypatch.chdir(tmp_path)
    from benchmarks.gpu import contenders, grid

    measure = contenders.ceilings
    monkeypatch.setattr(contenders, "ceilings", lambda: measure(16, 64) | LIMITS)
    return grid


@on_stand_in
def test_a_run_writes_its_rows(gpu, capsys):
    with Backend.CUPY_FAKE.allow_host_conversion():
        assert gpu.main(SMALL) == 0
    run = json.loads(Path("gpu.json").read_text(encoding="utf-8"))
    keys = [(r["cell"], r["tf32"], r["pass"]) for r in run["rows"]]
    assert len(keys) == len(set(keys)) == 12
    for row in run["rows"]:
        assert row["us"].keys() >= {"tier2", "gemm"}
        assert ("tier1" in row["us"]) is not row["tf32"]
        assert ("tier3" in row["us"]) is not ("tier3" in row["missing"])
        assert "torch" in row["missing"]
        assert all(u["q1"] <= u["median"] <= u["q3"] and u["rounds"] >= 5 for u in row["us"].values())
        assert row["error"]["tier2"] < (2e-2 if row["tf32"] else 1e-6)
        assert row["error"]["tier2"] > (1e-5 if row["tf32"] else 0)
    text = Path("gpu.md").read_text(encoding="utf-8")
    assert text == capsys.readouterr().out
    assert "### lstm, float32, TF32 on" in text
    assert "No goal can be judged" in text
    assert "fake CuPy (compute capability 90" in text
    assert not list(Path.cwd().glob("*.part"))


@on_stand_in
def test_a_stopped_run_keeps_its_rows(gpu, monkeypatch):
    from benchmarks.gpu import contenders

    calls = []

    def stopping(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return {"tier2": [1e-3] * 5}

    monkeypatch.setattr(contenders, "time_in_turns", stopping)
    with Backend.CUPY_FAKE.allow_host_conversion(), pytest.raises(KeyboardInterrupt):
        gpu.main([*SMALL, "--tf32", "off"])
    assert len(json.loads(Path("gpu.json").read_text(encoding="utf-8"))["rows"]) == 2
    assert "### elman" in Path("gpu.md").read_text(encoding="utf-8")


@on_stand_in
def test_a_row_that_fails_is_noted_and_the_others_are_measured(gpu, monkeypatch):
    from benchmarks.gpu import contenders

    calls = []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:  # the first row's second pass
            raise MemoryError("cudaErrorMemoryAllocation")
        return {"tier2": [1e-3] * 5}

    monkeypatch.setattr(contenders, "time_in_turns", failing)
    with Backend.CUPY_FAKE.allow_host_conversion():
        assert gpu.main([*SMALL, "--tf32", "off"]) == 1
    run = json.loads(Path("gpu.json").read_text(encoding="utf-8"))
    assert [(r["cell"], r["pass"]) for r in run["rows"]] == [
        (c, w) for c in ("lstm", "gru") for w in (FORWARD, FORWARD_BACKWARD)
    ]
    assert "- FAILED: {'cell': 'elman'" in Path("gpu.md").read_text(encoding="utf-8")
    assert "MemoryError: cudaErrorMemoryAllocation" in Path("gpu.md").read_text(encoding="utf-8")


@on_stand_in
def test_test_suite_and_sanitizer_run_before_the_table_and_count_as_failures(gpu, monkeypatch):
    calls = []

    def record(command, **options):
        calls.append([str(word) for word in command])
        return subprocess.CompletedProcess(command, 9 if "racecheck" in command else 0)

    monkeypatch.setattr(subprocess, "run", record)
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: name)
    monkeypatch.setattr(gpu, "measure_grid", lambda args: 0)
    assert gpu.main(["--tests", "--sanitize"]) == 1
    suite, *checks = calls
    assert suite[1:6] == ["-m", "pytest", "-q", "--backend", "cupy"]
    assert [words[:5] for words in checks] == [
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"] for tool in ("memcheck", "racecheck")
    ]
    assert all(words[-3:] == ["-m", "benchmarks.gpu.grid", "--exercise"] for words in checks)
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: None)
    assert gpu.main(["--sanitize"]) == 1


@on_stand_in
def test_a_wrong_result_is_noted_and_fails_the_run(gpu, monkeypatch):
    from xprnn.kernels.cuda import fused

    flatten_leading = fused.flatten_leading

    def inaccurate(xp, a):
        factor = 1.001 if a.shape[-1] == 4 and a.ndim == 3 else 1
        return flatten_leading(xp, a) * factor

    monkeypatch.setattr(fused, "flatten_leading", inaccurate)
    with Backend.CUPY_FAKE.allow_host_conversion():
        assert gpu.main([*SMALL, "--tf32", "off", "--cell", "gru"]) == 1
    assert "- WRONG: tier2" in Path("gpu.md").read_text(encoding="utf-8")


@on_stand_in
def test_floors_follow_from_operations_bytes_and_cycles(gpu):
    from benchmarks.gpu import report

    bounds = report.floors((512, 512, 32, 100), "lstm", "forward", "float32", LIMITS)
    assert bounds["products"] == pytest.approx(2 * 100 * 32 * 1024 * 2048 / 50e12)
    assert bounds["memory"] == pytest.approx(4 * 100 * 32 * 1024 / 4e12)
    assert bounds["latency"] == pytest.approx(100 * (239 + 180) / 2e9)
    both = report.floors((64, 64, 1, 100), "elman", FORWARD_BACKWARD, "tf32", LIMITS)
    assert both["products"] == pytest.approx(3 * 2 * 100 * 128 * 64 / 400e12)
    assert both["latency"] == pytest.approx(2 * 100 * 239 / 2e9)
    assert "latency" not in report.floors((64, 64, 1, 100), "elman", FORWARD_BACKWARD, "tf32", LIMITS | {"clock": 0})


@on_stand_in
def test_ratios_and_goals(gpu):
    from benchmarks.gpu import report

    def row(h, torch, tier3, tf32=False):
        key = {"cell": "gru", "pass": "forward", "shape": [h, h, 32, 100], "tf32": tf32}
        times = {"torch": torch, "tier3": tier3, "tier2": [6e-4, 6e-4, 6e-4]}
        return report.summarize_row(key, times, {}, {"tier3": 1e-7, "torch": 2e-7}, LIMITS)

    fast = row(64, [2e-4, 4e-4, 6e-4], [1e-4, 1e-4, 2e-4])
    assert fast["us"]["torch"]["median"] == pytest.approx(4.0)
    assert fast["times_torch"]["tier3"] == pytest.approx(3.0)  # the median of the ratios 2, 4, 3
    assert fast["times_torch"]["tier2"] == pytest.approx(4 / 6)
    floor = max(fast["floor"].values())
    assert fast["over_floor"]["tier3"] == pytest.approx(1.0 / floor)
    slow = row(512, [1e-4] * 3, [2e-4] * 3)
    lines = report.goal_lines([fast, slow, row(64, [1e-9] * 3, [1e-4] * 3, tf32=True)])
    assert lines[0].startswith(
        "tier 3, persistent: at least 1.00 times PyTorch's speed on 1 of 2 rows; worst 0.50 at gru"
    )
    assert "tier 2, fused steps: at least 0.33 times PyTorch's speed on 1 of 2 rows; worst 0.17" in lines[1]
    machine = dict.fromkeys(("processor", "cores", "system", "python", "blas", "load", "gpu"), "x")
    machine |= {"capability": "90", "driver": 13000, "versions": {"xprnn": "0"}}
    text = "\n".join(
        report.markdown_report({"machine": machine, "rows": [fast, slow], "ceilings": LIMITS, "training": []})
    )
    assert "| 64 | 32 | f | 6.00 ±0% (0.67) | 1.00 ±25% (3.00) | 4.00 ±25% |" in text
    assert "1e-07, 2e-07" in text


@pytest.mark.needs("torch")
@pytest.mark.filterwarnings("default")  # of torch's switches for TF32
@pytest.mark.parametrize("cell", ["elman", "lstm", "gru"])
@on_stand_in
def test_torch_agrees_with_the_float64_scan(gpu, cell):
    from benchmarks.gpu import contenders

    problem = Problem(cell, (4, 4, 3, 5))
    with Backend.CUPY_FAKE.allow_host_conversion():
        implementations, missing = contenders.make_implementations(problem, False, torch_device="cpu")
        assert "torch" not in missing
        expected = contenders.float64_results(problem)
        assert implementations["torch"].results().keys() == expected.keys()
        assert 0 < contenders.pass_errors(implementations["torch"].results(), expected)[FORWARD_BACKWARD] < 1e-6
        times = contenders.time_in_turns({"torch": implementations["torch"]}, FORWARD_BACKWARD, 5, 0.0)
        assert len(times["torch"]) == 5


@pytest.mark.needs("torch")
@pytest.mark.filterwarnings("default")
@on_stand_in
def test_text_training_agrees_with_torch(gpu, monkeypatch):
    from benchmarks.cpu import training_steps
    from benchmarks.gpu import training

    monkeypatch.setattr(training_steps, "H", 8)
    for module in (training, training_steps):
        monkeypatch.setattr(module, "T", 6)
    with Backend.CUPY_FAKE.allow_host_conversion(), np.errstate(under="ignore"):
        row = training.measure_training("gru", 3, False, rounds=1, windows=2, device="cpu")
    assert row["agree"], row["losses"]
    assert row["rates"].keys() == {"xprnn", "torch"}


@on_stand_in
def test_each_tier_runs_once_for_the_sanitizer(gpu, capsys, monkeypatch):
    from benchmarks.gpu import contenders

    monkeypatch.setattr(contenders, "CELLS", ("elman",))
    monkeypatch.setattr(gpu, "SANITIZER_SHAPES", [(64, 3, 4), (8, 2, 3)])
    with Backend.CUPY_FAKE.allow_host_conversion():
        assert gpu.main(["--exercise"]) == 0
    assert capsys.readouterr().out.count("elman (") == 2


def test_without_cupy_one_line_says_that_nothing_is_measured():
    code = "import runpy, sys; sys.modules['cupy'] = None; runpy.run_module('benchmarks.gpu.grid', run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith("nothing measured: ")
    assert "Traceback" not in run.stderr
