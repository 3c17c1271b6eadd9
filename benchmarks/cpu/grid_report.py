"""Tables, means and goals of the grid."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.harness.peers import PEERS
from benchmarks.harness.problem import FORWARD
from benchmarks.harness.report import Goal, format_time, machine_line, markdown_table

__all__ = [
    "best_peer_ratio",
    "geometric_means",
    "goals",
    "grid_report",
    "group_rows",
    "inconclusive",
    "is_noisy",
    "row_label",
]

Row = dict[str, Any]
OWN_NAMES = ("layer", "article_api")  # the implementations of xprnn that peers are compared with
CAPTION = (
    "Float32; milliseconds, median ± half the interquartile range. Each implementation runs in its own process; the "
    "processes take turns and are stopped between turns. Freed memory stays with a process if the C library is glibc."
    " In brackets: the peer's time over that of the layer or, in the tables of the article API, of the article API. "
    "Above 1, xprnn is faster. Compiled loop: a time loop written by hand for numba, for N = 1. Of GEMM rate: rate of "
    "the layer's matrix products alone, relative to NumPy's rate on a 2048 cube in the same run. Outputs and gradients"
    " are compared before timing; implementations that disagree are excluded. Disturbed: other processes kept the "
    "cores busy; such rows count in no mean."
)
ARTICLE_CAPTION = (
    "Article API: `xprnn.rnn_forward` and `xprnn.rnn_backward` on {order}-ordered arrays (features, m, T_x). All "
    "implementations in this table also compute y_pred = softmax(Wya a + by), with n_y = n_x; their backward pass "
    "starts at the cotangent of a. Torch computes this in its own layout (T, N, features) and on the article's arrays."
)
CELL_TITLES = {
    "elman": "Elman (xprnn.RNN)",
    "lstm": "LSTM (xprnn.LSTM)",
    "gru": "GRU (xprnn.GRU)",
    "lstm-proj": "LSTM projected to H/2 (xprnn.LSTM, proj_size)",
    "gru-before": "Original GRU (xprnn.GRU, reset_after=False)",
}
MAX_OVER_LOOP = 1.2  # time of the layer over that of the compiled loop
MIN_GEOMETRIC_MEANS = {"elman": 1.5, "lstm": 1.15, "gru": 1.5}  # best peer over layer, each pass; other cells: 1


def geometric_mean(values: list[float]) -> float:
    """Return exp(mean(log))."""
    return math.exp(sum(map(math.log, values)) / len(values))


def best_peer_ratio(row: Row, own_name: str = "layer") -> float:
    """Return the time of the fastest framework over that of `own_name`; NaN without a framework."""
    ratios = row["times_faster"][own_name]
    return min((ratio for name, ratio in ratios.items() if PEERS[name].is_framework), default=math.nan)


def is_noisy(row: Row) -> bool:
    """True if other processes disturbed most rounds of the row."""
    return int(row["discarded"]) < 0


def row_label(row: Row) -> str:
    """Name a row by cell, shape, pass and threads."""
    return f"{row['cell']} {tuple(row['shape'])} {row['pass']}, {row['threads']} thread(s)"


def group_rows(rows: list[Row]) -> dict[tuple[str, int], list[Row]]:
    """Group the rows by cell and threads, one group for each table."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["cell"], row["threads"]), []).append(row)
    return groups


def geometric_means(rows: list[Row], own_name: str = "layer") -> dict[tuple[str, int, str], dict[str, float]]:
    """Average the ratios of all undisturbed rows.

    Returns:
        (cell, threads, pass) -> peer -> geometric mean of the peer's time over that of `own_name`. "best peer" is the
        mean over each row's fastest framework.
    """
    means = {}
    for (cell, threads), group in group_rows(rows).items():
        for pass_name in dict.fromkeys(r["pass"] for r in group):
            ratios = [
                r["times_faster"][own_name]
                for r in group
                if r["pass"] == pass_name and own_name in r["times_faster"] and not is_noisy(r)
            ]
            if not ratios:
                continue
            # A peer that is missing in one row has no mean over the grid.
            names = [name for name in ratios[0] if all(name in r for r in ratios)]
            mean = {name: geometric_mean([r[name] for r in ratios]) for name in names}
            if any(PEERS[name].is_framework for name in names):
                frameworks = ([ratio for name, ratio in r.items() if PEERS[name].is_framework] for r in ratios)
                mean["best peer"] = geometric_mean([min(values) for values in frameworks])
            means[cell, threads, pass_name] = mean
    return means


def _format_cell(row: Row, name: str, own_name: str) -> str:
    if name not in row["seconds"]:
        return ""
    ratios = [] if name == own_name else [row["times_faster"][own_name][name]]
    return format_time(row["seconds"][name], ratios=ratios)


