"""One row of the benchmark grid: its arrays, and the calls and results of an implementation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

__all__ = [
    "FORWARD",
    "FORWARD_BACKWARD",
    "GATE_COUNTS",
    "GRID",
    "STEP",
    "TRAIN_STEP",
    "Array",
    "Call",
    "Implementation",
    "Problem",
    "matmul_flops",
]

Array: TypeAlias = "np.ndarray[Any, Any]"
Call: TypeAlias = Callable[[], Any]
FORWARD, FORWARD_BACKWARD, STEP, TRAIN_STEP = "forward", "forward+backward", "step", "training step"
# lstm-proj: LSTM projected to H/2. gru-before: the original GRU, whose reset gate acts before the recurrent product.
GATE_COUNTS = {"elman": 1, "lstm": 4, "gru": 3, "lstm-proj": 4, "gru-before": 3}
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
    """An implementation of one task: the calls to time and the arrays to compare.

    calls: name -> call: FORWARD and FORWARD_BACKWARD for a row of the grid, STEP for a stream, TRAIN_STEP for training.
    results: returns what the calls compute, as NumPy arrays with torch's layout and names: y (T,N,H), dx, dh0, dc0,
        dweight_ih, ... An array that an implementation does not compute is absent; an empty dict compares nothing.
    timer: runs a call once and returns its seconds (CUDA events). None: the host clock times repeated calls.
    """

    calls: dict[str, Call]
    results: Callable[[], dict[str, Array]] = dict
    timer: Callable[[Call], float] | None = None


class Problem:
    """Float32 arrays of one row, equal for all implementations.

    Weights are drawn uniformly as in torch, so that states neither vanish nor saturate.

    Args:
        cell: a key of GATE_COUNTS.
        shape: (D, H, N, T).
        order: memory order of the article's arrays. With "F", `xprnn.rnn_forward` copies nothing.
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
        state_sizes = [self.output_size, h] if cell.startswith("lstm") else [h]
        self.state = tuple(0.5 * self._normal(rng, n, size) for size in state_sizes)
        self.head = (
            rng.uniform(-scale, scale, (d, h)).astype(np.float32),
            rng.uniform(-scale, scale, (d, 1)).astype(np.float32),
        )

    @staticmethod
    def _normal(rng: np.random.Generator, *shape: int) -> Array:
        return rng.standard_normal(shape, dtype=np.float32)

    @property
    def output_size(self) -> int:
        """The number of features of h."""
        return self.shape[1] // 2 if self.cell == "lstm-proj" else self.shape[1]

    def _to_features_first(self, a: Array) -> Array:
        return np.asfortranarray(a.T) if self.order == "F" else np.ascontiguousarray(a.T)

    def article_arrays(self) -> tuple[Array, Array, Array, dict[str, Array]]:
        """Return x (n_x, m, T), a0 (n_a, m), da (n_a, m, T) and the article's parameters, with n_y = n_x outputs."""
        p = self.params
        bias = (p["bias_ih"] + p["bias_hh"])[:, None]
        wya, by = self.head
        parameters = {"Wax": p["weight_ih"], "Waa": p["weight_hh"], "Wya": wya, "ba": bias, "by": by}
        x, a0, da = (self._to_features_first(a) for a in (self.x, self.state[0], self.dy))
        return x, a0, da, parameters


def matmul_flops(cell: str, shape: tuple[int, int, int, int]) -> dict[str, float]:
    """Count the operations of the matrix products of each pass.

    The backward pass has two products for each product of the forward pass.

    Args:
        cell: a key of GATE_COUNTS.
        shape: (D, H, N, T).
    """
    d, h, n, t = shape
    output_size, projection = (h // 2, h // 2 * h) if cell == "lstm-proj" else (h, 0)
    forward = 2.0 * t * n * ((d + output_size) * GATE_COUNTS[cell] * h + projection)
    return {FORWARD: forward, FORWARD_BACKWARD: 3 * forward}
