"""Measures the cost of the input's memory layout: the time of a pass over its time on a C-ordered x.

    python -m benchmarks.cpu.layouts [--cell elman lstm gru] [--rounds COUNT]

A layout that the kernels do not read costs a copy of x and no more. Forward, and forward+backward, float32, one thread;
the layouts take turns. Outputs and gradients are compared before timing with those of a C-ordered copy.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness import machine, timing
from benchmarks.harness.agreement import mismatches
from benchmarks.harness.options import CELLS, argument_parser, rerun_keeping_memory
from benchmarks.harness.problem import FORWARD, FORWARD_BACKWARD, Array, Implementation, Problem
from benchmarks.harness.report import Goal, Report, markdown_table, write_results
from benchmarks.harness.xprnn_contenders import LAYERS, layer_arrays

SHAPE = (27, 100, 32, 50)  # D, H, N, T
PASSES = (FORWARD, FORWARD_BACKWARD)
C_ORDERED = "C-ordered"
MAX_RATIO = 1.15
Row = dict[str, Any]


class Layout(NamedTuple):
    """An input array: x (T, N, D), or (N, T, D) for a layer with batch_first=True."""

    x: Array
    batch_first: bool = False


def input_layouts(x: Array) -> dict[str, Layout]:
    """Return layouts of the C-ordered x (T, N, D) by name. All but the expanded arrays have the values of x."""
    read_only = x.copy()
    read_only.setflags(write=False)
    batch_major = np.ascontiguousarray(x.swapaxes(0, 1))
    views = {
        C_ORDERED: x,
        "Fortran-ordered": np.asfortranarray(x),
        "X[:, index]": x[:, np.arange(x.shape[1])],  # NumPy allocates the result with N as its slowest axis
        "X[:, ::2]": np.repeat(x, 2, axis=1)[:, ::2],
        "X[..., ::2]": np.repeat(x, 2, axis=2)[..., ::2],
        "swapaxes view of (N, T, D)": batch_major.swapaxes(0, 1),
        "X[::-1]": x[::-1].copy()[::-1],
        "X[:, ::-1]": x[:, ::-1].copy()[:, ::-1],
        "X[..., ::-1]": x[..., ::-1].copy()[..., ::-1],
        "read-only": read_only,
        "expanded over T": np.broadcast_to(x[:1], x.shape),
        "expanded over N": np.broadcast_to(x[:, :1], x.shape),
    }
    return {name: Layout(view) for name, view in views.items()} | {"batch_first=True": Layout(batch_major, True)}


def make_implementation(problem: Problem, layout: Layout) -> Implementation:
    """Run xprnn's layer on x in a layout. The results are time-major."""
    _, params, _, state, dy = layer_arrays(problem)
    layers: Any = LAYERS[problem.cell]  # `batch_first` is not in the type of LAYERS
    layer, x = layers(*problem.shape[:2], batch_first=layout.batch_first), layout.x

    def time_major(a: Array) -> Array:
        return a.swapaxes(0, 1) if layout.batch_first else a

    dy = np.ascontiguousarray(time_major(dy))

    def forward() -> Any:
        return layer(params, x, state)

    def forward_backward() -> Any:
        y, _, tape = layer.forward(params, x, state)
        return y, layer.backward(tape, dy)

    def results() -> dict[str, Array]:
        y, (dx, _, dparams) = forward_backward()
        arrays = {"y": time_major(forward()[0]), "y (with a tape)": time_major(y), "dx": time_major(dx)}
        return arrays | {f"d{name}": gradient for name, gradient in dparams.items()}

    return Implementation({FORWARD: forward, FORWARD_BACKWARD: forward_backward}, results)


def disagreement(problem: Problem, layout: Layout, implementation: Implementation) -> list[str]:
    """Compare the results of a layout with those of a C-ordered, time-major copy of its values."""
    x = np.ascontiguousarray(layout.x.swapaxes(0, 1) if layout.batch_first else layout.x)
    return mismatches(make_implementation(problem, Layout(x)).results(), implementation.results())


def measure_cell(cell: str, rounds: int, shape: tuple[int, int, int, int] = SHAPE) -> list[Row]:
    """Measure both passes of a cell: seconds, and the medians of the rounds' ratios to the C-ordered x."""
    problem, implementations, problems = Problem(cell, shape), dict[str, Implementation](), list[str]()
    for name, layout in input_layouts(problem.x).items():
        implementation = make_implementation(problem, layout)
        differences = disagreement(problem, layout, implementation)
        problems += [f"{name}: {difference}" for difference in differences]
        if not differences:
            implementations[name] = implementation
    rows = []
    for pass_name in PASSES:
        calls = {name: implementation.calls[pass_name] for name, implementation in implementations.items()}
        for call in calls.values():
            call()
        times = timing.time_interleaved(calls, rounds)
        ratios = {name: timing.paired_ratio(t, times[C_ORDERED]) for name, t in times.items()}
        seconds = {name: timing.quartile_summary(t) for name, t in times.items()}
        rows.append({"cell": cell, "pass": pass_name, "seconds": seconds, "ratios": ratios, "disagree": problems})
    return rows


def goals(rows: list[Row]) -> list[Goal]:
    """Judge every layout but the C-ordered one."""
    return [
        Goal(f"layout of x, {row['cell']}, {row['pass']}, {name} over {C_ORDERED}", ratio, most=MAX_RATIO)
        for row in rows
        for name, ratio in row["ratios"].items()
        if name != C_ORDERED
    ]


def report(rows: list[Row]) -> list[str]:
    """Format a table with a line for each layout: milliseconds of the C-ordered x, and ratios to it."""
    d, h, n, t = SHAPE
    caption = (
        f"Time of a pass over its time on a C-ordered x; D={d}, H={h}, N={n}, T={t}, float32, one thread; medians of "
        "the rounds' ratios. X is a larger or reversed array whose slice has the values of x."
    )
    names = dict.fromkeys(name for row in rows for name in row["ratios"] if name != C_ORDERED)
    table: list[list[str] | str] = [
        [f"{C_ORDERED}, milliseconds", *(f"{1e3 * row['seconds'][C_ORDERED]['median']:.3g}" for row in rows)]
    ]
    table += [
        [name, *(f"{row['ratios'][name]:.2f}" if name in row["ratios"] else "" for row in rows)] for name in names
    ]
    table += [
        f"excluded: {row['cell']}, {problem}" for row in rows if row["pass"] == FORWARD for problem in row["disagree"]
    ]
    return [caption, "", *markdown_table(["x", *(f"{row['cell']}, {row['pass']}" for row in rows)], table)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = argument_parser(__doc__, rounds=25, cells=CELLS).parse_args(argv)
    if (code := rerun_keeping_memory()) is not None:
        return code
    machine.pin_to_cores(machine.available_cores()[:1])
    rows = []
    for cell in args.cell:
        rows += measure_cell(cell, args.rounds)
        print(f"{cell}: measured", file=sys.stderr, flush=True)
    failed = any(row["disagree"] for row in rows)
    return write_results(Report({"rows": rows}, report(rows), goals(rows), failed=failed), json_file=args.json)


if __name__ == "__main__":
    sys.exit(main())
