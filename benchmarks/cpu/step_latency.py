"""Measures the latency of one step of a stream: xprnn against torch, ONNX Runtime, OpenVINO, tract and the article.

    python -m benchmarks.cpu.step_latency                  100,000 steps of each implementation, some two minutes
    python -m benchmarks.cpu.step_latency --steps 5000     quicker, but p99.9 is then unreliable

Float32, N = 1, D = 1, the state carried from step to step, one thread. "floor" is the arithmetic alone on arrays that
exist already: the compiled kernel, or the same NumPy calls written by hand. The overhead is what xprnn's median takes
beyond it. The implementations take turns in blocks of 500 steps, so that a disturbance of the machine affects all.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from benchmarks.cpu import step_implementations as steps
from benchmarks.harness import machine
from benchmarks.harness.agreement import mismatches
from benchmarks.harness.options import CELLS, argument_parser
from benchmarks.harness.peers import PEERS, missing_reason
from benchmarks.harness.problem import STEP, Array, Implementation, Problem
from benchmarks.harness.report import Goal, Report, markdown_table, write_results
from xprnn.kernels.config import allow_jit
from xprnn.kernels.jit import compile_cache

XPRNN_NUMPY = "xprnn, NumPy"
PEER_STEPS = {
    "torch": steps.torch_step,
    "onnxruntime": steps.onnxruntime_step,
    "openvino": steps.openvino_step,
    "tract": steps.tract_step,
}
MAX_OVERHEAD_US = {"fast": 2.0, "NumPy": 6.0}  # microseconds of xprnn's median beyond the floor
D = 1
BLOCK_STEPS = 500
WARMUP_STEPS = 20  # at the start of each block
RTOL = 1e-5  # of float32 values below 1, after a few steps
Row = dict[str, Any]
Factory = Callable[[Problem], Implementation]
ContextFor = Callable[[str], AbstractContextManager[Any]]


def _step_times(implementations: dict[str, Implementation], count: int, context: ContextFor) -> dict[str, Array]:
    """Return the nanoseconds of each step, less those of reading the clock."""
    clock, times = time.perf_counter_ns, {name: np.empty(count) for name in implementations}
    clock_cost = float(np.median([-(clock() - clock()) for _ in range(1000)]))
    order = list(implementations)
    gc.collect()
    gc.disable()
    try:
        for first in range(0, count, BLOCK_STEPS):
            for name in order:
                step, out = implementations[name].calls[STEP], times[name]
                with context(name):
                    for _ in range(WARMUP_STEPS):
                        step()
                    for k in range(first, min(first + BLOCK_STEPS, count)):
                        start = clock()
                        step()
                        out[k] = clock() - start
            order = order[1:] + order[:1]
    finally:
        gc.enable()
    return {name: t - clock_cost for name, t in times.items()}


def compare_steps(
    factories: Mapping[str, Factory],
    problem: Problem,
    count: int,
    context: ContextFor = lambda _: nullcontext(),
) -> Row:
    """Compare the first steps of all implementations, then time those that agree with the first one.

    Args:
        factories: name -> factory of an implementation with the call STEP.
        problem: a problem of one row (N = 1).
        count: number of timed steps of each.
        context: name -> the context in which the implementation runs.

    Returns:
        {"cell", "hidden", "microseconds": name -> {"p50", "p99", "p99.9"}, "disagree": descriptions}.
    """
    expected: dict[str, Array] = {}
    agreeing, problems = {}, []
    for name, factory in factories.items():
        try:
            implementation = factory(problem)
            with context(name):
                results = implementation.results()
        except Exception as error:  # shown in the table; the other figures still count
            problems.append(f"{name} raises {type(error).__name__}: {error}")
            continue
        differences = mismatches(expected, results, RTOL)
        problems += [f"{name}: {difference}" for difference in differences]
        expected = results | expected
        if not differences:
            agreeing[name] = implementation
    microseconds = {
        name: {f"p{q:g}": float(np.percentile(times, q)) / 1e3 for q in (50, 99, 99.9)}
        for name, times in _step_times(agreeing, count, context).items()
    }
    return {"cell": problem.cell, "hidden": problem.shape[1], "microseconds": microseconds, "disagree": problems}


def measure_row(cell: str, hidden: int, count: int, jit: bool, peer_names: Sequence[str]) -> Row:
    """Measure one cell and size.

    Args:
        cell: a key of GATE_COUNTS.
        hidden: H.
        count: number of timed steps.
        jit: True: also measure xprnn with numba.
        peer_names: keys of PEER_STEPS.
    """
    factories: dict[str, Factory] = {}
    if jit:
        factories |= {"xprnn, fast": steps.xprnn_step, "floor, fast": steps.compiled_floor}
    factories |= {XPRNN_NUMPY: steps.xprnn_step, "floor, NumPy": steps.numpy_floor}
    factories |= {PEERS[name].title: PEER_STEPS[name] for name in peer_names}
    factories |= {PEERS["article"].title: steps.article_step} if cell == "elman" else {}
    problem = Problem(cell, (D, hidden, 1, 1))
    return compare_steps(factories, problem, count, lambda name: allow_jit(name != XPRNN_NUMPY))


def measure(cells: list[str], sizes: list[int], count: int) -> tuple[list[Row], list[str]]:
    """Measure all cells and sizes. Return the rows, and a note for each peer that is left out."""
    jit = compile_cache.numba_available()
    reasons = {name: missing_reason(name) for name in PEER_STEPS}
    notes = [f"{PEERS[name].title}: left out ({reason})" for name, reason in reasons.items() if reason]
    installed = [name for name, reason in reasons.items() if not reason]
    return [measure_row(cell, hidden, count, jit, installed) for cell in cells for hidden in sizes], notes


def overhead(row: Row, variant: str) -> float | None:
    """Return the microseconds that xprnn's median takes beyond the floor; None if one is missing."""
    microseconds = row["microseconds"]
    xprnn, floor = microseconds.get(f"xprnn, {variant}"), microseconds.get(f"floor, {variant}")
    return xprnn["p50"] - floor["p50"] if xprnn and floor else None


