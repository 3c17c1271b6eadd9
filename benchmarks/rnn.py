"""How fast xprnn is, side by side with the article's loop, torch, JAX and ONNX Runtime, in one run and as ratios.

    python benchmarks/rnn.py                           Elman, one and two threads, some five minutes
    python benchmarks/rnn.py --cell elman lstm gru     all three cells
    python benchmarks/rnn.py --cell lstm-proj gru-before   cells that fewer have: a projected LSTM, the original GRU
    python benchmarks/rnn.py --quick                   the five smaller rows, about a minute

Each number of threads is measured in a process of its own, because JAX and OpenBLAS read theirs when they start.
Before the clock starts, everyone's outputs and gradients are compared; where they differ the row says so and the exit
code is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

QUICK = 5  # rows


def arguments() -> argparse.Namespace:
    """The command line."""
    from xprnn.bench.problem import GATES
    from xprnn.bench.short import shape_of

    def numbers(text: str) -> tuple[int, ...]:
        try:
            return shape_of(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{error}, found {text!r}") from None

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cell", nargs="+", choices=tuple(GATES), default=["elman"], help="default: elman")
    add("--threads", nargs="+", type=int, default=[1, 2], metavar="COUNT", help="default: 1 2")
    add("--shape", nargs="+", type=numbers, metavar="D,H,N,T", help="instead of the grid")
    add("--peers", nargs="*", choices=("torch", "jax", "onnxruntime"), default=["torch", "jax", "onnxruntime"])
    add("--order", choices=("C", "F"), default="C", help="memory order of the article's arrays; default: C")
    add("--published", action="store_true", help="also the article with its float64 zeros")
    add("--seconds", type=float, help="for the whole run, roughly; default: 270 for each cell")
    add("--quick", action="store_true", help="five rows, few rounds")
    add("--short", action="store_true", help="three rows, few rounds")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add("--png", type=Path, metavar="FILE", help="draw the ratios (needs matplotlib)")
    return parser.parse_args()


def main() -> int:
    """Measure, print, write."""
    if importlib.util.find_spec("xprnn") is None:
        print("xprnn is not installed: pip install -e .", file=sys.stderr)
        return 2
    from picture import picture

    from xprnn.bench import machine, measure, tables
    from xprnn.bench.problem import GRID
    from xprnn.bench.short import ROWS as SHORT_ROWS

    args = arguments()
    shapes = args.shape or (SHORT_ROWS if args.short else GRID[: QUICK if args.quick else None])
    seconds = args.seconds or (15 if args.short else 40 if args.quick else 270) * len(args.cell)
    run = measure.new_run(args.order)
    available = len(machine.cores())
    threads = [k for k in args.threads if 1 <= k <= available]
    run["notes"] += [f"{k} threads: left out, {available} core(s) here" for k in args.threads if k not in threads]
    least, most = (3, 15) if args.quick or args.short else (5, 80)
    start, failed = time.monotonic(), False
    for k in threads:
        task: dict[str, Any] = measure.TASK | {"threads": k, "cells": args.cell, "shapes": shapes, "peers": args.peers}
        task |= {"order": args.order, "published": args.published, "seconds": seconds / len(threads)}
        code = measure.collect(task | {"least": least, "most": most}, run, measure.progress)
        failed = failed or code != 0
    run["wall_seconds"] = time.monotonic() - start
    run["goals"], run["undecided"] = tables.goals(run["rows"]), tables.undecided(run["rows"])
    if run["rows"]:
        print(tables.tables(run))
    if args.json:
        args.json.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    if args.png and run["rows"]:
        print(picture(run, args.png) or f"wrote {args.png}", file=sys.stderr)
    return 1 if failed or not run["rows"] or any(row["disagree"] for row in run["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
