"""Measures what it takes to run a small LSTM from a file: install size, import, first output, latency, memory.

    python -m benchmarks.cpu.deployment                       installs each runtime into its own folder, then measures
    python -m benchmarks.cpu.deployment --targets DIR         keeps these folders in DIR and uses them again
    python -m benchmarks.cpu.deployment --install-only ...    only installs

Each runtime is installed by `pip install --target` into an empty folder; the install size includes all dependencies.
Every figure comes from fresh processes that see only this folder and the standard library; the runtimes take turns.
Outputs are compared before anything is reported. The time to the first output includes the start of the interpreter.
numba compiles at the second step, so the time to the tenth output is reported, too.
Writing the model files needs torch and the extra `onnx` in this environment.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import xprnn
from benchmarks.harness import machine
from benchmarks.harness.options import argument_parser
from benchmarks.harness.peers import PEERS
from benchmarks.harness.report import Report, format_time, machine_line, markdown_table, write_results
from benchmarks.harness.timing import quartile_summary
from benchmarks.harness.worker_pool import ROOT, run_process

WORKER = Path(__file__).with_name("deployment_worker.py")
D, H, V, T = 16, 64, 8, 100
MAX_DIFFERENCE = 1e-5  # between outputs
COLUMNS = {  # key -> heading and factor
    "size": ("installed, MB", 1e-6),
    "import": ("import, ms", 1e3),
    "first": ("first output, ms", 1e3),
    "tenth": ("tenth output, ms", 1e3),
    "step": ("a step, µs", 1.0),
    "step99": ("99 of 100 steps within, µs", 1.0),
    "sequence": (f"a step of {T} at once, µs", 1.0),
    "memory": ("peak memory, MB", 1.0),
}
Run = dict[str, Any]


class Deployment(NamedTuple):
    """A runtime to measure.

    runtime: name of the runtime in deployment_worker.
    requirements: what pip installs.
    model_file: the file that it runs.
    cold_cache: True: nothing was compiled before.
    """

    runtime: str
    requirements: tuple[str, ...]
    model_file: str
    cold_cache: bool = False


DEPLOYMENTS = {
    "xprnn": Deployment("xprnn", (".",), "model.safetensors"),
    "xprnn[fast]": Deployment("xprnn", (".[fast]",), "model.safetensors"),
    "xprnn[fast], nothing compiled yet": Deployment("xprnn", (".[fast]",), "model.safetensors", cold_cache=True),
    "ONNX Runtime": Deployment("onnxruntime", PEERS["onnxruntime"].requirements[0], "model.onnx"),
    "torch": Deployment("torch", PEERS["torch"].requirements[0], "model.pt"),
    "(NumPy alone)": Deployment("numpy", ("numpy",), "model.safetensors"),
}


def install(targets: Path, deployment: Deployment) -> Path:
    """Return the folder with the deployment's packages; install them if it does not exist."""
    name = "-".join(re.sub(r"^\.", "xprnn", requirement) for requirement in deployment.requirements)
    folder = targets / name
    if not folder.exists():
        partial = targets / f"{name}.part"
        shutil.rmtree(partial, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(partial)]
        subprocess.run([*command, *deployment.requirements], cwd=ROOT, check=True)
        partial.rename(folder)
    return folder


