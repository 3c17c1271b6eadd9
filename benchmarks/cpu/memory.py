"""Measures peak memory against T, and the time that checkpoints cost.

    python -m benchmarks.cpu.memory            about two minutes
    python -m benchmarks.cpu.memory --quick    shorter sequences

Measured are the full tape, checkpoints, and an endless stream in windows. Memory is what NumPy reports to tracemalloc
from before the forward pass to the end of the backward pass, less the caller's arrays x, dy, y and dx. The exponent is
the slope of log(peak) over log(T) between the two largest T. Times are CPU times of the process (time.process_time),
medians of interleaved runs, with one BLAS thread.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

import xprnn
from benchmarks.harness.options import argument_parser
from benchmarks.harness.report import Goal, Report, markdown_table, write_results
from xprnn.training.truncated_bptt import window_gradients, windows

CHECKPOINT_BUDGET = "4MiB"
CHECKPOINT_SETTINGS: dict[str, Any] = {
    "full tape": None,
    'checkpoint="sqrt"': "sqrt",
    f'checkpoint="{CHECKPOINT_BUDGET}"': CHECKPOINT_BUDGET,
}
K1, K2, CHUNK_STEPS = 256, 512, 5000
LAYERS = {"RNN": xprnn.RNN, "LSTM": xprnn.LSTM, "GRU": xprnn.GRU}
TIMED_SHAPES = [(1, 16, 1, 4000), (64, 128, 32, 400), (128, 256, 64, 200)]
MAX_TAPE_EXPONENT, MAX_EXPONENT = 1.02, 0.1  # of the full tape, which grows linearly, and of everything else
Row = dict[str, Any]


def peak_bytes(run: Callable[[], int]) -> int:
    """Return the largest number of bytes held during `run`, less the caller's bytes, which `run` returns."""
    tracemalloc.start()
    caller_bytes = run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - caller_bytes


def run_sequence(layer: Any, params: Any, steps: int, checkpoint: Any) -> int:
    """Run forward and backward over one sequence. Return the bytes of x, y, dy and dx."""
    x = np.ones((steps, 1, layer.input_size), np.float32)
    y, _, tape = layer.forward(params, x, checkpoint=checkpoint)
    dy = np.ones_like(y)
    dx = layer.backward(tape, dy).dx
    return int(x.nbytes + y.nbytes + dy.nbytes + dx.nbytes)


def run_windows(layer: Any, params: Any, steps: int) -> int:
    """Run the sequence from a generator of chunks, in windows of K1 new steps and gradients K2 steps back. Return 0."""

    def chunks() -> Iterator[Any]:
        for t in range(0, steps, CHUNK_STEPS):
            n = min(CHUNK_STEPS, steps - t)
            yield np.ones((n, 1, layer.input_size), np.float32), np.zeros((n, 1, layer.output_size), np.float32)

    state = None
    for window in windows(chunks(), K1, K2):
        _, _, state = window_gradients(layer, params, window, state, xprnn.mse)
    return 0


def measure_memory(lengths: list[int]) -> list[Row]:
    """Measure the peaks of an LSTM of 16 units, batch 1, at each T."""
    layer = xprnn.LSTM(1, 16)
    params = layer.init(np.random.default_rng(0), like=np.zeros(0, np.float32))
    rows = []
    for steps in lengths:
        row: Row = {"T": steps}
        for name, checkpoint in CHECKPOINT_SETTINGS.items():
            run_sequence(layer, params, min(steps, 500), checkpoint)  # compiles; its memory is not counted
            row[name] = peak_bytes(lambda c=checkpoint, t=steps: run_sequence(layer, params, t, c))
        row["windows"] = peak_bytes(lambda t=steps: run_windows(layer, params, t))
        rows.append(row)
        print(f"T = {steps:,}: measured", file=sys.stderr, flush=True)
    return rows


def cpu_seconds(call: Callable[[], Any]) -> float:
    """Return the CPU time of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def timed_calls(layer: Any, shape: tuple[int, int, int, int]) -> dict[str, Callable[[], Any]]:
    """Return the calls to time: both passes with the full tape and with checkpoints, and forward alone."""
    d, h, n, steps = shape
    rng = np.random.default_rng(0)
    params = layer.init(rng, like=np.zeros(0, np.float32))
    x, dy = (rng.standard_normal((steps, n, k)).astype(np.float32) for k in (d, h))

    def forward_backward(checkpoint: Any) -> None:
        _, _, tape = layer.forward(params, x, checkpoint=checkpoint)
        layer.backward(tape, dy)

    return {
        "full": lambda: forward_backward(None),
        "sqrt": lambda: forward_backward("sqrt"),
        "forward": lambda: layer.forward(params, x),
    }


def measure_times(rounds: int) -> list[Row]:
    """Measure forward and backward with and without checkpoints."""
    rows = []
    for cell, layer_class in LAYERS.items():
        for shape in TIMED_SHAPES:
            calls = timed_calls(layer_class(*shape[:2]), shape)
            calls["full"](), calls["sqrt"]()
            times: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(rounds):
                for name, call in calls.items():
                    times[name].append(cpu_seconds(call))
            full, sqrt, forward = (statistics.median(seen) for seen in times.values())
            row = {"cell": cell, "shape": shape, "full": full, "ratio": sqrt / full, "floor": 1 + forward / full}
            rows.append(row)
    return rows


def exponents(rows: list[Row]) -> dict[str, float]:
    """Return the slope between the two largest T, for each setting."""
    a, b = rows[-2:]
    return {n: math.log(b[n] / a[n]) / math.log(b["T"] / a["T"]) for n in (*CHECKPOINT_SETTINGS, "windows")}


def goals(rows: list[Row]) -> list[Goal]:
    """Judge the exponents: only the full tape may grow with T."""
    return [
        Goal(f"memory with T, {name}: exponent", value, most=MAX_TAPE_EXPONENT if "full" in name else MAX_EXPONENT)
        for name, value in exponents(rows).items()
    ]


def report(run: dict[str, Any]) -> list[str]:
    """Format both tables."""
    names = [*CHECKPOINT_SETTINGS, "windows"]
    peaks = [[f"{r['T']:,}", *(f"{r[n] / 1e6:.2f}" for n in names)] for r in run["memory"]]
    peaks.append(["exponent", *(f"{s:.2f}" for s in exponents(run["memory"]).values())])
    times = [
        [r["cell"], str(tuple(r["shape"])), f"{r['full'] * 1e3:.1f}", f"{r['ratio']:.2f}", f"{r['floor']:.2f}"]
        for r in run["times"]
    ]
    return [
        f"LSTM, D=1, H=16, N=1, float32; windows: k1={K1}, k2={K2}. Peak memory in MB beyond x, y, dy and dx:",
        "",
        *markdown_table(["T", *names], peaks),
        "",
        'Time of checkpoint="sqrt" over the time of the full tape. Computing all steps again costs 1 + forward/total:',
        "",
        *markdown_table(["cell", "(D, H, N, T)", "full tape, ms", "ratio", "1 + forward/total"], times),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argument_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="T up to 20,000")
    args = parser.parse_args(argv)
    from threadpoolctl import threadpool_limits

    lengths = [5_000, 20_000] if args.quick else [10_000, 100_000, 1_000_000]
    with threadpool_limits(1):
        run = {"times": measure_times(5 if args.quick else 15), "memory": measure_memory(lengths)}
    # Short sequences do not show an exponent.
    return write_results(Report(run, report(run), () if args.quick else goals(run["memory"])), json_file=args.json)


if __name__ == "__main__":
    sys.exit(main())
