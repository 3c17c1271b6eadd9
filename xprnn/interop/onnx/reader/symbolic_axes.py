"""Stand-ins for the values of a graph: data as the labels of its axes, states and lengths as where they come from."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from xprnn.interop.onnx.node import Host, Node

__all__ = ["Data", "Final", "Given", "Group", "OtherGraphError", "Sizes", "start_of"]

Group = tuple[str, ...]


class OtherGraphError(Exception):
    """The graph is none of xprnn's own models; the message says why."""


@dataclass(frozen=True)
class Data:
    """What piece number `piece` wrote (-1: the input): for each axis the labels that it is made of.

    Labels: "0" and "1" for the first two axes of the input, d0, d1, ... for the directions of a piece, h0, h1, ... for
    its features.
    """

    piece: int
    axes: tuple[Group, ...]


class Sizes(dict[str, int]):
    """The size of each label.

    >>> Sizes({"0": 5, "d0": 2, "h0": 3}).of(("d0", "h0"))
    6
    """

    def of(self, group: Group) -> int:
        """The size of an axis."""
        return math.prod(self[label] for label in group)

    def shape(self, node: Node, x: Data) -> Host:
        """Shape."""
        sizes = np.asarray([self.of(g) for g in x.axes], np.int64)
        return Host(sizes[node.attrs.get("start", 0) : node.attrs.get("end")])

    def transpose(self, node: Node, x: Data) -> Data:
        """Transpose."""
        perm = node.attrs.get("perm", range(len(x.axes) - 1, -1, -1))
        return replace(x, axes=tuple(x.axes[k] for k in perm))

    def squeeze(self, node: Node, x: Data, axes: Host | None = None) -> Data:
        """Squeeze: only an axis of directions may go."""
        given = node.attrs.get("axes") if axes is None else axes.array.reshape(-1).tolist()
        over = [k for k, g in enumerate(x.axes) if self.of(g) == 1] if given is None else given
        gone = {a % len(x.axes) for a in over}
        if any(not x.axes[k][0].startswith("d") for k in gone):
            raise OtherGraphError(f"{node} removes an axis of data")
        return replace(x, axes=tuple(g for k, g in enumerate(x.axes) if k not in gone))

    def reshape(self, node: Node, x: Data, shape: Host) -> Data:
        """Reshape: the labels in their order, cut anew where the products fit."""
        wanted = np.asarray(shape.array).reshape(-1).tolist()
        if not node.attrs.get("allowzero", 0):
            wanted = [self.of(x.axes[k]) if d == 0 else d for k, d in enumerate(wanted)]
        labels = [a for g in x.axes for a in g]
        if -1 in wanted:
            rest = math.prod(d for d in wanted if d != -1)
            wanted[wanted.index(-1)] = self.of(tuple(labels)) // max(rest, 1)
        groups = []
        for d in wanted:
            group: Group = ()
            while labels and (not group or self.of(group) < d):
                group += (labels.pop(0),)
            groups.append(group)
        if groups and labels and self.of(tuple(labels)) == 1:  # one unit, or one direction, at the end
            groups[-1] += tuple(labels)
            labels = []
        if labels or [self.of(g) for g in groups] != wanted:
            raise OtherGraphError(f"{node} mixes axes")
        return replace(x, axes=tuple(groups))


@dataclass(frozen=True)
class Given:
    """A graph input that is a state (its rows from start to stop) or the lengths; `default` where it has one."""

    name: str
    start: int
    stop: int
    default: Any = None


@dataclass(frozen=True)
class Final:
    """Final states of recurrent pieces, h or c: (directions, N, H), or (N, directions, H) if batch_first."""

    pieces: tuple[int, ...]
    state: str
    batch_first: bool = False


def start_of(value: Any) -> Any:
    """The initial state (directions, H) that a file holds, as `value`; None for zero.

    Raises:
        OtherGraphError: one of its own for each row of the batch.
    """
    array = value.array if isinstance(value, Host) else getattr(value, "default", None)
    if array is None or not np.any(array):
        return None
    if isinstance(value, Given):
        array = array[value.start : value.stop]
    if not (array == array[:, :1]).all():
        raise OtherGraphError("its rows start from states of their own")
    return array[:, 0]
