"""Workspace of one pass of the NumPy scan: its arrays, blocks of steps, input projection and gate activation."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from xprnn.arrays.linear import flatten_leading, gather_columns
from xprnn.arrays.namespace import Array, Params
from xprnn.cells.cell import Cell
from xprnn.kernels.row_order import RowOrder
from xprnn.kernels.tape import State
from xprnn.kernels.ufunc.plan import UfuncPlan

__all__ = [
    "FusedGateActivation",
    "ScanWorkspace",
    "project_inputs",
    "step_buffer",
    "step_views",
]

_BLOCK_BYTES = 1 << 18  # keeps the hoisted factors of a block in the second-level cache
_BLOCK_STEPS = 512


def _gate_slice(a: Array, k: int, width: int) -> Array:
    return a[..., k * width : (k + 1) * width]


@dataclass
class ScanWorkspace:
    """One pass over a sequence: its configuration, and its arrays (T, N, .) by their names in the programs."""

    plan: UfuncPlan
    cell: Cell
    params: Params
    row_order: RowOrder
    reverse: bool
    reset_state: State
    arrays: dict[str, Array] = field(default_factory=dict)

    @property
    def hidden_size(self) -> int:
        """H, the number of units."""
        return int(self.params["weight_hh"].shape[0]) // self.cell.gates

    def gate_views(self, letter: str, a: Array) -> dict[str, Array]:
        """Return views of the gates of (..., G*H), named letter0, letter1, ..."""
        return {f"{letter}{k}": _gate_slice(a, k, self.hidden_size) for k in range(self.cell.gates)}

    def vectors(self) -> dict[str, Array]:
        """Return the cell's vectors, named p0, p1, ..."""
        return {f"p{k}": self.params[name] for k, name in enumerate(self.cell.vectors)}

    def step_blocks(self, reverse: bool, step_bytes: int) -> Iterator[tuple[int, int, int, range]]:
        """Yield (first step, last step + 1, number of rows, steps in the order of the time loop) of each block.

        All steps of a block run the same number of rows. Views are made for one block at a time, so the number of
        Python objects does not grow with T.

        Args:
            reverse: True to begin with the last step.
            step_bytes: the memory of the hoisted factors of one step.
        """
        size = max(1, min(_BLOCK_STEPS, _BLOCK_BYTES // max(1, step_bytes)))
        runs = [(a, min(a + size, b), n) for start, b, n in self.row_order.step_runs for a in range(start, b, size)]
        for t0, t1, n in reversed(runs) if reverse else runs:
            yield t0, t1, n, range(t1 - 1, t0 - 1, -1) if reverse else range(t0, t1)


def step_views(a: Array, n: int, reverse: bool) -> list[Array]:
    """Return views of the first n rows of each step of a block, in the order of the time loop."""
    return list(a[::-1, :n] if reverse else a[:, :n])


def step_buffer(shape: tuple[int, ...], dtype: Any, record_tape: bool) -> Array:
    """Allocate an array (T, N, H); without a tape, all of its steps share the memory of one."""
    if record_tape:
        return np.empty(shape, dtype)
    single = np.empty((1, *shape[1:]), dtype)
    return as_strided(single, shape, (0, *single.strides[1:]))


class FusedGateActivation(NamedTuple):
    """The activations of all summed gates in one call of tanh: scale * tanh(scale * x) + offset.

    sigmoid(x) = tanh(x/2)/2 + 1/2, so scale and offset are 1/2 for a sigmoid; they are 1 and 0 for tanh. The inner
    scale is applied to the rows of the weights and biases before the time loop.
    """

    scale: Array  # (number of summed gates * H,)
    offset: Array

    @classmethod
    def from_workspace(cls, w: ScanWorkspace, dtype: Any) -> "FusedGateActivation | None":
        """Return the fused activation of a pass, or None if no gate is a sigmoid."""
        if "sigmoid" not in w.plan.gate_activations:
            return None
        scales = np.asarray([0.5 if op == "sigmoid" else 1.0 for op in w.plan.gate_activations], dtype)
        scale = np.repeat(scales, w.hidden_size)
        return cls(scale, 1 - scale)

    def scale_rows(self, a: Array) -> Array:
        """Return a copy of (G*H, ...) with its rows multiplied by `scale`; the rows of the other gates stay."""
        a, cut = a.copy(), self.scale.shape[0]
        a[:cut] *= self.scale.reshape(cut, *[1] * (a.ndim - 1))
        return a


def project_inputs(w: ScanWorkspace, activation: FusedGateActivation | None, x: Array, out: Array | None) -> Array:
    """Compute the input projection x W^T + b_ih of all steps.

    For the summed gates it includes b_hh.

    Args:
        w: the workspace.
        activation: if not None, the projection is scaled for it.
        x: (T, N, D), or integers (T, N).
        out: (T, N, G*H) to write to, or None to allocate.
    """
    weight, b, b_hh = w.params["weight_ih"], w.params.get("bias_ih"), w.params.get("bias_hh")
    if b is not None and b_hh is not None:
        cut = w.plan.summed_gates * w.hidden_size
        b = np.concatenate((b[:cut] + b_hh[:cut], b[cut:]))
    if activation is not None:
        b = None if b is None else activation.scale_rows(b)
        weight = weight if x.dtype.kind in "iu" else activation.scale_rows(weight)
    target = None if out is None else flatten_leading(np, out)
    if x.dtype.kind in "iu":
        y = gather_columns(np, weight, x.reshape(x.size))
        if activation is not None:
            y[:, : activation.scale.shape[0]] *= activation.scale
        if target is not None:
            target[...] = y
            y = target
    else:
        y = np.dot(flatten_leading(np, x), weight.T, out=target)
    if b is not None:
        y += b
    return y.reshape(*x.shape[:2], weight.shape[0])
