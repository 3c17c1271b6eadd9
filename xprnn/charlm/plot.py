"""Pictures: the learning curve of a run, as PNG. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from xprnn.arrays.namespace import InputError
from xprnn.io.archive import write_atomically


def can_plot() -> bool:
    """Whether matplotlib is installed."""
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
    """Draw curves over training steps, and horizontal lines to compare them with.

    Args:
        path: the PNG to write.
        steps: (K,) the steps measured.
        curves: name -> (K,) bits per character.
        levels: name -> bits per character that something else reaches.

    Raises:
        InputError: matplotlib is not installed, or the place cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            'plot_curve: a picture needs matplotlib, which is not installed: pip install "xprnn[plot]"'
        ) from None
    # A figure of our own with its own canvas: pyplot would choose a backend for the whole process.
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, values in curves.items():
        axes.plot(steps, values, label=name)
    for number, (name, value) in enumerate((baselines or {}).items()):
        axes.axhline(value, label=f"{name}: {value:.2f}", color="gray", linestyle=("--", ":", "-.")[number % 3])
    axes.set_xlabel("training steps")
    axes.set_ylabel("bits per character")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())
