"""Times the CUDA kernels against PyTorch's cuDNN layer, on a machine with a GPU, CuPy and PyTorch.

    python -m benchmarks.gpu.grid                             the table and text training, some fifteen minutes
    python -m benchmarks.gpu.grid --tests --sanitize          first the test suite on CuPy and compute-sanitizer
    python -m benchmarks.gpu.grid --hidden 256 --batch 32     a part of the grid

Measured are Elman, LSTM and GRU, forward and forward+backward, D = H, float32 with TF32 off and on: the three tiers of
xprnn's kernels and PyTorch's cuDNN layer, with lower bounds from the device's limits. The files of --json and
--markdown are written after each row, so that a run that is stopped keeps its rows. Results are compared with float64
before timing. If they differ by more than rounding, or if a row fails, the report says so and the exit code is 1; the
other rows are still measured.

Without a CUDA device or without CuPy nothing is measured, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.gpu import contenders, report, training
from benchmarks.harness import machine
from benchmarks.harness.options import argument_parser
from benchmarks.harness.problem import FORWARD, FORWARD_BACKWARD, Problem
from benchmarks.harness.report import Report, write_results
from benchmarks.harness.worker_pool import ROOT

# Largest relative errors of float32 and of TF32 over hundreds of steps. A wrong index or a race shows as more.
RTOL = {False: 1e-4, True: 5e-2}
SANITIZER_SHAPES = [(64, 3, 4), (256, 5, 3), (512, 2, 3), (1024, 2, 3)]  # H, N, T
TRAINING_BATCH = 64
Row = dict[str, Any]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argument_parser(__doc__, rounds=20, cells=list(contenders.CELLS))
    add = parser.add_argument
    add("--hidden", nargs="+", type=int, default=[64, 256, 512, 1024], metavar="H", help="default: 64 256 512 1024")
    add("--batch", nargs="+", type=int, default=[1, 32, 128], metavar="N", help="default: 1 32 128")
    add("--steps", type=int, default=512, metavar="T", help="time steps (default: 512)")
    add("--tf32", choices=("off", "on", "both"), default="both", help="default: both")
    add("--seconds", type=float, default=4.0, help="duration of each row, roughly (default: 4)")
    add("--markdown", type=Path, default=Path("gpu.md"), metavar="FILE", help="default: gpu.md")
    add("--no-training", action="store_true", help="without text training")
    add("--tests", action="store_true", help="first run the test suite on CuPy")
    add("--sanitize", action="store_true", help="first run the kernels under compute-sanitizer: memcheck, racecheck")
    add("--exercise", action="store_true", help=argparse.SUPPRESS)  # the program that compute-sanitizer runs
    parser.set_defaults(json=Path("gpu.json"))
    return parser.parse_args(argv)


def missing_reason() -> str:
    """Return why nothing can be measured here, or ""."""
    try:
        installed = importlib.util.find_spec("cupy") is not None
    except ValueError:  # sys.modules["cupy"] is None
        installed = False
    if not installed:
        return 'CuPy is not installed: pip install ".[cuda13]" (or cuda12)'
    import cupy

    return "" if cupy.cuda.is_available() else "there is no CUDA device, or its driver is too old for this CuPy"


def describe_gpu() -> dict[str, Any]:
    """Describe the machine, the device, and the versions of all that runs on it."""
    import cupy

    summary = machine.describe()
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    summary["gpu"] = properties["name"].decode() if isinstance(properties["name"], bytes) else properties["name"]
    summary["capability"] = cupy.cuda.Device().compute_capability
    summary["driver"] = cupy.cuda.runtime.driverGetVersion()
    summary["versions"]["cupy"] = cupy.__version__
    if importlib.util.find_spec("torch") is not None:
        import torch

        summary["versions"]["cuDNN"] = torch.backends.cudnn.version()
    return summary


def grid_keys(args: argparse.Namespace) -> list[Row]:
    """Return the keys of the rows without the pass, smaller rows first."""
    modes = {"off": [False], "on": [True], "both": [False, True]}[args.tf32]
    return [
        {"cell": cell, "shape": [h, h, n, args.steps], "tf32": tf32}
        for h in args.hidden
        for n in args.batch
        for cell in args.cell
        for tf32 in modes
    ]


def measure_row(key: Row, args: argparse.Namespace, ceilings: dict[str, float]) -> list[Row]:
    """Measure both passes of a row: errors against float64, and times."""
    import cupy

    problem = Problem(key["cell"], tuple(key["shape"]))
    expected = contenders.float64_results(problem)
    implementations, missing = contenders.make_implementations(problem, key["tf32"])
    errors = {name: contenders.pass_errors(each.results(), expected) for name, each in implementations.items()}
    rows = []
    for pass_name in (FORWARD, FORWARD_BACKWARD):
        times = contenders.time_in_turns(implementations, pass_name, args.rounds, args.seconds)
        pass_errors = {name: error[pass_name] for name, error in errors.items() if error}
        rows.append(report.summarize_row(key | {"pass": pass_name}, times, missing, pass_errors, ceilings))
    del implementations
    cupy.get_default_memory_pool().free_all_blocks()
    return rows


def inaccurate_tiers(row: Row) -> list[str]:
    """Return the tiers whose error is larger than rounding allows."""
    return [name for name, error in row["error"].items() if name != "torch" and not error <= RTOL[row["tf32"]]]


def write_files(run: dict[str, Any], args: argparse.Namespace, print_lines: bool = False) -> int:
    """Write what is known so far to both files. Return the exit code."""
    failed = any(note.startswith(("WRONG", "FAILED")) for note in run["notes"])
    lines = report.markdown_report(run)
    return write_results(Report(run, lines, failed=failed), args.markdown, args.json, print_lines)


def measure_grid(args: argparse.Namespace) -> int:
    """Measure the grid and text training. Return the exit code."""
    run: dict[str, Any] = {"machine": describe_gpu(), "notes": [], "rows": [], "training": []}
    run["ceilings"] = contenders.ceilings()
    for key in grid_keys(args):
        with record_failure(run, args, str(key)):
            for row in measure_row(key, args, run["ceilings"]):
                run["rows"].append(row)
                if tiers := inaccurate_tiers(row):
                    run["notes"].append(f"WRONG: {', '.join(tiers)} at {key} ({row['pass']}): {row['error']}")
            medians = {name: round(u["median"], 3) for name, u in row["us"].items()}
            print(f"{key}: {medians} us", file=sys.stderr, flush=True)
    for tf32 in () if args.no_training else (False, True):
        for cell in args.cell:
            with record_failure(run, args, f"training {cell}"):
                run["training"].append(training.measure_training(cell, TRAINING_BATCH, tf32))
                if not run["training"][-1]["agree"]:
                    losses = run["training"][-1]["losses"]
                    run["notes"].append(f"WRONG: the losses of training {cell} differ: {losses}")
    return write_files(run, args, print_lines=True)


@contextmanager
def record_failure(run: dict[str, Any], args: argparse.Namespace, what: str) -> Iterator[None]:
    """Note an exception of one row, so that the next row is measured, and write the files."""
    try:
        yield
    except Exception as error:  # out of memory, an error of a library: of this row only
        run["notes"].append(f"FAILED: {what}: {type(error).__name__}: {error}")
        print(run["notes"][-1], file=sys.stderr, flush=True)
    write_files(run, args)


def run_each_tier() -> int:
    """Run every tier once on small rows: compute-sanitizer makes it a hundred times slower. Return the exit code."""
    failed = False
    for cell in contenders.CELLS:
        for h, n, t in SANITIZER_SHAPES:
            problem = Problem(cell, (h, h, n, t))
            expected = contenders.float64_results(problem)
            implementations, missing = contenders.make_implementations(problem, False)
            tiers = {name: each for name, each in implementations.items() if name.startswith("tier")}
            errors = {
                name: contenders.pass_errors(each.results(), expected)[FORWARD_BACKWARD] for name, each in tiers.items()
            }
            print(cell, (h, n, t), errors, {name: why for name, why in missing.items() if name == "tier3"}, flush=True)
            failed |= any(not error <= RTOL[False] for error in errors.values())
    return int(failed)


def run_sanitizer() -> int:
    """Run `run_each_tier` under compute-sanitizer: invalid addresses, and races in shared memory."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        print("compute-sanitizer is not installed (it comes with the CUDA toolkit): not run", file=sys.stderr)
        return 1
    command = [sys.executable, "-m", "benchmarks.gpu.grid", "--exercise"]
    codes = []
    for check in ("memcheck", "racecheck"):
        print(f"compute-sanitizer --tool {check}", file=sys.stderr, flush=True)
        sanitizer = [tool, "--tool", check, "--error-exitcode", "9"]
        codes.append(subprocess.run([*sanitizer, *command], cwd=ROOT, check=False).returncode)
    return int(any(codes))


def run_test_suite() -> int:
    """Run the whole test suite on CuPy."""
    command = [sys.executable, "-m", "pytest", "-q", "--backend", "cupy", str(ROOT / "tests")]
    return int(subprocess.run(command, cwd=ROOT, check=False).returncode != 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure, write."""
    args = parse_arguments(argv)
    if reason := missing_reason():
        print(f"nothing measured: {reason}", file=sys.stderr)
        return 1
    if args.exercise:
        return run_each_tier()
    failed = run_test_suite() if args.tests else 0
    failed |= run_sanitizer() if args.sanitize else 0
    return failed | measure_grid(args)


if __name__ == "__main__":
    sys.exit(main())
