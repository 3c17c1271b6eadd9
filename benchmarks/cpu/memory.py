"""Peak bytes against T: full tape, checkpoints, an endless stream in windows; and what checkpoints cost in time.

    python benchmarks/cpu/memory.py            about two minutes
    python benchmarks/cpu/memory.py --quick    smaller T

Memory is what NumPy reports to tracemalloc, from an empty start to the end of the backward pass, less what is the
caller's: x, dy, y and dx. The exponent is the slope of log(peak) over log(T) between the two largest T.
Time is the process's own (time.process_time), medians of interleaved runs, one BLAS thread.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import xprnn
from benchmarks.harness.options import argument_parser, write_results
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


def peak_bytes(run: Callable[[], int]) -> int:
    """The most bytes held at a time while `run` works, less the bytes that it says are the caller's."""
    tracemalloc.start()
    theirs = run()
    high = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return high - theirs


def run_sequence(layer: Any, params: Any, steps: int, checkpoint: Any) -> int:
    """Forward and backward over a sequence in memory."""
    x = np.ones((steps, 1, layer.input_size), np.float32)
    y, _, tape = layer.forward(params, x, checkpoint=checkpoint)
    dy = np.ones_like(y)
    dx = layer.backward(tape, dy).dx
    return int(x.nbytes + y.nbytes + dy.nbytes + dx.nbytes)


def run_windows(layer: Any, params: Any, steps: int) -> int:
    """The same sequence as a generator of chunks, trained in windows of K1 fresh steps, gradients K2 steps back."""

    def chunks() -> Iterator[Any]:
        for t in range(0, steps, CHUNK_STEPS):
            n = min(CHUNK_STEPS, steps - t)
            yield np.ones((n, 1, layer.input_size), np.float32), np.zeros((n, 1, layer.output_size), np.float32)

    state = None
    for window in windows(chunks(), K1, K2):
        _, _, state = window_gradients(layer, params, window, state, xprnn.mse)
    return 0


def measure_memory(lengths: list[int]) -> list[dict[str, Any]]:
    """Peaks of an LSTM of 16 units, batch 1, at each T."""
    layer = xprnn.LSTM(1, 16)
    params = layer.init(np.random.default_rng(0), like=np.zeros(0, np.float32))
    rows = []
    for steps in lengths:
        row: dict[str, Any] = {"T": steps}
        for name, checkpoint in CHECKPOINT_SETTINGS.items():
            run_sequence(layer, params, min(steps, 500), checkpoint)  # what is compiled once is not counted
            row[name] = peak_bytes(lambda c=checkpoint, t=steps: run_sequence(layer, params, t, c))
        row["windows"] = peak_bytes(lambda t=steps: run_windows(layer, params, t))
        rows.append(row)
        print(f"  T = {steps:,} measured", file=sys.stderr, flush=True)
    return rows


def measure_times(rounds: int) -> list[dict[str, Any]]:
    """Forward and backward with and without checkpoints."""
    rows = []
    for cell, maker in LAYERS.items():
        for d, h, n, steps in TIMED_SHAPES:
            layer, rng = maker(d, h), np.random.default_rng(0)
            params = layer.init(rng, like=np.zeros(0, np.float32))
            x, dy = (rng.standard_normal((steps, n, k)).astype(np.float32) for k in (d, h))

            def once(checkpoint: Any, layer: Any = layer, params: Any = params, x: Any = x, dy: Any = dy) -> float:
                start = time.process_time()
                _, _, tape = layer.forward(params, x, checkpoint=checkpoint)
                layer.backward(tape, dy)
                return time.process_time() - start

            def forward(layer: Any = layer, params: Any = params, x: Any = x) -> float:
                start = time.process_time()
                layer.forward(params, x)
                return time.process_time() - start

            seen: dict[Any, list[float]] = {None: [], "sqrt": [], "forward": []}
            once(None), once("sqrt")
            for _ in range(rounds):
                seen[None].append(once(None))
                seen["sqrt"].append(once("sqrt"))
                seen["forward"].append(forward())
            full, cut, ahead = (statistics.median(seen[k]) for k in (None, "sqrt", "forward"))
            rows.append(
                {"cell": cell, "shape": (d, h, n, steps), "full": full, "ratio": cut / full, "floor": 1 + ahead / full}
            )
    return rows


def exponents(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The slope between the two largest T, for each setting."""
    a, b = rows[-2:]
    return {n: math.log(b[n] / a[n]) / math.log(b["T"] / a["T"]) for n in (*CHECKPOINT_SETTINGS, "windows")}


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A full tape grows with T, and nothing else does."""
    found = exponents(rows).items()
    return [
        {"what": f"memory with T, {n}: exponent", "value": v, "most": 1.02 if "full" in n else 0.1} for n, v in found
    ]


def report(run: dict[str, Any]) -> str:
    """The tables, as markdown."""
    names = [*CHECKPOINT_SETTINGS, "windows"]
    lines = ["", f"LSTM, D=1, H=16, N=1, float32; windows: k1={K1}, k2={K2}. Peak MB beyond x, y, dy, dx:", ""]
    lines += ["| T | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {r['T']:,} | " + " | ".join(f"{r[n] / 1e6:.2f}" for n in names) + " |" for r in run["memory"]]
    lines += ["| exponent | " + " | ".join(f"{s:.2f}" for s in exponents(run["memory"]).values()) + " |", ""]
    lines += [
        'Time of checkpoint="sqrt", over that of the full tape; running all steps again costs 1 + forward/total:',
        "",
    ]
    lines += ["| cell | (D, H, N, T) | full tape, ms | ratio | 1 + forward/total |", "|---|---|---|---|---|"]
    for r in run["times"]:
        lines.append(
            f"| {r['cell']} | {tuple(r['shape'])} | {r['full'] * 1e3:.1f} | {r['ratio']:.2f} | {r['floor']:.2f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure, print, write."""
    parser = argument_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="T up to 20,000")
    args = parser.parse_args()
    from threadpoolctl import threadpool_limits

    lengths = [5_000, 20_000] if args.quick else [10_000, 100_000, 1_000_000]
    with threadpool_limits(1):
        run: dict[str, Any] = {"times": measure_times(5 if args.quick else 15), "memory": measure_memory(lengths)}
    run["goals"] = [] if args.quick else goals(run["memory"])  # short sequences do not show an exponent
    return write_results(args, [report(run)], run)


if __name__ == "__main__":
    sys.exit(main())
