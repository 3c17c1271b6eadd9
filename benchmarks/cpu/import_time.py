"""Measures the time that `import xprnn` adds to `import numpy`, and the optional packages that it imports.

    python -m benchmarks.cpu.import_time [--rounds COUNT]

Each round is a fresh interpreter that imports NumPy and then xprnn, with all files in the system's cache.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks.harness.options import argument_parser
from benchmarks.harness.report import Goal, Report, write_results
from benchmarks.harness.worker_pool import run_process

MAX_IMPORT_MS = 50.0
OPTIONAL_PACKAGES = ("cupy", "h5py", "jax", "llvmlite", "matplotlib", "numba", "onnx", "onnxruntime", "torch")
IMPORT_SCRIPT = """
import sys, time
a = time.perf_counter()
import numpy
b = time.perf_counter()
import xprnn
print((b - a) * 1e3, (time.perf_counter() - b) * 1e3, *(m for m in sys.modules if "." not in m))
"""


def time_imports(pycache_prefix: str) -> dict[str, Any]:
    """Run one interpreter: milliseconds of each import, and the optional packages that were imported."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    result = run_process([sys.executable, "-c", IMPORT_SCRIPT], env | {"PYTHONPYCACHEPREFIX": pycache_prefix})
    if result.returncode:
        raise RuntimeError(f"import xprnn ended with code {result.returncode}")
    numpy_ms, xprnn_ms, *modules = result.lines[-1].split()
    optional = sorted(set(modules) & set(OPTIONAL_PACKAGES))
    return {"numpy": float(numpy_ms), "xprnn": float(xprnn_ms), "optional": optional}


def measure(rounds: int) -> list[dict[str, Any]]:
    """Run `rounds` interpreters, after one that compiles the files, as an installation does."""
    with tempfile.TemporaryDirectory() as pycache_prefix:
        time_imports(pycache_prefix)
        return [time_imports(pycache_prefix) for _ in range(rounds)]


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """Judge the median time and the number of optional packages."""
    median = statistics.median(row["xprnn"] for row in rows)
    return [
        Goal("import xprnn after numpy, milliseconds", median, most=MAX_IMPORT_MS),
        Goal("optional packages that import xprnn imports", len(rows[-1]["optional"]), most=0),
    ]


def report(rows: list[dict[str, Any]]) -> list[str]:
    """Format the medians as one sentence."""
    low, middle, high = statistics.quantiles([row["xprnn"] for row in rows], n=4)
    numpy_ms = statistics.median(row["numpy"] for row in rows)
    text = (
        f"`import xprnn` adds {middle:.0f} ms (quartiles {low:.0f} to {high:.0f}) to `import numpy`, which takes "
        f"{numpy_ms:.0f} ms; optional packages imported: {', '.join(rows[-1]['optional']) or 'none'}. "
        f"{len(rows)} fresh processes."
    )
    return [text]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = argument_parser(__doc__, rounds=21).parse_args(argv)
    rows = measure(args.rounds)
    return write_results(Report({"rows": rows}, report(rows), goals(rows)), json_file=args.json)


if __name__ == "__main__":
    sys.exit(main())
