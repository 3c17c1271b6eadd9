"""One row of the grid: its arrays, and what a contender is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

__all__ = ["FORWARD", "FORWARD_BACKWARD", "GATE_COUNTS", "GRID", "Call", "Implementation", "Problem"]

Array: TypeAlias = "np.ndarray[Any, Any]"
Call: TypeAlias = Callable[[], Any]
FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"
GATE_COUNTS = {
    "elman": 1,
    "lstm": 4,
    "gru": 3,
    "lstm-proj": 4,
    "gru-before": 3,
}  # proj: to H/2; before: the original GRU
GRID = [  # D, H, N, T
    (1, 16, 1, 1000),
    (27, 50, 1, 100),
    (27, 100, 32, 50),
    (64, 128, 32, 100),
    (128, 256, 64, 100),
    (256, 512, 128, 50),
    (512, 1024, 64, 50),
]


@dataclass(frozen=True)
class Implementation:
    """Someone who can run a task.

    calls: what is timed, by name: of a row FORWARD, and BOTH (forward and backward) of those who can.
    results: what the calls compute, as NumPy arrays in the core's layout and under the core's names: y (T, N, H), dx,
        dh0 (and dc0), dweight_ih, ...; those that a contender has no notion of are left out.
    """

    calls: dict[str, Call]
    results: Callable[[], dict[str, Array]]


class Problem:
    """Float32 arrays of one row, the same for everyone.

    Weights are drawn as torch does, so that states neither die nor explode. The article's arrays are what its readers
    have: features first and C-ordered (or Fortran-ordered if `order` is "F": then the door copies nothing).
    """

    def __init__(self, cell: str, shape: tuple[int, int, int, int], order: str = "C") -> None:
        self.cell, self.shape, self.order = cell, shape, order
        d, h, n, t = shape
        rng = np.random.default_rng(0)
        scale = h**-0.5
        rows = GATE_COUNTS[cell] * h
        sizes = {"weight_ih": (rows, d), "weight_hh": (rows, self.output_size), "bias_ih": (rows,), "bias_hh": (rows,)}
        sizes |= {"weight_hr": (self.output_size, h)} if self.output_size < h else {}
        self.params = {k: rng.uniform(-scale, scale, s).astype(np.float32) for k, s in sizes.items()}
        self.x, self.dy = self._normal(rng, t, n, d), self._normal(rng, t, n, self.output_size)
        widths = [self.output_size, h] if cell.startswith("lstm") else [h]
        self.state = tuple(0.5 * self._normal(rng, n, wide) for wide in widths)
        self.head = (
            rng.uniform(-scale, scale, (d, h)).astype(np.float32),
            rng.uniform(-scale, scale, (d, 1)).astype(np.float32),
        )

    @staticmethod
    def _normal(rng: np.random.Generator, *shape: int) -> Array:
        return rng.standard_normal(shape, dtype=np.float32)

    @property
    def output_size(self) -> int:
        """The width of h."""
        return self.shape[1] // 2 if self.cell == "lstm-proj" else self.shape[1]

    @property
    def flops(self) -> dict[str, float]:
        """Operations of the matrix products alone; the backward pass has two for each one of the forward pass."""
        d, h, n, t = self.shape
        products = (d + self.output_size) * GATE_COUNTS[self.cell] * h + (
            self.output_size * h if self.output_size < h else 0
        )
        forward = 2.0 * t * n * products
        return {FORWARD: forward, FORWARD_BACKWARD: 3 * forward}

    def _to_features_first(self, a: Array) -> Array:
        return np.asfortranarray(a.T) if self.order == "F" else np.ascontiguousarray(a.T)

    def article_arrays(self) -> tuple[Array, Array, Array, dict[str, Array]]:
        """x (n_x, m, T), a0 (n_a, m), da (n_a, m, T) and the article's parameters, with n_y = n_x outputs."""
        p = self.params
        bias = (p["bias_ih"] + p["bias_hh"])[:, None]
        wya, by = self.head
        parameters = {"Wax": p["weight_ih"], "Waa": p["weight_hh"], "Wya": wya, "ba": bias, "by": by}
        return (
            self._to_features_first(self.x),
            self._to_features_first(self.state[0]),
            self._to_features_first(self.dy),
            parameters,
        )
