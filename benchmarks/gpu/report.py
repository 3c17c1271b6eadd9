"""Lower bounds, goals and the Markdown of a GPU run.

python -m benchmarks.gpu.report FILE    prints the Markdown of a JSON file again
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.contenders import TITLES
from benchmarks.harness.problem import FORWARD, FORWARD_BACKWARD, GATE_COUNTS, matmul_flops
from benchmarks.harness.report import format_time, machine_line, markdown_table
from benchmarks.harness.timing import paired_ratio, quartile_summary

__all__ = ["floors", "goal_lines", "markdown_report", "summarize_row"]

TIERS = ("tier3", "tier2", "tier1")
# Fewest cycles of one step: read the state from shared memory, add across a warp, tanh, write. Beyond 128 units the
# state must also pass from one multiprocessor to another (arXiv:2402.13499: 29 and 180 cycles).
STEP_CYCLES, CROSS_SM_CYCLES = 239, 180
MAX_SINGLE_SM_UNITS = 128  # units whose weight fits one multiprocessor
MIN_TIMES_TORCH = {"tier3": 1.0, "tier2": 1 / 3}  # goals: PyTorch's time over the tier's, with TF32 off
CAPTION = (
    "Microseconds per step (CUDA events around the whole pass, over T), median ± half the interquartile range. In "
    "brackets: PyTorch's time over xprnn's; above 1, xprnn is faster. `floor`: largest lower bound of products, memory "
    "traffic and chain of steps. `x`: time of the best tier over the floor. `error`: largest difference of the best "
    "tier and of PyTorch from float64, relative to the largest number."
)
Row = dict[str, Any]


def floors(
    shape: tuple[int, int, int, int], cell: str, pass_name: str, arithmetic: str, ceilings: dict[str, float]
) -> dict[str, float]:
    """Return lower bounds of the seconds of a pass: of its products, its memory traffic, its chain of steps.

    Args:
        shape: (D, H, N, T).
        cell: "elman", "lstm" or "gru".
        pass_name: FORWARD or FORWARD_BACKWARD.
        arithmetic: "float32" or "tf32".
        ceilings: limits of the device, as measured by `contenders.ceilings`.
    """
    d, h, n, t = shape
    backward = pass_name == FORWARD_BACKWARD
    # x and y are read or written once in each direction; the gates lie between forward and backward.
    numbers = t * n * ((d + h) * (3 if backward else 1) + (2 * GATE_COUNTS[cell] * h if backward else 0))
    seconds = {
        "products": matmul_flops(cell, shape)[pass_name] / ceilings[arithmetic],
        "memory": 4 * numbers / ceilings["bytes"],
    }
    if ceilings.get("clock"):
        cycles = STEP_CYCLES + (CROSS_SM_CYCLES if h > MAX_SINGLE_SM_UNITS else 0)
        seconds["latency"] = t * cycles * (2 if backward else 1) / ceilings["clock"]
    return seconds


def summarize_row(
    key: Row,
    times: dict[str, list[float]],
    missing: dict[str, str],
    error: dict[str, float],
    ceilings: dict[str, float],
) -> Row:
    """Summarize a measured row: microseconds per step, ratios, lower bounds, errors.

    Args:
        key: cell, shape, tf32 and pass.
        times: name -> seconds of the pass, one entry a round.
        missing: name -> why it cannot run the row.
        error: name -> largest relative error.
        ceilings: limits of the device.
    """
    shape, t = tuple(key["shape"]), key["shape"][3]
    us = {name: quartile_summary([1e6 * s / t for s in seen]) for name, seen in times.items()}
    seconds = floors(shape, key["cell"], key["pass"], "tf32" if key["tf32"] else "float32", ceilings)
    floor = {name: 1e6 * s / t for name, s in seconds.items()}
    row = key | {"us": us, "missing": missing, "floor": floor, "error": error}
    row["over_floor"] = {name: u["median"] / max(floor.values()) for name, u in us.items()}
    if "torch" in us:
        row["times_torch"] = {
            name: paired_ratio(times["torch"], seen) for name, seen in times.items() if name != "torch"
        }
    return row


def goal_lines(rows: list[Row]) -> list[str]:
    """Count the rows that meet each goal, and name the worst one."""
    judged = [row for row in rows if not row["tf32"] and "times_torch" in row]
    if not judged:
        return ["No goal can be judged: PyTorch was not measured."]
    lines = []
    for name, least in MIN_TIMES_TORCH.items():
        measured = [row for row in judged if name in row["times_torch"]]
        unmet = [row for row in measured if row["times_torch"][name] < least]
        met = f"{len(measured) - len(unmet)} of {len(measured)} rows"
        text = f"{TITLES[name]}: at least {least:.2f} times PyTorch's speed on {met}"
        worst = min(unmet, key=lambda row: row["times_torch"][name], default=None)
        text += f"; worst {worst['times_torch'][name]:.2f} at {_row_label(worst)}" if worst else ""
        lines.append(text + f" (of {len(judged)} measured)")
    return lines


def _row_label(row: Row) -> str:
    _, h, n, _ = row["shape"]
    return f"{row['cell']}, {row['pass']}, H {h}, N {n}"


def _format_cell(row: Row, name: str) -> str:
    if name not in row["us"]:
        return ""
    ratio = row.get("times_torch", {}).get(name)
    return format_time(row["us"][name], 1.0, [ratio] if ratio else [])


def _device_lines(run: dict[str, Any]) -> list[str]:
    """Describe the machine, the GPU and its measured limits."""
    m = run["machine"]
    lines = [machine_line(m), f"{m['gpu']} (compute capability {m['capability']}, driver CUDA {m['driver']})."]
    if limits := run.get("ceilings"):
        lines.append(
            f"Limits measured here: {limits['float32'] / 1e12:.1f} TFLOP/s float32, {limits['tf32'] / 1e12:.1f} TF32, "
            f"copy {limits['bytes'] / 1e12:.2f} TB/s, clock {limits['clock'] / 1e9:.2f} GHz."
        )
    return lines


def _training_line(row: Row) -> str:
    rates = ", ".join(f"{name} {rate:,.0f} characters per second" for name, rate in row["rates"].items())
    return f"- text training, {row['cell']}, batch {row['batch']}, TF32 {'on' if row['tf32'] else 'off'}: {rates}"


def markdown_report(run: dict[str, Any]) -> list[str]:
    """Format the whole report."""
    lines = [*_device_lines(run), CAPTION]
    for tf32 in (False, True):
        for cell in dict.fromkeys(row["cell"] for row in run["rows"]):
            rows = [row for row in run["rows"] if row["cell"] == cell and row["tf32"] is tf32]
            if rows:
                lines += ["", f"### {cell}, float32, TF32 {'on' if tf32 else 'off'}", "", *_table(rows)]
    lines += ["", *(f"- {goal}" for goal in goal_lines(run["rows"]))]
    reasons: dict[str, str] = {}
    for row in run["rows"]:
        for name, reason in row["missing"].items():
            reasons.setdefault(f"{TITLES[name]}: {reason}", _row_label(row))
    lines += [f"- not run: {text} (first at {label})" for text, label in reasons.items()]
    lines += [f"- {note}" for note in run.get("notes", [])]
    return lines + [_training_line(row) for row in run.get("training", [])]


def _table(rows: list[Row]) -> list[str]:
    shown = [name for name in TITLES if any(name in row["us"] for row in rows)]
    table = []
    for row in rows:
        _, h, n, _ = row["shape"]
        tier = next(name for name in TIERS if name in row["us"])
        bound = max(row["floor"], key=lambda name: row["floor"][name])
        error = ", ".join(f"{row['error'][name]:.0e}" for name in (tier, "torch") if name in row["error"])
        cells = [_format_cell(row, name) for name in shown]
        floor = f"{row['floor'][bound]:.3g} ({bound})"
        pass_name = "f" if row["pass"] == FORWARD else "f+b"
        table.append([str(h), str(n), pass_name, *cells, floor, f"{row['over_floor'][tier]:.1f}", error])
    return markdown_table(["H", "N", "pass", *(TITLES[name] for name in shown), "floor", "x", "error"], table)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the Markdown of a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a JSON file that benchmarks.gpu.grid wrote")
    run = json.loads(parser.parse_args(argv).file.read_text(encoding="utf-8"))
    print(*markdown_report(run), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
