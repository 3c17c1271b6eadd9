"""What the CUDA kernels are worth, on a machine with a GPU, CuPy and PyTorch: one command, one table.

    python benchmarks/gpu/grid.py                                the table (some fifteen minutes), and training text
    python benchmarks/gpu/grid.py --tests --sanitize             first the whole test suite on CuPy, then compute-sanitizer
    python benchmarks/gpu/grid.py --hidden 256 --batch 32        one part of the grid

Elman, LSTM and GRU, forward and forward+backward, D = H, float32 with TF32 off and on: the three tiers beside PyTorch's
cuDNN layer, with the floors that the device's own ceilings set. Every row is written to --json and --markdown as soon
as it is measured, so that a run that is stopped keeps what it has. Results are compared with float64 before the clock
starts; where they differ by more than rounding allows, the table says so and the exit code is 1, and so where a row
fails; the others go on.

Without a CUDA device, or without CuPy, it says so and exits with 1: there is nothing to measure.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# Relative errors that float32, or TF32, may show over hundreds of steps; a wrong index or a race shows as more.
TOLERANCES = {False: 1e-4, True: 5e-2}
SANITIZER_SHAPES = [(64, 3, 4), (256, 5, 3), (512, 2, 3), (1024, 2, 3)]  # H, N, T


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cell", nargs="+", choices=("elman", "lstm", "gru"), default=["elman", "lstm", "gru"])
    add("--hidden", nargs="+", type=int, default=[64, 256, 512, 1024], metavar="H")
    add("--batch", nargs="+", type=int, default=[1, 32, 128], metavar="N")
    add("--steps", type=int, default=512, metavar="T")
    add("--tf32", choices=("off", "on", "both"), default="both")
    add("--rounds", type=int, default=20, help="of each row, at most; default: 20")
    add("--seconds", type=float, default=4.0, help="of each row, roughly; default: 4")
    add("--json", type=Path, default=Path("gpu.json"), metavar="FILE", help="default: gpu.json")
    add("--markdown", type=Path, default=Path("gpu.md"), metavar="FILE", help="default: gpu.md")
    add("--no-training", action="store_true", help="without the text job")
    add("--tests", action="store_true", help="first run the test suite on CuPy")
    add("--sanitize", action="store_true", help="first run the kernels under compute-sanitizer: memcheck, racecheck")
    add("--exercise", action="store_true", help=argparse.SUPPRESS)  # what compute-sanitizer watches
    return parser.parse_args(argv)


def missing_reason() -> str:
    """Why nothing can be measured here, or ""."""
    if importlib.util.find_spec("xprnn") is None:
        return "xprnn is not installed: pip install -e ."
    if importlib.util.find_spec("cupy") is None:
        return 'CuPy is not installed: pip install ".[cuda13]" (or cuda12)'
    import cupy

    return "" if cupy.cuda.is_available() else "there is no CUDA device, or its driver is too old for this CuPy"


def describe_gpu() -> dict[str, Any]:
    """The device, and the versions of all that runs on it."""
    import cupy

    from benchmarks.harness import machine as harness_machine

    found = harness_machine.describe()
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    found["gpu"] = properties["name"].decode() if isinstance(properties["name"], bytes) else properties["name"]
    found["capability"] = cupy.cuda.Device().compute_capability
    found["driver"] = cupy.cuda.runtime.driverGetVersion()
    found["versions"]["cupy"] = cupy.__version__
    if importlib.util.find_spec("torch") is not None:
        import torch

        found["versions"]["cuDNN"] = torch.backends.cudnn.version()
    return found


def write_report(run: dict[str, Any], args: argparse.Namespace) -> None:
    """All that is known so far, into both files; each is whole at any time."""
    from benchmarks.gpu import report as gpu_report

    for path, text in ((args.json, json.dumps(run, indent=1)), (args.markdown, gpu_report.markdown_report(run))):
        beside = path.with_name(path.name + ".part")
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)


def grid_keys(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows' keys but for the pass, the smaller first."""
    modes = {"off": [False], "on": [True], "both": [False, True]}[args.tf32]
    return [
        {"cell": cell, "shape": [h, h, n, args.steps], "tf32": tf32}
        for h in args.hidden
        for n in args.batch
        for cell in args.cell
        for tf32 in modes
    ]


