"""Measures bidirectional LSTMs on one row (N = 1): both directions against one, and three layers against torch.

    python -m benchmarks.cpu.bidirectional [--threads 1 2] [--rounds COUNT] [--seconds SECONDS]

Forward, and forward+backward, float32. Each implementation runs in its own process, on as many cores as it has threads;
the processes take turns. Outputs and gradients of xprnn and torch are compared before timing.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cpu.bidirectional_passes import MODELS, make_implementation
from benchmarks.harness import machine, timing
from benchmarks.harness.agreement import check_agreement
from benchmarks.harness.options import argument_parser
from benchmarks.harness.peers import missing_reason
from benchmarks.harness.problem import FORWARD, FORWARD_BACKWARD
from benchmarks.harness.report import Goal, Report, format_time, markdown_table, write_results
from benchmarks.harness.worker_pool import WorkerPool, run_rounds

PASSES = (FORWARD, FORWARD_BACKWARD)
ONE, BOTH, STACK = MODELS
MAX_BOTH_OVER_ONE = 2.2  # time of both directions over that of one
MIN_STACK_AGAINST_TORCH = 1.3  # torch's time over xprnn's, three layers
Row = dict[str, Any]


def measure(thread_counts: Sequence[int], frameworks: Sequence[str], rounds: int, seconds: float) -> list[Row]:
    """Measure every number of threads and pass: framework -> model -> seconds of each round."""
    rows = []
    with WorkerPool() as pool, tempfile.TemporaryDirectory() as folder:
        for threads in thread_counts:
            keys = {f"{framework}, {name}": (framework, name) for name in MODELS for framework in frameworks}
            workers = {key: pool.worker(f"{key}, {threads}", threads) for key in keys}
            tasks = {
                key: {"framework": framework, "name": name, "threads": threads}
                for key, (framework, name) in keys.items()
            }
            loaded, problems = check_agreement(workers, make_implementation, tasks, Path(folder))
            for pass_name in PASSES:
                timed = {key: workers[key] for key in loaded}
                measured = run_rounds(timed, pass_name, 0.0, rounds, rounds, seconds)
                times: dict[str, dict[str, list[float]]] = {framework: {} for framework in frameworks}
                for key, each in measured.times.items():
                    framework, name = keys[key]
                    times[framework][name] = each
                failed = [f"{key} {reason}" for key, reason in measured.failed.items()]
                row = {"threads": threads, "pass": pass_name, "times": times, "disagree": problems + failed}
                rows.append(row | {"discarded": measured.discarded})
            print(f"{threads} thread(s): measured", file=sys.stderr, flush=True)
    return rows


def both_over_one(row: Row, framework: str = "xprnn") -> float | None:
    """Return the time of both directions over that of one; None if one of them is missing."""
    times = row["times"].get(framework, {})
    return timing.paired_ratio(times[BOTH], times[ONE]) if BOTH in times and ONE in times else None


def against_torch(row: Row, name: str) -> float | None:
    """Return torch's time over xprnn's for a model; None if one of them is missing."""
    xprnn, torch = row["times"]["xprnn"].get(name), row["times"].get("torch", {}).get(name)
    return timing.paired_ratio(torch, xprnn) if xprnn and torch else None


def _label(row: Row) -> str:
    return f"N=1, {row['pass']}, {row['threads']} thread(s)"


def goals(rows: list[Row]) -> list[Goal]:
    """Judge both directions against one, and three layers against torch, in every undisturbed row."""
    judged = []
    for row in rows:
        if row["discarded"] < 0:
            continue
        if (ratio := both_over_one(row)) is not None:
            judged.append(Goal(f"{BOTH} over one, {_label(row)}", ratio, most=MAX_BOTH_OVER_ONE))
        if (ratio := against_torch(row, STACK)) is not None:
            judged.append(Goal(f"{STACK}, {_label(row)}, against torch", ratio, least=MIN_STACK_AGAINST_TORCH))
    return judged


def inconclusive(rows: list[Row]) -> list[str]:
    """Name the rows of which other processes disturbed most rounds."""
    return [f"bidirectional, {_label(row)}" for row in rows if row["discarded"] < 0]


def report(rows: list[Row]) -> list[str]:
    """Format a table with a line for each number of threads, pass and model."""
    caption = (
        "Milliseconds, N = 1, as many inputs as hidden units. In brackets: torch's time over xprnn's. Both over one: "
        "time of both directions over that of one direction."
    )
    table: list[list[str] | str] = []
    for row in rows:
        frameworks = row["times"]
        for name in MODELS:
            cells = []
            for framework, times in frameworks.items():
                ratio = against_torch(row, name) if framework == "torch" else None
                summary = timing.quartile_summary(times[name]) if name in times else None
                cells.append(format_time(summary, ratios=[ratio] if ratio else []) if summary else "")
            growth = [both_over_one(row, framework) if name == BOTH else None for framework in frameworks]
            cells.append(" / ".join(f"{ratio:.2f}" for ratio in growth if ratio))
            disturbed = " (disturbed)" * (row["discarded"] < 0)
            table.append([name, row["pass"] + disturbed, str(row["threads"]), *cells])
        table += [f"excluded: {problem}" for problem in row["disagree"]]
    frameworks = rows[0]["times"]
    headings = ["", "pass", "threads", *frameworks, f"both over one, {' / '.join(frameworks)}"]
    return [caption, "", *markdown_table(headings, table)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argument_parser(__doc__, rounds=15)
    add = parser.add_argument
    add("--threads", nargs="+", type=int, default=[1, 2], metavar="COUNT", help="default: 1 2")
    add("--seconds", type=float, default=0.1, help="duration of a turn (default: 0.1)")
    args = parser.parse_args(argv)
    threads = [k for k in args.threads if 1 <= k <= len(machine.available_cores())]
    reason = missing_reason("torch")
    rows = measure(threads, ["xprnn", *["torch"] * (not reason)], args.rounds, args.seconds)
    notes = [f"torch: left out ({reason})"] * bool(reason)
    failed = any(row["disagree"] for row in rows)
    lines = [*(f"- {note}" for note in notes), *report(rows)]
    figures = {"notes": notes, "rows": rows}
    return write_results(Report(figures, lines, goals(rows), inconclusive(rows), failed), json_file=args.json)


if __name__ == "__main__":
    sys.exit(main())
