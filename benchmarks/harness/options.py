"""Command-line options that the benchmark scripts share."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.harness import machine
from benchmarks.harness.worker_pool import run_process

__all__ = ["CELLS", "argument_parser", "rerun_keeping_memory"]

CELLS = ["elman", "lstm", "gru"]


def argument_parser(
    doc: str | None, *, rounds: int = 0, cells: list[str] | None = None, cell_choices: list[str] = CELLS
) -> argparse.ArgumentParser:
    """Create a parser with the option --json.

    Args:
        doc: the script's docstring, shown by --help.
        rounds: default of the option --rounds; 0: no such option.
        cells: default of the option --cell; None: no such option.
        cell_choices: cells that --cell accepts.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to FILE")
    if rounds:
        parser.add_argument("--rounds", type=int, default=rounds, help=f"repetitions (default: {rounds})")
    if cells:
        parser.add_argument(
            "--cell",
            nargs="+",
            choices=cell_choices,
            default=cells,
            help=f"recurrent cells (default: {' '.join(cells)})",
        )
    return parser


def rerun_keeping_memory() -> int | None:
    """Run this module again in an environment in which freed memory stays with the process.

    Returns:
        The exit code of that run; None if this process already has the environment.
    """
    if "MALLOC_MMAP_MAX_" in os.environ:
        return None
    spec = sys.modules["__main__"].__spec__
    assert spec is not None, "run benchmarks as `python -m module`"
    result = run_process([sys.executable, "-m", spec.name, *sys.argv[1:]], machine.benchmark_environment(1))
    print(*result.lines, sep="\n")
    return result.returncode
