"""Problems of the feature comparison, and the float64 loop that computes their expected results.

Expected gradients come from complex steps, Im f(x + 1e-30 i) / 1e-30. No difference is taken, so they are exact to
rounding, and they share no derivative code with any library.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.harness.agreement import relative_error

__all__ = [
    "LEAK",
    "D",
    "FeatureProblem",
    "H",
    "N",
    "T",
    "UnsupportedFeatureError",
    "judge_results",
    "public_names_containing",
    "random_problem",
    "reference_results",
    "signature_error",
    "to_numpy",
]

T, N, D, H = 5, 3, 3, 4
GATE_COUNTS = {"rnn": 1, "leaky": 1, "lstm": 4, "gru": 3}
RTOL = {"float64": 1e-9, "float32": 1e-4}  # relative to the largest entry of the array
LEAK = 0.1  # of the user-defined cell, h' = (1 - LEAK) h + LEAK tanh(W x + U h + b)


class UnsupportedFeatureError(Exception):
    """The library does not have the feature; the message says what it has instead."""


@dataclass(frozen=True)
class FeatureProblem:
    """Arrays of one problem; the loss is sum(dy y) + sum(dh h_T).

    cell: "rnn", "lstm", "gru" (the original one) or "leaky" (user-defined).
    arrays: x (T,N,D), weight_ih (GH,D), weight_hh (GH,H), bias_ih (GH,), h0 and c0 (N,H), in torch's gate order
        (LSTM i,f,g,o; GRU r,z,n).
    dy: (T,N,H), the cotangent of y.
    dh: (N,H), the cotangent of the final h.
    lengths: number of steps of each row.
    mask: (T,N), False: the step is skipped. Set from `lengths` if they are given.
    reset: (T,N), True: the row starts again from h0 and c0.
    """

    cell: str
    arrays: dict[str, Any]
    dy: Any
    dh: Any
    lengths: list[int] | None = None
    mask: Any = None
    reset: Any = None

    @property
    def dtype(self) -> Any:
        """The dtype of all arrays."""
        return self.arrays["x"].dtype


def random_problem(
    cell: str, *, steps: int = T, random_state: bool = False, dtype: str = "float64", **flags: Any
) -> FeatureProblem:
    """Draw random arrays.

    Args:
        cell: see FeatureProblem.
        steps: T.
        random_state: draw the initial states; otherwise they are 0.
        dtype: of all arrays.
        flags: `lengths`, `mask` and `reset` of FeatureProblem.
    """
    rng, g = np.random.default_rng(5), GATE_COUNTS[cell] * H
    shapes = {"x": (steps, N, D), "weight_ih": (g, D), "weight_hh": (g, H), "bias_ih": (g,)}
    shapes |= {"h0": (N, H), "c0": (N, H)}
    arrays = {name: 0.7 * rng.standard_normal(shape) for name, shape in shapes.items()}
    for name in ("h0", "c0"):
        arrays[name] *= random_state
    dy, dh = rng.standard_normal((steps, N, H)), rng.standard_normal((N, H))
    if "lengths" in flags:
        flags["mask"] = np.arange(steps)[:, None] < np.asarray(flags["lengths"])
    return FeatureProblem(
        cell, {k: a.astype(dtype) for k, a in arrays.items()}, dy.astype(dtype), dh.astype(dtype), **flags
    )


def _sigmoid(a: Any) -> Any:
    return 1 / (1 + np.exp(-a))


def reference_step(cell: str, x: Any, h: Any, c: Any, a: dict[str, Any]) -> tuple[Any, Any]:
    """Compute one step by the equations of the papers. Return h and c."""
    W, U, b = a["weight_ih"], a["weight_hh"], a["bias_ih"]
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


def _reference_scan(p: FeatureProblem, a: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return y, the final h, and c after every step."""
    h, c = h0, c0 = a["h0"], a["c0"]
    y, cells = [], []
    for t in range(len(a["x"])):
        if p.reset is not None:
            reset = p.reset[t][:, None]
            h, c = np.where(reset, h0, h), np.where(reset, c0, c)
        mask = np.ones((N, 1), bool) if p.mask is None else p.mask[t][:, None]
        h1, c1 = reference_step(p.cell, a["x"][t], h, c, a)
        h, c = np.where(mask, h1, h), np.where(mask, c1, c)
        y.append(np.where(mask, h1, 0))
        cells.append(c)
    return np.reshape(np.asarray(y), (-1, N, H)), h, cells


def reference_results(p: FeatureProblem) -> dict[str, Any]:
    """Return y, h, c and the gradient of the loss with respect to every array."""
    a = {k: v.astype(np.complex128) for k, v in p.arrays.items()}
    y, h, cells = _reference_scan(p, a)
    results = {"y": y.real, "h": h.real, "c": np.asarray(cells).real}
    names = ["x", "weight_ih", "weight_hh", "bias_ih", "h0"] + ["c0"] * (p.cell == "lstm")
    for name in names:
        results[f"d{name}"] = np.zeros(a[name].shape)
        for index in itertools.product(*map(range, a[name].shape)):
            shifted = a[name].copy()
            shifted[index] += 1e-30j
            y, h, _ = _reference_scan(p, a | {name: shifted})
            results[f"d{name}"][index] = (np.sum(p.dy * y) + np.sum(p.dh * h)).imag / 1e-30
    return results


def to_numpy(value: Any) -> Any:
    """Convert the array of any library."""
    value = value.detach() if hasattr(value, "detach") else value
    return np.asarray(value.array if type(value).__module__.startswith("chainer") else value)


def signature_error(function: Any, exclude: tuple[str, ...] = ()) -> UnsupportedFeatureError:
    """Return an error that lists the arguments of a function."""
    names = [k for k in inspect.signature(function).parameters if k not in ("self", "args", "kwargs", *exclude)]
    return UnsupportedFeatureError(f"its arguments: {', '.join(names)}")


def public_names_containing(module: Any, *parts: str) -> list[str]:
    """Return the public names of a module that contain every part."""
    return [n for n in dir(module) if n[0] != "_" and all(part in n.lower() for part in parts)]


def judge_results(results: dict[str, Any], p: FeatureProblem, states: bool = False) -> tuple[bool, str]:
    """Compare results with the expected ones.

    Args:
        results: as `LibraryAdapter.run` returns them.
        p: the problem.
        states: also require the gradients of the initial states.

    Returns:
        True if all are right, and the errors as text.
    """
    expected = reference_results(p)
    gradients = [k for k in expected if k[0] == "d" and (states or k[-1] != "0")]
    errors = {k: relative_error(to_numpy(results[k]), expected[k]) for k in ("y", "h", *gradients) if k in results}
    outputs = max(errors[k] for k in ("y", "h") if k in errors)
    worst = max((errors[k] for k in gradients if k in errors), default=0.0)
    absent = [k for k in gradients if k not in results]
    right = not absent and max(outputs, worst) < RTOL[str(to_numpy(results["y"]).dtype)]
    text = f"outputs {outputs:.0e}, gradients {worst:.0e}"
    return right, text + (f", no {', '.join(absent)}" if absent else "")
