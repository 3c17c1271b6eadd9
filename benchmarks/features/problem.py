"""What the comparison asks of everyone, and the float64 loop that knows the right answers.

Right gradients come from complex steps, Im f(x + 1e-30 i) / 1e-30: no difference is taken, so they are exact to
rounding, and no line of derivative code is shared with anyone.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["LEAK", "D", "FeatureProblem", "H", "N", "T", "UnsupportedFeatureError"]
__all__ += [
    "judge_results",
    "public_names_containing",
    "random_problem",
    "reference_results",
    "relative_error",
    "signature_error",
    "to_numpy",
]

T, N, D, H = 5, 3, 3, 4
GATE_COUNTS = {"rnn": 1, "leaky": 1, "lstm": 4, "gru": 3}
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}  # of the largest entry of the array
LEAK = 0.1


class UnsupportedFeatureError(Exception):
    """The library has no such thing; the text says what it has."""


@dataclass(frozen=True)
class FeatureProblem:
    """Weights in the gate orders of torch (LSTM i,f,g,o; GRU r,z,n), arrays, and the loss sum(u y) + sum(v h_T)."""

    cell: str
    arrays: dict[str, Any]  # x (T,N,D), W (GH,D), U (GH,H), b (GH,), h0 and c0 (N,H)
    dy: Any
    dh: Any
    lengths: list[int] | None = None
    mask: Any = None  # (T,N), False: the step is skipped; from `lengths` where they are given
    reset: Any = None  # (T,N), True: the row starts again from h0

    @property
    def dtype(self) -> Any:
        """Of x and of everything else."""
        return self.arrays["x"].dtype


def random_problem(
    cell: str, *, steps: int = T, random_state: bool = False, dtype: str = "float64", **flags: Any
) -> FeatureProblem:
    """Random arrays; the initial states are 0 unless `given`."""
    rng, g = np.random.default_rng(5), GATE_COUNTS[cell] * H
    shapes = {"x": (steps, N, D), "W": (g, D), "U": (g, H), "b": (g,), "h0": (N, H), "c0": (N, H)}
    arrays = {name: 0.7 * rng.standard_normal(shape) for name, shape in shapes.items()}
    for name in ("h0", "c0"):
        arrays[name] *= random_state
    u, v = rng.standard_normal((steps, N, H)), rng.standard_normal((N, H))
    if "lengths" in flags:
        flags["keep"] = np.arange(steps)[:, None] < np.asarray(flags["lengths"])
    return FeatureProblem(
        cell, {k: a.astype(dtype) for k, a in arrays.items()}, u.astype(dtype), v.astype(dtype), **flags
    )


def _sigmoid(a: Any) -> Any:
    return 1 / (1 + np.exp(-a))


def reference_step(cell: str, x: Any, h: Any, c: Any, a: dict[str, Any]) -> tuple[Any, Any]:
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


def _reference_scan(p: FeatureProblem, a: dict[str, Any]) -> tuple[Any, Any, Any]:
    """y, the final h, and c at every step."""
    h, c = h0, c0 = a["h0"], a["c0"]
    y, cells = [], []
    for t in range(len(a["x"])):
        if p.reset is not None:
            again = p.reset[t][:, None]
            h, c = np.where(again, h0, h), np.where(again, c0, c)
        keep = np.ones((N, 1), bool) if p.mask is None else p.mask[t][:, None]
        h1, c1 = reference_step(p.cell, a["x"][t], h, c, a)
        h, c = np.where(keep, h1, h), np.where(keep, c1, c)
        y.append(np.where(keep, h1, 0))
        cells.append(c)
    return np.reshape(np.asarray(y), (-1, N, H)), h, cells


def reference_results(p: FeatureProblem) -> dict[str, Any]:
    """Outputs, and the gradient of the loss for every array."""
    a = {k: v.astype(np.complex128) for k, v in p.arrays.items()}
    y, h, cells = _reference_scan(p, a)
    found = {"y": y.real, "h": h.real, "c": np.asarray(cells).real}
    names = ["x", "W", "U", "b", "h0"] + ["c0"] * (p.cell == "lstm")
    for name in names:
        found[f"d{name}"] = np.zeros(a[name].shape)
        for place in itertools.product(*map(range, a[name].shape)):
            moved = a[name].copy()
            moved[place] += 1e-30j
            y, h, _ = _reference_scan(p, a | {name: moved})
            found[f"d{name}"][place] = (np.sum(p.dy * y) + np.sum(p.dh * h)).imag / 1e-30
    return found


def to_numpy(value: Any) -> Any:
    """Any library's array."""
    value = value.detach() if hasattr(value, "detach") else value
    return np.asarray(value.array if type(value).__module__.startswith("chainer") else value)


def signature_error(function: Any, exclude: tuple[str, ...] = ()) -> UnsupportedFeatureError:
    """What a layer can be told, by the signature that Python shows."""
    names = [k for k in inspect.signature(function).parameters if k not in ("self", "args", "kwargs", *exclude)]
    return UnsupportedFeatureError(f"its arguments: {', '.join(names)}")


def public_names_containing(module: Any, *parts: str) -> list[str]:
    """Public names of a module in which every part occurs."""
    return [n for n in dir(module) if n[0] != "_" and all(part in n.lower() for part in parts)]


def relative_error(found: Any, wanted: Any) -> float:
    """The largest error, relative to the largest entry."""
    found = to_numpy(found)
    if found.shape != wanted.shape:
        return np.inf
    scale = np.max(np.abs(wanted), initial=0.0)
    return float(np.max(np.abs(found - wanted), initial=0.0) / (scale or 1.0))


def judge_results(found: dict[str, Any], p: FeatureProblem, states: bool = False) -> tuple[bool, str]:
    """(right, the errors in words). Gradients of the initial states count only where they are asked for."""
    wanted = reference_results(p)
    keys = [k for k in wanted if k[0] == "d" and (states or k[-1] != "0")]
    out = max(relative_error(found[k], wanted[k]) for k in ("y", "h") if k in found)
    worst = max((relative_error(found[k], wanted[k]) for k in keys if k in found), default=0.0)
    lacking = [k for k in keys if k not in found]
    right = not lacking and max(out, worst) < TOLERANCE[str(to_numpy(found["y"]).dtype)]
    text = f"outputs {out:.0e}, gradients {worst:.0e}"
    return right, text + (f", no {', '.join(lacking)}" if lacking else "")
