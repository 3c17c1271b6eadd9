"""The measuring process: one number of threads, chosen by whoever started it.

Reads its task from standard input (JSON) and writes a JSON line for each thing it knows: the machine, a note, a row,
a stream.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import numpy as np

from xprnn.bench import machine, ours, peers, streams, timing
from xprnn.bench.problem import Contender, Problem

__all__ = ["checked", "contenders", "measure"]

TOLERANCE = 1e-4  # of an array's largest entry; float32 sums over all steps and rows stay two digits below
REST = 0.05  # seconds; see timing.interleave
PASSES = {"forward": "forward", "both": "forward+backward"}


def say(**what: Any) -> None:
    """One line for the parent."""
    print(json.dumps(what), flush=True)


def contenders(problem: Problem, task: dict[str, Any], names: list[str]) -> list[Contender]:
    """Ours first."""
    found = [ours.core(problem)]
    if problem.cell == "elman":
        found += [ours.door(problem), ours.loop(problem)]
        found += [ours.loop(problem, published=True)] if task["published"] else []
    return found + peers.peers(problem, names, task["threads"])


def _differences(one: Contender, known: dict[str, Any], results: dict[str, Any]) -> list[str]:
    """Where these outputs or gradients are not the known ones; those not known yet are added."""
    wrong = []
    for key, value in results.items():
        wanted = known.setdefault(key, np.array(value))
        same = wanted.shape == value.shape
        error = np.max(np.abs(wanted - value)) / max(np.max(np.abs(wanted)), 1e-30) if same else np.inf
        if not error <= TOLERANCE:  # so that NaN is wrong, too
            wrong.append(f"{one.name}: {key} is off by {error:.1e}")
    return wrong


def checked(those: list[Contender]) -> tuple[list[Contender], list[str]]:
    """Those who agree with the core (or, for what it hasn't, with the door), and what is wrong with the others."""
    known: dict[str, Any] = {}
    wrong, running = [], []
    for one in those:
        try:
            found = _differences(one, known, one.results())
        except Exception as error:  # the table must say so; the others' figures still count
            found = [f"{one.name} raises {type(error).__name__}: {error}"]
        wrong += found
        if not found:
            running.append(one)
    return running, wrong


def measure(
    problem: Problem, those: list[Contender], task: dict[str, Any], seconds: float, what: str
) -> dict[str, Any]:
    """One pass of one row."""
    calls = {c.name: call for c in those if (call := c.forward if what == "forward" else c.both) is not None}
    rates = timing.gemm_rate(2)  # here and below: the best of four, so that a disturbance can't flatter our share
    pause = REST if task["threads"] > 1 else 0.0
    times, aside = timing.interleave(calls, seconds, task["least"], task["most"], pause)
    rate = max(rates + timing.gemm_rate(2))
    ratios = {
        us: {k: timing.paired_ratio(v, times[us]) for k, v in times.items() if k not in ("core", "door")}
        for us in ("core", "door")
        if us in times
    }
    return {
        "cell": problem.cell,
        "threads": task["threads"],
        "shape": list(problem.shape),
        "pass": PASSES[what],
        "seconds": {k: timing.summary(v) for k, v in times.items()},
        "set_aside": aside,
        "times_faster": ratios,  # ours -> peer -> the peer's time over ours
        "gemm_rate": rate,
        "gemm_share": problem.flops[what] / statistics.median(times["core"]) / rate,
    }


def _grid(task: dict[str, Any], names: list[str]) -> None:
    timing.gemm_rate(3)  # wakes the processor up
    todo = [(cell, tuple(shape)) for cell in task["cells"] for shape in task["shapes"]]
    deadline = time.perf_counter() + task["seconds"]
    for k, (cell, shape) in enumerate(todo):
        problem = Problem(cell, shape, task["order"])
        those, wrong = checked(contenders(problem, task, names))
        for i, what in enumerate(PASSES):
            # What earlier rows left over goes to the later ones, which are larger.
            left = max(0.0, deadline - time.perf_counter()) / (2 * (len(todo) - k) - i)
            say(row=measure(problem, those, task, left, what) | {"disagree": wrong})


def main() -> None:
    """Work through the task."""
    task = json.load(sys.stdin)
    say(machine=machine.describe() | {"threads": task["threads"]})
    reasons = {name: peers.missing(name) for name in task["peers"]}
    names = [name for name, reason in reasons.items() if not reason]
    for reason in filter(None, reasons.values()):
        say(note=reason)
    if task["shapes"]:
        _grid(task, names)
    for cell in task["cells"] if task["steps"] else ():
        for hidden in task["stream_sizes"]:
            say(stream=streams.measure(cell, hidden, names, task["steps"]))


if __name__ == "__main__":
    main()
