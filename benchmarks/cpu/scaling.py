"""How time grows with T and with N, at a small fixed size.

    python benchmarks/cpu/scaling.py            about two minutes
    python benchmarks/cpu/scaling.py --short    T up to 10^5, fewer rounds

D = 1, H = 16, float32, one thread: T = 10^3 to 10^6 with N = 1, and N = 1 to 1024 with T = 100. The exponent is the
slope of log(time) over log(size), fitted by least squares to all points, and between the two largest. Memory against T
is benchmarks/cpu/memory.py's.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.harness.options import CELLS, argument_parser, rerun_keeping_memory, write_results
from benchmarks.harness.problem import FORWARD, FORWARD_BACKWARD, Problem
from benchmarks.harness.xprnn_contenders import core_layer

D, H, T, N = 1, 16, 100, 1
SEQUENCE_LENGTHS, BATCH_SIZES = [10**3, 10**4, 10**5, 10**6], [1, 4, 16, 64, 256, 1024]
MAX_EXPONENT = 1.1  # of the exponent between the two largest sizes: linear, and some way out of the caches


def median_time(call: Callable[[], Any], rounds: int) -> float:
    """The median time of a call, of at least three and at most `rounds` while a second lasts."""
    call()
    call()
    times: list[float] = []
    while len(times) < 3 or (len(times) < rounds and sum(times) < 1.0):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(steps: list[int], rounds: int) -> list[dict[str, Any]]:
    """A row for each cell, pass and letter: sizes, seconds and exponents."""
    out = []
    for cell in CELLS:
        for letter, sizes in (("T", steps), ("N", BATCH_SIZES)):
            seconds: dict[str, list[float]] = {FORWARD: [], FORWARD_BACKWARD: []}
            for size in sizes:
                shape = (D, H, N, size) if letter == "T" else (D, H, size, T)
                one = core_layer(Problem(cell, shape))
                for which, times in seconds.items():
                    times.append(median_time(one.calls[which], rounds))
            for which, times in seconds.items():
                x, y = np.log(sizes), np.log(times)
                fitted, last = float(np.polyfit(x, y, 1)[0]), float((y[-1] - y[-2]) / (x[-1] - x[-2]))
                row = {"cell": cell, "pass": which, "letter": letter, "sizes": sizes, "seconds": times}
                out.append(row | {"exponent": fitted, "last": last})
        print(f"{cell}: measured", file=sys.stderr, flush=True)
    return out


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Linear."""
    return [
        {
            "what": f"growth with {r['letter']}, {r['cell']}, {r['pass']}: exponent",
            "value": r["last"],
            "most": MAX_EXPONENT,
        }
        for r in rows
    ]


def report(rows: list[dict[str, Any]]) -> list[str]:
    """A table for each letter: milliseconds and the exponents."""
    lines = [f"D={D}, H={H}, float32, one thread; milliseconds, medians. With T at N={N}, with N at T={T}."]
    for letter in "TN":
        some = [r for r in rows if r["letter"] == letter]
        heads = [f"{letter}={size:,}" for size in some[0]["sizes"]]
        lines += ["", f"| cell | pass | {' | '.join(heads)} | exponent, fitted | of the last two |"]
        lines.append("|" + "---|" * (len(heads) + 4))
        for r in some:
            cells = [f"{1e3 * s:.{max(0, 2 - math.floor(math.log10(1e3 * s)))}f}" for s in r["seconds"]]
            lines.append(f"| {r['cell']} | {r['pass']} | {' | '.join(cells)} | {r['exponent']:.2f} | {r['last']:.2f} |")
    return lines


def main() -> int:
    """Measure, print, write."""
    parser = argument_parser(__doc__)
    parser.add_argument("--short", action="store_true", help="T up to 10^5, fewer rounds")
    args = parser.parse_args()
    if (code := rerun_keeping_memory()) is not None:
        return code
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        rows = measure(SEQUENCE_LENGTHS[:-1] if args.short else SEQUENCE_LENGTHS, 5 if args.short else 15)
    return write_results(args, report(rows), {"rows": rows, "goals": goals(rows)})


if __name__ == "__main__":
    sys.exit(main())
