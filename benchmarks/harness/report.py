"""Tables and means of what was measured, in markdown."""

from __future__ import annotations

import math
from typing import Any

__all__ = [
    "TITLES",
    "align_columns",
    "best_peer_ratio",
    "geometric_means",
    "goals",
    "grid_report",
    "group_rows",
    "inconclusive",
    "is_noisy",
    "latency_table",
]

Row = dict[str, Any]
OWN_NAMES = ("core", "door")
FRAMEWORKS = ("torch", "jax", "onnxruntime")  # the article and the loop are none
TITLES = {
    "core": "core",
    "door": "door",
    "article": "article",
    "article f64": "article, its float64 zeros",
    "loop": "compiled loop",
    "torch": "torch",
    "jax": "JAX jit",
    "onnxruntime": "ONNX Runtime",
}
CAPTION = (
    "Float32; milliseconds, median ± half the interquartile range; each contender in a process of its own, in turns, "
    "stopped between them; memory once taken stays with a process where the C library is glibc. In brackets: "
    "the peer's time over the core's (/ over the door's): above 1, xprnn is faster. The door and the article also "
    "compute y_pred (n_y = n_x), the others don't. Compiled loop: by hand, in numba, for N = 1. GEMM rate: the core's "
    "matrix products alone, against NumPy's own rate on a 2048 cube in the same run. Everyone's results are compared "
    "before the clock starts: who disagrees is refused. Disturbed: other processes kept the cores busy; such rows "
    "count in no mean. Arrays in the article's layout are {order}-ordered."
)
CELL_TITLES = {
    "elman": "Elman (xprnn.RNN)",
    "lstm": "LSTM (xprnn.LSTM)",
    "gru": "GRU (xprnn.GRU)",
    "lstm-proj": "LSTM projected to H/2 (xprnn.LSTM, proj_size)",
    "gru-before": "Original GRU (xprnn.GRU, reset_after=False)",
}


def geometric_mean(values: list[float]) -> float:
    """exp(mean(log))."""
    return math.exp(sum(map(math.log, values)) / len(values))


def best_peer_ratio(row: Row, own_name: str = "core") -> float:
    """The time of the fastest framework over ours."""
    return min((v for k, v in row["times_faster"][own_name].items() if k in FRAMEWORKS), default=math.nan)


def is_noisy(row: Row) -> bool:
    """Whether other processes kept the cores busy nearly all the time."""
    return int(row["discarded"]) < 0


def group_rows(rows: list[Row]) -> dict[tuple[str, int], list[Row]]:
    """The rows of each table, by cell and threads."""
    out: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        out.setdefault((row["cell"], row["threads"]), []).append(row)
    return out


def geometric_means(rows: list[Row], own_name: str = "core") -> dict[tuple[str, int, str], dict[str, float]]:
    """(cell, threads, pass) -> peer -> how many times faster `us` is, over undisturbed rows; "best peer" row by row."""
    out = {}
    for (cell, threads), some in group_rows(rows).items():
        for which in dict.fromkeys(r["pass"] for r in some):
            mine = [r for r in some if r["pass"] == which and own_name in r["times_faster"] and not is_noisy(r)]
            if not mine:
                continue
            # A peer that is missing in one row has no mean over the grid.
            names = [
                k for k in mine[0]["times_faster"][own_name] if all(k in r["times_faster"][own_name] for r in mine)
            ]
            means = {k: geometric_mean([r["times_faster"][own_name][k] for r in mine]) for k in names}
            if any(k in FRAMEWORKS for k in names):
                means["best peer"] = geometric_mean([best_peer_ratio(r, own_name) for r in mine])
            out[cell, threads, which] = means
    return out


def _format_number(value: float) -> str:
    digits = max(0, 2 - math.floor(math.log10(max(value, 1e-9))))
    return f"{value:.{min(digits, 4)}f}"


def _format_time(row: Row, name: str) -> str:
    """Milliseconds, with half the distance between the quartiles."""
    s = row["seconds"].get(name)
    if s is None:
        return ""
    spread = 50 * (s["q3"] - s["q1"]) / s["median"]
    return f"{_format_number(1e3 * s['median'])} ±{spread:.0f}%"


def _format_cell(row: Row, name: str) -> str:
    text = _format_time(row, name)
    factors = [f"{row['times_faster'][us][name]:.2f}" for us in OWN_NAMES if name in row["times_faster"].get(us, {})]
    return f"{text} ({' / '.join(factors)})" if factors else text


