"""What the in-place scan's forward and backward share: the arrays of a pass, its blocks of steps, the hoisted GEMM."""

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

_BLOCK_BYTES = 1 << 18  # the hoisted factors of a block should stay in the second-level cache
_BLOCK_STEPS = 512


def _gate_slice(a: Array, k: int, width: int) -> Array:
    return a[..., k * width : (k + 1) * width]


@dataclass
class ScanWorkspace:
    """One pass over a sequence: its parts, and the arrays with a step axis, (T, N, .), under their program names."""

    plan: UfuncPlan
    cell: Cell
    params: Params
    row_order: RowOrder
    reverse: bool
    reset_state: State
    arrays: dict[str, Array] = field(default_factory=dict)

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.params["weight_hh"].shape[0]) // self.cell.gates

    def gate_views(self, letter: str, a: Array) -> dict[str, Array]:
        """The gates of (..., G*H) as letter0, letter1, ..."""
        return {f"{letter}{k}": _gate_slice(a, k, self.hidden_size) for k in range(self.cell.gates)}

    def vectors(self) -> dict[str, Array]:
        """The cell's own vectors as p0, p1, ..."""
        return {f"p{k}": self.params[name] for k, name in enumerate(self.cell.vectors)}

    def step_blocks(self, reverse: bool, step_bytes: int) -> Iterator[tuple[int, int, int, range]]:
        """(first step, last step + 1, row count, the steps in order) of each block, in the order of the walk."""
        size = max(1, min(_BLOCK_STEPS, _BLOCK_BYTES // max(1, step_bytes)))
        runs = [(a, min(a + size, b), n) for start, b, n in self.row_order.step_runs for a in range(start, b, size)]
        for t0, t1, n in reversed(runs) if reverse else runs:
            yield t0, t1, n, range(t1 - 1, t0 - 1, -1) if reverse else range(t0, t1)


def step_views(a: Array, n: int, reverse: bool) -> list[Array]:
    """The first n rows of each step of a block, in the order of the walk."""
    return list(a[::-1, :n] if reverse else a[:, :n])


def step_buffer(shape: tuple[int, ...], dtype: Any, record_tape: bool) -> Array:
    """(T, N, H) to write into; where no tape is kept, one step's room seen at every step."""
    if record_tape:
        return np.empty(shape, dtype)
    one = np.empty((1, *shape[1:]), dtype)
    return as_strided(one, shape, (0, *one.strides[1:]))


class FusedGateActivation(NamedTuple):
    """How the added gates become tanh or sigmoid in one call for all: sigmoid(x) = tanh(x/2)/2 + 1/2.

    Each is (cut,): the weights' rows are scaled by `half` once, the tanh by `half` again, and `offset` is added.
    """

    scale: Array
    offset: Array

    @classmethod
    def from_workspace(cls, w: ScanWorkspace, dtype: Any) -> "FusedGateActivation | None":
        """None where no gate is a sigmoid."""
        if "sigmoid" not in w.plan.gate_activations:
            return None
        half = np.repeat(
            np.asarray([0.5 if op == "sigmoid" else 1.0 for op in w.plan.gate_activations], dtype), w.hidden_size
        )
        return cls(half, 1 - half)

    def scale_rows(self, a: Array) -> Array:
        """A copy of (G*H, ...) with the rows of sigmoid gates halved."""
        a, cut = a.copy(), self.scale.shape[0]
        a[:cut] *= self.scale.reshape(cut, *[1] * (a.ndim - 1))
        return a


def project_inputs(w: ScanWorkspace, activation: FusedGateActivation | None, x: Array, out: Array | None) -> Array:
    """x W' + b_ih, and b_hh of the added gates, for all steps, scaled for the squash; into `out` if given."""
    wih, b, b_hh = w.params["weight_ih"], w.params.get("bias_ih"), w.params.get("bias_hh")
    if b is not None and b_hh is not None:
        cut = w.plan.summed_gates * w.hidden_size
        b = np.concatenate((b[:cut] + b_hh[:cut], b[cut:]))
    if activation is not None:
        b = None if b is None else activation.scale_rows(b)
        wih = wih if x.dtype.kind in "iu" else activation.scale_rows(wih)
    to = None if out is None else flatten_leading(np, out)
    if x.dtype.kind in "iu":
        y = gather_columns(np, wih, x.reshape(x.size))
        if activation is not None:
            y[:, : activation.scale.shape[0]] *= activation.scale
        if to is not None:
            to[...] = y
            y = to
    else:
        y = np.dot(flatten_leading(np, x), wih.T, out=to)
    if b is not None:
        y += b
    return y.reshape(*x.shape[:2], wih.shape[0])
