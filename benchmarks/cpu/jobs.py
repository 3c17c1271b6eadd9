"""Measures whole training steps as users write them: xprnn against torch (eager and torch.compile) and JAX (jitted).

    python -m benchmarks.cpu.jobs [--job NAME ...] [--peers NAME ...] [--threads COUNT ...] [--rounds COUNT]

A step takes a batch out of the data and runs forward, loss, backward, clipping by global norm and the optimiser, in
float32; the loss is read after each step. Data and initial parameters are the same for all, and the losses of the first
steps are compared. Each implementation runs in its own process, with one thread on one core and with two threads on two
cores; the processes take turns. `job_steps` holds the jobs and the step of each implementation. torch.compile runs with
its default settings, in which it leaves RNN modules to eager mode. JAX's step is one jitted function with donated
buffers, with the batch taken inside and the optimisers of optax.

The first step of a fresh process is timed separately, with compiled kernels in xprnn's cache on disk.
"""

from __future__ import annotations

import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cpu.job_steps import COMPARED_STEPS, JOBS, make_implementation
from benchmarks.harness import machine
from benchmarks.harness.agreement import check_agreement
from benchmarks.harness.options import argument_parser
from benchmarks.harness.problem import TRAIN_STEP
from benchmarks.harness.report import Goal, Report, format_time, markdown_table, write_results
from benchmarks.harness.timing import paired_ratio, quartile_summary
from benchmarks.harness.worker_pool import WorkerPool, run_process, run_rounds

TITLES = {"torch": "torch", "torch_compile": "torch.compile", "jax": "JAX jit"}
LOSS_RTOL = 1e-3  # relative to the largest loss, over the first steps
MEAN_AGAINST_TORCH = 2.0
MAX_FIRST_STEP_S = 0.5
COMPILERS = ("c++", "g++", "clang++", "cl")
FIRST_STEP_SCRIPT = "import xprnn; from benchmarks.cpu.job_steps import first_step_seconds as f; print(f({job!r}))"
Row = dict[str, Any]


def missing_compiler() -> str:
    """Return why torch.compile cannot run here, or ""."""
    return "" if any(map(shutil.which, COMPILERS)) else "torch.compile is skipped: it needs a C++ compiler"


def measure_row(job: str, threads: int, peers: list[str], rounds: int, seconds: float) -> Row:
    """Measure the seconds of a training step of each implementation, and how many times faster xprnn is."""
    names = ["xprnn", *peers]
    with WorkerPool() as pool, tempfile.TemporaryDirectory() as folder:
        workers = {name: pool.worker(name, threads) for name in names}
        tasks = {name: {"framework": name, "job": job, "threads": threads} for name in names}
        loaded, problems = check_agreement(workers, make_implementation, tasks, Path(folder), LOSS_RTOL)
        timed = {name: workers[name] for name in loaded}
        measured = run_rounds(timed, TRAIN_STEP, 0.0, rounds, rounds, seconds)
    problems += [f"{name} {reason}" for name, reason in measured.failed.items()]
    times = measured.times
    ratios = {name: paired_ratio(times[name], times["xprnn"]) for name in times if name != "xprnn" and "xprnn" in times}
    summaries = {name: quartile_summary(seen) for name, seen in times.items()}
    row = {"job": job, "threads": threads, "seconds": summaries, "times_faster": ratios}
    return row | {"disagree": problems, "discarded": measured.discarded}


def measure_first_steps(jobs: list[str], rounds: int) -> dict[str, float]:
    """Return the median seconds of the first training step of a fresh process, for each job."""
    environment, medians = machine.benchmark_environment(1), {}
    for job in jobs:
        command = [sys.executable, "-c", FIRST_STEP_SCRIPT.format(job=job)]
        seconds = []
        for _ in range(1 + rounds):  # the first process fills the cache
            result = run_process(command, environment)
            if result.returncode:
                raise RuntimeError(f"the first step of {job} ended with code {result.returncode}")
            seconds.append(float(result.lines[-1]))
        medians[job] = statistics.median(seconds[1:])
    return medians


def best_ratio(row: Row) -> float:
    """Return how many times faster xprnn is than the fastest peer; NaN if xprnn failed or there is no peer."""
    return min(row["times_faster"].values(), default=math.nan)


def geometric_mean(rows: list[Row], peer: str) -> float:
    """Return the geometric mean of xprnn's ratios to a peer, or to the "best peer" of each row; NaN without rows.

    Disturbed rows, and rows without that peer, do not count.
    """
    ratios = [
        best_ratio(row) if peer == "best peer" else row["times_faster"].get(peer, math.nan)
        for row in rows
        if row["discarded"] >= 0
    ]
    known = [ratio for ratio in ratios if not math.isnan(ratio)]
    return statistics.geometric_mean(known) if known else math.nan


