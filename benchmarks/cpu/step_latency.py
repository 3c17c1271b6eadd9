"""What one step of a stream costs, over many steps: ours beside torch's cells, ONNX Runtime and the article's cell.

    python benchmarks/cpu/step_latency.py                      100,000 steps of each contender, some two minutes
    python benchmarks/cpu/step_latency.py --steps 5000         quicker, without a trustworthy p99.9

float32, N = 1, the state carried from step to step, one thread. "floor" is the arithmetic alone on ready arrays: the
compiled kernel called with arrays that are there already, or the same NumPy calls written out by hand; what a step
takes above it is its overhead. Contenders take turns in blocks, so that what disturbs the machine hits all alike.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.harness import article_baseline, machine, step_latency
from benchmarks.harness.options import CELLS, argument_parser, write_results
from benchmarks.harness.peers import missing_reason
from benchmarks.harness.problem import Problem
from benchmarks.harness.step_latency import StreamStep
from xprnn.kernels.config import allow_jit
from xprnn.kernels.jit import compile_cache
from xprnn.kernels.jit.step import step_source

XPRNN_NUMPY = "xprnn, NumPy"
MAX_OVERHEAD_US = {"fast": 2.0, "NumPy": 6.0}  # microseconds above the floor


def compiled_floor(problem: Problem) -> StreamStep:
    """The bare compiled step, its arrays made before."""
    layer = step_latency.LAYERS[problem.cell](*problem.shape[:2])
    printed = step_source(layer.resolved_cell, 32, True, False)
    assert printed is not None
    kernel, x, d = compile_cache.compile_kernel(*printed), problem.x[0], problem.shape[0]
    weights = tuple(problem.params[name] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    states = [np.zeros((1, 1, problem.shape[1]), np.float32) for _ in problem.state]
    after, y = [np.empty_like(s) for s in states], np.empty((1, problem.shape[1]), np.float32)
    calls = [(0, d, *weights, x, *states, y, *after), (0, d, *weights, x, *after, y, *states)]  # there and back

    def step() -> Any:
        calls.reverse()
        kernel(*calls[1])
        return y

    return step


def numpy_floor(problem: Problem) -> StreamStep:
    """The straight NumPy calls, by hand, for one row."""
    h_size, dot, add, multiply, tanh = problem.shape[1], np.ndarray.dot, np.add, np.multiply, np.tanh
    w, u, bi, bh = (problem.params[name] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    x, h, c = problem.x[0, 0], np.zeros(h_size, np.float32), np.zeros(h_size, np.float32)
    half = np.full(len(bi), 0.5, np.float32)
    half[2 * h_size : 3 * h_size] = 1.0  # the LSTM's candidate is a tanh
    gru_half, offset, held = half[: 2 * h_size].copy(), 1 - half, [h, c]

    def elman() -> Any:
        held[0] = tanh(add(add(dot(w, x), dot(u, held[0])), add(bi, bh)))
        return held[0][None]

    def lstm() -> Any:
        a = add(add(dot(w, x), dot(u, held[0])), add(bi, bh))
        a = add(multiply(tanh(multiply(a, half)), half), offset)
        i, f, g, o = a[:h_size], a[h_size : 2 * h_size], a[2 * h_size : 3 * h_size], a[3 * h_size :]
        held[1] = add(multiply(f, held[1]), multiply(i, g))
        held[0] = multiply(o, tanh(held[1]))
        return held[0][None]

    def gru() -> Any:
        a, b = add(dot(w, x), bi), add(dot(u, held[0]), bh)
        s = add(a[: 2 * h_size], b[: 2 * h_size])
        s = add(multiply(tanh(multiply(s, gru_half)), gru_half), gru_half)
        n = tanh(add(a[2 * h_size :], multiply(s[:h_size], b[2 * h_size :])))
        held[0] = add(n, multiply(s[h_size:], np.subtract(held[0], n)))
        return held[0][None]

    return {"elman": elman, "lstm": lstm, "gru": gru}[problem.cell]


def article_step(problem: Problem) -> StreamStep:
    """The article's cell, its prediction included: it has no other."""
    _, _, _, parameters = problem.article_arrays()
    x, held = problem.x[0].T.copy(), [np.zeros((problem.shape[1], 1), np.float32)]

    def step() -> Any:
        held[0], _, _ = article_baseline.rnn_cell_forward(x, held[0], parameters)
        return held[0].T

    return step


def measure_row(cell: str, hidden: int, count: int, jit: bool) -> dict[str, Any]:
    """One cell and size, with everyone who is installed."""
    makers: dict[str, Callable[[Problem], StreamStep]] = {}
    if jit:
        makers |= {"xprnn, fast": step_latency.xprnn_step, "floor, fast": compiled_floor}
    makers |= {XPRNN_NUMPY: step_latency.xprnn_step, "floor, NumPy": numpy_floor}
    makers |= {
        title: make
        for name, title, make in (
            ("torch", "torch", step_latency.torch_step),
            ("onnxruntime", "ONNX Runtime", step_latency.onnxruntime_step),
        )
        if not missing_reason(name)
    }
    makers |= {"the article": article_step} if cell == "elman" else {}
    problem = Problem(cell, (step_latency.D, hidden, 1, 1))
    return step_latency.compare_steps(makers, problem, count, lambda name: allow_jit(name != XPRNN_NUMPY))


def overhead(row: dict[str, Any], variant: str) -> float | None:
    """Microseconds that our median takes above the arithmetic's."""
    found = row["microseconds"]
    ours, floor = found.get(f"xprnn, {variant}"), found.get(f"floor, {variant}")
    return ours["p50"] - floor["p50"] if ours and floor else None


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The overhead of each cell and size."""
    return [
        {"what": f"step, {r['cell']}, H={r['hidden']}, {way}: overhead, microseconds", "value": value, "most": most}
        for r in rows
        for way, most in MAX_OVERHEAD_US.items()
        if (value := overhead(r, way)) is not None
    ]


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: p50 / p99 / p99.9, and the overhead of our median."""
    names = list(dict.fromkeys(name for r in rows for name in r["microseconds"]))
    lines = [f"| cell | H | {' | '.join(names)} | overhead, fast | overhead, NumPy |"]
    lines += ["|" + "---|" * (len(names) + 4)]
    for r in rows:
        found = r["microseconds"]
        cells = ["" if n not in found else " / ".join(f"{v:.1f}" for v in found[n].values()) for n in names]
        cells += ["" if (value := overhead(r, way)) is None else f"{value:.1f}" for way in MAX_OVERHEAD_US]
        note = f" (disagree: {', '.join(r['disagree'])})" if r["disagree"] else ""
        lines.append(f"| {r['cell']}{note} | {r['hidden']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, print, write."""
    parser = argument_parser(__doc__, cells=CELLS)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--hidden", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument("--short", action="store_true", help="a tenth of the steps")
    args = parser.parse_args()
    steps = max(1, args.steps // 10) if args.short else args.steps
    machine.pin_to_cores(machine.available_cores()[:1])  # one core, so that nobody's threads help
    rows = [measure_row(c, h, steps, compile_cache.numba_available()) for c in args.cell for h in args.hidden]
    lines = ["Microseconds a step, p50 / p99 / p99.9:", "", markdown_table(rows)]
    failed = any(r["disagree"] for r in rows)
    return write_results(args, lines, {"steps": steps, "rows": rows, "goals": goals(rows)}, failed)


if __name__ == "__main__":
    sys.exit(main())
