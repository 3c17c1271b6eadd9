"""Floors, ratios and the Markdown table of a GPU run; python gpu_report.py FILE prints that of a JSON again."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.gpu.contenders import TITLES

__all__ = ["floors", "goal_lines", "markdown_report", "summarize_row"]

TIERS = ("tier3", "tier2", "tier1")
GATE_COUNTS = {"elman": 1, "lstm": 4, "gru": 3}
# Cycles that one step takes at least, however small: read the state from shared memory, add up across a warp, tanh,
# write; beyond 128 units the state must also cross from one multiprocessor to another (arXiv:2402.13499: 29 and 180).
STEP_CYCLES, CROSS_SM_CYCLES = 239, 180
MAX_SINGLE_SM_UNITS = 128  # units whose weight fits one multiprocessor
MIN_TIMES_TORCH = {"tier3": 1.0, "tier2": 1 / 3}  # the goals: times PyTorch's speed, with TF32 off


def floors(
    shape: tuple[int, int, int, int], cell: str, call_name: str, arithmetic: str, ceilings: dict[str, float]
) -> dict[str, float]:
    """Seconds that a pass over D, H, N, T can't go below: of its products, of its memory, of its chain of steps."""
    d, h, n, t = shape
    passes = 3 if call_name == "both" else 1  # the backward pass has two products for each one of the forward pass
    flops = 2.0 * t * n * (d + h) * GATE_COUNTS[cell] * h * passes
    # x and y once each way, and what lies between forward and backward at least once: the gates.
    numbers = t * n * ((d + h) * passes + (2 * GATE_COUNTS[cell] * h if call_name == "both" else 0))
    found = {"products": flops / ceilings[arithmetic], "memory": 4 * numbers / ceilings["bytes"]}
    if ceilings.get("clock"):
        cycles = STEP_CYCLES + (CROSS_SM_CYCLES if h > MAX_SINGLE_SM_UNITS else 0)
        found["latency"] = t * cycles * (2 if call_name == "both" else 1) / ceilings["clock"]
    return found


def summarize_row(
    key: dict[str, Any], times: dict[str, list[float]], missing: dict[str, str], error: dict[str, Any], best: Any
) -> Any:
    """What is kept of one measured row: microseconds a step, ratios, floors, errors."""
    shape, t = tuple(key["shape"]), key["shape"][3]
    steps = {who: sorted(1e6 * s / t for s in seen) for who, seen in times.items()}
    us = {}
    for who, seen in steps.items():
        low, middle, high = statistics.quantiles(seen, n=4) if len(seen) > 1 else seen * 3
        us[who] = {"median": middle, "q1": low, "q3": high, "rounds": len(seen)}
    low = floors(shape, key["cell"], key["pass"], "tf32" if key["tf32"] else "float32", best)
    least = {name: 1e6 * s / t for name, s in low.items()}
    out = key | {"us": us, "missing": missing, "floor": least, "error": error}
    out["over_floor"] = {who: u["median"] / max(least.values()) for who, u in us.items()}
    if "torch" in us:
        pairs = {who: zip(times["torch"], seen, strict=True) for who, seen in times.items() if who != "torch"}
        out["times_torch"] = {who: statistics.median(a / b for a, b in p) for who, p in pairs.items()}
    return out


def goal_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The issue's goals, each with the rows that miss it."""
    plain = [r for r in rows if not r["tf32"] and "times_torch" in r]
    if not plain:
        return ["No goal can be judged: PyTorch was not measured."]
    lines = []
    for who, least in MIN_TIMES_TORCH.items():
        have = [r for r in plain if who in r["times_torch"]]
        short = [r for r in have if r["times_torch"][who] < least]
        text = (
            f"{TITLES[who]}: at least {least:.2f} times PyTorch's speed on {len(have) - len(short)} of {len(have)} rows"
        )
        worst = min(short, key=lambda r: r["times_torch"][who], default=None)
        text += f"; worst {worst['times_torch'][who]:.2f} at {_row_label(worst)}" if worst else ""
        lines.append(text + f" (of {len(plain)} measured)")
    return lines


def _row_label(r: dict[str, Any]) -> str:
    _, h, n, _ = r["shape"]
    return f"{r['cell']}, {'forward+backward' if r['pass'] == 'both' else 'forward'}, H {h}, N {n}"


def _format_cell(r: dict[str, Any], who: str) -> str:
    if who not in r["us"]:
        return ""
    u = r["us"][who]
    spread = 50 * (u["q3"] - u["q1"]) / u["median"] if u["median"] else 0.0
    ratio = r.get("times_torch", {}).get(who)
    return f"{u['median']:.3g} ±{spread:.0f}%" + (f" ({ratio:.2f})" if ratio else "")


def markdown_report(run: dict[str, Any]) -> str:
    """The whole report."""
    m = run["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
    lines = [
        f"{m['gpu']} (compute capability {m['capability']}, driver CUDA {m['driver']}), {m['processor']}; {versions}."
    ]
    if best := run.get("ceilings"):
        lines.append(
            f"Ceilings measured here: {best['float32'] / 1e12:.1f} TFLOP/s float32, {best['tf32'] / 1e12:.1f} TF32, "
            f"copy {best['bytes'] / 1e12:.2f} TB/s, clock {best['clock'] / 1e9:.2f} GHz."
        )
    lines.append(
        "Microseconds a step (CUDA events around the whole pass, over T), median ± half the interquartile range; in "
        "brackets PyTorch's time over ours: above 1, xprnn is faster. `floor` is the largest of what the products, the "
        "memory and the chain of steps take at least, `x` the best tier over it; `error` the best tier's and PyTorch's "
        "largest difference from float64, relative to the largest number."
    )
    for tf32 in (False, True):
        for name in dict.fromkeys(r["cell"] for r in run["rows"]):
            rows = [r for r in run["rows"] if r["cell"] == name and r["tf32"] is tf32]
            if rows:
                lines += ["", f"### {name}, float32, TF32 {'on' if tf32 else 'off'}", "", *_markdown_table(rows)]
    lines += ["", *(f"- {g}" for g in goal_lines(run["rows"]))]
    reasons = {f"{TITLES[who]}: {why}": _row_label(r) for r in run["rows"] for who, why in r["missing"].items()}
    lines += [f"- not run: {text} (first at {where})" for text, where in reversed(reasons.items())]
    lines += [f"- {line}" for line in run.get("notes", [])]
    for text in run.get("training", []):
        lines.append(
            f"- training text, {text['cell']}, batch {text['batch']}: "
            + ", ".join(f"{who} {rate:,.0f} characters a second" for who, rate in text["rates"].items())
        )
    return "\n".join(lines) + "\n"


def _markdown_table(rows: list[dict[str, Any]]) -> list[str]:
    shown = [who for who in TITLES if any(who in r["us"] for r in rows)]
    heads = ["H", "N", "pass", *(TITLES[who] for who in shown), "floor", "x", "error"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for r in rows:
        _, h, n, _ = r["shape"]
        tier = next(who for who in TIERS if who in r["us"])
        kind = max(r["floor"], key=lambda k: r["floor"][k])
        error = ", ".join(f"{r['error'][who]:.0e}" for who in (tier, "torch") if who in r["error"])
        cells = [str(h), str(n), "f+b" if r["pass"] == "both" else "f", *(_format_cell(r, who) for who in shown)]
        cells += [f"{r['floor'][kind]:.3g} ({kind})", f"{r['over_floor'][tier]:.1f}", error]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    print(markdown_report(json.loads(parser.parse_args().file.read_text(encoding="utf-8"))), end="")
