"""The rows of the comparison, what is asked in each, and the float64 loop that knows the right answers.

A peer has one method `run(problem)`, which uses the library as its users would, and everything else follows: rows are
answered by its outputs and gradients, by its own error message, or by the list of arguments that its layer takes.

Right gradients come from complex steps, Im f(x + 1e-30 i) / 1e-30: no difference is taken, so they are exact to
rounding, and no line of derivative code is shared with anyone.
"""

from __future__ import annotations

import inspect
import itertools
import re
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

__all__ = ["ROWS", "Missing", "Peer", "Problem", "answer", "problem", "reference", "takes"]

T, N, D, H = 5, 3, 3, 4
GATES = {"rnn": 1, "leaky": 1, "lstm": 4, "gru": 3}
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}  # of the largest entry of the array
LEAK = 0.1

ROWS = {  # method of Peer -> what the table calls it
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


class Missing(Exception):
    """The library has no such thing; the text says what it has."""


@dataclass(frozen=True)
class Problem:
    """Weights in the gate orders of torch (LSTM i,f,g,o; GRU r,z,n), arrays, and the loss sum(u y) + sum(v h_T)."""

    cell: str
    arrays: dict[str, Any]  # x (T,N,D), W (GH,D), U (GH,H), b (GH,), h0 and c0 (N,H)
    u: Any
    v: Any
    lengths: list[int] | None = None
    keep: Any = None  # (T,N), False: the step is skipped; from `lengths` where they are given
    reset: Any = None  # (T,N), True: the row starts again from h0

    @property
    def dtype(self) -> Any:
        """Of x and of everything else."""
        return self.arrays["x"].dtype


def problem(cell: str, *, steps: int = T, given: bool = False, dtype: str = "float64", **flags: Any) -> Problem:
    """Random arrays; the initial states are 0 unless `given`."""
    rng, g = np.random.default_rng(5), GATES[cell] * H
    shapes = {"x": (steps, N, D), "W": (g, D), "U": (g, H), "b": (g,), "h0": (N, H), "c0": (N, H)}
    arrays = {name: 0.7 * rng.standard_normal(shape) for name, shape in shapes.items()}
    for name in ("h0", "c0"):
        arrays[name] *= given
    u, v = rng.standard_normal((steps, N, H)), rng.standard_normal((N, H))
    if "lengths" in flags:
        flags["keep"] = np.arange(steps)[:, None] < np.asarray(flags["lengths"])
    return Problem(cell, {k: a.astype(dtype) for k, a in arrays.items()}, u.astype(dtype), v.astype(dtype), **flags)


def _sigmoid(a: Any) -> Any:
    return 1 / (1 + np.exp(-a))


def one_step(cell: str, x: Any, h: Any, c: Any, a: dict[str, Any]) -> tuple[Any, Any]:
    """The cells as their papers have them."""
    W, U, b = a["W"], a["U"], a["b"]
    if cell == "gru":
        r, z = (_sigmoid(x @ W[k].T + h @ U[k].T + b[k]) for k in (slice(H), slice(H, 2 * H)))
        n = np.tanh(x @ W[2 * H :].T + (r * h) @ U[2 * H :].T + b[2 * H :])
        return (1 - z) * n + z * h, c
    s = x @ W.T + h @ U.T + b
    if cell == "lstm":
        i, f, g, o = (s[:, k * H : (k + 1) * H] for k in range(4))
        c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
        return _sigmoid(o) * np.tanh(c), c
    return ((1 - LEAK) * h + LEAK * np.tanh(s) if cell == "leaky" else np.tanh(s)), c


def _loop(p: Problem, a: dict[str, Any]) -> tuple[Any, Any, Any]:
    """y, the final h, and c at every step."""
    h, c = h0, c0 = a["h0"], a["c0"]
    y, cells = [], []
    for t in range(len(a["x"])):
        if p.reset is not None:
            again = p.reset[t][:, None]
            h, c = np.where(again, h0, h), np.where(again, c0, c)
        keep = np.ones((N, 1), bool) if p.keep is None else p.keep[t][:, None]
        h1, c1 = one_step(p.cell, a["x"][t], h, c, a)
        h, c = np.where(keep, h1, h), np.where(keep, c1, c)
        y.append(np.where(keep, h1, 0))
        cells.append(c)
    return np.reshape(np.asarray(y), (-1, N, H)), h, cells


def reference(p: Problem) -> dict[str, Any]:
    """Outputs, and the gradient of the loss for every array."""
    a = {k: v.astype(np.complex128) for k, v in p.arrays.items()}
    y, h, cells = _loop(p, a)
    found = {"y": y.real, "h": h.real, "c": np.asarray(cells).real}
    names = ["x", "W", "U", "b", "h0"] + ["c0"] * (p.cell == "lstm")
    for name in names:
        found[f"d{name}"] = np.zeros(a[name].shape)
        for place in itertools.product(*map(range, a[name].shape)):
            moved = a[name].copy()
            moved[place] += 1e-30j
            y, h, _ = _loop(p, a | {name: moved})
            found[f"d{name}"][place] = (np.sum(p.u * y) + np.sum(p.v * h)).imag / 1e-30
    return found


def to_numpy(value: Any) -> Any:
    """Any library's array."""
    value = value.detach() if hasattr(value, "detach") else value
    return np.asarray(value.array if type(value).__module__.startswith("chainer") else value)


def takes(function: Any, hide: tuple[str, ...] = ()) -> Missing:
    """What a layer can be told, by the signature that Python shows."""
    names = [k for k in inspect.signature(function).parameters if k not in ("self", "args", "kwargs", *hide)]
    return Missing(f"takes {', '.join(names)}")


def names_with(module: Any, *parts: str) -> list[str]:
    """Public names of a module in which every part occurs."""
    return [n for n in dir(module) if n[0] != "_" and all(part in n.lower() for part in parts)]


def off(found: Any, wanted: Any) -> float:
    """The largest error, relative to the largest entry."""
    found = to_numpy(found)
    if found.shape != wanted.shape:
        return np.inf
    scale = np.max(np.abs(wanted), initial=0.0)
    return float(np.max(np.abs(found - wanted), initial=0.0) / (scale or 1.0))


def figures(found: dict[str, Any], p: Problem, states: bool = False) -> tuple[bool, str]:
    """(right, the errors in words). Gradients of the initial states count only where they are asked for."""
    wanted = reference(p)
    keys = [k for k in wanted if k[0] == "d" and (states or k[-1] != "0")]
    out = max(off(found[k], wanted[k]) for k in ("y", "h") if k in found)
    worst = max((off(found[k], wanted[k]) for k in keys if k in found), default=0.0)
    lacking = [k for k in keys if k not in found]
    right = not lacking and max(out, worst) < TOLERANCE[str(to_numpy(found["y"]).dtype)]
    text = f"outputs {out:.0e}, gradients {worst:.0e}"
    return right, text + (f", no {', '.join(lacking)}" if lacking else "")


@dataclass
class Peer:
    """One library; rows are its methods."""

    ragged: str = "lstm"  # the cell that the rows about time are asked with
    widths: tuple[int, int] = (H, 2)
    tried: dict[str, Any] = field(default_factory=dict)

    def array(self, value: Any) -> Any:
        """NumPy to the library's own arrays."""
        return value

    def run(self, p: Problem, array: Any = None) -> dict[str, Any]:
        """y, h (T,N,H), (N,H); dx, dW, dU, db and, where there are any, dh0, dc0: as the library returns them."""
        raise NotImplementedError

    def imports(self) -> str:
        """With which NumPy."""
        return f"yes (NumPy {np.__version__})"

    def error(self, cell: str, **flags: Any) -> str:
        """A row of numbers."""
        p = problem(cell, **flags)
        return figures(self.run(p), p)[1]

    def judge(self, cell: str, states: bool = False, **flags: Any) -> str:
        """A row of yes and no."""
        p = problem(cell, **flags)
        right, text = figures(self.run(p), p, states)
        return "yes" if right else f"no ({text})"

    def rnn(self) -> str:
        """Outputs, and the gradients of x, W, U and b."""
        return self.error("rnn")

    def lstm(self) -> str:
        """As rnn."""
        return self.error("lstm")

    def gru(self) -> str:
        """As rnn."""
        return self.error("gru")

    def state(self) -> str:
        """Each row has its own."""
        return self.judge(self.ragged, states=True, given=True)

    def lengths(self) -> str:
        """Unsorted."""
        return self.judge(self.ragged, lengths=[2, T, 3])

    def zero(self) -> str:
        """Between others."""
        return self.judge(self.ragged, lengths=[2, 0, T])

    def empty(self) -> str:
        """The final state is the initial one."""
        return self.judge(self.ragged, steps=0)

    def mask(self) -> str:
        """The state is carried over the holes; y there is 0."""
        keep = np.asarray([[1, 1, 0], [0, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 0]], bool)
        return self.judge(self.ragged, keep=keep)

    def reset(self) -> str:
        """Two rows, at different steps."""
        start = np.zeros((T, N), bool)
        start[2, 0] = start[3, 2] = True
        return self.judge(self.ragged, reset=start, given=True)

    def refuse(self) -> str:
        """One row of state for three rows of x."""
        p = problem(self.ragged, given=True)
        p = replace(p, arrays=p.arrays | {k: p.arrays[k][:1] for k in ("h0", "c0")})
        try:
            self.run(p)
        except Missing:
            raise
        except Exception as error:  # whatever it says, it is refused
            return f"yes ({type(error).__name__})"
        return "no (used for every row)"

    def own(self) -> str:
        """A leaky unit, h' = 0.9 h + 0.1 tanh(W x + U h + b)."""
        return self.judge("leaky")

    def dtype(self) -> str:
        """Everything that comes back."""
        wrong = {}
        for dtype in ("float32", "float64"):
            found = self.run(problem(self.ragged, dtype=dtype))
            kinds = {k: str(to_numpy(v).dtype) for k, v in found.items()}
            wrong |= {f"{dtype} in, {v} out": [n for n in kinds if kinds[n] == v] for v in {*kinds.values()} - {dtype}}
        return "yes" if not wrong else f"no ({'; '.join(f'{k}: {chr(32).join(v)}' for k, v in wrong.items())})"

    def plain(self) -> str:
        """Nothing is wrapped, nothing has to be converted by hand."""
        found = self.run(problem(self.ragged), array=np.asarray)
        kinds = sorted({type(v).__name__ for v in found.values()} - {"ndarray"})
        return "yes" if not kinds else f"no (out: {', '.join(kinds)})"

    def libraries(self) -> str:
        """Forward and backward, each library's arrays in."""
        same = []
        for name, (array, root) in array_libraries().items():
            try:
                found = self.run(problem(self.ragged), array=array)
            except Exception:  # not for this library: that is the answer
                continue
            if all(type(v).__module__.split(".")[0] in root for v in found.values()):
                same.append(name)
        return ", ".join(same) or "none"

    def softmax_of(self, x: Any) -> Any:
        """Columns that sum to 1."""
        raise NotImplementedError

    def softmax(self) -> str:
        """Three columns that differ by a constant have one softmax."""
        column = np.asarray([0.5, 0.0, -1.0, 2.0])[:, None]
        found = to_numpy(self.softmax_of(self.array(column + np.asarray([0.0, 1e3, 1e4]))))
        wanted = np.exp(column) / np.exp(column).sum() + np.zeros((1, 3))
        if np.isnan(found).any():
            return f"no (nan in {np.isnan(found).any(axis=0).sum()} of 3 columns)"
        return "yes" if off(found, wanted) < 1e-6 else f"no (off by {off(found, wanted):.0e})"

    def cells(self) -> str:
        """Any array among what comes back that holds them."""
        p = problem("lstm")
        wanted = reference(p)["c"]
        found = [to_numpy(v) for v in self.returned(p)]
        hit = any(min(off(v, w) for w in (wanted, wanted.transpose(1, 0, 2))) < 1e-4 for v in found)
        return "yes" if hit else f"no (returns {' '.join(str(v.shape).replace(' ', '') for v in found)})"

    def returned(self, p: Problem) -> list[Any]:
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


def answer(peer: Peer, row: str) -> str:
    """One cell of the table."""
    try:
        text = getattr(peer, row)()
    except Missing as lack:
        text = f"no ({lack})"
    except Exception as error:  # the library's own words
        line = next(iter(str(error).strip().splitlines()), "")
        line = re.sub(r"(?<!\w)/[\w./+-]+", "...", line)  # no path of this machine in a table
        text = f"no ({type(error).__name__}: {line if len(line) <= 80 else line[:77] + '...'})"
    return text.replace("|", "/")
