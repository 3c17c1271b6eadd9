"""Who can run a row of the grid, made by name, and whether they agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import peers, xprnn_contenders
from benchmarks.harness.problem import Array, Implementation, Problem
from benchmarks.harness.worker_pool import Worker, WorkerError

__all__ = ["check_agreement", "eligible_names", "make_implementation", "mismatches"]

TOLERANCE = 1e-4  # of an array's largest entry; float32 sums over all steps and rows stay two digits below


def eligible_names(cell: str, shape: tuple[int, ...], float64_zeros: bool, candidates: list[str]) -> list[str]:
    """Ours first; then those of `others` who have something for this row."""
    article = ["door", "article", *["article f64"] * float64_zeros] if cell == "elman" else []
    able = [k for k in candidates if cell not in peers.UNSUPPORTED_CELLS.get(k, ())]
    return ["core", *article, *(k for k in able if k != "loop" or shape[2] == 1)]


def make_implementation(
    name: str, cell: str, shape: tuple[int, int, int, int], order: str, threads: int
) -> Implementation:
    """The contender of this name for a row."""
    problem = Problem(cell, shape, order)
    makers = {
        "core": xprnn_contenders.core_layer,
        "door": xprnn_contenders.article_api,
        "article": xprnn_contenders.article_loop,
    }
    if name == "article f64":
        return xprnn_contenders.article_loop(problem, zeros_dtype=np.float64)
    return makers[name](problem) if name in makers else peers.make_peer(name, problem, threads)


def mismatches(expected: dict[str, Array], results: dict[str, Array], tolerance: float) -> list[str]:
    """Where these outputs or gradients are not the known ones; those not known yet are added."""
    wrong = []
    for key, value in results.items():
        wanted = expected.setdefault(key, value)
        same = wanted.shape == value.shape
        error = np.max(np.abs(wanted - value)) / max(np.max(np.abs(wanted)), 1e-30) if same else np.inf
        if not error <= tolerance:  # so that NaN is wrong, too
            wrong.append(f"{key} is off by {error:.1e}")
    return wrong


def check_agreement(
    workers: dict[str, Worker],
    factory: Callable[..., Implementation],
    tasks: dict[str, dict[str, Any]],
    folder: Path,
    tolerance: float = TOLERANCE,
) -> tuple[dict[str, list[str]], list[str]]:
    """Seat each player at its task and compare what they compute.

    Returns:
        Of those who agree with the players before them, the names of their calls; and what is wrong with the others.
    """
    known: dict[str, Array] = {}
    seated, wrong = {}, []
    for name, player in workers.items():
        file = folder / "results.npz"
        try:
            calls = player.load(factory, tasks[name], file)
        except WorkerError as error:  # the table must say so; the others' figures still count
            wrong.append(f"{name} {error}")
            continue
        with np.load(file) as results:
            found = mismatches(known, results, tolerance)
        wrong += [f"{name}: {part}" for part in found]
        if not found:
            seated[name] = calls
    return seated, wrong
