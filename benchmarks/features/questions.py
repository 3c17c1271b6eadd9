"""The rows of the comparison, and what is asked in each.

A peer has one method `run(problem)`, which uses the library as its users would, and everything else follows: rows are
answered by its outputs and gradients, by its own error message, or by the list of arguments that its layer takes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.features.problem import (
    FeatureProblem,
    H,
    N,
    T,
    UnsupportedFeatureError,
    judge_results,
    random_problem,
    reference_results,
    relative_error,
    to_numpy,
)

__all__ = ["QUESTIONS", "LibraryAdapter", "answer"]

QUESTIONS = {  # method of Peer -> what the table calls it
    "imports": "imports",
    "rnn": "tanh RNN: largest relative error",
    "lstm": "LSTM: largest relative error",
    "gru": "original GRU (reset before the product): largest relative error",
    "state": "initial states given, with their gradients",
    "softmax": "softmax of columns 1e3 and 1e4 apart",
    "dtype": "float32 in, float32 out; float64 in, float64 out",
    "plain": "NumPy arrays in; outputs and gradients are NumPy arrays",
    "libraries": "array libraries found here that come out as they went in",
    "lengths": "rows of different lengths",
    "zero": "one row of length 0",
    "empty": "T = 0",
    "mask": "a mask with holes inside",
    "reset": "rows reset inside a sequence",
    "refuse": "a state of another batch size is refused",
    "sizes": "a hidden size for each layer",
    "own": "your own cell in the layer",
    "cells": "the LSTM layer returns its cell states at all steps",
    "checker": "a gradient checker, which catches a wrong gradient",
    "memory": "backward in bounded memory, an argument of the layer",
}


@dataclass
class LibraryAdapter:
    """One library; rows are its methods."""

    default_cell: str = "lstm"  # the cell that the rows about time are asked with
    precision: str = "float64"
    widths: tuple[int, int] = (H, 2)

    def to_array(self, value: Any) -> Any:
        """NumPy to the library's own arrays."""
        return value

    def run(self, p: FeatureProblem, to_array: Any = None) -> dict[str, Any]:
        """y, h (T,N,H), (N,H); dx, dW, dU, db and, where there are any, dh0, dc0: as the library returns them."""
        raise NotImplementedError

    def imports(self) -> str:
        """With which NumPy."""
        return f"yes (NumPy {np.__version__})"

    def answer_with_errors(self, cell: str, **flags: Any) -> str:
        """A row of numbers."""
        p = random_problem(cell, dtype=self.precision, **flags)
        right, text = judge_results(self.run(p), p)
        return f"{'' if right else 'wrong: '}{text}"

    def answer_yes_no(self, cell: str, states: bool = False, **flags: Any) -> str:
        """A row of yes and no."""
        p = random_problem(cell, dtype=self.precision, **flags)
        right, text = judge_results(self.run(p), p, states)
        return "yes" if right else f"no ({text})"

    def rnn(self) -> str:
        """Outputs, and the gradients of x, W, U and b."""
        return self.answer_with_errors("rnn")

    def lstm(self) -> str:
        """As rnn."""
        return self.answer_with_errors("lstm")

    def gru(self) -> str:
        """As rnn."""
        return self.answer_with_errors("gru")

    def initial_state(self) -> str:
        """Each row has its own."""
        return self.answer_yes_no(self.default_cell, states=True, given=True)

    def lengths(self) -> str:
        """Unsorted."""
        return self.answer_yes_no(self.default_cell, lengths=[2, T, 3])

    def zero_length(self) -> str:
        """Between others."""
        return self.answer_yes_no(self.default_cell, lengths=[2, 0, T])

    def zero_steps(self) -> str:
        """The final state is the initial one."""
        return self.answer_yes_no(self.default_cell, steps=0)

    def mask(self) -> str:
        """The state is carried over the holes; y there is 0."""
        keep = np.asarray([[1, 1, 0], [0, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 0]], bool)
        return self.answer_yes_no(self.default_cell, keep=keep)

    def reset(self) -> str:
        """Two rows, at different steps."""
        start = np.zeros((T, N), bool)
        start[2, 0] = start[3, 2] = True
        return self.answer_yes_no(self.default_cell, reset=start, given=True)

    def wrong_state_shape(self) -> str:
        """One row of state for three rows of x."""
        p = random_problem(self.default_cell, random_state=True, dtype=self.precision)
        p = replace(p, arrays=p.arrays | {k: p.arrays[k][:1] for k in ("h0", "c0")})
        try:
            self.run(p)
        except UnsupportedFeatureError:
            raise
        except Exception as error:  # whatever it says, it is refused
            return f"yes ({type(error).__name__})"
        return "no (used for every row)"

    def custom_cell(self) -> str:
        """A leaky unit, h' = 0.9 h + 0.1 tanh(W x + U h + b)."""
        return self.answer_yes_no("leaky")

    def dtype(self) -> str:
        """Everything that comes back, and with float64's accuracy."""
        wrong: dict[str, list[str]] = {}
        for dtype in ("float32", "float64"):
            found = self.run(random_problem(self.default_cell, dtype=dtype))
            kinds = {k: str(to_numpy(v).dtype) for k, v in found.items()}
            wrong |= {f"{dtype} in, {v} out": [n for n in kinds if kinds[n] == v] for v in {*kinds.values()} - {dtype}}
        right, text = judge_results(found, random_problem(self.default_cell))
        if not (wrong or right):
            return f"no (float64 in, float32's accuracy: {text})"
        return "yes" if not wrong else f"no ({'; '.join(f'{k}: {chr(32).join(v)}' for k, v in wrong.items())})"

    def numpy_arrays(self) -> str:
        """Nothing is wrapped, nothing has to be converted by hand."""
        found = self.run(random_problem(self.default_cell, dtype=self.precision), to_array=np.asarray)
        kinds = sorted({type(v).__name__ for v in found.values()} - {"ndarray"})
        return "yes" if not kinds else f"no (out: {', '.join(kinds)})"

    def preserved_libraries(self) -> str:
        """Forward and backward, each library's arrays in."""
        same = []
        for name, (array, root) in array_libraries().items():
            try:
                found = self.run(random_problem(self.default_cell, dtype=self.precision), to_array=array)
            except Exception:  # not for this library: that is the answer
                continue
            if all(type(v).__module__.split(".")[0] in root for v in found.values()):
                same.append(name)
        return ", ".join(same) or "none"

    def column_softmax(self, x: Any) -> Any:
        """Columns that sum to 1."""
        raise NotImplementedError

    def softmax(self) -> str:
        """Three columns that differ by a constant have one softmax."""
        column = np.asarray([0.5, 0.0, -1.0, 2.0])[:, None]
        found = to_numpy(self.column_softmax(self.to_array(column + np.asarray([0.0, 1e3, 1e4]))))
        wanted = np.exp(column) / np.exp(column).sum() + np.zeros((1, 3))
        if np.isnan(found).any():
            return f"no (nan in {np.isnan(found).any(axis=0).sum()} of 3 columns)"
        return "yes" if relative_error(found, wanted) < 1e-6 else f"no (off by {relative_error(found, wanted):.0e})"

    def cell_states(self) -> str:
        """Any array among what comes back that holds them."""
        p = random_problem("lstm", dtype=self.precision)
        wanted = reference_results(p)["c"]
        found = [to_numpy(v) for v in self.lstm_outputs(p)]
        hit = any(min(relative_error(v, w) for w in (wanted, wanted.transpose(1, 0, 2))) < 1e-4 for v in found)
        return "yes" if hit else f"no (returns {' '.join(str(v.shape).replace(' ', '') for v in found)})"

    def lstm_outputs(self, p: FeatureProblem) -> list[Any]:
        """All arrays that the LSTM's forward returns."""
        raise NotImplementedError


