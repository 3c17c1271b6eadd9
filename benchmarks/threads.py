"""What a second thread does to each row of the grid: xprnn's time with two threads over that with one.

    python benchmarks/threads.py [--cell elman lstm gru] [--rounds N]

Small work must not be slowed by threads that it doesn't need. One process with one thread on one core and one with two
on two, in turns (turns.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from turns import Player, rounds, serve

from xprnn.bench import machine
from xprnn.bench.ours import core
from xprnn.bench.problem import GRID, Contender, Problem

LIMIT = 1.05
PASSES = ("forward", "forward+backward")


@lru_cache(maxsize=1)
def row(cell: str, shape: tuple[int, int, int, int]) -> Contender:
    """A row's arrays, kept while its passes are measured."""
    return core(Problem(cell, shape))


def make(task: dict[str, Any]) -> tuple[Callable[[str], Any], Any]:
    """In the measuring process: the call whose word is cell/D,H,N,T/pass."""

    def call(word: str) -> Any:
        cell, shape, which = word.split("/")
        d, h, n, t = map(int, shape.split(","))
        one = row(cell, (d, h, n, t))
        return one.forward() if which == "forward" else one.both()

    return call, None


def measure(cells: list[str], shapes: list[tuple[int, ...]], count: int, seconds: float) -> list[dict[str, Any]]:
    """Seconds with one and with two threads, and the rounds' ratios."""
    players = {str(k): Player(__file__, {}, k) for k in (1, 2)}
    rows = []
    for cell in cells:
        for shape in shapes:
            for which in PASSES:
                times = rounds(players, count, seconds, f"{cell}/{','.join(map(str, shape))}/{which}")
                ratio = statistics.median(b / a for a, b in zip(times["1"], times["2"], strict=True))
                rows.append({"cell": cell, "shape": shape, "pass": which, "seconds": times, "ratio": ratio})
        print(f"{cell}: measured", file=sys.stderr, flush=True)
    for player in players.values():
        player.close()
    return rows


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every row."""
    return [
        {
            "what": f"two threads over one, {r['cell']} {tuple(r['shape'])} {r['pass']}",
            "value": r["ratio"],
            "most": LIMIT,
        }
        for r in rows
    ]


def report(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: a line for each row, the ratios of both passes of each cell."""
    cells = list(dict.fromkeys(r["cell"] for r in rows))
    heads = [f"{cell}, {which}" for cell in cells for which in PASSES]
    lines = ["xprnn's time with two threads on two cores over that with one on one; medians of the rounds' ratios.", ""]
    lines += [f"| (D, H, N, T) | {' | '.join(heads)} |", "|" + "---|" * (1 + len(heads))]
    for shape in dict.fromkeys(tuple(r["shape"]) for r in rows):
        found = {(r["cell"], r["pass"]): r["ratio"] for r in rows if tuple(r["shape"]) == shape}
        lines.append(f"| {shape} | " + " | ".join(f"{found[c, w]:.2f}" for c in cells for w in PASSES) + " |")
    return lines


def main() -> int:
    """Measure, print, write."""
    if "--play" in sys.argv:
        serve(make)
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cell", nargs="+", choices=("elman", "lstm", "gru"), default=["elman", "lstm", "gru"])
    add("--rows", type=int, default=len(GRID), metavar="COUNT", help="the first rows of the grid; default: all")
    add("--rounds", type=int, default=9)
    add("--seconds", type=float, default=0.1, help="of a turn; default: 0.1")
    add("--json", type=Path, metavar="FILE", help="write the figures here too")
    args = parser.parse_args()
    if len(machine.cores()) < 2:
        print("one core here: nothing to compare")
        return 0
    rows = measure(args.cell, GRID[: args.rows], args.rounds, args.seconds)
    print(*report(rows), sep="\n")
    if args.json:
        run = {"machine": machine.describe(), "rows": rows, "goals": goals(rows)}
        args.json.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
