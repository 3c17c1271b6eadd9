"""The rows of the feature comparison: each question is a method that runs the library.

A library has one method `run(problem)` that uses it as its users would. Most answers follow from the outputs and
gradients of `run`, from the library's error message, or from the arguments of its layer.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
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
    to_numpy,
)
from benchmarks.harness.agreement import relative_error
from benchmarks.harness.peers import PEERS

__all__ = ["QUESTIONS", "LibraryAdapter", "answer", "describe_peer"]

QUESTIONS = {  # method of LibraryAdapter -> title of the row
    "imports": "imports",
    "rnn": "tanh RNN: largest relative error",
    "lstm": "LSTM: largest relative error",
    "gru": "original GRU (reset before the product): largest relative error",
    "initial_state": "initial states given, with their gradients",
    "softmax": "softmax of columns 1e3 and 1e4 apart",
    "dtype": "float32 in, float32 out; float64 in, float64 out",
    "numpy_arrays": "NumPy arrays in; outputs and gradients are NumPy arrays",
    "preserved_libraries": "array libraries found here that come out as they went in",
    "lengths": "rows of different lengths",
    "zero_length": "one row of length 0",
    "zero_steps": "T = 0",
    "mask": "a mask with holes inside",
    "reset": "rows reset inside a sequence",
    "wrong_state_shape": "a state of another batch size is refused",
    "layer_sizes": "a hidden size for each layer",
    "custom_cell": "a user-defined cell in the layer",
    "cell_states": "the LSTM layer returns its cell states at all steps",
    "gradient_checker": "a gradient checker, which catches a wrong gradient",
    "bounded_memory": "backward in bounded memory, an argument of the layer",
}
ADAPTERS = {  # peer -> module:class
    "xprnn": "array_peers:Xprnn",
    "article": "array_peers:Article",
    "torch": "framework_peers:Torch",
    "keras": "framework_peers:Keras",
    "chainer": "chainer_peer:Chainer",
    "thinc": "array_peers:Thinc",
}


@dataclass
class LibraryAdapter:
    """A library; its methods answer the questions.

    default_cell: the cell for questions about time, dtypes and arrays.
    precision: dtype of the problems.
    layer_widths: hidden sizes of two layers.
    """

    default_cell: str = "lstm"
    precision: str = "float64"
    layer_widths: tuple[int, int] = (H, 2)

    def to_array(self, value: Any) -> Any:
        """Convert a NumPy array to the library's array."""
        return value

    def run(self, p: FeatureProblem, to_array: Any = None) -> dict[str, Any]:
        """Run forward and backward on a problem.

        Args:
            p: the problem.
            to_array: converts NumPy arrays; default: `self.to_array`.

        Returns:
            y (T,N,H), h (N,H), dx, dweight_ih, dweight_hh, dbias_ih and, if the library has them, dh0 and dc0, as the
            library returns them.

        Raises:
            UnsupportedFeatureError: the library cannot express the problem.
        """
        raise NotImplementedError

    def imports(self) -> str:
        """Name the NumPy that the library runs with."""
        return f"yes (NumPy {np.__version__})"

    def answer_with_errors(self, cell: str) -> str:
        """Answer with the errors of outputs and gradients."""
        p = random_problem(cell, dtype=self.precision)
        right, text = judge_results(self.run(p), p)
        return f"{'' if right else 'wrong: '}{text}"

    def answer_yes_no(self, cell: str, states: bool = False, **options: Any) -> str:
        """Answer yes or no; `options` are those of `random_problem`."""
        p = random_problem(cell, dtype=self.precision, **options)
        right, text = judge_results(self.run(p), p, states)
        return "yes" if right else f"no ({text})"

    def rnn(self) -> str:
        """Compare the tanh RNN's outputs, and its gradients of x, weights and bias."""
        return self.answer_with_errors("rnn")

    def lstm(self) -> str:
        """Compare the LSTM's outputs, and its gradients of x, weights and bias."""
        return self.answer_with_errors("lstm")

    def gru(self) -> str:
        """Compare the original GRU's outputs, and its gradients of x, weights and bias."""
        return self.answer_with_errors("gru")

    def initial_state(self) -> str:
        """Give each row another initial state."""
        return self.answer_yes_no(self.default_cell, states=True, random_state=True)

    def lengths(self) -> str:
        """Give the rows unsorted lengths."""
        return self.answer_yes_no(self.default_cell, lengths=[2, T, 3])

    def zero_length(self) -> str:
        """Give one row the length 0."""
        return self.answer_yes_no(self.default_cell, lengths=[2, 0, T])

    def zero_steps(self) -> str:
        """Run no step: the final state is the initial one."""
        return self.answer_yes_no(self.default_cell, steps=0)

    def mask(self) -> str:
        """Mask steps inside the sequence: the state is carried over them, and their y is 0."""
        mask = np.asarray([[1, 1, 0], [0, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 0]], bool)
        return self.answer_yes_no(self.default_cell, mask=mask)

    def reset(self) -> str:
        """Reset two rows at different steps."""
        reset = np.zeros((T, N), bool)
        reset[2, 0] = reset[3, 2] = True
        return self.answer_yes_no(self.default_cell, reset=reset, random_state=True)

    def wrong_state_shape(self) -> str:
        """Give one row of state for three rows of x."""
        p = random_problem(self.default_cell, random_state=True, dtype=self.precision)
        p = replace(p, arrays=p.arrays | {k: p.arrays[k][:1] for k in ("h0", "c0")})
        try:
            self.run(p)
        except UnsupportedFeatureError:
            raise
        except Exception as error:  # any exception refuses it
            return f"yes ({type(error).__name__})"
        return "no (used for every row)"

    def custom_cell(self) -> str:
        """Run a leaky unit, h' = 0.9 h + 0.1 tanh(W x + U h + b)."""
        return self.answer_yes_no("leaky")

    def dtype(self) -> str:
        """Compare the dtypes of all outputs and gradients, and the accuracy of float64."""
        wrong: dict[str, list[str]] = {}
        for dtype in ("float32", "float64"):
            results = self.run(random_problem(self.default_cell, dtype=dtype))
            dtypes = {k: str(to_numpy(v).dtype) for k, v in results.items()}
            for other in {*dtypes.values()} - {dtype}:
                wrong[f"{dtype} in, {other} out"] = [name for name in dtypes if dtypes[name] == other]
        right, text = judge_results(results, random_problem(self.default_cell))
        if not (wrong or right):
            return f"no (float64 in, float32's accuracy: {text})"
        return "yes" if not wrong else f"no ({'; '.join(f'{k}: {chr(32).join(v)}' for k, v in wrong.items())})"

    def numpy_arrays(self) -> str:
        """Give NumPy arrays and look at the types of the results."""
        results = self.run(random_problem(self.default_cell, dtype=self.precision), to_array=np.asarray)
        types = sorted({type(v).__name__ for v in results.values()} - {"ndarray"})
        return "yes" if not types else f"no (out: {', '.join(types)})"

    def preserved_libraries(self) -> str:
        """Give the arrays of each installed library and look at the types of the results."""
        preserved = []
        for name, (to_array, roots) in array_libraries().items():
            try:
                results = self.run(random_problem(self.default_cell, dtype=self.precision), to_array=to_array)
            except Exception:  # the arrays are not accepted
                continue
            if all(type(v).__module__.split(".")[0] in roots for v in results.values()):
                preserved.append(name)
        return ", ".join(preserved) or "none"

    def column_softmax(self, x: Any) -> Any:
        """Return the softmax of each column."""
        raise NotImplementedError

    def softmax(self) -> str:
        """Compute the softmax of three columns that differ by a constant: the results must be equal."""
        column = np.asarray([0.5, 0.0, -1.0, 2.0])[:, None]
        result = to_numpy(self.column_softmax(self.to_array(column + np.asarray([0.0, 1e3, 1e4]))))
        expected = np.exp(column) / np.exp(column).sum() + np.zeros((1, 3))
        if np.isnan(result).any():
            return f"no (nan in {np.isnan(result).any(axis=0).sum()} of 3 columns)"
        error = relative_error(result, expected)
        return "yes" if error < 1e-6 else f"no (off by {error:.0e})"

    def cell_states(self) -> str:
        """Search the cell states at all steps among the arrays that the LSTM returns."""
        p = random_problem("lstm", dtype=self.precision)
        expected = reference_results(p)["c"]
        outputs = [to_numpy(v) for v in self.lstm_outputs(p)]
        layouts = (expected, expected.transpose(1, 0, 2))
        found = any(min(relative_error(v, w) for w in layouts) < 1e-4 for v in outputs)
        return "yes" if found else f"no (returns {' '.join(str(v.shape).replace(' ', '') for v in outputs)})"

    def lstm_outputs(self, p: FeatureProblem) -> list[Any]:
        """Return all arrays that the LSTM's forward pass returns."""
        raise NotImplementedError


