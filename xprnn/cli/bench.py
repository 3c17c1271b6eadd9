"""The `bench` command: times the layers of xprnn on this machine and names the kernels that run."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import itertools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xprnn.arrays.namespace import InputError

__all__ = [
    "add_arguments",
    "available_cores",
    "bench_command",
    "installed_versions",
    "machine_summary",
    "parse_shape",
    "quartile_summary",
    "time_interleaved",
]

Call = Callable[[], Any]
CELLS = ("elman", "lstm", "gru")
SHAPES = [(1, 16, 1, 1000), (27, 100, 32, 50), (128, 256, 64, 100)]  # D, H, N, T
ROUNDS, QUICK_ROUNDS, QUICK_SHAPES = 31, 7, 2
MIN_TURN_S = 2e-3  # a shorter turn would mostly time the clock and the switch between calls
MIN_ROUNDS = 5  # rounds that are measured even if they take longer than max_s
PASSES = {"forward": ("forward, ms", 1e3), "forward+backward": ("forward+backward, ms", 1e3), "step": ("step, µs", 1e6)}


def parse_shape(text: str) -> tuple[int, ...]:
    """Parse "D,H,N,T": inputs, hidden units, batch and time steps.

    Raises:
        argparse.ArgumentTypeError: anything but four positive integers.

    >>> parse_shape("1,16,1,1000")
    (1, 16, 1, 1000)
    """
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) != 4 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected D,H,N,T, four positive integers, found {text!r}")
    return shape


def _seconds_per_call(call: Call, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def time_interleaved(
    calls: Mapping[str, Call],
    rounds: int,
    timers: Mapping[str, Callable[[Call], float]] | None = None,
    max_s: float = math.inf,
) -> dict[str, list[float]]:
    """Time several calls in turns, so that a slow drift of the machine affects all of them equally.

    Args:
        calls: name -> call; each has run at least once before.
        rounds: number of rounds; every call has one turn in a round.
        timers: name -> function that runs a call once and returns its seconds (CUDA events). Without one, the host
            clock times as many calls as fill MIN_TURN_S.
        max_s: stop after the round in which this time is used up, but not before 5 rounds.

    Returns:
        name -> seconds per call, one entry a round.
    """
    timers = timers or {}
    counts = {
        name: math.ceil(MIN_TURN_S / max(min(_seconds_per_call(call, 1) for _ in range(2)), 1e-7))
        for name, call in calls.items()
        if name not in timers
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    gc.collect()
    gc.disable()  # a collection would be charged to one call for the garbage of all
    try:
        start = time.perf_counter()
        for k in range(rounds):
            if k >= MIN_ROUNDS and time.perf_counter() - start > max_s:
                break
            for name in order:
                call = calls[name]
                seconds = timers[name](call) if name in timers else _seconds_per_call(call, counts[name])
                times[name].append(seconds)
            order = order[1:] + order[:1]  # no call always follows the one that evicts the caches
    finally:
        gc.enable()
    return times


def quartile_summary(values: list[float]) -> dict[str, Any]:
    """Summarize repeated measurements by median and quartiles.

    >>> quartile_summary([4.0, 1.0, 2.0, 3.0, 5.0])
    {'median': 3.0, 'q1': 2.0, 'q3': 4.0, 'rounds': 5}
    """
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {"median": float(middle), "q1": float(low), "q3": float(high), "rounds": len(values)}


def layer_calls(cell: str, shape: tuple[int, ...]) -> tuple[dict[str, Call], str]:
    """Build a float32 layer and its three calls, and run each call once.

    Args:
        cell: "elman", "lstm" or "gru".
        shape: (D, H, N, T).

    Returns:
        The calls by the names of PASSES, and the kernels that the passes ran (`tape.explain()`).
    """
    from xprnn.layers.rnn_lstm_gru import GRU, LSTM, RNN

    d, h, n, t = shape
    layer: Any = {"elman": RNN, "lstm": LSTM, "gru": GRU}[cell](d, h)
    rng = np.random.default_rng(0)
    params = layer.init(rng, like=np.zeros(0, np.float32))
    x, dy = (rng.standard_normal((t, n, size), dtype=np.float32) for size in (d, h))
    state: list[Any] = [None]

    def forward_backward() -> Any:
        y, _, tape = layer.forward(params, x)
        return layer.backward(tape, dy), y, tape

    def step() -> None:
        _, state[0] = layer.step(params, x[0], state[0])

    calls = {"forward": lambda: layer(params, x), "forward+backward": forward_backward, "step": step}
    for call in calls.values():
        call()
        call()  # a step compiles at the second call
    return calls, forward_backward()[2].explain().partition(": ")[2]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text(encoding="utf-8").splitlines() if ":" in line)
        fields = {k.strip(): v.strip() for k, v in lines.items()}
        if "model name" in fields:
            family = [f"{k} {fields[k]}" for k in ("cpu family", "model") if k in fields]
            return f"{fields['model name']} ({', '.join(family)})"
    return platform.processor() or platform.machine()


def _blas() -> str:
    """Name the BLAS of NumPy, its kernel and its number of threads."""
    from threadpoolctl import threadpool_info

    build = np.show_config("dicts")["Build Dependencies"]["blas"]
    libraries = [info for info in threadpool_info() if info["user_api"] == "blas"]
    kernels = [f"{i.get('architecture') or i['internal_api']} kernel, {i['num_threads']} thread(s)" for i in libraries]
    return f"{build['name']} {build['version']} ({'; '.join(kernels) or 'kernel unknown'})"


def available_cores() -> list[int]:
    """List the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def installed_versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def machine_summary() -> dict[str, Any]:
    """Describe processor, cores, system, load, BLAS and versions, without any path or host name.

    Call it before another library with a BLAS is imported: its threads would be listed, too.
    """
    import xprnn

    return {
        "processor": _processor(),
        "cores": len(available_cores()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
        "blas": _blas(),
        "versions": {"xprnn": xprnn.__version__} | installed_versions(("numpy", "numba")),
    }


def format_table(rows: list[dict[str, Any]]) -> str:
    """Format the measured rows for a terminal, one line for each cell and shape."""
    lines = [["cell", "D,H,N,T", *(heading for heading, _ in PASSES.values()), "kernels"]]
    for (cell, shape), group in itertools.groupby(rows, key=lambda row: (row["cell"], tuple(row["shape"]))):
        by_pass = {row["pass"]: row for row in group}
        texts = []
        for name, (_, scale) in PASSES.items():
            s = by_pass[name]["seconds"]
            texts.append(f"{scale * s['median']:.3g} ±{50 * (s['q3'] - s['q1']) / s['median']:.0f}%")
        lines.append([cell, ",".join(map(str, shape)), *texts, by_pass["forward+backward"]["kernels"]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add("--cell", nargs="+", choices=CELLS, default=CELLS, help="recurrent cells (default: all three)")
    add("--rows", nargs="+", type=parse_shape, metavar="D,H,N,T", help="sizes: inputs, hidden units, batch, steps")
    add("--threads", type=int, default=1, help="threads of the matrix products and kernels (default: 1)")
    add("--quick", action="store_true", help="fewer sizes and repetitions")
    add("--json", metavar="FILE", help="also write all figures to FILE")


def bench_command(args: argparse.Namespace) -> int:
    """Time the layers, print a table, write the figures.

    Args:
        args: the options that `add_arguments` declares.

    Returns:
        The exit code, 0.

    Raises:
        InputError: the process has fewer cores than threads, or the JSON file cannot be written.
    """
    from threadpoolctl import threadpool_limits

    from xprnn.io.archive import write_atomically

    cores = len(available_cores())
    if not 1 <= args.threads <= cores:
        raise InputError(f"--threads: expected 1 to {cores}, the cores of this process, found {args.threads}")
    if args.json:  # fails here if the file cannot be written, not after the measurement
        write_atomically(args.json, b"{}\n")
    shapes = args.rows or (SHAPES[:QUICK_SHAPES] if args.quick else SHAPES)
    rows: list[dict[str, Any]] = []
    with threadpool_limits(args.threads):
        machine = machine_summary()
        for cell, shape in itertools.product(args.cell, shapes):
            calls, kernels = layer_calls(cell, shape)
            for name, times in time_interleaved(calls, QUICK_ROUNDS if args.quick else ROUNDS).items():
                row = {"cell": cell, "shape": list(shape), "pass": name, "threads": args.threads}
                # `explain` describes passes over a sequence; nothing names the kernel of a step.
                named = {} if name == "step" else {"kernels": kernels}
                rows.append(row | {"seconds": quartile_summary(times)} | named)
            print(f"{cell} {','.join(map(str, shape))}: measured", file=sys.stderr, flush=True)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    print(
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}; Python {machine['python']}, {versions}"
    )
    print(f"BLAS {machine['blas']}; load {machine['load']}; float32, {args.threads} thread(s), median ± half the IQR\n")
    print(format_table(rows))
    if args.json:
        write_atomically(args.json, (json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n").encode())
    return 0
