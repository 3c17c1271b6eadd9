"""Medians of many short rounds, and the rate of NumPy's matrix product."""

from __future__ import annotations

import gc
import math
import statistics
import time
from typing import Any

import numpy as np

from benchmarks.harness.problem import Call

__all__ = ["GEMM_SIZE", "gemm_rate", "paired_ratio", "quartile_summary", "time_interleaved"]

MIN_TURN_S = 2e-3  # seconds a turn lasts at least: shorter ones mostly time the clock and the switch between contenders
GEMM_SIZE = 2048


def _seconds_per_call(call: Call, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def time_interleaved(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds per call of each contender of one process and one thread, one entry a round; see players.py for others.

    Args:
        calls: name -> call; each has run at least once before.
        rounds: how many; in each, every contender has a turn.
    """
    counts = {
        name: math.ceil(MIN_TURN_S / max(min(_seconds_per_call(call, 1) for _ in range(2)), 1e-7))
        for name, call in calls.items()
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    gc.collect()
    gc.disable()  # a collection would land on whoever's turn it is, for garbage that others made
    try:
        for _ in range(rounds):
            for name in order:
                times[name].append(_seconds_per_call(calls[name], counts[name]))
            order = order[1:] + order[:1]  # so that nobody always follows the one that empties the caches
    finally:
        gc.enable()
    return times


def quartile_summary(values: list[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {"median": float(middle), "q1": float(low), "q3": float(high), "rounds": len(values)}


def paired_ratio(numerators: list[float], denominators: list[float]) -> float:
    """How many times faster ours is: the median of the rounds' own ratios, which slow drifts leave alone."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def gemm_rate(repeats: int, size: int) -> list[float]:
    """Float32 operations per second of NumPy's matrix product on a cube, one entry a turn."""
    a = np.ones((size, size), np.float32)
    out = np.zeros_like(a)
    return [2 * size**3 / _seconds_per_call(lambda: np.dot(a, a, out=out), 1) for _ in range(repeats)]
