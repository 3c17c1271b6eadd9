"""Timing in one process: interleaved rounds, quartiles, ratios, and the rate of NumPy's matrix product."""

from __future__ import annotations

import statistics
import time

import numpy as np

from xprnn.cli.bench import quartile_summary, time_interleaved

__all__ = ["GEMM_SIZE", "gemm_rate", "paired_ratio", "quartile_summary", "time_interleaved"]

GEMM_SIZE = 2048


def paired_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Return the median of the rounds' ratios, which a slow drift of the machine does not change."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def gemm_rate(repeats: int, size: int) -> list[float]:
    """Return the float32 operations per second of NumPy's product of two (size, size) matrices, one entry a repeat."""
    a = np.ones((size, size), np.float32)
    out = np.zeros_like(a)
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        np.dot(a, a, out=out)
        rates.append(2 * size**3 / (time.perf_counter() - start))
    return rates
