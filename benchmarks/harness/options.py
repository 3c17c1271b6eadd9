"""What the commands of this folder share: their options, how they begin again, and how they end."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness import machine
from xprnn.io.archive import write_atomically

__all__ = ["CELLS", "argument_parser", "rerun_keeping_memory", "write_results"]

CELLS = ["elman", "lstm", "gru"]


def argument_parser(
    doc: str | None, *, rounds: int = 0, cells: list[str] | None = None, cell_choices: list[str] = CELLS
) -> argparse.ArgumentParser:
    """A parser with --json, and --rounds and --cell (of the known ones) where there is a default for them."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here too")
    if rounds:
        parser.add_argument("--rounds", type=int, default=rounds, help=f"default: {rounds}")
    if cells:
        parser.add_argument(
            "--cell", nargs="+", choices=cell_choices, default=cells, help=f"default: {' '.join(cells)}"
        )
    return parser


def rerun_keeping_memory() -> int | None:
    """Run this command once more, with freed memory kept as in the other comparisons; None where it already is.

    Returns its exit code.
    """
    if "MALLOC_MMAP_MAX_" in os.environ:
        return None
    return subprocess.run([sys.executable, *sys.argv], env=machine.benchmark_environment(1), check=False).returncode


def write_results(args: argparse.Namespace, lines: Iterable[str], figures: dict[str, Any], failed: bool = False) -> int:
    """Print the lines, write the figures; returns the exit code."""
    print(*lines, sep="\n")
    if args.json:
        figures = {"machine": machine.describe()} | figures
        write_atomically(args.json, (json.dumps(figures, indent=1) + "\n").encode())
    return int(failed)
