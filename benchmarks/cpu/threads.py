"""Measures the effect of a second thread: xprnn's time with two threads over its time with one.

    python -m benchmarks.cpu.threads [--cell elman lstm gru] [--rows COUNT] [--rounds COUNT]

A second thread must not slow down small rows. One worker process has one thread on one core, another has two threads
on two cores; they take turns.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import machine, timing
from benchmarks.harness.agreement import check_agreement
from benchmarks.harness.options import CELLS, argument_parser
from benchmarks.harness.peers import make_implementation
from benchmarks.harness.problem import FORWARD, FORWARD_BACKWARD, GRID
from benchmarks.harness.report import Goal, Report, markdown_table, write_results
from benchmarks.harness.worker_pool import WorkerPool, run_rounds

MAX_RATIO = 1.05
PASSES = (FORWARD, FORWARD_BACKWARD)
Row = dict[str, Any]


def measure(cells: list[str], shapes: Sequence[tuple[int, ...]], rounds: int, seconds: float) -> list[Row]:
    """Measure each pass with one and with two threads: seconds, and the median of the rounds' ratios."""
    rows = []
    with WorkerPool() as pool, tempfile.TemporaryDirectory() as folder:
        workers = {str(k): pool.worker(str(k), k) for k in (1, 2)}
        for cell in cells:
            for shape in shapes:
                arguments = {"name": "layer", "cell": cell, "shape": shape}
                tasks = {name: arguments | {"threads": w.threads} for name, w in workers.items()}
                _, problems = check_agreement(workers, make_implementation, tasks, Path(folder))
                if problems:
                    raise RuntimeError(f"{cell} {shape}: {'; '.join(problems)}")
                for pass_name in PASSES:
                    measured = run_rounds(workers, pass_name, 0.0, rounds, rounds, seconds)
                    ratio = timing.paired_ratio(measured.times["2"], measured.times["1"])
                    row = {"cell": cell, "shape": shape, "pass": pass_name, "seconds": measured.times, "ratio": ratio}
                    rows.append(row | {"discarded": measured.discarded})
            print(f"{cell}: measured", file=sys.stderr, flush=True)
    return rows


def _label(row: Row) -> str:
    return f"two threads over one, {row['cell']} {tuple(row['shape'])} {row['pass']}"


def goals(rows: list[Row]) -> list[Goal]:
    """Judge every undisturbed row."""
    return [Goal(_label(row), row["ratio"], most=MAX_RATIO) for row in rows if row["discarded"] >= 0]


def inconclusive(rows: list[Row]) -> list[str]:
    """Name the rows of which other processes disturbed most rounds."""
    return [_label(row) for row in rows if row["discarded"] < 0]


def report(rows: list[Row]) -> list[str]:
    """Format a table with a line for each shape."""
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    ratios = {(row["cell"], tuple(row["shape"]), row["pass"]): f"{row['ratio']:.2f}" for row in rows}
    headings = ["(D, H, N, T)", *(f"{cell}, {pass_name}" for cell in cells for pass_name in PASSES)]
    lines = [
        [str(shape), *(ratios[cell, shape, pass_name] for cell in cells for pass_name in PASSES)]
        for shape in dict.fromkeys(tuple(row["shape"]) for row in rows)
    ]
    caption = "Time with two threads on two cores over time with one thread on one core; medians of the rounds' ratios."
    return [caption, "", *markdown_table(headings, lines)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argument_parser(__doc__, rounds=9, cells=CELLS)
    parser.add_argument(
        "--rows", type=int, default=len(GRID), metavar="COUNT", help="first rows of the grid (default: all)"
    )
    parser.add_argument("--seconds", type=float, default=0.1, help="duration of a turn (default: 0.1)")
    args = parser.parse_args(argv)
    if len(machine.available_cores()) < 2:
        return write_results(Report({}, ["This machine has one core: nothing to compare."]), json_file=args.json)
    rows = measure(args.cell, GRID[: args.rows], args.rounds, args.seconds)
    return write_results(Report({"rows": rows}, report(rows), goals(rows), inconclusive(rows)), json_file=args.json)


if __name__ == "__main__":
    sys.exit(main())
