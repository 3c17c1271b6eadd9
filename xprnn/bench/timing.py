"""Medians of many short rounds, in which every contender has its turn: what disturbs the machine hits all alike."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["gemm_rate", "interleave", "paired_ratio", "summary"]

Call = Callable[[], Any]

SHORTEST = 2e-3  # seconds a turn lasts at least: shorter ones mostly time the clock and the switch between contenders
GEMM_SIZE = 2048
QUIET = 0.1  # of a core: what other processes may take of a round in which several threads wait for each other
PATIENCE = 3  # times the wanted seconds, for as many quiet rounds as are needed at least


def _turn(call: Call, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def _others() -> float:
    """CPU seconds that all other processes have used so far; 0 where the system doesn't tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, soft, steal = map(int, stat.read_text(encoding="ascii").split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()


def interleave(
    calls: dict[str, Call], seconds: float, least: int, most: int, pause: float
) -> tuple[dict[str, list[float]], int]:
    """Seconds per call of each contender, one entry a round.

    Args:
        calls: name -> call; each has run at least once before.
        seconds: stop after the round in which this time is used up,
        least: but not before so many rounds,
        most: and after so many in any case.
        pause: seconds of rest before each turn, and then one call off the clock: idle workers of the last contender's
            thread pool spin for a while (OpenBLAS's for some 25 ms) and would take a core from the next one. Such
            pools also stall when another process takes one of their cores, so busy rounds are set aside.

    Returns:
        The times, and how many rounds were set aside; -1 where too few would be left: then all are there, disturbed.
    """
    counts = {
        name: math.ceil(SHORTEST / max(min(_turn(call, 1) for _ in range(2)), 1e-7)) for name, call in calls.items()
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    start = time.perf_counter()
    quiet: list[bool] = []
    gc.collect()
    gc.disable()  # a collection would land on whoever's turn it is, for garbage that others made
    try:
        while sum(quiet) < most:
            passed = time.perf_counter() - start
            if len(quiet) >= least and passed > seconds * (1 if sum(quiet) >= least else PATIENCE):
                break
            others, began = _others(), time.perf_counter()
            for name in order:
                if pause:
                    time.sleep(pause)
                    calls[name]()
                times[name].append(_turn(calls[name], counts[name]))
            quiet.append(not pause or _others() - others < QUIET * (time.perf_counter() - began))
            order = order[1:] + order[:1]  # so that nobody always follows the one that empties the caches
    finally:
        gc.enable()
    if sum(quiet) < least:
        return times, -1
    return {name: [t for t, q in zip(ts, quiet, strict=True) if q] for name, ts in times.items()}, quiet.count(False)


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {"median": float(middle), "q1": float(low), "q3": float(high), "rounds": len(values)}


def paired_ratio(theirs: list[float], ours: list[float]) -> float:
    """How many times faster ours is: the median of the rounds' own ratios, which slow drifts leave alone."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def gemm_rate(turns: int = 3) -> list[float]:
    """Float32 operations per second of NumPy's matrix product on a large cube, one entry a turn."""
    a = np.ones((GEMM_SIZE, GEMM_SIZE), np.float32)
    out = np.empty_like(a)
    return [2 * GEMM_SIZE**3 / _turn(lambda: np.dot(a, a, out=out), 1) for _ in range(turns)]
