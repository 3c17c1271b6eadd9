"""Signature of a layer for the single-step kernels, and the lines of Python code that they share.

A step kernel is a Python function printed for the names, shapes and sizes of one layer. It checks its arguments and
returns None if they do not fit.
"""

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


MAX_COMPILED_ROWS = 8  # for more rows BLAS is faster, because it reads the weights once for all rows
_LARGE_WEIGHTS = 1 << 19  # number of weights from which BLAS is faster for more than one row

DTYPE_BITS = {np.dtype(np.float32): 32, np.dtype(np.float64): 64}


StepFn = Callable[[dict[str, Any], Any, Any], Any]


class LayerSignature(NamedTuple):
    """The configuration of a recurrent layer, as far as a step depends on it."""

    cell: Cell
    bias: bool
    input_size: int  # D
    hidden_size: int  # H
    projection_size: int  # P, or 0
    parameter_names: tuple[tuple[str, ...], ...]  # of each layer: weight_ih, weight_hh, biases, vectors, weight_hr
    initial_state_names: tuple[str, ...]  # learned initial states, which a step does not read
    parameter_shapes: dict[str, tuple[int, ...]]  # of all these names

    @property
    def max_compiled_rows(self) -> int:
        """The number of rows up to which the compiled step is faster than the NumPy step."""
        return (
            MAX_COMPILED_ROWS
            if self.cell.gates * self.hidden_size * (self.input_size + self.hidden_size) < _LARGE_WEIGHTS
            else 1
        )

    @property
    def state_sizes(self) -> list[int]:
        """The number of features of each of the cell's states."""
        return [self.projection_size or self.hidden_size, *[self.hidden_size] * (len(self.cell.states) - 1)]


@lru_cache(maxsize=1024)
def _compile_code(source: str) -> Any:
    return compile(source, "<xprnn step>", "exec")


def compile_python(lines: list[str], scope: dict[str, Any]) -> StepFn:
    """Compile the function `step(params, x, state)` with these lines as its body, over the names in `scope`.

    The callers print the lines from names, sizes and traced operations; no text from a user or a file enters them,
    except the names of parameters, as string literals.
    """
    scope = {"empty": np.empty, "zeros": np.zeros, "ndarray": np.ndarray, "bits": DTYPE_BITS, **scope}
    exec(_compile_code("\n    ".join(("def step(params, x, state):", *lines))), scope)
    step: StepFn = scope["step"]
    return step


def argument_lines(signature: LayerSignature, integer: bool) -> list[str]:
    """Print the lines that set n (the number of rows), dtype, and the old states s0, s1, ..."""
    dtype = f"params[{signature.parameter_names[0][1]!r}].dtype" if integer else "x.dtype"
    lines, states = ["n = len(x)", f"dtype = {dtype}"], [f"s{k}" for k in range(len(signature.state_sizes))]
    if len(states) == 1:
        return [*lines, "s0 = state"]
    check = f"if state.__class__ is not tuple or len(state) != {len(states)}: return None"
    return [*lines, check, f"{', '.join(states)} = state"]


def initial_state_checks(signature: LayerSignature) -> list[str]:
    """Print the checks of the learned initial states."""
    return [
        line
        for name in signature.initial_state_names
        for line in (f"p = params[{name!r}]", array_check("p", str(signature.parameter_shapes[name])))
    ]


def array_check(name: str, shape: str) -> str:
    """Print the check that a variable is a NumPy array of this shape and of the dtype of the call."""
    test = f"{name}.__class__ is not ndarray or {name}.dtype != dtype or {name}.shape != {shape}"
    return f"if {test}: return None"


def result_expression(signature: LayerSignature) -> str:
    """Print the expression of the new state: n0, or the tuple (n0, n1, ...)."""
    states = [f"n{k}" for k in range(len(signature.state_sizes))]
    return states[0] if len(states) == 1 else f"({', '.join(states)})"
