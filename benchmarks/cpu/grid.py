"""How fast xprnn is, side by side with the article's loop, torch, JAX and ONNX Runtime, in one run and as ratios.

    python benchmarks/cpu/grid.py                           Elman, one and two threads, some five minutes
    python benchmarks/cpu/grid.py --cell elman lstm gru     all three cells
    python benchmarks/cpu/grid.py --cell lstm-proj gru-before   cells that fewer have: a projected LSTM, the original GRU
    python benchmarks/cpu/grid.py --quick                   the five smaller rows, about a minute

Each contender runs in a process of its own, on the same cores, and is stopped when it is not its turn. Before the clock
starts, everyone's outputs and gradients are compared; where they differ the row says so and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import machine, measure, report
from benchmarks.harness.options import argument_parser, write_results
from benchmarks.harness.peers import PEERS
from benchmarks.harness.plot import plot_ratios
from benchmarks.harness.problem import GATE_COUNTS, GRID
from benchmarks.harness.short import SHORT_GRID as SHORT_ROWS
from benchmarks.harness.short import parse_shape

QUICK_ROW_COUNT = 5  # rows
MIN_ROUNDS, MAX_ROUNDS = 9, 40  # rounds


def parse_arguments() -> argparse.Namespace:
    """The command line."""

    def numbers(text: str) -> tuple[int, ...]:
        try:
            return parse_shape(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{error}, found {text!r}") from None

    parser = argument_parser(__doc__, cells=["elman"], cell_choices=list(GATE_COUNTS))
    add = parser.add_argument
    add("--threads", nargs="+", type=int, default=[1, 2], metavar="COUNT", help="default: 1 2")
    add("--shape", nargs="+", type=numbers, metavar="D,H,N,T", help="instead of the grid")
    add("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="default: all that are installed")
    add("--order", choices=("C", "F"), default="C", help="memory order of the article's arrays; default: C")
    add("--published", action="store_true", help="also the article with its float64 zeros")
    add("--seconds", type=float, help="for the whole run, roughly; default: 270 for each cell")
    add("--quick", action="store_true", help="five rows, few rounds")
    add("--short", action="store_true", help="three rows, few rounds")
    add("--png", type=Path, metavar="FILE", help="draw the ratios (needs matplotlib)")
    return parser.parse_args()


def main() -> int:
    """Measure, print, write."""
    args = parse_arguments()
    shapes = args.shape or (SHORT_ROWS if args.short else GRID[: QUICK_ROW_COUNT if args.quick else None])
    seconds = args.seconds or (15 if args.short else 40 if args.quick else 270) * len(args.cell)
    run = measure.new_run(args.order)
    available = len(machine.available_cores())
    threads = [k for k in args.threads if 1 <= k <= available]
    run["notes"] += [f"{k} threads: left out, {available} core(s) here" for k in args.threads if k not in threads]
    least, most = (3, 9) if args.quick or args.short else (MIN_ROUNDS, MAX_ROUNDS)
    start, failed = time.monotonic(), False
    for k in threads:
        task: dict[str, Any] = measure.DEFAULT_TASK | {
            "threads": k,
            "cells": args.cell,
            "shapes": shapes,
            "peers": args.peers,
        }
        task |= {"order": args.order, "published": args.published, "seconds": seconds / len(threads)}
        code = measure.measure_task(task | {"least": least, "most": most}, run, measure.print_progress)
        failed = failed or code != 0
    run["wall_seconds"] = time.monotonic() - start
    run["goals"], run["undecided"] = report.goals(run["rows"]), report.inconclusive(run["rows"])
    if args.png and run["rows"]:
        print(plot_ratios(run, args.png) or f"wrote {args.png}", file=sys.stderr)
    failed = failed or not run["rows"] or any(row["disagree"] for row in run["rows"])
    return write_results(args, [report.grid_report(run)] if run["rows"] else run["notes"], run, failed)


if __name__ == "__main__":
    sys.exit(main())
