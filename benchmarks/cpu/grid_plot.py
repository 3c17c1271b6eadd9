"""Draws the ratios of the grid."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.cpu.grid_report import group_rows
from benchmarks.harness.peers import PEERS

__all__ = ["plot_ratios"]


def plot_ratios(rows: list[dict[str, Any]], file: Path) -> str:
    """Draw each peer's time over the layer's time as a PNG. Return why this is impossible, or ""."""
    try:
        import matplotlib as mpl
    except ImportError:
        return "no picture: matplotlib is not installed"
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    groups = group_rows(rows)
    passes = list(dict.fromkeys(r["pass"] for r in rows))
    figure, axes = plt.subplots(len(groups), len(passes), squeeze=False, figsize=(6.5 * len(passes), 3.4 * len(groups)))
    for line, ((cell, threads), group) in zip(axes, groups.items(), strict=True):
        for ax, pass_name in zip(line, passes, strict=True):
            shown = [r for r in group if r["pass"] == pass_name]
            labels = ["\n".join(map(str, r["shape"])) for r in shown]
            for name in (k for k in PEERS if k in shown[0]["times_faster"]["layer"]):
                ratios = [r["times_faster"]["layer"].get(name, math.nan) for r in shown]
                ax.plot(labels, ratios, "o-", label=PEERS[name].title)
            ax.axhline(1, color="black", linewidth=1)
            ax.set(yscale="log", title=f"{cell}, {threads} thread(s), {pass_name}", ylabel="times faster than")
            if ax.get_lines()[1:]:  # more than the line at 1
                ax.legend(fontsize="small")
    figure.supxlabel("D, H, N, T")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    return ""
