"""Plot of the learning curve of a run as a PNG file; needs matplotlib (the extra `plot`)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from xprnn.arrays.namespace import InputError
from xprnn.io.archive import write_atomically


def can_plot() -> bool:
    """Return True if matplotlib is installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def plot_curve(
    path: str | Path,
    steps: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    baselines: Mapping[str, float] | None = None,
) -> None:
    """Plot curves over training steps, with horizontal lines for the baselines, to a PNG file.

    Args:
        path: the PNG file to write.
        steps: (K,) training steps of the measurements.
        curves: name -> (K,) bits per character.
        baselines: name -> bits per character of a baseline.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError('matplotlib is not installed: pip install ".[plot]" in the clone of xprnn') from None
    # Not pyplot, which would set the backend of the whole process.
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, values in curves.items():
        axes.plot(steps, values, label=name)
    for index, (name, value) in enumerate((baselines or {}).items()):
        axes.axhline(value, label=f"{name}: {value:.2f}", color="gray", linestyle=("--", ":", "-.")[index % 3])
    axes.set_xlabel("training steps")
    axes.set_ylabel("bits per character")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())
