"""Compares the results of implementations before they are timed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.harness.worker import WorkerError

if TYPE_CHECKING:
    from benchmarks.harness.problem import Array, Implementation
    from benchmarks.harness.worker_pool import Worker

__all__ = ["RTOL", "check_agreement", "mismatches", "relative_error", "relative_errors"]

RTOL = 1e-4  # relative to the largest entry; rounding of float32 sums over all steps and rows stays below 1e-6


def relative_error(value: Any, expected: Any) -> float:
    """Return the largest difference over the largest entry of `expected`; inf if the shapes differ."""
    if value.shape != expected.shape:
        return np.inf
    scale = np.max(np.abs(expected), initial=0.0)
    difference = np.abs(np.asarray(value, np.float64) - np.asarray(expected, np.float64))
    return float(np.max(difference, initial=0.0) / (scale or 1.0))


def relative_errors(results: dict[str, Array], expected: dict[str, Array]) -> dict[str, float]:
    """Return the relative error of every array that is in both."""
    return {name: relative_error(a, expected[name]) for name, a in results.items() if name in expected}


def mismatches(expected: dict[str, Array], results: dict[str, Array], rtol: float = RTOL) -> list[str]:
    """Describe the arrays whose relative error exceeds `rtol` or is NaN."""
    errors = relative_errors(results, expected)
    return [f"{name} is off by {error:.1e}" for name, error in errors.items() if not error <= rtol]


def check_agreement(
    workers: dict[str, Worker],
    factory: Callable[..., Implementation],
    tasks: dict[str, dict[str, Any]],
    folder: Path,
    rtol: float = RTOL,
) -> tuple[dict[str, list[str]], list[str]]:
    """Load an implementation in every worker and compare their results.

    Args:
        workers: name -> worker. Each array is compared with that of the first worker that computes it.
        factory: returns an Implementation, called in the worker.
        tasks: name -> keyword arguments of the factory.
        folder: where the workers write their results.
        rtol: the largest relative error that counts as agreement.

    Returns:
        name -> names of the calls, for the workers that agree; and a description of each disagreement or error.
    """
    expected: dict[str, Array] = {}
    loaded: dict[str, list[str]] = {}
    problems: list[str] = []
    for name, worker in workers.items():
        file = folder / "results.npz"
        try:
            calls = worker.load(factory, tasks[name], file)
        except WorkerError as error:  # shown in the table; the other figures still count
            problems.append(f"{name} {error}")
            continue
        with np.load(file) as archive:
            results = dict(archive)
        differences = mismatches(expected, results, rtol)
        problems += [f"{name}: {difference}" for difference in differences]
        expected = results | expected
        if not differences:
            loaded[name] = calls
    return loaded, problems