def directory_size(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def write_models(folder: Path) -> None:
    """Write the network in the format of each runtime, and the inputs."""
    rng = np.random.default_rng(0)
    model = xprnn.Sequential(rnn=xprnn.LSTM(D, H), head=xprnn.Linear(H, V))
    params = model.init(rng, like=np.zeros(0, np.float32))
    xprnn.save(folder / "model.safetensors", model, params)
    xprnn.to_onnx(model, params, folder / "model.onnx", lengths=False, optional=False)
    import torch

    torch.save(xprnn.to_torch(model, params).state_dict, folder / "model.pt")
    (folder / "inputs.bin").write_bytes(rng.standard_normal((T, 1, D)).astype(np.float32).tobytes())


def run_once(deployment: Deployment, packages: Path, folder: Path, cache: Path) -> Run:
    """Measure one fresh process.

    Args:
        deployment: the runtime.
        packages: the only folder of packages that the process sees.
        folder: holds the model files and inputs.
        cache: folder of kernels that xprnn compiles.
    """
    environment = machine.benchmark_environment(1) | {"PYTHONPATH": str(packages), "XPRNN_CACHE": str(cache)}
    python = getattr(sys, "_base_executable", sys.executable)  # not a virtual environment's: its packages stay hidden
    files = [str(folder / deployment.model_file), str(folder / "inputs.bin")]
    result = run_process([python, "-s", "-S", "-P", str(WORKER), deployment.runtime, *files], environment, folder)
    if result.returncode:
        raise SystemExit(f"{deployment.runtime}: exit code {result.returncode}")
    marks = {line: seconds for line, seconds in zip(result.lines, result.line_times, strict=True) if line[0] != "{"}
    figures: Run = json.loads(result.lines[-1])
    return figures | ({} if deployment.runtime == "numpy" else marks)


def measure(targets: Path, rounds: int) -> dict[str, list[Run]]:
    """Measure all deployments in turns. Return name -> figures of each round."""
    packages = {name: install(targets, deployment) for name, deployment in DEPLOYMENTS.items()}
    runs: dict[str, list[Run]] = {name: [] for name in DEPLOYMENTS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_models(folder)
        run_once(DEPLOYMENTS["xprnn[fast]"], packages["xprnn[fast]"], folder, folder / "warm")
        for k in range(rounds):
            for name, deployment in DEPLOYMENTS.items():
                cache = folder / (f"cold{k}" if deployment.cold_cache else "warm")
                size = directory_size(packages[name]) if not k else runs[name][0]["size"]
                runs[name].append(run_once(deployment, packages[name], folder, cache) | {"size": size})
    return runs


def max_difference(runs: dict[str, list[Run]]) -> float:
    """Return the largest difference between any output, streamed or not, and that of xprnn."""
    expected = np.asarray(runs["xprnn"][0]["y"])
    outputs = [run[key] for seen in runs.values() for run in seen for key in ("y", "streamed") if key in run]
    return max(float(np.max(np.abs(np.asarray(y) - expected))) for y in outputs)


def report(description: dict[str, Any], runs: dict[str, list[Run]], rounds: int) -> list[str]:
    """Format medians, half the interquartile range, and in brackets the ratio to xprnn."""
    table = []
    for name, seen in runs.items():
        cells = []
        for key, (_, scale) in COLUMNS.items():
            values = [run[key] for run in seen if run.get(key) is not None]
            if not values:
                cells.append("")
                continue
            summary = quartile_summary(values)
            xprnn_median = quartile_summary([run[key] for run in runs["xprnn"]])["median"]
            ratios = [] if name == "xprnn" else [summary["median"] / xprnn_median]
            cells.append(format_time(summary, scale, ratios).replace(" ±0%", ""))
        table.append([name, *cells])
    return [
        machine_line(description),
        "",
        f"LSTM of {H} units, {D} inputs, {V} outputs, one sequence, float32, one thread; {rounds} processes each.",
        "",
        *markdown_table(["", *(heading for heading, _ in COLUMNS.values())], table),
        "",
        f"Outputs differ by at most {max_difference(runs):.1e}.",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Install, measure, compare, print."""
    parser = argument_parser(__doc__, rounds=7)
    parser.add_argument("--targets", type=Path, metavar="DIR", help="install here (default: a temporary folder)")
    parser.add_argument("--install-only", action="store_true", help="install, and do not measure")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        targets = (args.targets or Path(temporary)).resolve()
        targets.mkdir(parents=True, exist_ok=True)
        for deployment in DEPLOYMENTS.values():
            install(targets, deployment)
        if args.install_only:
            return 0
        description = machine.describe()
        runs = measure(targets, args.rounds)
    difference = max_difference(runs)
    figures = {"machine": description, "rounds": args.rounds, "difference": difference, "runs": runs}
    failed = not difference < MAX_DIFFERENCE
    return write_results(Report(figures, report(description, runs, args.rounds), failed=failed), json_file=args.json)


if __name__ == "__main__":
    sys.exit(main())
