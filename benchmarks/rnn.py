"""How fast xprnn is, side by side with the article's loop, torch, JAX and ONNX Runtime, in one run and as ratios.

    python benchmarks/rnn.py                           Elman, one and two threads, some five minutes
    python benchmarks/rnn.py --cell elman lstm gru     all three cells
    python benchmarks/rnn.py --quick                   the five smaller rows, about a minute

Each number of threads is measured in a process of its own, because JAX and OpenBLAS read theirs when they start.
Before the clock starts, everyone's outputs and gradients are compared; where they differ the row says so and the exit
code is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import machine
import report

HERE = Path(__file__).parent
GRID = [  # D, H, N, T
    (1, 16, 1, 1000),
    (27, 50, 1, 100),
    (27, 100, 32, 50),
    (64, 128, 32, 100),
    (128, 256, 64, 100),
    (256, 512, 128, 50),
    (512, 1024, 64, 50),
]
QUICK = 5  # rows


def numbers(text: str) -> tuple[int, ...]:
    """D,H,N,T."""
    shape = tuple(int(part) for part in text.split(","))
    if len(shape) != 4 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected D,H,N,T, four positive integers, found {text!r}")
    return shape


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cell", nargs="+", choices=("elman", "lstm", "gru"), default=["elman"], help="default: elman")
    add("--threads", nargs="+", type=int, default=[1, 2], metavar="COUNT", help="default: 1 2")
    add("--shape", nargs="+", type=numbers, metavar="D,H,N,T", help="instead of the grid")
    add("--peers", nargs="*", choices=("torch", "jax", "onnxruntime"), default=["torch", "jax", "onnxruntime"])
    add("--order", choices=("C", "F"), default="C", help="memory order of the article's arrays; default: C")
    add("--published", action="store_true", help="also the article with its float64 zeros")
    add("--seconds", type=float, help="for the whole run, roughly; default: 270 for each cell")
    add("--quick", action="store_true", help="five rows, few rounds")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add("--png", type=Path, metavar="FILE", help="draw the ratios (needs matplotlib)")
    return parser.parse_args()


def measure(task: dict[str, Any], run: dict[str, Any]) -> int:
    """Run one measuring process and collect what it says; returns its exit code."""
    allowed = machine.cores()
    machine.pin(allowed[: task["threads"]])  # the child inherits it
    command = [sys.executable, str(HERE / "worker.py")]
    env = machine.measuring_environment(task["threads"])
    try:
        child = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    finally:
        machine.pin(allowed)
    assert child.stdin is not None
    assert child.stdout is not None
    with child, child.stdin as stdin:
        stdin.write(json.dumps(task))
        stdin.close()
        for line in child.stdout:
            heard = json.loads(line)
            if "machine" in heard:
                # The child sees only the cores it is pinned to.
                run["machines"].append(heard["machine"] | {"cores": len(allowed)})
            elif "note" in heard:
                run["notes"] += [heard["note"]] if heard["note"] not in run["notes"] else []
            else:
                run["rows"].append(heard["row"])
                progress(heard["row"])
    return child.returncode


def progress(row: dict[str, Any]) -> None:
    """One short line on standard error."""
    core = row["seconds"]["core"]
    wrong = f"  DISAGREE: {'; '.join(row['disagree'])}" if row["disagree"] else ""
    where = f"{row['cell']} {tuple(row['shape'])} {row['pass']}, {row['threads']} thread(s)"
    aside = "disturbed" if report.disturbed(row) else f"{row['set_aside']} set aside"
    print(
        f"{where}: {1e3 * core['median']:.3g} ms, {core['rounds']} rounds ({aside}){wrong}",
        file=sys.stderr,
        flush=True,
    )


def main() -> int:
    """Measure, print, write."""
    args = arguments()
    if importlib.util.find_spec("xprnn") is None:
        print("xprnn is not installed: pip install -e .", file=sys.stderr)
        return 2
    shapes = args.shape or GRID[: QUICK if args.quick else None]
    seconds = args.seconds or (40 if args.quick else 270) * len(args.cell)
    run: dict[str, Any] = {"order": args.order, "machines": [], "notes": [], "rows": []}
    available = len(machine.cores())
    threads = [k for k in args.threads if 1 <= k <= available]
    run["notes"] += [f"{k} threads: left out, {available} core(s) here" for k in args.threads if k not in threads]
    least, most = (3, 15) if args.quick else (5, 80)
    start, failed = time.monotonic(), False
    for k in threads:
        task = {"threads": k, "cells": args.cell, "shapes": shapes, "peers": args.peers, "order": args.order}
        task |= {"published": args.published, "seconds": seconds / len(threads), "least": least, "most": most}
        code = measure(task, run)
        failed = failed or code != 0
        run["notes"] += [f"{k} thread(s): the measuring process ended early, exit code {code}"] if code else []
    run["wall_seconds"] = time.monotonic() - start
    if run["rows"]:
        print(report.tables(run))
    if args.json:
        args.json.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    if args.png and run["rows"]:
        print(report.picture(run, args.png) or f"wrote {args.png}", file=sys.stderr)
    return 1 if failed or not run["rows"] or any(row["disagree"] for row in run["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
