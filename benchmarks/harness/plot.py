"""A picture of the ratios that rnn.py measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.harness.report import TITLES, group_rows

__all__ = ["plot_ratios"]


def plot_ratios(run: dict[str, Any], file: Path) -> str:
    """Write a PNG of the ratios; returns why not, or ""."""
    try:
        import matplotlib as mpl
    except ImportError:
        return "no picture: matplotlib is not installed"
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    some = group_rows(run["rows"])
    passes = list(dict.fromkeys(r["pass"] for r in run["rows"]))
    figure, axes = plt.subplots(len(some), len(passes), squeeze=False, figsize=(6.5 * len(passes), 3.4 * len(some)))
    for line, ((cell, threads), rows) in zip(axes, some.items(), strict=True):
        for ax, which in zip(line, passes, strict=True):
            mine = [r for r in rows if r["pass"] == which]
            labels = ["\n".join(map(str, r["shape"])) for r in mine]
            for k in (n for n in TITLES if n in mine[0]["times_faster"]["core"]):
                ax.plot(labels, [r["times_faster"]["core"].get(k, math.nan) for r in mine], "o-", label=TITLES[k])
            ax.axhline(1, color="black", linewidth=1)
            ax.set(yscale="log", title=f"{cell}, {threads} thread(s), {which}", ylabel="times faster than")
            ax.legend(fontsize="small")
    figure.supxlabel("D, H, N, T")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    return ""
