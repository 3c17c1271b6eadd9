"""Measures a task: rows of the grid and streams, with one number of threads for all, each contender in its process."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import contenders, machine, peers, report, step_latency, timing
from benchmarks.harness.problem import FORWARD, FORWARD_BACKWARD, Problem
from benchmarks.harness.worker_pool import Worker, WorkerError, WorkerPool, run_rounds

__all__ = ["DEFAULT_TASK", "measure_task", "new_run", "print_progress"]

# What a task holds; the caller replaces what is to be different.
DEFAULT_TASK: dict[str, Any] = {
    "threads": 1,
    "cells": ["elman"],
    "shapes": [],
    "peers": list(peers.PEERS),
    "order": "C",  # of the article's arrays
    "published": False,  # also the article with its float64 zeros
    "seconds": 30.0,  # for all rows together
    "least": 3,  # rounds of a row
    "most": 15,
    "steps": 0,  # of the streams
    "stream_sizes": [],  # H
}
Row = dict[str, Any]


def new_run(order: str = "C") -> dict[str, Any]:
    """Where `measure_task` puts what it hears."""
    return {"order": order, "machines": [], "notes": [], "rows": [], "streams": []}


def measure_task(task: dict[str, Any], run: dict[str, Any], on_row: Callable[[Row], None]) -> int:
    """Measure a task into a run; `on_row` is called with each row. Returns 1 where it had to be given up."""
    threads = task["threads"]
    try:
        with WorkerPool() as company, tempfile.TemporaryDirectory() as folder:
            core = company.worker("core", threads)
            seen = core.call(machine.describe)
            # The player sees only the cores that it is kept on.
            run["machines"].append(seen | {"threads": threads, "cores": len(machine.available_cores())})
            reasons = {name: _missing_note(name, company.worker(name, threads)) for name in task["peers"]}
            run["notes"] += [r for r in reasons.values() if r and r not in run["notes"]]
            names = [name for name, reason in reasons.items() if not reason]
            for row in _grid_rows(company, task, names, Path(folder)) if task["shapes"] else ():
                run["rows"].append(row)
                on_row(row)
            for cell in task["cells"] if task["steps"] else ():
                for hidden in task["stream_sizes"]:
                    asked = {"cell": cell, "hidden": hidden, "names": names, "count": task["steps"]}
                    run["streams"].append(
                        company.worker("streams", threads).call(step_latency.measure_latency, **asked)
                    )
    except WorkerError as error:  # ours: without it the others can't be compared with anything
        run["notes"].append(f"{threads} thread(s): given up, {error}")
        return 1
    return 0


def _missing_note(name: str, player: Worker) -> str:
    """Why a peer is left out, or ""."""
    try:
        reason: str = player.call(peers.missing_reason, name=name)
    except WorkerError as error:
        reason = str(error)
    return reason and f"{name}: left out ({reason})"


def _grid_rows(company: WorkerPool, task: dict[str, Any], names: list[str], folder: Path) -> Iterator[Row]:
    """The rows, two for each shape: forward, and forward+backward."""
    threads, core = task["threads"], company.worker("core", task["threads"])
    core.call(timing.gemm_rate, turns=3, size=timing.GEMM_SIZE)  # wakes the processor up
    todo = [(cell, tuple(shape)) for cell in task["cells"] for shape in task["shapes"]]
    deadline = time.perf_counter() + task["seconds"]
    for k, (cell, shape) in enumerate(todo):
        who = contenders.eligible_names(cell, shape, task["published"], names)
        about = {"cell": cell, "shape": shape, "order": task["order"], "threads": threads}
        players = {name: company.worker(name, threads) for name in who}
        tasks = {name: about | {"name": name} for name in who}
        seated, wrong = contenders.check_agreement(players, contenders.make_implementation, tasks, folder)
        for i, what in enumerate((FORWARD, FORWARD_BACKWARD)):
            # What earlier rows left over goes to the later ones, which are larger.
            left = max(0.0, deadline - time.perf_counter()) / (2 * (len(todo) - k) - i)
            playing = {name: players[name] for name, calls in seated.items() if what in calls}
            if "core" not in playing:
                raise WorkerError(f"{cell} {shape}: {'; '.join(wrong)}")
            row = _measure_row(playing, Problem(cell, shape), what, task, left)
            yield row | {"disagree": wrong + row["disagree"]}


def _measure_row(players: dict[str, Worker], problem: Problem, what: str, task: dict[str, Any], seconds: float) -> Row:
    """One pass of one shape."""
    # Before and after: the best of four, so that a disturbance can't flatter our share.
    gemm = {"turns": 2, "size": timing.GEMM_SIZE}
    rates = players["core"].call(timing.gemm_rate, **gemm)
    seen = run_rounds(players, what, seconds, task["least"], task["most"])
    if "core" in seen.failed:
        raise WorkerError(f"{problem.cell} {problem.shape} {what}: core {seen.failed['core']}")
    rate = max(rates + players["core"].call(timing.gemm_rate, **gemm))
    ratios = {
        us: {k: timing.paired_ratio(v, seen.times[us]) for k, v in seen.times.items() if k not in ("core", "door")}
        for us in ("core", "door")
        if us in seen.times
    }
    return {
        "cell": problem.cell,
        "threads": task["threads"],
        "shape": list(problem.shape),
        "pass": what,
        "seconds": {k: timing.quartile_summary(v) for k, v in seen.times.items()},
        "discarded": seen.discarded,
        "times_faster": ratios,  # ours -> peer -> the peer's time over ours
        "gemm_rate": rate,
        "gemm_share": problem.flops[what] / statistics.median(seen.times["core"]) / rate,
        "disagree": [f"{name} {why}" for name, why in seen.failed.items()],
    }


def print_progress(row: Row) -> None:
    """One short line on standard error."""
    core = row["seconds"]["core"]
    wrong = f"  DISAGREE: {'; '.join(row['disagree'])}" if row["disagree"] else ""
    where = f"{row['cell']} {tuple(row['shape'])} {row['pass']}, {row['threads']} thread(s)"
    aside = "disturbed" if report.is_noisy(row) else f"{row['discarded']} set aside"
    text = f"{where}: {1e3 * core['median']:.3g} ms, {core['rounds']} rounds ({aside}){wrong}"
    print(text, file=sys.stderr, flush=True)
