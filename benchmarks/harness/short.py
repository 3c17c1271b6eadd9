"""`python -m xprnn bench`: the short form, for a user on their own machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import machine, measure
from benchmarks.harness import report as harness_report
from benchmarks.harness.problem import GRID
from xprnn.arrays.namespace import InputError
from xprnn.io.archive import write_atomically

__all__ = ["bench_command", "parse_shape"]

SHORT_GRID = [GRID[0], GRID[2], GRID[4]]
FULL_SETTINGS: dict[str, Any] = {"seconds": 24.0, "least": 3, "most": 15, "steps": 5000, "stream_sizes": [16, 64]}
QUICK_SETTINGS: dict[str, Any] = {"seconds": 5.0, "least": 3, "most": 5, "steps": 1000, "stream_sizes": [16]}


def parse_shape(text: str) -> tuple[int, ...]:
    """D,H,N,T as four positive numbers.

    Raises:
        ValueError: anything else.

    >>> parse_shape("1,16,1,1000")
    (1, 16, 1, 1000)
    """
    shape = tuple(int(part) for part in text.split(","))
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError("expected D,H,N,T, four positive integers")
    return shape


def bench_command(
    cells: Sequence[str],
    rows: Sequence[tuple[int, ...]] | None,
    peers: Sequence[str],
    threads: int,
    quick: bool,
    file: str | None,
) -> int:
    """Measure, print the tables, write the figures; returns the exit code: 1 where someone's results disagree.

    Args:
        cells: "elman", "lstm", "gru".
        rows: (D, H, N, T); None: three of the grid's, two if quick.
        peers: those of "loop", "torch", "jax", "onnxruntime" that are to be tried; what is not installed is left out.
        threads: of everyone.
        quick: few rounds.
        file: where to write the figures as JSON, or None.

    Raises:
        InputError: more threads than cores, or a file that cannot be written.
    """
    cores = len(machine.available_cores())
    if threads > cores:
        raise InputError(f"--threads: this process may use {cores} core(s), found {threads}")
    shapes = [list(r) for r in rows or SHORT_GRID[: 2 if quick else 3]]
    run = measure.new_run()
    if file:  # now, not after a minute
        write_atomically(file, b"{}\n")
    options = QUICK_SETTINGS if quick else FULL_SETTINGS
    task = (
        measure.DEFAULT_TASK
        | options
        | {"cells": list(cells), "shapes": shapes, "threads": threads, "peers": list(peers)}
    )
    code = measure.measure_task(task, run, measure.print_progress)
    if run["rows"]:
        print(harness_report.align_columns(bench_report(run)))
    if file:
        write_atomically(file, (json.dumps(run, indent=1) + "\n").encode())
    if code or not run["rows"]:
        print("\n".join(run["notes"]), file=sys.stderr)
        return 1
    return 1 if any(part["disagree"] for part in run["rows"] + run["streams"]) else 0


def bench_report(run: dict[str, Any]) -> str:
    """The tables of the rows and of the streams."""
    lines = [harness_report.grid_report(run)]
    if run["streams"]:
        lines += ["", "### Streaming: one step at a time, N = 1, D = 1, microseconds", ""]
        lines += [*harness_report.latency_table(run["streams"]), ""]
    return "\n".join(lines)
