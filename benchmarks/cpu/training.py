"""Characters a second while learning to write: xprnn's training step beside torch's (eager) and JAX's (jitted).

    python benchmarks/cpu/training.py [--cell elman lstm gru] [--rounds N] [--batch N ...]

The text job of `python -m xprnn train`: one-hot input, a recurrent layer, a linear head, cross-entropy, clipping by
global norm, Adam, the state carried from window to window, float32; the same text, windows and first parameters for
all. The losses of the first windows are compared. Each contender runs in a process of its own, with one thread on one
core and with two on two; in turns of half a second, round by round. training_steps.py is what each of them does.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.cpu.training_steps import COMPARED_WINDOWS, STEP_CALL, H, T, make_implementation
from benchmarks.harness import machine
from benchmarks.harness.contenders import check_agreement
from benchmarks.harness.options import CELLS, argument_parser, write_results
from benchmarks.harness.worker_pool import WorkerPool, run_rounds

TITLES = {"xprnn": "xprnn", "torch": "torch, eager", "jax": "JAX, jitted, optax"}
LOSS_TOLERANCE = 1e-3  # of the largest loss, over the first windows


def measure(cell: str, n: int, threads: list[int], count: int, seconds: float) -> dict[str, Any]:
    """A row: characters a second of each contender with each number of threads."""
    with WorkerPool() as company, tempfile.TemporaryDirectory() as folder:
        players = {f"{who} {k}": company.worker(f"{who} {k}", k) for who in TITLES for k in threads}
        about = {"cell": cell, "batch": n}
        tasks = {name: about | {"who": name.split()[0], "threads": p.threads} for name, p in players.items()}
        seated, wrong = check_agreement(players, make_implementation, tasks, Path(folder), LOSS_TOLERANCE)
        playing = {name: players[name] for name in seated}
        seen = run_rounds(playing, STEP_CALL, 0.0, count, count, seconds)
    wrong += [f"{name} {why}" for name, why in seen.failed.items()]
    rate = {name: [n * T / t for t in times] for name, times in seen.times.items()}
    return {"cell": cell, "batch": n, "rates": rate, "disagree": wrong, "discarded": seen.discarded}


def best_rate(row: dict[str, Any], who: str, threads: list[int]) -> tuple[float, int] | None:
    """Median characters a second with the better number of threads, and that number."""
    rates = {k: statistics.median(v) for k in threads if (v := row["rates"].get(f"{who} {k}"))}
    return max(((rate, k) for k, rate in rates.items()), default=None)


def goals(rows: list[dict[str, Any]], threads: list[int]) -> list[dict[str, Any]]:
    """Each undisturbed row against the faster peer, everyone with as many threads as suit it.

    A row that xprnn could not run is missed by an unknown factor, with why in its `disagree`.
    """
    out = []
    for row in rows:
        found = {who: b for who in TITLES if (b := best_rate(row, who, threads))}
        rivals = {who: b[0] for who, b in found.items() if who != "xprnn"}
        if rivals and row["discarded"] >= 0:
            who = max(rivals, key=lambda k: rivals[k])
            what = f"training, {row['cell']}, batch {row['batch']}, up to {threads[-1]} cores, against {TITLES[who]}"
            ours = found["xprnn"][0] if "xprnn" in found else math.nan
            out.append({"what": what, "value": ours / rivals[who], "least": 1.0})
    return out


def markdown_table(rows: list[dict[str, Any]], threads: list[int]) -> list[str]:
    """Markdown: characters a second, and the ratio to each peer with the same number of threads."""
    heads = ["cell", "N", "threads", *TITLES.values()]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        for k in threads:
            cells = []
            for who in TITLES:
                seen = row["rates"].get(f"{who} {k}")
                if not seen:
                    cells.append("")
                    continue
                ours = [] if who == "xprnn" else row["rates"].get(f"xprnn {k}", [])
                cells.append(f"{statistics.median(seen):,.0f}{_format_ratios(ours, seen)}")
            lines.append(f"| {row['cell']} | {row['batch']} | {k} | {' | '.join(cells)} |")
        lines += [f"| | **{remark}** |" + " |" * (len(heads) - 2) for remark in row["disagree"]]
    return lines


def _format_ratios(ours: list[float], theirs: list[float]) -> str:
    """How many times as fast we are, round by round; nothing where we have no times."""
    if not ours:
        return ""
    low, ratio, high = statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4)
    return f" ({ratio:.2f}; {low:.2f} to {high:.2f})"


def main() -> int:
    """Measure and print."""
    parser = argument_parser(__doc__, rounds=7, cells=CELLS)
    add = parser.add_argument
    add("--batch", nargs="+", type=int, default=[16, 32], metavar="N", help="default: 16 32")
    add("--threads", nargs="+", type=int, default=[1, 2], metavar="COUNT", help="default: 1 2")
    add("--seconds", type=float, default=0.5, help="of a turn; default: 0.5")
    args = parser.parse_args()
    threads = [k for k in args.threads if k <= len(machine.available_cores())]
    rows = []
    for cell in args.cell:
        for n in args.batch:
            rows.append(measure(cell, n, threads, args.rounds, args.seconds))
            print(f"{cell}, N = {n}: measured", file=sys.stderr, flush=True)
    caption = (
        f"Characters a second, the text job: H = {H}, windows of {T}, float32. Medians of {args.rounds} turns; in "
        "brackets how many times faster xprnn is with the same number of threads: median of the rounds, quartiles. "
        f"The losses of the first {COMPARED_WINDOWS} windows agree.\n"
    )
    undecided = [f"training, {r['cell']}, batch {r['batch']}" for r in rows if r["discarded"] < 0]
    figures = {"rows": rows, "goals": goals(rows, threads), "undecided": undecided}
    return write_results(args, [caption, *markdown_table(rows, threads)], figures, any(row["disagree"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
