"""Running a small LSTM from a file: install size, import, first output, latency of a step; against its peers.

    python benchmarks/cpu/deployment.py                       installs each contender into a folder of its own, then measures
    python benchmarks/cpu/deployment.py --targets DIR         keeps these folders in DIR, and finds them there again
    python benchmarks/cpu/deployment.py --install-only ...    the first half

An install is `pip install --target` into an empty folder: its size is that of everything that came. Every figure is
from fresh processes that see this folder and the standard library, the contenders taking turns. Outputs are compared
before anything is reported. "First output" runs from the start of the process, the interpreter included; numba compiles
at the second step, which is why there is a tenth.
Needs the extra `onnx` here, to write the model for ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import xprnn
from benchmarks.harness import machine

ROOT = Path(__file__).resolve().parents[1]
TORCH_REQUIREMENT = "torch==2.13.0"  # the one of pyproject.toml
D, H, V, T = 16, 64, 8, 100
COLUMNS = {
    "size": ("installed, MB", 1e-6),
    "import": ("import, ms", 1e3),
    "first": ("first output, ms", 1e3),
    "tenth": ("tenth output, ms", 1e3),
    "step": ("a step, µs", 1.0),
    "step99": ("99 of 100 steps within, µs", 1.0),
    "sequence": (f"a step of {T} at once, µs", 1.0),
    "memory": ("memory at most, MB", 1.0),
}


class Deployment(NamedTuple):
    """What is installed, which part of runtime_child.py runs, on which file."""

    packages: tuple[str, ...]
    runtime: str
    model_file: str
    cold_cache: bool = False  # nothing compiled before


DEPLOYMENTS = {
    "xprnn": Deployment((".",), "xprnn", "model.safetensors"),
    "xprnn[fast]": Deployment((".[fast]",), "xprnn", "model.safetensors"),
    "xprnn[fast], first time ever": Deployment((".[fast]",), "xprnn", "model.safetensors", cold_cache=True),
    "ONNX Runtime": Deployment(("onnxruntime",), "onnxruntime", "model.onnx"),
    "torch": Deployment((TORCH_REQUIREMENT, "numpy"), "torch", "model.pt"),
    "(NumPy alone)": Deployment(("numpy",), "numpy", "model.safetensors"),
}


def install(targets: Path, contender: Deployment) -> Path:
    """The folder with the contender's packages, filled if it is not there."""
    name = "-".join(re.sub(r"^\.", "xprnn", package) for package in contender.packages)
    place = targets / name
    if not place.exists():
        beside = targets / f"{name}.part"
        shutil.rmtree(beside, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(beside), *contender.packages]
        subprocess.run(command, cwd=ROOT, check=True)
        beside.rename(place)
    return place


def directory_size(place: Path) -> int:
    """Bytes of all files below."""
    return sum(path.lstat().st_size for path in place.rglob("*") if path.is_file())


def write_models(folder: Path) -> None:
    """The same network for everyone, and the inputs."""
    rng = np.random.default_rng(0)
    model = xprnn.Sequential(rnn=xprnn.LSTM(D, H), head=xprnn.Linear(H, V))
    params = model.init(rng, like=np.zeros(0, np.float32))
    xprnn.save(folder / "model.safetensors", model, params)
    xprnn.to_onnx(model, params, folder / "model.onnx", lengths=False, optional=False)
    import torch

    torch.save(xprnn.to_torch(model, params).state_dict, folder / "model.pt")
    (folder / "inputs.bin").write_bytes(rng.standard_normal((T, 1, D)).astype(np.float32).tobytes())


def run_process(contender: Deployment, place: Path, folder: Path, cache: Path) -> dict[str, Any]:
    """One process of its own."""
    environment = machine.benchmark_environment(1) | {"PYTHONPATH": str(place), "XPRNN_CACHE": str(cache)}
    python = getattr(sys, "_base_executable", sys.executable)  # not a virtual environment's: nothing else is to be seen
    child = [python, "-s", "-S", "-P", str(ROOT / "benchmarks" / "runtime_child.py"), contender.runtime]
    files = [str(folder / contender.model_file), str(folder / "inputs.bin")]
    begin = time.perf_counter()
    with subprocess.Popen([*child, *files], env=environment, stdout=subprocess.PIPE, text=True, cwd=folder) as process:
        assert process.stdout is not None
        times, line = {}, process.stdout.readline()
        while line.strip() in ("first", "tenth"):
            times[line.strip()] = time.perf_counter() - begin
            line = process.stdout.readline()
    if process.returncode:
        raise SystemExit(f"{contender.runtime}: exit code {process.returncode}")
    if contender.runtime == "numpy":
        times.clear()  # it has no outputs
    return json.loads(line) | times


def measure(targets: Path, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """The figures of each round of each contender, who take turns."""
    places = {name: install(targets, contender) for name, contender in DEPLOYMENTS.items()}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in DEPLOYMENTS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_models(folder)
        run_process(DEPLOYMENTS["xprnn[fast]"], places["xprnn[fast]"], folder, folder / "warm")
        for k in range(rounds):
            for name, contender in DEPLOYMENTS.items():
                cache = folder / (f"cold{k}" if contender.cold_cache else "warm")
                found[name].append(run_process(contender, places[name], folder, cache))
    for name, runs in found.items():
        for run in runs:
            run["size"] = directory_size(places[name])
    return found


def max_difference(found: dict[str, list[dict[str, Any]]]) -> float:
    """The largest difference between anyone's outputs and ours, streamed ones included."""
    want = np.asarray(found["xprnn"][0].get("y"))
    others = [run[key] for runs in found.values() for run in runs for key in ("y", "streamed") if key in run]
    return max(float(np.max(np.abs(np.asarray(y) - want))) for y in others)


def markdown_table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Medians, half the interquartile range, and in brackets the figure over xprnn's."""
    lines = ["| | " + " | ".join(title for title, _ in COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, runs in found.items():
        cells = []
        for key, (_, scale) in COLUMNS.items():
            values = [scale * run[key] for run in runs if run.get(key) is not None]
            if not values:
                cells.append("")
                continue
            middle, ours = statistics.median(values), scale * statistics.median(run[key] for run in found["xprnn"])
            low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (middle,) * 3
            spread = f" ±{50 * (high - low) / middle:.0f}%" if high > low else ""
            ratio = "" if name == "xprnn" else f" ({middle / ours:.2f})"
            cells.append(f"{middle:.3g}{spread}{ratio}" if middle < 1000 else f"{middle:,.0f}{spread}{ratio}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Install, measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=Path, help="where the contenders are installed (default: a temporary folder)")
    parser.add_argument("--install-only", action="store_true", help="install them, and measure another time")
    parser.add_argument("--rounds", type=int, default=7, help="processes of each (default: 7)")
    parser.add_argument("--json", type=Path, help="write all figures here too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        targets = (args.targets or Path(temporary)).resolve()
        targets.mkdir(parents=True, exist_ok=True)
        for contender in DEPLOYMENTS.values():
            install(targets, contender)
        if args.install_only:
            return 0
        about = machine.describe()
        found = measure(targets, args.rounds)
    apart = max_difference(found)
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    print(
        f"LSTM of {H} units, {D} inputs, {V} outputs, one sequence, float32, one thread; {args.rounds} processes each."
    )
    print(markdown_table(found))
    print(f"\nOutputs differ by at most {apart:.1e}.")
    if args.json:
        args.json.write_text(
            json.dumps({"machine": about, "rounds": args.rounds, "apart": apart, "runs": found}), encoding="utf-8"
        )
    return 0 if apart < 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
