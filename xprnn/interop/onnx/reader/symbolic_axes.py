"""Symbolic values of a graph: data arrays, final states, and inputs that are states or lengths."""

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
    """Raised if a graph is not a model of xprnn; the message says why."""


@dataclass(frozen=True)
class SymbolicArray:
    """The output of a layer, described by its axes.

    Args:
        layer_index: the number of the layer; -1 for the input of the graph.
        axes: for each axis, its labels; an axis that merges several axes has several. Labels are "0" and "1" for the
            first two axes of the input (time and batch in either order), "x" for its features, "d2" for the directions
            and "h2" for the features of layer number 2, "m2" for features that layer 2 merged, and "d_last" for an axis
            of size 1 that a slice of the last time step left.
    """

    layer_index: int
    axes: tuple[AxisLabels, ...]


class AxisSizes(dict[str, int]):
    """The size of each label.

    >>> AxisSizes({"0": 5, "d0": 2, "h0": 3}).size_of(("d0", "h0"))
    6
    """

    def size_of(self, labels: AxisLabels) -> int:
        """The size of an axis with these labels."""
        return math.prod(self[label] for label in labels)

    def shape(self, node: Node, x: SymbolicArray) -> HostValue:
        """Evaluate Shape."""
        sizes = np.asarray([self.size_of(g) for g in x.axes], np.int64)
        return HostValue(sizes[node.attrs.get("start", 0) : node.attrs.get("end")])

    def transpose(self, node: Node, x: SymbolicArray) -> SymbolicArray:
        """Evaluate Transpose."""
        perm = node.attrs.get("perm", range(len(x.axes) - 1, -1, -1))
        return replace(x, axes=tuple(x.axes[k] for k in perm))

    def squeeze(self, node: Node, x: SymbolicArray, axes: HostValue | None = None) -> SymbolicArray:
        """Evaluate Squeeze. Only an axis of directions, or the axis "d_last" of the last time step, may be removed."""
        listed = node.attrs.get("axes") if axes is None else axes.array.reshape(-1).tolist()
        listed = [k for k, g in enumerate(x.axes) if self.size_of(g) == 1] if listed is None else listed
        removed = {a % len(x.axes) for a in listed}
        if any(not x.axes[k][0].startswith("d") for k in removed):
            raise NotALayerGraphError(f"{node} removes an axis of data")
        return replace(x, axes=tuple(g for k, g in enumerate(x.axes) if k not in removed))

    def reshape(self, node: Node, x: SymbolicArray, shape: HostValue) -> SymbolicArray:
        """Evaluate Reshape: keep the order of the labels and divide them into axes whose sizes are those of `shape`."""
        sizes = np.asarray(shape.array).reshape(-1).tolist()
        if not node.attrs.get("allowzero", 0):
            sizes = [self.size_of(x.axes[k]) if d == 0 else d for k, d in enumerate(sizes)]
        labels = [a for g in x.axes for a in g]
        if -1 in sizes:
            rest = math.prod(d for d in sizes if d != -1)
            sizes[sizes.index(-1)] = self.size_of(tuple(labels)) // max(rest, 1)
        groups = []
        for d in sizes:
            group: AxisLabels = ()
            while labels and (not group or self.size_of(group) < d):
                group += (labels.pop(0),)
            groups.append(group)
        if groups and labels and self.size_of(tuple(labels)) == 1:  # the last labels have size 1
            groups[-1] += tuple(labels)
            labels = []
        if labels or [self.size_of(g) for g in groups] != sizes:
            raise NotALayerGraphError(f"{node} mixes axes")
        return replace(x, axes=tuple(groups))


@dataclass(frozen=True)
class SymbolicInput:
    """A graph input that holds initial states or lengths.

    Args:
        name: the name of the input.
        start, stop: the rows of it that this value holds.
        default: the default value of the input, or None.
    """

    name: str
    start: int
    stop: int
    default: Any = None


@dataclass(frozen=True)
class FinalState:
    """Final states, concatenated along the directions.

    Args:
        layer_indices: the numbers of the recurrent layers.
        state: "h" or "c".
        batch_first: True for the shape (N,directions,H), False for (directions,N,H).
    """

    layer_indices: tuple[int, ...]
    state: str
    batch_first: bool = False


def initial_state_value(value: Any) -> Any:
    """The initial state (directions,H) of a constant or of an input's default value; None for zeros.

    Raises:
        NotALayerGraphError: the rows of the batch have different initial states.
    """
    array = value.array if isinstance(value, HostValue) else getattr(value, "default", None)
    if array is None or not np.any(array):
        return None
    if isinstance(value, SymbolicInput):
        array = array[value.start : value.stop]
    if not (array == array[:, :1]).all():
        raise NotALayerGraphError("the rows of the batch have different initial states")
    return array[:, 0]