def measure_row(key: dict[str, Any], args: argparse.Namespace, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """Both passes of a row: who can run it, how far each is from float64, how long each takes."""
    import cupy

    from benchmarks.gpu import contenders as gpu_contenders
    from benchmarks.gpu import report as gpu_report
    from benchmarks.harness.problem import Problem

    problem = Problem(key["cell"], tuple(key["shape"]))
    wanted = gpu_contenders.float64_results(problem)
    found, missing = gpu_contenders.make_implementations(problem, key["tf32"])
    error = {who: gpu_contenders.relative_errors(c.results(), wanted) for who, c in found.items()}
    rows = []
    for which in ("forward", "both"):
        times = gpu_contenders.time_in_turns(found, which, args.rounds, args.seconds)
        own = {who: e[which] for who, e in error.items() if e}
        rows.append(gpu_report.summarize_row({**key, "pass": which}, times, missing, own, ceilings))
    del found
    cupy.get_default_memory_pool().free_all_blocks()
    return rows


def inaccurate_tiers(row: dict[str, Any]) -> list[str]:
    """Which of our tiers are further from float64 than rounding allows."""
    return [who for who, e in row["error"].items() if who != "torch" and not e <= TOLERANCES[row["tf32"]]]


def measure_grid(args: argparse.Namespace) -> int:
    """Measure the grid and the text job; 1 if a result was wrong."""
    from benchmarks.gpu import contenders as gpu_contenders
    from benchmarks.gpu import training as gpu_training

    run: dict[str, Any] = {"machine": describe_gpu(), "notes": [], "rows": [], "training": []}
    run["ceilings"] = gpu_contenders.ceilings()
    for key in grid_keys(args):
        with record_failure(run, args, str(key)):
            for row in measure_row(key, args, run["ceilings"]):
                run["rows"].append(row)
                if bad := inaccurate_tiers(row):
                    run["notes"].append(f"WRONG: {', '.join(bad)} at {key} ({row['pass']}): {row['error']}")
            medians = {w: round(u["median"], 3) for w, u in row["us"].items()}
            print(f"{key}: {medians} us", file=sys.stderr, flush=True)
    for tf32 in () if args.no_training else (False, True):
        for cell in args.cell:
            with record_failure(run, args, f"training {cell}"):
                run["training"].append(gpu_training.measure_training(cell, 64, tf32))
                if not run["training"][-1]["agree"]:
                    run["notes"].append(f"WRONG: the losses of training {cell} differ: {run['training'][-1]['losses']}")
    print(args.markdown.read_text(encoding="utf-8"), end="")
    return int(any(note.startswith(("WRONG", "FAILED")) for note in run["notes"]))


@contextmanager
def record_failure(run: dict[str, Any], args: argparse.Namespace, what: str) -> Iterator[None]:
    """One row or job: what it raises is noted, all is written, and the next has its turn."""
    try:
        yield
    except Exception as error:  # out of memory, a library's refusal: of this row only
        run["notes"].append(f"FAILED: {what}: {type(error).__name__}: {error}")
        print(run["notes"][-1], file=sys.stderr, flush=True)
    write_report(run, args)


def run_each_tier() -> int:
    """Every tier once, small: for compute-sanitizer, which slows everything down a hundredfold."""
    from benchmarks.gpu import contenders as gpu_contenders
    from benchmarks.harness.problem import Problem

    failed = 0
    for cell in gpu_contenders.LAYER_CLASSES:
        for h, n, t in SANITIZER_SHAPES:
            problem = Problem(cell, (h, h, n, t))
            wanted = gpu_contenders.float64_results(problem)
            found, missing = gpu_contenders.make_implementations(problem, False)
            tiers = {who: c for who, c in found.items() if who.startswith("tier")}
            error = {who: gpu_contenders.relative_errors(c.results(), wanted)["both"] for who, c in tiers.items()}
            print(cell, (h, n, t), error, {w: why for w, why in missing.items() if w == "tier3"}, flush=True)
            failed |= any(not e <= TOLERANCES[False] for e in error.values())
    return int(failed)


def run_sanitizer() -> int:
    """compute-sanitizer over `run_each_tier`: out of bounds, misaligned, races in shared memory."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        print("compute-sanitizer is not installed (it comes with the CUDA toolkit): not run", file=sys.stderr)
        return 1
    command = [sys.executable, str(HERE / "gpu.py"), "--exercise"]
    codes = []
    for check in ("memcheck", "racecheck"):
        print(f"compute-sanitizer --tool {check}", file=sys.stderr, flush=True)
        codes.append(subprocess.run([tool, "--tool", check, "--error-exitcode", "9", *command], check=False).returncode)
    return int(any(codes))


def run_test_suite() -> int:
    """The whole test suite on CuPy."""
    command = [sys.executable, "-m", "pytest", "-q", "--backend", "cupy", str(HERE.parent / "tests")]
    return int(subprocess.run(command, cwd=HERE.parent, check=False).returncode != 0)


def main(argv: list[str] | None = None) -> int:
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