def array_libraries() -> dict[str, Any]:
    """name -> (NumPy to its arrays, root modules of its types), of those installed here."""
    found: dict[str, Any] = {"NumPy": (np.asarray, ("numpy",))}
    for name, module, convert in (
        ("array-api-strict", "array_api_strict", "asarray"),
        ("torch", "torch", "from_numpy"),
        ("JAX", "jax.numpy", "asarray"),
        ("CuPy", "cupy", "asarray"),
    ):
        try:
            library = __import__(module, fromlist=["*"])
            if name == "CuPy" and not library.cuda.is_available():
                continue  # it imports without a GPU
        except ImportError:
            continue
        root = module.split(".")[0]
        found[name] = (getattr(library, convert), (root, "jaxlib") if root == "jax" else (root,))
    return found


def answer(peer: LibraryAdapter, row: str) -> str:
    """One cell of the table."""
    try:
        text = getattr(peer, row)()
    except UnsupportedFeatureError as lack:
        text = f"no ({lack})"
    except Exception as error:  # the library's own words
        lines = re.sub(r"\x1b\[\d*m", "", str(error)).split("\n")  # Keras puts a headline and colours around the reason
        line = next((one for one in lines if one.strip() and not one.startswith("Exception encountered")), "")
        line = re.sub(r"(?<!\w)/[\w./+-]+", "...", line)  # no path of this machine in a table
        text = f"no ({type(error).__name__}: {line if len(line) <= 80 else line[:77] + '...'})"
    return text.replace("|", "/")
