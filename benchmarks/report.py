"""Tables, means and a picture of what rnn.py measured. `python benchmarks/report.py FILE.json` prints a saved run."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

__all__ = ["best_peer", "geometric_means", "picture", "tables"]

Row = dict[str, Any]
OWN = ("core", "door")
TITLES = {
    "core": "core",
    "door": "door",
    "article": "article",
    "article f64": "article, its float64 zeros",
    "torch": "torch",
    "jax": "JAX jit",
    "onnxruntime": "ONNX Runtime",
}
CAPTION = (
    "Float32; milliseconds, median ± half the interquartile range, contenders interleaved round by round. In brackets: "
    "the peer's time over the core's (/ over the door's): above 1, xprnn is faster. The door and the article also "
    "compute y_pred (n_y = n_x), the others don't. GEMM rate: the core's matrix products alone, against NumPy's own "
    "rate on a 2048 cube in the same run. Disturbed: other processes kept the cores busy; such rows count in no mean. "
    "Arrays in the article's layout are {order}-ordered."
)
CELLS = {"elman": "Elman (xprnn.RNN)", "lstm": "LSTM (xprnn.LSTM)", "gru": "GRU (xprnn.GRU)"}


def geometric_mean(values: list[float]) -> float:
    """exp(mean(log))."""
    return math.exp(sum(map(math.log, values)) / len(values))


def best_peer(row: Row, us: str = "core") -> float:
    """The time of the fastest framework over ours; the article is no framework."""
    return min((v for k, v in row["times_faster"][us].items() if not k.startswith("article")), default=math.nan)


def disturbed(row: Row) -> bool:
    """Whether other processes kept the cores busy nearly all the time."""
    return row["set_aside"] < 0


def groups(rows: list[Row]) -> dict[tuple[str, int], list[Row]]:
    """The rows of each table, by cell and threads."""
    out: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        out.setdefault((row["cell"], row["threads"]), []).append(row)
    return out


def geometric_means(rows: list[Row], us: str = "core") -> dict[tuple[str, int, str], dict[str, float]]:
    """(cell, threads, pass) -> peer -> how many times faster `us` is, over undisturbed rows; "best peer" row by row."""
    out = {}
    for (cell, threads), some in groups(rows).items():
        for which in dict.fromkeys(r["pass"] for r in some):
            mine = [r for r in some if r["pass"] == which and us in r["times_faster"] and not disturbed(r)]
            if not mine:
                continue
            # A peer that is missing in one row has no mean over the grid.
            names = [k for k in mine[0]["times_faster"][us] if all(k in r["times_faster"][us] for r in mine)]
            means = {k: geometric_mean([r["times_faster"][us][k] for r in mine]) for k in names}
            if any(not k.startswith("article") for k in names):
                means["best peer"] = geometric_mean([best_peer(r, us) for r in mine])
            out[cell, threads, which] = means
    return out


def _number(value: float) -> str:
    digits = max(0, 2 - math.floor(math.log10(max(value, 1e-9))))
    return f"{value:.{min(digits, 4)}f}"


def _time(row: Row, name: str) -> str:
    """Milliseconds, with half the distance between the quartiles."""
    s = row["seconds"].get(name)
    if s is None:
        return ""
    spread = 50 * (s["q3"] - s["q1"]) / s["median"]
    return f"{_number(1e3 * s['median'])} ±{spread:.0f}%"


def _cell(row: Row, name: str) -> str:
    text = _time(row, name)
    factors = [f"{row['times_faster'][us][name]:.2f}" for us in OWN if name in row["times_faster"].get(us, {})]
    return f"{text} ({' / '.join(factors)})" if factors else text


def table(rows: list[Row]) -> list[str]:
    """One markdown table: milliseconds, and in brackets how many times faster ours is."""
    names = [n for n in TITLES if any(n in r["seconds"] for r in rows)]
    heads = ["(D, H, N, T)", "pass", *(TITLES[n] for n in names), "of GEMM rate"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        shape = f"({', '.join(map(str, row['shape']))})" if row["pass"] == "forward" else ""
        share = f"{100 * row['gemm_share']:.0f}%"
        what = row["pass"] + " (disturbed)" * disturbed(row)
        cells = [shape, what, *(_cell(row, n) for n in names), share]
        lines.append("| " + " | ".join(cells) + " |")
        if row["disagree"] and row["pass"] != "forward":
            lines.append(f"| | **DISAGREE: {'; '.join(row['disagree'])}** |" + " |" * (len(heads) - 2))
    return lines


def means_line(rows: list[Row]) -> list[str]:
    """A sentence for each pass and each of ours."""
    lines = []
    for us in OWN:
        for (_, _, which), means in geometric_means(rows, us).items():
            parts = [f"{v:.2f} × {TITLES.get(k, k)}" for k, v in means.items()]
            count = sum(r["pass"] == which and not disturbed(r) for r in rows)
            lines.append(f"- geometric mean of {count} rows, {us}, {which}: {', '.join(parts)}")
    return lines


def tables(run: dict[str, Any]) -> str:
    """The whole report, in markdown."""
    lines = []
    first = run["machines"][0]
    versions = ", ".join(f"{k} {v}" for k, v in first["versions"].items())
    lines.append(
        f"{first['processor']}, {first['cores']} cores, {first['system']}; Python {first['python']}, {versions}"
    )
    lines += [f"- {m['threads']} thread(s): BLAS {m['blas']}; load at the start {m['load']}" for m in run["machines"]]
    lines += [f"- {note}" for note in run["notes"]]
    lines.append("")
    lines.append(CAPTION.format(order=run["order"]))
    for (cell, threads), rows in groups(run["rows"]).items():
        rate = sorted(r["gemm_rate"] for r in rows)[len(rows) // 2] / 1e9
        lines += ["", f"### {CELLS[cell]}, {threads} thread{'s' * (threads > 1)} (GEMM {rate:.0f} GF/s)", ""]
        lines += [*table(rows), "", *means_line(rows)]
    return "\n".join(lines)


def picture(run: dict[str, Any], file: Path) -> str:
    """Write a PNG of the ratios; returns why not, or ""."""
    try:
        import matplotlib as mpl
    except ImportError:
        return "no picture: matplotlib is not installed"
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    some = groups(run["rows"])
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    print(tables(json.loads(parser.parse_args().file.read_text(encoding="utf-8"))))
