"""Measures how time grows with T and with N, at a small fixed size.

    python -m benchmarks.cpu.scaling            about two minutes
    python -m benchmarks.cpu.scaling --short    T up to 100,000, fewer repetitions

D = 1, H = 16, float32, one thread. T grows from 1,000 to 1,000,000 at N = 1; N grows from 1 to 1,024 at T = 100. The
exponent is the slope of log(time) over log(size), fitted by least squares to all points, and between the two largest.
`benchmarks.cpu.memory` measures memory against T.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.harness.options import CELLS, argument_parser, rerun_keeping_memory
from benchmarks.harness.problem import FORWARD, FORWARD_BACKWARD, Call, Problem
from benchmarks.harness.report import Goal, Report, format_number, markdown_table, write_results
from benchmarks.harness.xprnn_contenders import core_layer

D, H, T, N = 1, 16, 100, 1
SEQUENCE_LENGTHS, BATCH_SIZES = [10**3, 10**4, 10**5, 10**6], [1, 4, 16, 64, 256, 1024]
MAX_EXPONENT = 1.1  # between the two largest sizes; 1 is linear, and the largest sizes exceed the caches
Row = dict[str, Any]


def median_time(call: Call, repeats: int) -> float:
    """Return the median time of a call, of at least three and at most `repeats` repeats within one second."""
    call()
    call()
    times: list[float] = []
    while len(times) < 3 or (len(times) < repeats and sum(times) < 1.0):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(lengths: list[int], repeats: int) -> list[Row]:
    """Measure a row for each cell, pass and letter: sizes, seconds and exponents."""
    rows = []
    for cell in CELLS:
        for letter, sizes in (("T", lengths), ("N", BATCH_SIZES)):
            seconds: dict[str, list[float]] = {FORWARD: [], FORWARD_BACKWARD: []}
            for size in sizes:
                shape = (D, H, N, size) if letter == "T" else (D, H, size, T)
                layer = core_layer(Problem(cell, shape))
                for pass_name, times in seconds.items():
                    times.append(median_time(layer.calls[pass_name], repeats))
            for pass_name, times in seconds.items():
                x, y = np.log(sizes), np.log(times)
                fitted, last = float(np.polyfit(x, y, 1)[0]), float((y[-1] - y[-2]) / (x[-1] - x[-2]))
                row = {"cell": cell, "pass": pass_name, "letter": letter, "sizes": sizes, "seconds": times}
                rows.append(row | {"exponent": fitted, "last": last})
        print(f"{cell}: measured", file=sys.stderr, flush=True)
    return rows


def goals(rows: list[Row]) -> list[Goal]:
    """Judge the exponent between the two largest sizes of every row."""
    return [
        Goal(f"growth with {r['letter']}, {r['cell']}, {r['pass']}: exponent", r["last"], most=MAX_EXPONENT)
        for r in rows
    ]


def report(rows: list[Row]) -> list[str]:
    """Format a table for each letter: milliseconds and the exponents."""
    lines = [f"D={D}, H={H}, float32, one thread; medians in milliseconds. T grows at N={N}, N grows at T={T}."]
    for letter in "TN":
        group = [r for r in rows if r["letter"] == letter]
        sizes = [f"{letter}={size:,}" for size in group[0]["sizes"]]
        table = [
            [
                r["cell"],
                r["pass"],
                *(format_number(1e3 * s) for s in r["seconds"]),
                f"{r['exponent']:.2f}",
                f"{r['last']:.2f}",
            ]
            for r in group
        ]
        lines += ["", *markdown_table(["cell", "pass", *sizes, "exponent, fitted", "of the last two"], table)]
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argument_parser(__doc__)
    parser.add_argument("--short", action="store_true", help="T up to 100,000, fewer repetitions")
    args = parser.parse_args(argv)
    if (code := rerun_keeping_memory()) is not None:
        return code
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        rows = measure(SEQUENCE_LENGTHS[:-1] if args.short else SEQUENCE_LENGTHS, 5 if args.short else 15)
    return write_results(Report({"rows": rows}, report(rows), goals(rows)), json_file=args.json)


if __name__ == "__main__":
    sys.exit(main())
