"""Runs all CPU benchmarks and writes one report in Markdown, with unmet goals first, and all figures as JSON.

    python -m benchmarks.run_all                              some 25 minutes on two idle cores
    python -m benchmarks.run_all --short                      some five minutes
    python -m benchmarks.run_all --only grid training         some of the benchmarks
    python -m benchmarks.run_all --markdown F --json F --png F

Each benchmark is a module of this folder. They run one after the other, each in its own process.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cpu.grid_plot import plot_ratios
from benchmarks.harness import machine
from benchmarks.harness.report import Goal, Report, machine_line, unmet_goal_lines, write_results
from benchmarks.harness.worker_pool import run_process

CELL_ARGUMENTS = "--cell elman lstm gru"


class Benchmark(NamedTuple):
    """A module of `benchmarks` and its arguments.

    title: heading in the report.
    module: below `benchmarks`.
    arguments, short_arguments: of the full and of the short run.
    """

    title: str
    module: str
    arguments: str = ""
    short_arguments: str = ""


BENCHMARKS = {
    "grid": Benchmark(
        "Grid: one thread and two", "cpu.grid", f"{CELL_ARGUMENTS} --seconds 480", f"{CELL_ARGUMENTS} --short"
    ),
    "threads": Benchmark("Effect of a second thread", "cpu.threads", "", "--rows 5 --rounds 5"),
    "step_latency": Benchmark("Latency of one step", "cpu.step_latency", "", "--short"),
    "training": Benchmark("Training", "cpu.training", "", "--batch 16 --rounds 3"),
    "jobs": Benchmark("Whole training steps", "cpu.jobs", "", "--threads 1 --rounds 3 --first-steps 1"),
    "vocabulary": Benchmark("Large vocabularies", "cpu.vocabulary", "", "--rounds 9"),
    "scaling": Benchmark("Growth with T and N", "cpu.scaling", "", "--short"),
    "memory": Benchmark("Memory against T and cost of checkpoints", "cpu.memory", "", "--quick"),
    "import_time": Benchmark("Import time", "cpu.import_time", "", "--rounds 7"),
    "layouts": Benchmark("Memory layouts of the input", "cpu.layouts", "", "--rounds 7"),
    "bidirectional": Benchmark("Bidirectional layers", "cpu.bidirectional", "", "--rounds 5 --seconds 0.05"),
}


def run_benchmark(benchmark: Benchmark, short: bool, folder: Path) -> dict[str, Any]:
    """Run a benchmark in its own process. Return its title, Markdown, figures, seconds and exit code."""
    file, start = folder / f"{benchmark.module}.json", time.monotonic()
    arguments = (benchmark.short_arguments if short else benchmark.arguments).split()
    result = run_process([sys.executable, "-m", f"benchmarks.{benchmark.module}", *arguments, "--json", str(file)])
    figures = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {
        "title": benchmark.title,
        "text": "\n".join(result.lines).strip(),
        "figures": figures,
        "seconds": time.monotonic() - start,
        "code": result.returncode,
    }


def goals(results: dict[str, dict[str, Any]]) -> list[Goal]:
    """Collect the goals of all benchmarks."""
    return [Goal(**goal) for result in results.values() for goal in result["figures"].get("goals", [])]


def inconclusive(results: dict[str, dict[str, Any]]) -> list[str]:
    """Collect the rows of all benchmarks whose goals are not judged."""
    return [row for result in results.values() for row in result["figures"].get("inconclusive", [])]


def report_lines(run: dict[str, Any]) -> list[str]:
    """Format the whole Markdown."""
    results = run["results"]
    duration = f"{run['seconds'] / 60:.0f} minutes{', short run' if run['short'] else ''}."
    lines = [f"{machine_line(run['machine'])} {duration}", "", "### Unmet goals", "", *unmet_goal_lines(goals(results))]
    lines += [f"- {row}: not judged, other processes kept the cores busy" for row in inconclusive(results)]
    lines += [
        f"- **{result['title']}: ended with code {result['code']}**" for result in results.values() if result["code"]
    ]
    for result in results.values():
        # Headings of a benchmark's tables are one level below its title.
        text = (f"#{line}" if line.startswith("### ") else line for line in result["text"].splitlines())
        lines += ["", f"### {result['title']}", "", *text]
    return lines


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--short", action="store_true", help="fewer sizes and repetitions")
    add("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), metavar="NAME", help=", ".join(BENCHMARKS))
    add("--markdown", type=Path, metavar="FILE", help="also write the report to FILE")
    add("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    add("--png", type=Path, metavar="FILE", help="draw the grid's ratios (needs matplotlib)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parse_arguments(argv)
    start = time.monotonic()
    run: dict[str, Any] = {"machine": machine.describe(), "short": args.short, "results": {}}
    code = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            print(f"--- {name}", file=sys.stderr, flush=True)
            run["results"][name] = run_benchmark(BENCHMARKS[name], args.short, Path(folder))
            run["seconds"] = time.monotonic() - start
            failed = any(result["code"] for result in run["results"].values())
            # After each benchmark, so that a run that is stopped keeps its results.
            report = Report(run, report_lines(run), goals(run["results"]), inconclusive(run["results"]), failed)
            code = write_results(report, args.markdown, args.json, print_lines=name == args.only[-1])
    rows = run["results"].get("grid", {}).get("figures", {}).get("rows")
    if args.png and rows:
        print(plot_ratios(rows, args.png) or f"wrote {args.png}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
