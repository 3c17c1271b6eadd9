"""All measurements as one report: Markdown, with what falls short named first; JSON and a picture beside it.

    python benchmarks/run_all.py                              some 25 minutes on two idle cores
    python benchmarks/run_all.py --short                      some five
    python benchmarks/run_all.py --only grid training         parts of it
    python benchmarks/run_all.py --markdown F --json F --png F

Each part is a command of its own in this folder; here they are run one after the other, and their tables put together.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import machine
from benchmarks.harness.plot import plot_ratios
from xprnn.io.archive import write_atomically

HERE = Path(__file__).parent


class BenchmarkCommand(NamedTuple):
    """A command of this folder."""

    title: str
    command: str
    short_command: str


CELL_ARGUMENTS = "--cell elman lstm gru"
BENCHMARKS = {
    "grid": BenchmarkCommand(
        "Side by side, one thread and two", f"rnn.py {CELL_ARGUMENTS} --seconds 480", f"rnn.py {CELL_ARGUMENTS} --short"
    ),
    "threads": BenchmarkCommand("What a second thread does", "threads.py", "threads.py --rows 5 --rounds 5"),
    "streaming": BenchmarkCommand("Streaming, one step at a time", "streaming.py", "streaming.py --short"),
    "training": BenchmarkCommand("Training end to end", "training.py", "training.py --batch 16 --rounds 3"),
    "onehot": BenchmarkCommand("One-hot input by look-up", "onehot.py", "onehot.py --rounds 9"),
    "growth": BenchmarkCommand("Growth with T and N", "growth.py", "growth.py --short"),
    "memory": BenchmarkCommand("Memory against T, and what checkpoints cost", "memory.py", "memory.py --quick"),
    "imports": BenchmarkCommand("Import", "imports.py", "imports.py --rounds 7"),
}


def run_benchmark(benchmark: BenchmarkCommand, short: bool, folder: Path) -> dict[str, Any]:
    """Run a part: its Markdown, figures and goals; where it fails, its last words."""
    script, *words = (benchmark.short_command if short else benchmark.command).split()
    file, start = folder / f"{script}.json", time.monotonic()
    command = [sys.executable, str(HERE / script), *words, "--json", str(file)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    figures = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    out = {"text": done.stdout.strip(), "figures": figures, "seconds": time.monotonic() - start}
    out["undecided"] = figures.get("undecided", [])
    return out | {"code": done.returncode, "goals": figures.get("goals", []), "title": benchmark.title}


def is_unmet(goal: dict[str, Any]) -> bool:
    """Whether a figure is beyond its bound; what is no number is."""
    return not (goal["value"] >= goal["least"] if "least" in goal else goal["value"] <= goal["most"])


def unmet_goal_lines(results: dict[str, dict[str, Any]]) -> list[str]:
    """What is met, in numbers, and a line for each figure that is not: which, by how much."""
    every = [goal for part in results.values() for goal in part["goals"]]
    short = [goal for goal in every if is_unmet(goal)]
    lines = [f"{len(every) - len(short)} of {len(every)} goals are met.", ""]
    for goal in short:
        bound = f"at least {goal['least']}" if "least" in goal else f"at most {goal['most']}"
        lines.append(f"- {goal['what']}: {goal['value']:.2f}, {bound} wanted")
    lines += [
        f"- {what}: not judged, other processes kept the cores busy"
        for p in results.values()
        for what in p["undecided"]
    ]
    failed = [f"- **{part['title']}: ended with code {part['code']}**" for part in results.values() if part["code"]]
    return lines + failed


def report(run: dict[str, Any]) -> str:
    """The whole Markdown."""
    about = run["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    measured = (
        f"Measured on {about['processor']}, {about['cores']} cores, {about['system']}; Python {about['python']}, "
        f"{versions}; BLAS {about['blas']}; load at the start {about['load']}; {run['seconds'] / 60:.0f} minutes"
        f"{', the short form' if run['short'] else ''}."
    )
    lines = [
        measured,
        "",
        "### Where it falls short",
        "",
        *unmet_goal_lines(run["parts"]),
    ]
    for part in run["parts"].values():
        # A part's own tables stand one level below its title.
        text = "\n".join(f"#{line}" if line.startswith("### ") else line for line in part["text"].splitlines())
        lines += ["", f"### {part['title']}", "", text]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--short", action="store_true", help="fewer rows and rounds")
    add("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), metavar="PART", help=", ".join(BENCHMARKS))
    add("--markdown", metavar="FILE", help="write what is printed here too")
    add("--json", metavar="FILE", help="write all figures")
    add("--png", type=Path, metavar="FILE", help="draw the grid's ratios (needs matplotlib)")
    args = parser.parse_args()
    start = time.monotonic()
    run: dict[str, Any] = {"machine": machine.describe(), "short": args.short, "layers": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            print(f"--- {name}", file=sys.stderr, flush=True)
            run["parts"][name] = run_benchmark(BENCHMARKS[name], args.short, Path(folder))
            run["seconds"] = time.monotonic() - start
            # After each part, so that what was measured is not lost with what comes later.
            for file, text in ((args.markdown, report(run)), (args.json, json.dumps(run, indent=1) + "\n")):
                if file:
                    write_atomically(file, text.encode())
    print(report(run))
    grid = run["parts"].get("grid", {}).get("figures", {})
    if args.png and grid.get("rows"):
        print(plot_ratios(grid, args.png) or f"wrote {args.png}", file=sys.stderr)
    return 1 if any(part["code"] for part in run["parts"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
