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
from benchmarks.harness.problem import BOTH, FORWARD, Problem
from benchmarks.harness.worker_pool import Company, Player, PlayerError, rounds

__all__ = ["TASK", "collect", "new_run", "progress"]

# What a task holds; the caller replaces what is to be different.
TASK: dict[str, Any] = {
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
    """Where `collect` puts what it hears."""
    return {"order": order, "machines": [], "notes": [], "rows": [], "streams": []}


def collect(task: dict[str, Any], run: dict[str, Any], hear: Callable[[Row], None]) -> int:
    """Measure a task into a run; `hear` is called with each row. Returns 1 where it had to be given up."""
    threads = task["threads"]
    try:
        with Company() as company, tempfile.TemporaryDirectory() as folder:
            core = company.player("core", threads)
            seen = core.call(machine.describe)
            # The player sees only the cores that it is kept on.
            run["machines"].append(seen | {"threads": threads, "cores": len(machine.cores())})
            reasons = {name: _missing(name, company.player(name, threads)) for name in task["peers"]}
            run["notes"] += [r for r in reasons.values() if r and r not in run["notes"]]
            names = [name for name, reason in reasons.items() if not reason]
            for row in _grid(company, task, names, Path(folder)) if task["shapes"] else ():
                run["rows"].append(row)
                hear(row)
            for cell in task["cells"] if task["steps"] else ():
                for hidden in task["stream_sizes"]:
                    asked = {"cell": cell, "hidden": hidden, "names": names, "count": task["steps"]}
                    run["streams"].append(company.player("streams", threads).call(step_latency.measure, **asked))
    except PlayerError as error:  # ours: without it the others can't be compared with anything
        run["notes"].append(f"{threads} thread(s): given up, {error}")
        return 1
    return 0


def _missing(name: str, player: Player) -> str:
    """Why a peer is left out, or ""."""
    try:
        reason: str = player.call(peers.missing, name=name)
    except PlayerError as error:
        reason = str(error)
    return reason and f"{name}: left out ({reason})"


def _grid(company: Company, task: dict[str, Any], names: list[str], folder: Path) -> Iterator[Row]:
    """The rows, two for each shape: forward, and forward+backward."""
    threads, core = task["threads"], company.player("core", task["threads"])
    core.call(timing.gemm_rate, turns=3, size=timing.GEMM_SIZE)  # wakes the processor up
    todo = [(cell, tuple(shape)) for cell in task["cells"] for shape in task["shapes"]]
    deadline = time.perf_counter() + task["seconds"]
    for k, (cell, shape) in enumerate(todo):
        who = contenders.names(cell, shape, task["published"], names)
        about = {"cell": cell, "shape": shape, "order": task["order"], "threads": threads}
        players = {name: company.player(name, threads) for name in who}
        tasks = {name: about | {"name": name} for name in who}
        seated, wrong = contenders.agreeing(players, contenders.contender, tasks, folder)
        for i, what in enumerate((FORWARD, BOTH)):
            # What earlier rows left over goes to the later ones, which are larger.
            left = max(0.0, deadline - time.perf_counter()) / (2 * (len(todo) - k) - i)
            playing = {name: players[name] for name, calls in seated.items() if what in calls}
            if "core" not in playing:
                raise PlayerError(f"{cell} {shape}: {'; '.join(wrong)}")
            row = _row(playing, Problem(cell, shape), what, task, left)
            yield row | {"disagree": wrong + row["disagree"]}


def _row(players: dict[str, Player], problem: Problem, what: str, task: dict[str, Any], seconds: float) -> Row:
    """One pass of one shape."""
    # Before and after: the best of four, so that a disturbance can't flatter our share.
    gemm = {"turns": 2, "size": timing.GEMM_SIZE}
    rates = players["core"].call(timing.gemm_rate, **gemm)
    seen = rounds(players, what, seconds, task["least"], task["most"])
    if "core" in seen.lost:
        raise PlayerError(f"{problem.cell} {problem.shape} {what}: core {seen.lost['core']}")
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
        "seconds": {k: timing.summary(v) for k, v in seen.times.items()},
        "set_aside": seen.set_aside,
        "times_faster": ratios,  # ours -> peer -> the peer's time over ours
        "gemm_rate": rate,
        "gemm_share": problem.flops[what] / statistics.median(seen.times["core"]) / rate,
        "disagree": [f"{name} {why}" for name, why in seen.lost.items()],
    }


def progress(row: Row) -> None:
    """One short line on standard error."""
    core = row["seconds"]["core"]
    wrong = f"  DISAGREE: {'; '.join(row['disagree'])}" if row["disagree"] else ""
    where = f"{row['cell']} {tuple(row['shape'])} {row['pass']}, {row['threads']} thread(s)"
    aside = "disturbed" if report.disturbed(row) else f"{row['set_aside']} set aside"
    text = f"{where}: {1e3 * core['median']:.3g} ms, {core['rounds']} rounds ({aside}){wrong}"
    print(text, file=sys.stderr, flush=True)
