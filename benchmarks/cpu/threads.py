"""What a second thread does to each row of the grid: xprnn's time with two threads over that with one.

    python benchmarks/cpu/threads.py [--cell elman lstm gru] [--rounds N]

Small work must not be slowed by threads that it doesn't need. One process with one thread on one core and one with two
on two, in turns.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import machine, timing
from benchmarks.harness.contenders import check_agreement, make_implementation
from benchmarks.harness.options import CELLS, argument_parser, write_results
from benchmarks.harness.problem import FORWARD, FORWARD_BACKWARD, GRID
from benchmarks.harness.worker_pool import WorkerPool, run_rounds

MAX_RATIO = 1.05
PASSES = (FORWARD, FORWARD_BACKWARD)


def measure(cells: list[str], shapes: list[tuple[int, ...]], count: int, seconds: float) -> list[dict[str, Any]]:
    """Seconds with one and with two threads, and the rounds' ratios."""
    rows = []
    with WorkerPool() as company, tempfile.TemporaryDirectory() as folder:
        players = {str(k): company.worker(str(k), k) for k in (1, 2)}
        for cell in cells:
            for shape in shapes:
                about = {"name": "core", "cell": cell, "shape": shape, "order": "C"}
                tasks = {name: about | {"threads": p.threads} for name, p in players.items()}
                _, wrong = check_agreement(players, make_implementation, tasks, Path(folder))
                if wrong:
                    raise RuntimeError(f"{cell} {shape}: {'; '.join(wrong)}")
                for which in PASSES:
                    seen = run_rounds(players, which, 0.0, count, count, seconds)
                    ratio = timing.paired_ratio(seen.times["2"], seen.times["1"])
                    row = {"cell": cell, "shape": shape, "pass": which, "seconds": seen.times, "ratio": ratio}
                    rows.append(row | {"discarded": seen.discarded})
            print(f"{cell}: measured", file=sys.stderr, flush=True)
    return rows


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every undisturbed row."""
    return [
        {
            "what": f"two threads over one, {r['cell']} {tuple(r['shape'])} {r['pass']}",
            "value": r["ratio"],
            "most": MAX_RATIO,
        }
        for r in rows
        if r["discarded"] >= 0
    ]


def inconclusive(rows: list[dict[str, Any]]) -> list[str]:
    """The rows of which other processes disturbed most rounds."""
    return [f"two threads over one, {r['cell']} {tuple(r['shape'])} {r['pass']}" for r in rows if r["discarded"] < 0]


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
    parser = argument_parser(__doc__, rounds=9, cells=CELLS)
    parser.add_argument(
        "--rows", type=int, default=len(GRID), metavar="COUNT", help="the first of the grid; default: all"
    )
    parser.add_argument("--seconds", type=float, default=0.1, help="of a turn; default: 0.1")
    args = parser.parse_args()
    if len(machine.available_cores()) < 2:
        return write_results(args, ["one core here: nothing to compare"], {})
    rows = measure(args.cell, GRID[: args.rows], args.rounds, args.seconds)
    return write_results(args, report(rows), {"rows": rows, "goals": goals(rows), "undecided": inconclusive(rows)})


if __name__ == "__main__":
    sys.exit(main())