def grid_table(rows: list[Row]) -> list[str]:
    """One markdown table: milliseconds, and in brackets how many times faster ours is."""
    names = [n for n in TITLES if any(n in r["seconds"] for r in rows)]
    heads = ["(D, H, N, T)", "pass", *(TITLES[n] for n in names), "best peer / core", "of GEMM rate"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        shape = f"({', '.join(map(str, row['shape']))})" if row["pass"] == "forward" else ""
        share = f"{100 * row['gemm_share']:.0f}%"
        what = row["pass"] + " (disturbed)" * is_noisy(row)
        best = best_peer_ratio(row)
        cells = [shape, what, *(_format_cell(row, n) for n in names), "" if math.isnan(best) else f"{best:.2f}", share]
        lines.append("| " + " | ".join(cells) + " |")
        if row["disagree"] and row["pass"] != "forward":
            lines.append(f"| | **refused: {'; '.join(row['disagree'])}** |" + " |" * (len(heads) - 2))
    return lines


def geometric_mean_lines(rows: list[Row]) -> list[str]:
    """A sentence for each pass and each of ours."""
    lines = []
    for us in OWN_NAMES:
        for (_, _, which), means in geometric_means(rows, us).items():
            if not means:
                continue
            parts = [f"{v:.2f} × {TITLES.get(k, k)}" for k, v in means.items()]
            count = sum(r["pass"] == which and not is_noisy(r) for r in rows)
            lines.append(f"- geometric mean of {count} rows, {us}, {which}: {', '.join(parts)}")
    return lines


MAX_OVER_LOOP = 1.2  # times a compiled loop, tiny networks
MIN_GEOMETRIC_MEANS = {"elman": 1.5, "lstm": 1.15, "gru": 1.5}  # forward+backward, over the best peer; of other cells 1


def goals(rows: list[Row]) -> list[dict[str, Any]]:
    """Every undisturbed row against the best peer and the loop, and the geometric means of forward+backward."""
    out: list[dict[str, Any]] = []
    for row in rows:
        ratio, peers = best_peer_ratio(row), row["times_faster"]["core"]
        what = f"{row['cell']} {tuple(row['shape'])} {row['pass']}, {row['threads']} thread(s)"
        if is_noisy(row):
            continue
        if not math.isnan(ratio):
            who = next(TITLES[k] for k, v in peers.items() if v == ratio and k in FRAMEWORKS)
            out.append({"what": f"{what}, against {who}", "value": ratio, "least": 1.0})
        if "loop" in peers:
            out.append(
                {"what": f"{what}, core over {TITLES['loop']}", "value": 1 / peers["loop"], "most": MAX_OVER_LOOP}
            )
    for (cell, threads, which), means in geometric_means(rows).items():
        if which != "forward" and "best peer" in means:
            what = f"{cell}, geometric mean of {which}, {threads} thread(s), against the best peer"
            out.append({"what": what, "value": means["best peer"], "least": MIN_GEOMETRIC_MEANS.get(cell, 1.0)})
    return out


def inconclusive(rows: list[Row]) -> list[str]:
    """The disturbed rows: they say nothing either way."""
    return [f"{r['cell']} {tuple(r['shape'])} {r['pass']}, {r['threads']} thread(s)" for r in rows if is_noisy(r)]


def machine_lines(run: dict[str, Any]) -> list[str]:
    """Machine, versions, BLAS, notes."""
    first = run["machines"][0]
    versions = ", ".join(f"{k} {v}" for k, v in first["versions"].items())
    lines = [f"{first['processor']}, {first['cores']} cores, {first['system']}; Python {first['python']}, {versions}"]
    lines += [f"- {m['threads']} thread(s): BLAS {m['blas']}; load at the start {m['load']}" for m in run["machines"]]
    return lines + [f"- {note}" for note in run["notes"]]


def grid_report(run: dict[str, Any]) -> str:
    """The whole report, in markdown."""
    lines = [*machine_lines(run), "", CAPTION.format(order=run["order"])]
    for (cell, threads), rows in group_rows(run["rows"]).items():
        rate = sorted(r["gemm_rate"] for r in rows)[len(rows) // 2] / 1e9
        lines += ["", f"### {CELL_TITLES[cell]}, {threads} thread{'s' * (threads > 1)} (GEMM {rate:.0f} GF/s)", ""]
        lines += [*grid_table(rows), "", *geometric_mean_lines(rows)]
    return "\n".join(lines)


def latency_table(streams: list[dict[str, Any]]) -> list[str]:
    """Microseconds a step, one line for each size."""
    names = [n for n in TITLES if any(n in s["microseconds"] for s in streams)]
    heads = ["cell", "H", *(f"{TITLES[n]}, p50 / p99 / p99.9" for n in names), "best peer / core"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for s in streams:
        seen = s["microseconds"]
        cells = [" / ".join(_format_number(seen[n][q]) for q in seen[n]) if n in seen else "" for n in names]
        peers = [v["p50"] for n, v in seen.items() if n != "core"]
        ratio = f"{min(peers) / seen['core']['p50']:.2f}" if peers and "core" in seen else ""
        lines.append("| " + " | ".join([s["cell"], str(s["hidden"]), *cells, ratio]) + " |")
        if s["disagree"]:
            lines.append(f"| | **refused: {'; '.join(s['disagree'])}** |" + " |" * (len(heads) - 2))
    return lines


def align_columns(text: str) -> str:
    """Markdown for a terminal: the columns of each table are made equally wide."""
    out: list[str] = []
    block: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            block.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if block:
            out += _pad_columns(block)
            block = []
        out.append(line)
    return "\n".join(out[:-1])


def _pad_columns(block: list[list[str]]) -> list[str]:
    wide = [max((len(c) for c in column if len(column) == len(block)), default=0) for column in _columns(block)]
    lines = []
    for row in block:
        rule = set("".join(row)) == {"-"}
        cells = ["-" * w for w in wide] if rule else [c.ljust(w) for c, w in zip(row, wide, strict=False)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _columns(block: list[list[str]]) -> list[list[str]]:
    # A remark across the table makes no column wider.
    rows = [row for row in block if not any(c.startswith("**") for c in row)]
    return [[*column, *[""] * (len(block) - len(rows))] for column in zip(*rows, strict=True)]