def goals(rows: list[Row]) -> list[Goal]:
    """Judge the overhead of each cell and size."""
    return [
        Goal(f"step, {row['cell']}, H={row['hidden']}, {variant}: overhead, microseconds", value, most=most)
        for row in rows
        for variant, most in MAX_OVERHEAD_US.items()
        if (value := overhead(row, variant)) is not None
    ]


def report(rows: list[Row], notes: Sequence[str] = ()) -> list[str]:
    """Format the notes and the table: p50 / p99 / p99.9, and the overhead of xprnn's median."""
    names = list(dict.fromkeys(name for row in rows for name in row["microseconds"]))
    headings = ["cell", "H", *names, *(f"overhead, {variant}" for variant in MAX_OVERHEAD_US)]
    table: list[list[str] | str] = []
    for row in rows:
        seen = row["microseconds"]
        cells = [" / ".join(f"{v:.1f}" for v in seen[n].values()) if n in seen else "" for n in names]
        cells += ["" if (value := overhead(row, v)) is None else f"{value:.1f}" for v in MAX_OVERHEAD_US]
        table.append([row["cell"], str(row["hidden"]), *cells])
        table += [f"excluded: {problem}" for problem in row["disagree"]]
    return [
        *(f"- {note}" for note in notes),
        "Microseconds of a step, p50 / p99 / p99.9:",
        "",
        *markdown_table(headings, table),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argument_parser(__doc__, cells=CELLS)
    parser.add_argument("--steps", type=int, default=100_000, help="timed steps (default: 100000)")
    parser.add_argument("--hidden", nargs="+", type=int, default=[16, 32, 64], metavar="H", help="default: 16 32 64")
    parser.add_argument("--short", action="store_true", help="a tenth of the steps")
    args = parser.parse_args(argv)
    count = max(1, args.steps // 10) if args.short else args.steps
    machine.pin_to_cores(machine.available_cores()[:1])  # one core: no library gains from its threads
    rows, notes = measure(args.cell, args.hidden, count)
    failed = any(row["disagree"] for row in rows)
    figures = {"steps": count, "notes": notes, "rows": rows}
    return write_results(Report(figures, report(rows, notes), goals(rows), failed=failed), json_file=args.json)


if __name__ == "__main__":
    sys.exit(main())
