"""What each operator of the plumbing does to stand-ins, and to the row of pieces that stands so far."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from xprnn.interop.onnx.layer_specs import Piece
from xprnn.interop.onnx.node import Host, Node
from xprnn.interop.onnx.reader.symbolic_axes import Data, Final, Given, Group, OtherGraphError, Sizes
from xprnn.interop.onnx.recurrent_attributes import MERGES, function_of
from xprnn.layers.elementwise import Apply, Softmax
from xprnn.layers.masking import Last
from xprnn.layers.sequence_ops import Merge

__all__ = [
    "Plumbing",
    "identifier",
]


class Half(NamedTuple):
    """The first or the second half of the features of `whole`."""

    whole: Data
    which: int


class Plumbing:
    """Operators by name, `_on_...`; `done` are the pieces so far, `time` the label of the axis that is walked."""

    def __init__(self) -> None:
        self.done: list[Piece] = []
        self.sizes = Sizes()
        self.time: str | None = None
        self.lengths: set[str | None] = set()  # the input with lengths of each layer, None for none

    def _last(self, x: Any) -> bool:
        """Whether x is what the last piece wrote."""
        return isinstance(x, Data) and x.piece == len(self.done) - 1

    def _on_identity(self, node: Node, x: Any) -> Any:
        return x

    def _on_dropout(self, node: Node, x: Any, *rest: Any) -> Any:
        return x

    def _on_cast(self, node: Node, x: Any) -> Any:
        return x

    def _on_shape(self, node: Node, x: Data) -> Host:
        return self.sizes.shape(node, x)

    def _on_transpose(self, node: Node, x: Any) -> Data:
        if isinstance(x, Final):
            return self._both_finals(node, x)
        return self.sizes.transpose(node, x)

    def _on_squeeze(self, node: Node, x: Data, axes: Host | None = None) -> Data:
        return self.sizes.squeeze(node, x, axes)

    def _on_reshape(self, node: Node, x: Data, shape: Host) -> Data:
        return self.sizes.reshape(node, x, shape)

    def _part(self, x: Data, part: Any, axes: tuple[Group, ...]) -> Data:
        """One more part, which has no parameters."""
        self.done.append(Piece("", "part", 0, 0, False, {}, part=part))
        return Data(len(self.done) - 1, axes)

    def _function(self, node: Node, x: Any) -> Data:
        """An activation on every number."""
        if not self._last(x) or not self.done:
            raise OtherGraphError(f"{node} does not read what stands before it")
        return self._part(x, Apply(function_of(node.op, node.attrs)), x.axes)

    def _on_softmax(self, node: Node, x: Any) -> Data:
        axis = node.attrs.get("axis", -1 if node.opset >= 13 else 1)
        if not self._last(x) or axis % len(x.axes) != len(x.axes) - 1 or not self.done:
            raise OtherGraphError(f"{node} is not along the features of what stands before it")
        return self._part(x, Softmax(log=node.op == "LogSoftmax"), x.axes)

    _on_logsoftmax = _on_softmax

    def _on_split(self, node: Node, x: Any, sizes: Host | None = None) -> tuple[Any, Any]:
        """Features in two halves, which stand for x until one operator puts them into one."""
        if not self._last(x) or not self.done or node.attrs.get("axis", 0) % len(x.axes) != len(x.axes) - 1:
            raise OtherGraphError(f"{node} cuts data")
        half, rest = divmod(self.sizes.of(x.axes[-1]), 2)
        parts = [half, half] if sizes is None else sizes.array.tolist()
        if rest or len(node.outputs) != 2 or "split" in node.attrs or parts != [half, half]:
            raise OtherGraphError(f"{node} cuts features otherwise than in halves")
        return Half(x, 0), Half(x, 1)

    def _merged(self, node: Node, *halves: Any) -> Data:
        """Two halves put into one."""
        if {h.which if isinstance(h, Half) else None for h in halves} != {0, 1} or len(halves) != 2:
            raise OtherGraphError(f"{node} is none of the plumbing around recurrent layers")
        x = halves[0].whole
        if not self._last(x) or halves[1].whole != x:
            raise OtherGraphError(f"{node} does not read what stands before it")
        label, half = f"m{len(self.done)}", self.sizes.of(x.axes[-1]) // 2
        self.sizes[label] = half
        return self._part(x, Merge(half, MERGES[node.op]), (*x.axes[:-1], (label,)))

    _on_sum = _on_mul = _on_mean = _merged

    def _last_step(self, node: Node, x: Data, axis: int) -> tuple[Group, ...]:
        """The axes of x without time, which `node` takes the last step of."""
        axis = axis % len(x.axes)
        if not self._last(x) or x.axes[axis] != (self.time,) or len(x.axes) != 3:
            raise OtherGraphError(f"{node} cuts data")
        return x.axes[:axis] + x.axes[axis + 1 :]

    def _taken(self) -> Last:
        """What takes step T-1: with lengths among the inputs, that is no row's last valid one."""
        return Last(valid=not self.lengths - {None})

    def _on_gather(self, node: Node, table: Any, ids: Any) -> Data:
        axis = node.attrs.get("axis", 0)
        if isinstance(ids, Host) and ids.array.shape == ():
            if isinstance(table, Data) and int(ids.array) in (-1, self.sizes[self.time or "0"] - 1):
                return self._part(table, self._taken(), self._last_step(node, table, axis))
            if isinstance(table, Final):
                return self._final(node, table, axis, int(ids.array))
        whole = isinstance(table, Host) and table.array.ndim == 2 and table.array.dtype.kind == "f"
        if not whole or not self._last(ids) or self.done or axis != 0:
            raise OtherGraphError(f"{node} picks steps or features")
        at, name = len(self.done), _part_name(node.inputs[0])
        self.sizes[f"h{at}"] = table.array.shape[1]
        self.done.append(
            Piece(
                name, "embedding", int(table.array.shape[0]), int(table.array.shape[1]), False, {"weight": table.array}
            )
        )
        return Data(at, (*ids.axes, (f"h{at}",)))

    def _final(self, node: Node, finals: Final, axis: int, k: int) -> Data:
        """A final state h of the last layer, walked one way, is its last output."""
        at = len(self.done) - 1
        rows = finals.pieces[-1:] == (at,) and len(self.done[at].ways) == 1 and k in (-1, len(finals.pieces) - 1)
        if finals.state != "h" or not rows or axis % 3 != int(finals.batch_first):
            raise OtherGraphError(f"{node} takes a state of another layer, or of another row")
        batch = "0" if self.time == "1" else "1"
        walk = "reverse" if self.done[at].ways == (True,) else "forward"
        return self._part(Data(at, ()), Last(walk=walk), ((batch,), (f"h{at}",)))

    def _both_finals(self, node: Node, finals: Final) -> Data:
        """The final states h of both directions, (directions, N, H) -> (N, directions, H), are their last outputs."""
        at = len(self.done) - 1
        known = finals == Final((at,), "h") and len(self.done[at].ways) == 2
        if not known or list(node.attrs.get("perm", ())) != [1, 0, 2]:
            raise OtherGraphError(f"{node} turns states around")
        batch = "0" if self.time == "1" else "1"
        return self._part(Data(at, ()), Last(walk="both"), ((batch,), (f"d{at}",), (f"h{at}",)))

    def _linear(self, node: Node, x: Any, weight: Any, bias: Any, name: str) -> Data:
        if not isinstance(weight, Host) or weight.array.ndim != 2 or not self._last(x):
            raise OtherGraphError(f"{node} is no product with a weight")
        at = len(self.done)
        own = {"weight": np.ascontiguousarray(weight.array.T)}
        own |= {} if bias is None else {"bias": bias.array.reshape(-1)}
        self.sizes[f"h{at}"] = weight.array.shape[1]
        wide, narrow = weight.array.shape
        self.done.append(Piece(name, "linear", wide, narrow, bias is not None, own))
        return Data(at, (*x.axes[:-1], (f"h{at}",)))

    def _on_matmul(self, node: Node, x: Any, weight: Any) -> Data:
        return self._linear(node, x, weight, None, _part_name(node.inputs[1]))

    def _on_gemm(self, node: Node, x: Any, weight: Any, bias: Host | None = None) -> Data:
        get = node.attrs.get
        if get("transA", 0) or get("alpha", 1.0) != 1 or get("beta", 1.0) != 1 or not isinstance(weight, Host):
            raise OtherGraphError(f"{node} is no product with a weight")
        weight = Host(weight.array.T) if get("transB", 0) else weight
        return self._linear(node, x, weight, bias, _part_name(node.inputs[1]))

    def _on_add(self, node: Node, a: Any, b: Any) -> Data:
        x, bias = (a, b) if isinstance(a, Data) else (b, a)
        piece = self.done[-1] if self.done else None
        fits = isinstance(bias, Host) and piece is not None and bias.array.shape == (piece.outputs,)
        if piece is None or not fits or not self._last(x) or piece.kind != "linear" or piece.bias:
            raise OtherGraphError(f"{node} adds something else than a bias")
        name = _part_name(node.inputs[0 if x is b else 1]) or piece.name
        self.done[-1] = replace(piece, name=name, bias=True, own=piece.own | {"bias": bias.array})
        return x

    def _on_slice(self, node: Node, s: Any, *cuts: Host) -> Any:
        given = [c.array.reshape(-1).tolist() for c in cuts]
        if isinstance(s, Data) and given[0] == [-1] and given[1][0] >= 2**31 - 1 and len(given) == 3:
            k = given[2][0] % len(s.axes)
            rest = self._last_step(node, s, k)
            self.sizes["done"] = 1  # what is left of the axis of time, to be squeezed away
            return self._part(s, self._taken(), (*rest[:k], ("done",), *rest[k:]))
        if not isinstance(s, Given) or given[2:] not in ([[0]], [[0], [1]]):
            raise OtherGraphError(f"{node} cuts data")
        (start,), (stop,) = given[:2]
        return replace(s, start=s.start + start, stop=min(s.start + stop, s.stop))

    def _on_expand(self, node: Node, s: Given, shape: Any) -> Given:
        return s

    def _on_min(self, node: Node, *values: Any) -> Given:
        found = [v for v in values if isinstance(v, Given)]
        if len(found) != 1 or found[0].start or len(values) > 2:
            raise OtherGraphError(f"{node} is none of the plumbing around recurrent layers")
        return found[0]

    def _on_concat(self, node: Node, *finals: Any) -> Final:
        states = {(f.state, f.batch_first) if isinstance(f, Final) else None for f in finals}
        if node.attrs["axis"] != 0 or states not in ({("h", False)}, {("c", False)}):
            raise OtherGraphError(f"{node} joins data, or states of two kinds")
        return Final(tuple(k for f in finals for k in f.pieces), finals[0].state)


def _part_name(name: str) -> str:
    """The module that a weight belongs to, as torch calls it: "head" for "head.weight"."""
    part = name.rpartition(".")[0] if name.rpartition(".")[2] in ("weight", "bias") else ""
    return identifier(part)


def identifier(name: str) -> str:
    """The name of a part that a module's name allows; "" for none.

    >>> identifier("rnn"), identifier("encoder.rnn")
    ('rnn', '')
    """
    return name if name.isidentifier() else ""
