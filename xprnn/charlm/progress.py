"""Progress of a training run on stderr: a bar on a terminal, about twenty plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from tqdm import tqdm

_WIDE = 110  # columns from which the bar shows both losses and the rate
_NARROW_FORMAT = "{percentage:3.0f}%{postfix}"


class Progress(Protocol):
    """Display of a run in progress."""

    def advance(self, step: int, fraction: float) -> None:
        """Show that `step` is done, which is this fraction of the run."""

    def measured(self, step: int, fraction: float, training_bits: float, held_out_bits: float) -> None:
        """Show the losses after `step`, in bits per character."""


class _Bar:
    """A tqdm bar in characters. On a narrow terminal it is a percentage and the held-out loss, so that nothing is cut.

    Args:
        stream: a terminal.
        columns: its width.
        step_characters: characters that a step reads.
        start: the first step's number.
    """

    def __init__(self, stream: TextIO, columns: int, step_characters: int, start: int) -> None:
        self.step_characters, self.last, self.wide = step_characters, start, columns >= _WIDE
        options = {} if self.wide else {"bar_format": _NARROW_FORMAT}
        unit = {"unit": "char", "unit_scale": True, "initial": start * step_characters}
        self.tqdm: Any = tqdm(file=stream, ncols=columns, smoothing=0.1, **unit, **options)

    def advance(self, step: int, fraction: float) -> None:
        self.tqdm.total = round(self.step_characters * step / fraction)
        self.tqdm.update(self.step_characters * (step - self.last))
        self.last = step

    def measured(self, step: int, fraction: float, training_bits: float, held_out_bits: float) -> None:
        both = f"training {training_bits:.3f}, held-out {held_out_bits:.3f} bits per character"
        self.tqdm.set_postfix_str(both if self.wide else f"held-out {held_out_bits:.3f} bits")


class _Lines:
    """One line for each measurement, for log files and pipes."""

    def __init__(self, stream: TextIO, step_characters: int, start: int) -> None:
        self.stream, self.step_characters = stream, step_characters
        self.last, self.time = start, time.perf_counter()

    def advance(self, step: int, fraction: float) -> None:
        pass

    def measured(self, step: int, fraction: float, training_bits: float, held_out_bits: float) -> None:
        now = time.perf_counter()
        rate = (step - self.last) * self.step_characters / max(now - self.time, 1e-9)
        self.last, self.time = step, now
        losses = f"training {training_bits:.3f}, held-out {held_out_bits:.3f} bits per character"
        line = f"{min(fraction, 1):4.0%}  step {step:,}: {losses}, {rate:,.0f} characters/s"
        print(line, file=self.stream, flush=True)


@contextmanager
def show_progress(step_characters: int, start: int, stream: TextIO | None = None) -> Iterator[Progress]:
    """Return a display for a run that starts after step `start`.

    Args:
        step_characters: characters that a step reads.
        start: number of finished steps.
        stream: where to write; None: stderr.
    """
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        yield _Lines(stream, step_characters, start)
        return
    bar = _Bar(stream, _columns(stream), step_characters, start)
    with bar.tqdm:
        yield bar


def _columns(stream: TextIO) -> int:
    """Return the width of a terminal: that of COLUMNS, else its own, else 80."""
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
