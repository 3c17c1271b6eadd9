"""Signature of a layer as the single-step kernels need it, and the Python code around them."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from xprnn.cells.cell import Cell

__all__ = [
    "BITS",
    "FEW",
    "Stepped",
]


FEW = 8  # rows: of more, a BLAS that reads the weights once for all of them is faster;


_LARGE = 1 << 19  # weights: of so many, of more than one row


SHORT = 1 << 15  # products a step, for which a walk is faster than the scan's preparations, however far


BITS = {np.dtype(np.float32): 32, np.dtype(np.float64): 64}


Step = Callable[[dict[str, Any], Any, Any], Any]


class Stepped(NamedTuple):
    """A layer, as far as a step of it goes."""

    cell: Cell
    bias: bool
    inputs: int  # D
    hidden: int  # H
    projection: int  # P, or 0
    names: tuple[tuple[str, ...], ...]  # of each layer: w, u, biases, vectors, and where it is projected hr
    learned: tuple[str, ...]  # parameters that no step needs
    shapes: dict[str, tuple[int, ...]]

    @property
    def few(self) -> int:
        """The most rows that the compiled step is for."""
        return FEW if self.cell.gates * self.hidden * (self.inputs + self.hidden) < _LARGE else 1

    def short(self, n: int, integer: bool) -> bool:
        """Whether n rows are for the compiled walk; not a question of T, so that chunks are the whole bit for bit."""
        inner = self.hidden + (0 if integer else self.inputs)
        return n * self.cell.gates * self.hidden * inner <= SHORT

    @property
    def widths(self) -> list[int]:
        """Of each state."""
        return [self.projection or self.hidden, *[self.hidden] * (len(self.cell.states) - 1)]


@lru_cache(maxsize=1024)
def _code(source: str) -> Any:
    return compile(source, "<xprnn step>", "exec")


def _made(lines: list[str], scope: dict[str, Any]) -> Step:
    """The function of these lines, printed here from a finite list of names."""
    scope = {"empty": np.empty, "zeros": np.zeros, "ndarray": np.ndarray, "bits": BITS, **scope}
    exec(_code("\n    ".join(("def step(params, x, state):", *lines))), scope)
    step: Step = scope["step"]
    return step


def _head(its: Stepped, integer: bool) -> list[str]:
    """The number of rows, the dtype, the states before."""
    before = [f"s{k}" for k in range(len(its.widths))]
    lines = ["n = len(x)", f"dtype = params[{its.names[0][1]!r}].dtype" if integer else "dtype = x.dtype"]
    if len(before) == 1:
        return [*lines, "s0 = state"]
    return [*lines, "if state.__class__ is not tuple: return None", f"{', '.join(before)} = state"]


def _fit(its: Stepped) -> list[str]:
    """Checks of parameters that no step needs."""
    return [line for p in its.learned for line in (f"p = params[{p!r}]", _unless("p", str(its.shapes[p])))]


def _unless(name: str, shape: str) -> str:
    test = f"{name}.__class__ is not ndarray or {name}.dtype != dtype or {name}.shape != {shape}"
    return f"if {test}: return None"


def _result(its: Stepped) -> str:
    after = [f"n{k}" for k in range(len(its.widths))]
    return after[0] if len(after) == 1 else f"({', '.join(after)})"
