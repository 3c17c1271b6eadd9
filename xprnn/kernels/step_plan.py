"""Signature of a layer as the single-step kernels need it, and the Python code around them."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from xprnn.cells.cell import Cell

__all__ = [
    "DTYPE_BITS",
    "MAX_COMPILED_ROWS",
    "LayerSignature",
]


MAX_COMPILED_ROWS = 8  # rows: of more, a BLAS that reads the weights once for all of them is faster;


_LARGE_WEIGHTS = 1 << 19  # weights: of so many, of more than one row


MAX_SEQUENCE_KERNEL_WORK = (
    1 << 15
)  # products a step, for which a walk is faster than the scan's preparations, however far


DTYPE_BITS = {np.dtype(np.float32): 32, np.dtype(np.float64): 64}


StepFn = Callable[[dict[str, Any], Any, Any], Any]


class LayerSignature(NamedTuple):
    """A layer, as far as a step of it goes."""

    cell: Cell
    bias: bool
    input_size: int  # D
    hidden_size: int  # H
    projection_size: int  # P, or 0
    parameter_names: tuple[tuple[str, ...], ...]  # of each layer: w, u, biases, vectors, and where it is projected hr
    initial_state_names: tuple[str, ...]  # parameters that no step needs
    parameter_shapes: dict[str, tuple[int, ...]]

    @property
    def max_compiled_rows(self) -> int:
        """The most rows that the compiled step is for."""
        return (
            MAX_COMPILED_ROWS
            if self.cell.gates * self.hidden_size * (self.input_size + self.hidden_size) < _LARGE_WEIGHTS
            else 1
        )

    def use_sequence_kernel(self, n: int, integer: bool) -> bool:
        """Whether n rows are for the compiled walk; not a question of T, so that chunks are the whole bit for bit."""
        inner = self.hidden_size + (0 if integer else self.input_size)
        return n * self.cell.gates * self.hidden_size * inner <= MAX_SEQUENCE_KERNEL_WORK

    @property
    def state_sizes(self) -> list[int]:
        """Of each state."""
        return [self.projection_size or self.hidden_size, *[self.hidden_size] * (len(self.cell.states) - 1)]


@lru_cache(maxsize=1024)
def _compile_code(source: str) -> Any:
    return compile(source, "<xprnn step>", "exec")


def compile_python(lines: list[str], scope: dict[str, Any]) -> StepFn:
    """The function of these lines, printed here from a finite list of names."""
    scope = {"empty": np.empty, "zeros": np.zeros, "ndarray": np.ndarray, "bits": DTYPE_BITS, **scope}
    exec(_compile_code("\n    ".join(("def step(params, x, state):", *lines))), scope)
    step: StepFn = scope["step"]
    return step


def argument_lines(its: LayerSignature, integer: bool) -> list[str]:
    """The number of rows, the dtype, the states before."""
    before = [f"s{k}" for k in range(len(its.state_sizes))]
    lines = ["n = len(x)", f"dtype = params[{its.parameter_names[0][1]!r}].dtype" if integer else "dtype = x.dtype"]
    if len(before) == 1:
        return [*lines, "s0 = state"]
    return [*lines, "if state.__class__ is not tuple: return None", f"{', '.join(before)} = state"]


def initial_state_checks(its: LayerSignature) -> list[str]:
    """Checks of parameters that no step needs."""
    return [
        line
        for p in its.initial_state_names
        for line in (f"p = params[{p!r}]", array_check("p", str(its.parameter_shapes[p])))
    ]


def array_check(name: str, shape: str) -> str:
    test = f"{name}.__class__ is not ndarray or {name}.dtype != dtype or {name}.shape != {shape}"
    return f"if {test}: return None"


def result_expression(its: LayerSignature) -> str:
    after = [f"n{k}" for k in range(len(its.state_sizes))]
    return after[0] if len(after) == 1 else f"({', '.join(after)})"