def grid_table(rows: list[Row], own_name: str = "layer") -> list[str]:
    """Format the table of one cell, number of threads and implementation of xprnn: milliseconds and ratios."""
    rows = [row for row in rows if own_name in row["times_faster"]]
    peers = [name for name in PEERS if any(name in r["times_faster"][own_name] for r in rows)]
    names, is_layer = [own_name, *peers], own_name == "layer"
    headings = ["(D, H, N, T)", "pass", *(PEERS[name].title for name in names), f"best peer / {PEERS[own_name].title}"]
    lines: list[list[str] | str] = []
    for row in rows:
        shape = f"({', '.join(map(str, row['shape']))})" if row["pass"] == FORWARD else ""
        pass_name = row["pass"] + " (disturbed)" * is_noisy(row)
        best = best_peer_ratio(row, own_name)
        cells = [_format_cell(row, name, own_name) for name in names]
        share = [f"{100 * row['gemm_share']:.0f}%"] * is_layer
        lines.append([shape, pass_name, *cells, "" if math.isnan(best) else f"{best:.2f}", *share])
        if is_layer and row["disagree"] and row["pass"] != FORWARD:
            lines.append(f"excluded: {'; '.join(row['disagree'])}")
    return markdown_table([*headings, *["of GEMM rate"] * is_layer], lines)


def geometric_mean_lines(rows: list[Row], own_name: str = "layer") -> list[str]:
    """Format the means of one cell, number of threads and implementation of xprnn, a line for each pass."""
    lines = []
    for (_, _, pass_name), means in geometric_means(rows, own_name).items():
        if not means:
            continue
        parts = [f"{mean:.2f} × {PEERS[k].title if k in PEERS else k}" for k, mean in means.items()]
        count = sum(r["pass"] == pass_name and own_name in r["times_faster"] and not is_noisy(r) for r in rows)
        title = PEERS[own_name].title
        lines.append(f"- geometric mean of {count} rows, {title}, {pass_name}: {', '.join(parts)}")
    return lines


def _best_peer_goal(row: Row, own_name: str) -> list[Goal]:
    """Compare an implementation of xprnn with the fastest framework; empty without a framework."""
    ratio = best_peer_ratio(row, own_name)
    if math.isnan(ratio):
        return []
    ratios = row["times_faster"][own_name]
    name = next(k for k, v in ratios.items() if v == ratio and PEERS[k].is_framework)
    label = row_label(row) + f", {PEERS[own_name].title}" * (own_name != "layer")
    return [Goal(f"{label}, against {PEERS[name].title}", ratio, least=1.0)]


def goals(rows: list[Row]) -> list[Goal]:
    """Compare every undisturbed row with the best peer and the loop, and the layer's means with a bound."""
    judged = []
    for row in rows:
        if is_noisy(row):
            continue
        for own_name in row["times_faster"]:
            judged += _best_peer_goal(row, own_name)
        if (ratio := row["times_faster"]["layer"].get("loop")) is not None:
            what = f"{row_label(row)}, layer over {PEERS['loop'].title}"
            judged.append(Goal(what, 1 / ratio, most=MAX_OVER_LOOP))
    for (cell, threads, pass_name), means in geometric_means(rows).items():
        if "best peer" in means:
            what = f"{cell}, geometric mean of {pass_name}, {threads} thread(s), against the best peer"
            judged.append(Goal(what, means["best peer"], least=MIN_GEOMETRIC_MEANS.get(cell, 1.0)))
    return judged


def inconclusive(rows: list[Row]) -> list[str]:
    """Name the disturbed rows; their goals are not judged."""
    return [row_label(row) for row in rows if is_noisy(row)]


def grid_report(run: dict[str, Any]) -> list[str]:
    """Format the whole report."""
    lines = [machine_line(run["machines"][0])]
    lines += [f"- {m['threads']} thread(s): BLAS {m['blas']}; load at the start {m['load']}" for m in run["machines"]]
    lines += [*(f"- {note}" for note in run["notes"]), "", CAPTION]
    for (cell, threads), rows in group_rows(run["rows"]).items():
        rate = sorted(r["gemm_rate"] for r in rows)[len(rows) // 2] / 1e9
        lines += ["", f"### {CELL_TITLES[cell]}, {threads} thread{'s' * (threads > 1)} (GEMM {rate:.0f} GF/s)", ""]
        lines += [*grid_table(rows), "", *geometric_mean_lines(rows)]
        if any("article_api" in row["times_faster"] for row in rows):
            lines += ["", ARTICLE_CAPTION.format(order=run["order"]), "", *grid_table(rows, "article_api")]
            lines += ["", *geometric_mean_lines(rows, "article_api")]
    return lines
