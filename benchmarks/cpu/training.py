"""Measures the training rate of a text model in characters per second: xprnn against torch (eager) and JAX (jitted).

    python -m benchmarks.cpu.training [--cell elman lstm gru] [--rounds COUNT] [--batch N ...]

The task is that of `python -m xprnn train`: one-hot input, a recurrent layer, a linear head, cross-entropy, clipping by
global norm, Adam, the state carried from window to window, float32. Text, windows and initial parameters are the same
for all, and the losses of the first windows are compared. Each implementation runs in its own process, with one thread
on one core and with two threads on two cores; the processes take turns of half a second. `training_steps` holds the
step of each.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cpu.training_steps import COMPARED_WINDOWS, H, T, make_implementation
from benchmarks.harness import machine
from benchmarks.harness.agreement import check_agreement
from benchmarks.harness.options import CELLS, argument_parser
from benchmarks.harness.peers import PEERS
from benchmarks.harness.problem import TRAIN_STEP
from benchmarks.harness.report import Goal, Report, markdown_table, write_results
from benchmarks.harness.worker_pool import WorkerPool, run_rounds

NAMES = ("xprnn", "torch", "jax")
LOSS_RTOL = 1e-3  # relative to the largest loss, over the first windows
Row = dict[str, Any]


def measure_row(cell: str, n: int, threads: list[int], rounds: int, seconds: float) -> Row:
    """Measure the characters per second of each implementation with each number of threads."""
    with WorkerPool() as pool, tempfile.TemporaryDirectory() as folder:
        variants = {f"{name} {k}": (name, k) for name in NAMES for k in threads}
        workers = {key: pool.worker(key, k) for key, (_, k) in variants.items()}
        tasks = {
            key: {"framework": name, "cell": cell, "batch": n, "threads": k} for key, (name, k) in variants.items()
        }
        loaded, problems = check_agreement(workers, make_implementation, tasks, Path(folder), LOSS_RTOL)
        timed = {key: workers[key] for key in loaded}
        measured = run_rounds(timed, TRAIN_STEP, 0.0, rounds, rounds, seconds)
    problems += [f"{key} {reason}" for key, reason in measured.failed.items()]
    rates = {key: [n * T / t for t in times] for key, times in measured.times.items()}
    return {"cell": cell, "batch": n, "rates": rates, "disagree": problems, "discarded": measured.discarded}


def best_rate(row: Row, name: str, threads: list[int]) -> float | None:
    """Return the median characters per second with the better number of threads; None if there is no rate."""
    rates = [statistics.median(rates) for k in threads if (rates := row["rates"].get(f"{name} {k}"))]
    return max(rates, default=None)


def _label(row: Row) -> str:
    return f"training, {row['cell']}, batch {row['batch']}"


def goals(rows: list[Row], threads: list[int]) -> list[Goal]:
    """Compare each undisturbed row with the faster peer; each uses the number of threads that suits it.

    A row in which xprnn itself failed has the figure NaN, which meets no goal; its `disagree` holds the reason.
    """
    judged = []
    for row in rows:
        best = {name: rate for name in NAMES if (rate := best_rate(row, name, threads))}
        peers = {name: rate for name, rate in best.items() if name != "xprnn"}
        if peers and row["discarded"] >= 0:
            peer = max(peers, key=lambda name: peers[name])
            what = f"{_label(row)}, up to {threads[-1]} cores, against {PEERS[peer].title}"
            judged.append(Goal(what, best.get("xprnn", math.nan) / peers[peer], least=1.0))
    return judged


def rate_table(rows: list[Row], threads: list[int]) -> list[str]:
    """Format characters per second, and xprnn's ratio to each peer with the same number of threads."""
    table: list[list[str] | str] = []
    for row in rows:
        for k in threads:
            cells = []
            for name in NAMES:
                rates = row["rates"].get(f"{name} {k}")
                xprnn_rates = [] if name == "xprnn" else row["rates"].get(f"xprnn {k}", [])
                cells.append(f"{statistics.median(rates):,.0f}{_format_ratios(xprnn_rates, rates)}" if rates else "")
            table.append([row["cell"], str(row["batch"]), str(k), *cells])
        table += row["disagree"]
    return markdown_table(["cell", "N", "threads", *(PEERS[name].title for name in NAMES)], table)


def _format_ratios(xprnn_rates: list[float], peer_rates: list[float]) -> str:
    """Format median and quartiles of the rounds' ratios; "" without rates of xprnn."""
    if not xprnn_rates:
        return ""
    low, ratio, high = statistics.quantiles([a / b for a, b in zip(xprnn_rates, peer_rates, strict=True)], n=4)
    return f" ({ratio:.2f}; {low:.2f} to {high:.2f})"


def report(rows: list[Row], threads: list[int], rounds: int) -> list[str]:
    """Format the caption and the table."""
    caption = (
        f"Characters per second in text training: H = {H}, windows of {T}, float32; torch is eager, JAX jitted with "
        f"optax. Medians of {rounds} turns. In brackets: how many times faster xprnn is with the same number of "
        f"threads, median and quartiles of the rounds. The losses of the first {COMPARED_WINDOWS} windows agree."
    )
    return [caption, "", *rate_table(rows, threads)]


def measure(args: Any, threads: list[int]) -> list[Row]:
    """Measure all cells and batch sizes."""
    rows = []
    for cell in args.cell:
        for n in args.batch:
            rows.append(measure_row(cell, n, threads, args.rounds, args.seconds))
            print(f"{cell}, N = {n}: measured", file=sys.stderr, flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argument_parser(__doc__, rounds=7, cells=CELLS)
    add = parser.add_argument
    add("--batch", nargs="+", type=int, default=[16, 32], metavar="N", help="default: 16 32")
    add("--threads", nargs="+", type=int, default=[1, 2], metavar="COUNT", help="default: 1 2")
    add("--seconds", type=float, default=0.5, help="duration of a turn (default: 0.5)")
    args = parser.parse_args(argv)
    threads = [k for k in args.threads if k <= len(machine.available_cores())]
    rows = measure(args, threads)
    inconclusive = [_label(row) for row in rows if row["discarded"] < 0]
    failed = any(row["disagree"] for row in rows)
    lines = report(rows, threads, args.rounds)
    return write_results(Report({"rows": rows}, lines, goals(rows, threads), inconclusive, failed), json_file=args.json)


if __name__ == "__main__":
    sys.exit(main())
