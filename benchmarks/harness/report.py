"""Writes the results of a benchmark: Markdown tables, goals, JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import machine as harness_machine
from xprnn.io.archive import write_atomically

__all__ = [
    "Goal",
    "Report",
    "format_number",
    "format_time",
    "machine_line",
    "markdown_table",
    "unmet_goal_lines",
    "write_results",
]


class Goal(NamedTuple):
    """A figure and its bound: `least` or `most`."""

    what: str
    value: float
    least: float | None = None
    most: float | None = None

    @property
    def is_met(self) -> bool:
        """True if the figure is within its bound. NaN is not."""
        within = (self.least is None or self.value >= self.least, self.most is None or self.value <= self.most)
        return all(within)


class Report(NamedTuple):
    """Everything that a benchmark reports.

    figures: all measured values, written as JSON; usually {"rows": [...]}.
    lines: the Markdown.
    goals: goals that could be judged.
    inconclusive: rows that other processes disturbed: their goals are not judged.
    failed: True if an implementation failed or results disagree; the exit code is then 1.
    """

    figures: dict[str, Any]
    lines: list[str]
    goals: Sequence[Goal] = ()
    inconclusive: Sequence[str] = ()
    failed: bool = False


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str] | str]) -> list[str]:
    """Format a Markdown table. A row that is one string is a remark across the table.

    >>> print(*markdown_table(["cell", "ms"], [["gru", "0.5"], "torch disagrees"]), sep="\\n")
    | cell | ms |
    |---|---|
    | gru | 0.5 |
    | | **torch disagrees** |
    """
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    for row in rows:
        if isinstance(row, str):
            lines.append(f"| | **{row}** |" + " |" * (len(headings) - 2))
        else:
            lines.append(f"| {' | '.join(row)} |")
    return lines


def format_number(value: float) -> str:
    """Format with three significant digits and at most four decimals.

    >>> format_number(0.01234), format_number(5.0), format_number(1234.5)
    ('0.0123', '5.00', '1234')
    """
    digits = max(0, 2 - math.floor(math.log10(max(value, 1e-9))))
    return f"{value:.{min(digits, 4)}f}"


def format_time(summary: dict[str, Any], scale: float = 1e3, ratios: Sequence[float] = ()) -> str:
    """Format a median, half the interquartile range in percent, and ratios in brackets.

    >>> format_time({"median": 0.5e-3, "q1": 0.45e-3, "q3": 0.55e-3}, ratios=[2.0])
    '0.500 ±10% (2.00)'
    """
    middle = summary["median"]
    spread = 50 * (summary["q3"] - summary["q1"]) / middle if middle else 0.0
    text = f"{format_number(scale * middle)} ±{spread:.0f}%"
    return text + (f" ({' / '.join(f'{ratio:.2f}' for ratio in ratios)})" if ratios else "")


def machine_line(machine: dict[str, Any]) -> str:
    """Describe processor, system, versions, BLAS and load in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"Measured on {machine['processor']}, {machine['cores']} cores, {machine['system']}; "
        f"Python {machine['python']}, {versions}; BLAS {machine['blas']}; load at the start {machine['load']}."
    )


def unmet_goal_lines(goals: Sequence[Goal]) -> list[str]:
    """Count the goals that are met and describe each one that is not."""
    unmet = [goal for goal in goals if not goal.is_met]
    lines = [f"{len(goals) - len(unmet)} of {len(goals)} goals are met.", ""]
    for goal in unmet:
        bound = f"at most {goal.most}" if goal.least is None else f"at least {goal.least}"
        lines.append(f"- {goal.what}: {goal.value:.2f} (goal: {bound})")
    return lines


def write_results(
    report: Report, markdown: Path | None = None, json_file: Path | None = None, print_lines: bool = True
) -> int:
    """Print the Markdown and write the files.

    Args:
        report: the results.
        markdown: also write the Markdown here.
        json_file: write the machine, all figures and goals here.
        print_lines: False: only write the files.

    Returns:
        The exit code: 1 if the benchmark failed.
    """
    text = "\n".join(report.lines)
    if print_lines:
        print(text)
    if markdown:
        write_atomically(markdown, (text + "\n").encode())
    if json_file:
        figures = {"machine": harness_machine.describe()} | report.figures
        figures |= {"goals": [goal._asdict() for goal in report.goals], "inconclusive": list(report.inconclusive)}
        write_atomically(json_file, (json.dumps(figures, indent=1) + "\n").encode())
    return int(report.failed)