def goals(rows: list[Row], first_steps: dict[str, float]) -> list[Goal]:
    """Judge each undisturbed row against its best peer, the mean against torch, and the first steps.

    A row in which xprnn itself failed has the figure NaN, which meets no goal; its `disagree` holds the reason.
    """
    judged = [
        Goal(f"training step, {_label(row)}, against the best peer", best_ratio(row), least=1.0)
        for row in rows
        if row["discarded"] >= 0 and (row["times_faster"] or row["disagree"])
    ]
    for count in sorted({row["threads"] for row in rows}):
        mean = geometric_mean([row for row in rows if row["threads"] == count], "torch")
        if not math.isnan(mean):
            what = f"training step, {count} thread(s), geometric mean against torch"
            judged.append(Goal(what, mean, least=MEAN_AGAINST_TORCH))
    return judged + [
        Goal(f"first training step of a process, {job}, seconds", seconds, most=MAX_FIRST_STEP_S)
        for job, seconds in first_steps.items()
    ]


def _label(row: Row) -> str:
    return f"{row['job']}, {row['threads']} thread(s)"


def job_table(rows: list[Row], peers: list[str]) -> list[str]:
    """Format the milliseconds of a step and xprnn's ratio to each peer, and the geometric means."""
    table: list[list[str] | str] = []
    for row in rows:
        cells = [format_time(row["seconds"]["xprnn"]) if "xprnn" in row["seconds"] else ""]
        for name in peers:
            ratio = row["times_faster"].get(name)
            known = name in row["seconds"]
            cells.append(format_time(row["seconds"][name], ratios=[] if ratio is None else [ratio]) if known else "")
        cells.append(_format_ratio(best_ratio(row)))
        table.append([row["job"], str(row["threads"]), *cells])
        table += [f"{_label(row)}: {problem}" for problem in row["disagree"]]
        table += [f"{_label(row)}: disturbed by other processes"] * (row["discarded"] < 0)
    for count in sorted({row["threads"] for row in rows}):
        same = [row for row in rows if row["threads"] == count]
        means = [_format_ratio(geometric_mean(same, name)) for name in [*peers, "best peer"]]
        table.append(["geometric mean", str(count), "", *means])
    return markdown_table(["job", "threads", "xprnn", *(TITLES[name] for name in peers), "best peer"], table)


def _format_ratio(ratio: float) -> str:
    return "" if math.isnan(ratio) else f"{ratio:.2f}"


def sizes_table(jobs: list[str]) -> list[str]:
    """Describe the jobs."""
    table = []
    for name in jobs:
        job = JOBS[name]
        layer = f"{'bidirectional ' if job.tagging else ''}{job.cell}, {job.read}"
        task = f"{job.loss} of {'the last step' if job.last else 'all steps'}{', lengths' if job.tagging else ''}"
        table.append([name, layer, ", ".join(map(str, job.sizes)), task, job.optimizer])
    return markdown_table(["job", "layer, input", "D or V, H, outputs, N, T", "loss", "optimiser"], table)


def report(rows: list[Row], first_steps: dict[str, float], peers: list[str], rounds: int) -> list[str]:
    """Format captions and tables."""
    jobs = list(dict.fromkeys(row["job"] for row in rows)) or list(first_steps)
    caption = (
        f"Milliseconds of a training step, float32: medians of {rounds} turns ± half the interquartile range. In "
        f"brackets: how many times faster xprnn is. The losses of the first {COMPARED_STEPS} steps agree."
    )
    lines = [*sizes_table(jobs), "", caption, "", *job_table(rows, peers)]
    if first_steps:
        table = [[job, f"{1e3 * seconds:.0f}"] for job, seconds in first_steps.items()]
        lines += ["", "First training step of a fresh process after `import xprnn`, kernels in the cache on disk:", ""]
        lines += markdown_table(["job", "ms"], table)
    return lines


def measure(args: Any, threads: list[int], peers: list[str]) -> list[Row]:
    """Measure all jobs with all numbers of threads."""
    rows = []
    for job in args.job:
        for count in threads:
            rows.append(measure_row(job, count, peers, args.rounds, args.seconds))
            print(f"{_label(rows[-1])}: measured", file=sys.stderr, flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argument_parser(__doc__, rounds=9)
    add = parser.add_argument
    add("--job", nargs="+", choices=JOBS, default=list(JOBS), metavar="NAME", help=", ".join(JOBS))
    add("--peers", nargs="+", choices=TITLES, default=list(TITLES), metavar="NAME", help=", ".join(TITLES))
    add("--threads", nargs="+", type=int, default=[1, 2], metavar="COUNT", help="default: 1 2")
    add("--seconds", type=float, default=0.2, help="duration of a turn (default: 0.2)")
    add("--first-steps", type=int, default=3, metavar="COUNT", help="fresh processes for each job (default: 3)")
    args = parser.parse_args(argv)
    threads = [k for k in args.threads if k <= len(machine.available_cores())]
    skipped = missing_compiler() if "torch_compile" in args.peers else ""
    peers = [name for name in args.peers if name != "torch_compile" or not skipped]
    rows = measure(args, threads, peers)
    first_steps = measure_first_steps(args.job, args.first_steps) if args.first_steps else {}
    lines = report(rows, first_steps, peers, args.rounds) + (["", f"{skipped}."] if skipped else [])
    inconclusive = [f"training step, {_label(row)}" for row in rows if row["discarded"] < 0]
    failed = any(row["disagree"] for row in rows)
    figures = {"rows": rows, "first_steps": first_steps}
    return write_results(Report(figures, lines, goals(rows, first_steps), inconclusive, failed), json_file=args.json)


if __name__ == "__main__":
    sys.exit(main())
