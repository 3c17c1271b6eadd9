"""Times xprnn against the article's code, torch, JAX, ONNX Runtime and OpenVINO, over a grid of sizes.

    python -m benchmarks.cpu.grid                               Elman, one and two threads, some five minutes
    python -m benchmarks.cpu.grid --cell elman lstm gru         all three cells
    python -m benchmarks.cpu.grid --cell lstm-proj gru-before   a projected LSTM and the original GRU
    python -m benchmarks.cpu.grid --quick                       the five smaller rows, about a minute

Each implementation runs in its own process, on the same cores, and is stopped while another one runs. Outputs and
gradients are compared before timing. If they disagree, the row says so and the exit code is 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cpu import grid_report
from benchmarks.cpu.grid_plot import plot_ratios
from benchmarks.harness import agreement, machine, peers, timing
from benchmarks.harness.options import argument_parser
from benchmarks.harness.problem import FORWARD, FORWARD_BACKWARD, GATE_COUNTS, GRID, matmul_flops
from benchmarks.harness.report import Report, write_results
from benchmarks.harness.worker_pool import Worker, WorkerError, WorkerPool, run_rounds
from xprnn.cli.bench import parse_shape

Row = dict[str, Any]
PEER_NAMES = ["loop", "torch", "torch_head", "torch_article", "jax", "onnxruntime", "openvino"]
QUICK_ROW_COUNT = 5
SHORT_GRID = [GRID[0], GRID[2], GRID[4]]


@dataclass(frozen=True)
class GridTask:
    """Rows to measure with one number of threads.

    cells: keys of GATE_COUNTS.
    shapes: (D, H, N, T).
    peers: keys of peers.PEERS; those that are not installed are left out.
    threads: of every implementation.
    order: memory order of the article's arrays.
    published: also run the article's code with its float64 zeros.
    seconds: for all rows together.
    min_rounds, max_rounds: of each row.
    """

    cells: Sequence[str]
    shapes: Sequence[tuple[int, ...]]
    peers: Sequence[str]
    threads: int = 1
    order: str = "C"
    published: bool = False
    seconds: float = 30.0
    min_rounds: int = 3
    max_rounds: int = 15


def new_run(order: str = "C") -> dict[str, Any]:
    """Create the dict that `measure_task` adds its results to."""
    return {"order": order, "machines": [], "notes": [], "rows": []}


def measure_task(task: GridTask, run: dict[str, Any]) -> bool:
    """Measure the rows of a task and add them to a run.

    Returns:
        False if the layer itself failed: the rest of the task is then left out, with a note.
    """
    try:
        with WorkerPool() as pool, tempfile.TemporaryDirectory() as folder:
            layer_worker = pool.worker("layer", task.threads)
            description = layer_worker.call(machine.describe)
            # The worker sees only the cores that it is pinned to.
            run["machines"].append(description | {"threads": task.threads, "cores": len(machine.available_cores())})
            notes = {name: _missing_note(name, pool.worker(name, task.threads)) for name in task.peers}
            run["notes"] += [note for note in notes.values() if note and note not in run["notes"]]
            for row in _grid_rows(pool, task, [name for name, note in notes.items() if not note], Path(folder)):
                run["rows"].append(row)
                _print_progress(row)
    except WorkerError as error:
        run["notes"].append(f"{task.threads} thread(s): given up, {error}")
        return False
    return True


def _missing_note(name: str, worker: Worker) -> str:
    """Describe why a peer is left out, or return ""."""
    try:
        reason: str = worker.call(peers.missing_reason, name=name)
    except WorkerError as error:
        reason = str(error)
    return reason and f"{name}: left out ({reason})"


def _grid_rows(pool: WorkerPool, task: GridTask, peer_names: list[str], folder: Path) -> Iterator[Row]:
    """Measure two rows for each cell and shape: forward, and forward+backward."""
    own_names = ["layer", "article_api", "article_loop", *["article_loop_float64"] * task.published]
    # Raises the clock rate of the processor before the first row.
    pool.worker("layer", task.threads).call(timing.gemm_rate, repeats=3, size=timing.GEMM_SIZE)
    todo = [(cell, tuple(shape)) for cell in task.cells for shape in task.shapes]
    deadline = time.perf_counter() + task.seconds
    for k, (cell, shape) in enumerate(todo):
        names = peers.eligible_names(cell, shape, [*own_names, *peer_names])
        arguments = {"cell": cell, "shape": shape, "order": task.order, "threads": task.threads}
        workers = {name: pool.worker(name, task.threads) for name in names}
        tasks = {name: arguments | {"name": name} for name in names}
        loaded, problems = agreement.check_agreement(workers, peers.make_implementation, tasks, folder)
        for i, pass_name in enumerate((FORWARD, FORWARD_BACKWARD)):
            # Time that earlier rows did not use goes to the later ones, which are larger.
            seconds = max(0.0, deadline - time.perf_counter()) / (2 * (len(todo) - k) - i)
            timed = {name: workers[name] for name, calls in loaded.items() if pass_name in calls}
            if "layer" not in timed:
                raise WorkerError(f"{cell} {shape}: {'; '.join(problems)}")
            key = {"cell": cell, "threads": task.threads, "shape": list(shape), "pass": pass_name}
            row = _measure_row(key, timed, task, seconds)
            yield row | {"disagree": problems + row["disagree"]}


def _measure_row(key: Row, workers: dict[str, Worker], task: GridTask, seconds: float) -> Row:
    """Time one pass of one shape."""
    # The best of four, two before and two after: a disturbance cannot flatter the layer's share of the GEMM rate.
    gemm = {"repeats": 2, "size": timing.GEMM_SIZE}
    rates = workers["layer"].call(timing.gemm_rate, **gemm)
    rounds = run_rounds(workers, key["pass"], seconds, task.min_rounds, task.max_rounds)
    if "layer" in rounds.failed:
        raise WorkerError(f"{key['cell']} {key['shape']} {key['pass']}: layer {rounds.failed['layer']}")
    rate = max(rates + workers["layer"].call(timing.gemm_rate, **gemm))
    ratios = {
        own: {
            name: timing.paired_ratio(times, rounds.times[own])
            for name, times in rounds.times.items()
            if name not in grid_report.OWN_NAMES and peers.PEERS[name].counterpart == own
        }
        for own in grid_report.OWN_NAMES
        if own in rounds.times
    }
    flops = matmul_flops(key["cell"], key["shape"])[key["pass"]]
    return key | {
        "seconds": {name: timing.quartile_summary(times) for name, times in rounds.times.items()},
        "discarded": rounds.discarded,
        "times_faster": ratios,  # own name -> peer that computes the same -> its time over that of the own name
        "gemm_rate": rate,
        "gemm_share": flops / statistics.median(rounds.times["layer"]) / rate,
        "disagree": [f"{name} {reason}" for name, reason in rounds.failed.items()],
    }


def _print_progress(row: Row) -> None:
    """Print one line on standard error."""
    seconds = row["seconds"]["layer"]
    disagree = f"  DISAGREE: {'; '.join(row['disagree'])}" if row["disagree"] else ""
    discarded = "disturbed" if grid_report.is_noisy(row) else f"{row['discarded']} discarded"
    text = f"{1e3 * seconds['median']:.3g} ms, {seconds['rounds']} rounds ({discarded}){disagree}"
    print(f"{grid_report.row_label(row)}: {text}", file=sys.stderr, flush=True)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argument_parser(__doc__, cells=["elman"], cell_choices=list(GATE_COUNTS))
    add = parser.add_argument
    add("--threads", nargs="+", type=int, default=[1, 2], metavar="COUNT", help="default: 1 2")
    add("--shape", nargs="+", type=parse_shape, metavar="D,H,N,T", help="sizes instead of the grid")
    add("--peers", nargs="*", choices=PEER_NAMES, default=PEER_NAMES, help="default: all that are installed")
    add("--order", choices=("C", "F"), default="C", help="memory order of the article's arrays (default: C)")
    add("--published", action="store_true", help="also run the article's code with its float64 zeros")
    add("--seconds", type=float, help="duration of the whole run, roughly (default: 270 for each cell)")
    add("--quick", action="store_true", help="five sizes, few rounds")
    add("--short", action="store_true", help="three sizes, few rounds")
    add("--png", type=Path, metavar="FILE", help="draw the ratios (needs matplotlib)")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Measure the grid for every number of threads. Return the run, and False if a task was given up."""
    shapes = args.shape or (SHORT_GRID if args.short else GRID[: QUICK_ROW_COUNT if args.quick else None])
    seconds = args.seconds or (15 if args.short else 40 if args.quick else 270) * len(args.cell)
    run = new_run(args.order)
    available = len(machine.available_cores())
    threads = [k for k in args.threads if 1 <= k <= available]
    run["notes"] += [f"{k} threads: left out, {available} core(s) here" for k in args.threads if k not in threads]
    min_rounds, max_rounds = (3, 9) if args.quick or args.short else (9, 40)
    start, complete = time.monotonic(), True
    for k in threads:
        share = seconds / len(threads)
        task = GridTask(args.cell, shapes, args.peers, k, args.order, args.published, share, min_rounds, max_rounds)
        complete &= measure_task(task, run)
    run["wall_seconds"] = time.monotonic() - start
    return run, complete


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parse_arguments(argv)
    run, complete = measure(args)
    rows = run["rows"]
    if args.png and rows:
        print(plot_ratios(rows, args.png) or f"wrote {args.png}", file=sys.stderr)
    failed = not complete or not rows or any(row["disagree"] for row in rows)
    lines = grid_report.grid_report(run) if rows else run["notes"]
    report = Report(run, lines, grid_report.goals(rows), grid_report.inconclusive(rows), failed)
    return write_results(report, json_file=args.json)


if __name__ == "__main__":
    sys.exit(main())
