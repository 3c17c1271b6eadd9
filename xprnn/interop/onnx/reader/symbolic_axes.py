"""Stand-ins for the values of a graph: data as the labels of its axes, states and lengths as where they come from."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from xprnn.interop.onnx.node import HostValue, Node

__all__ = [
    "AxisLabels",
    "AxisSizes",
    "FinalState",
    "NotALayerGraphError",
    "SymbolicArray",
    "SymbolicInput",
    "initial_state_value",
]

AxisLabels = tuple[str, ...]


class NotALayerGraphError(Exception):
    """The graph is none of xprnn's own models; the message says why."""


@dataclass(frozen=True)
class SymbolicArray:
    """What piece number `piece` wrote (-1: the input): for each axis the labels that it is made of.

    Labels: "0" and "1" for the first two axes of the input, d0, d1, ... for the directions of a piece, h0, h1, ... for
    its features.
    """

    layer_index: int
    axes: tuple[AxisLabels, ...]


class AxisSizes(dict[str, int]):
    """The size of each label.

    >>> AxisSizes({"0": 5, "d0": 2, "h0": 3}).size_of(("d0", "h0"))
    6
    """

    def size_of(self, labels: AxisLabels) -> int:
        """The size of an axis."""
        return math.prod(self[label] for label in labels)

    def shape(self, node: Node, x: SymbolicArray) -> HostValue:
        """Shape."""
        sizes = np.asarray([self.size_of(g) for g in x.axes], np.int64)
        return HostValue(sizes[node.attrs.get("start", 0) : node.attrs.get("end")])

    def transpose(self, node: Node, x: SymbolicArray) -> SymbolicArray:
        """Transpose."""
        perm = node.attrs.get("perm", range(len(x.axes) - 1, -1, -1))
        return replace(x, axes=tuple(x.axes[k] for k in perm))

    def squeeze(self, node: Node, x: SymbolicArray, axes: HostValue | None = None) -> SymbolicArray:
        """Squeeze: only an axis of directions may go."""
        given = node.attrs.get("axes") if axes is None else axes.array.reshape(-1).tolist()
        over = [k for k, g in enumerate(x.axes) if self.size_of(g) == 1] if given is None else given
        gone = {a % len(x.axes) for a in over}
        if any(not x.axes[k][0].startswith("d") for k in gone):
            raise NotALayerGraphError(f"{node} removes an axis of data")
        return replace(x, axes=tuple(g for k, g in enumerate(x.axes) if k not in gone))

    def reshape(self, node: Node, x: SymbolicArray, shape: HostValue) -> SymbolicArray:
        """Reshape: the labels in their order, cut anew where the products fit."""
        wanted = np.asarray(shape.array).reshape(-1).tolist()
        if not node.attrs.get("allowzero", 0):
            wanted = [self.size_of(x.axes[k]) if d == 0 else d for k, d in enumerate(wanted)]
        labels = [a for g in x.axes for a in g]
        if -1 in wanted:
            rest = math.prod(d for d in wanted if d != -1)
            wanted[wanted.index(-1)] = self.size_of(tuple(labels)) // max(rest, 1)
        groups = []
        for d in wanted:
            group: AxisLabels = ()
            while labels and (not group or self.size_of(group) < d):
                group += (labels.pop(0),)
            groups.append(group)
        if groups and labels and self.size_of(tuple(labels)) == 1:  # one unit, or one direction, at the end
            groups[-1] += tuple(labels)
            labels = []
        if labels or [self.size_of(g) for g in groups] != wanted:
            raise NotALayerGraphError(f"{node} mixes axes")
        return replace(x, axes=tuple(groups))


@dataclass(frozen=True)
class SymbolicInput:
    """A graph input that is a state (its rows from start to stop) or the lengths; `default` where it has one."""

    name: str
    start: int
    stop: int
    default: Any = None


@dataclass(frozen=True)
class FinalState:
    """Final states of recurrent pieces, h or c: (directions, N, H), or (N, directions, H) if batch_first."""

    layer_indices: tuple[int, ...]
    state: str
    batch_first: bool = False


def initial_state_value(value: Any) -> Any:
    """The initial state (directions, H) that a file holds, as `value`; None for zero.

    Raises:
        NotALayerGraphError: one of its own for each row of the batch.
    """
    array = value.array if isinstance(value, HostValue) else getattr(value, "default", None)
    if array is None or not np.any(array):
        return None
    if isinstance(value, SymbolicInput):
        array = array[value.start : value.stop]
    if not (array == array[:, :1]).all():
        raise NotALayerGraphError("its rows start from states of their own")
    return array[:, 0]