def array_libraries() -> dict[str, Any]:
    """Return the installed array libraries: name -> (function from NumPy, root modules of the array types)."""
    libraries: dict[str, Any] = {"NumPy": (np.asarray, ("numpy",))}
    for name, module, convert in (
        ("array-api-strict", "array_api_strict", "asarray"),
        ("torch", "torch", "from_numpy"),
        ("JAX", "jax.numpy", "asarray"),
        ("CuPy", "cupy", "asarray"),
    ):
        try:
            library = importlib.import_module(module)
            if name == "CuPy" and not library.cuda.is_available():
                continue  # CuPy can be imported without a GPU
        except ImportError:
            continue
        root = module.split(".")[0]
        libraries[name] = (getattr(library, convert), (root, "jaxlib") if root == "jax" else (root,))
    return libraries


@cache
def _adapter(name: str) -> Any:
    """Import a library and create its adapter; the exception if that fails."""
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")  # the 0/0 of the article's softmax is reported in its row
    module, _, class_name = ADAPTERS[name].partition(":")
    try:
        return getattr(importlib.import_module(f"benchmarks.features.{module}"), class_name)()
    except Exception as error:  # any exception of the library's import
        return error


def describe_peer(name: str) -> dict[str, str]:
    """Return the title of a column, and in "problem" what prevents all answers, or ""."""
    title = PEERS[name].title
    if any(importlib.util.find_spec(module) is None for module in PEERS[name].modules):
        return {"title": title, "problem": "not installed"}
    adapter = _adapter(name)
    if isinstance(adapter, Exception):
        with suppress(importlib.metadata.PackageNotFoundError):  # xprnn runs from the repository
            title += f" {importlib.metadata.version(name)}"
        line = f"{type(adapter).__name__}: {(str(adapter).splitlines() or [''])[0]}"
        return {"title": f"{title} (NumPy {np.__version__})", "problem": f"import fails: {line}"}
    return {"title": f"{title} {adapter.version}".strip(), "problem": ""}


def answer(peer_name: str, question: str) -> str:
    """Answer a question: the text of one cell of the table.

    Args:
        peer_name: a key of ADAPTERS.
        question: a key of QUESTIONS.
    """
    try:
        text = str(getattr(_adapter(peer_name), question)())
    except UnsupportedFeatureError as error:
        text = f"no ({error})"
    except Exception as error:  # the library's own message
        # Keras puts a headline and colours around the reason.
        lines = re.sub(r"\x1b\[\d*m", "", str(error)).split("\n")
        line = next((one for one in lines if one.strip() and not one.startswith("Exception encountered")), "")
        line = re.sub(r"(?<!\w)/[\w./+-]+", "...", line)  # hides paths of this machine
        text = f"no ({type(error).__name__}: {line if len(line) <= 80 else line[:77] + '...'})"
    return text.replace("|", "/")
