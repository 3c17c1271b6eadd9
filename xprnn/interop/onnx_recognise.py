"""Whether a graph is one of xprnn's own models: [look-up] -> recurrent layers, in any plumbing -> [matrix products].

The graph is walked with stand-ins: data is the labels of its axes, shapes are worked out for lengths that nobody
would choose, and everything known from the file is computed. What is then left of the plumbing is nothing, and each
piece reads what the piece before it wrote; or the graph is something else, and the reason is said.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from xprnn.arrays import Params
from xprnn.interop.onnx_axes import Data, Final, Given, Group, OtherGraphError, Sizes, start_of
from xprnn.interop.onnx_compile import OPS, Block
from xprnn.interop.onnx_node import Host, Node, host_context
from xprnn.interop.onnx_pieces import Piece, from_pieces, pieces_of, same, with_structure
from xprnn.model import from_config

__all__ = ["OtherGraphError", "recognised"]

# What a graph that is none of ours may make of a stand-in.
_TROUBLE = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
_PROBES = (1009, 1013)  # sizes for the two free axes: primes, so that products tell them apart


def recognised(block: Block, metadata: dict[str, str]) -> tuple[Any, Params]:
    """The model and its parameters (NumPy).

    Raises:
        OtherGraphError: not one of ours; says why.
    """
    try:
        pieces = Walk(block).pieces()
        model, params = from_pieces(pieces)
    except _TROUBLE as error:
        raise OtherGraphError(f"it does something of its own ({error})") from None
    hint = _from_metadata(metadata)
    if hint is not None and same(pieces, pieces_of(hint, _blank(hint))):
        return hint, with_structure(hint, pieces)
    return model, params


def _from_metadata(metadata: dict[str, str]) -> Any:
    """The model that to_onnx wrote beside the graph; None where there is none, or another one."""
    try:
        return from_config(json.loads(metadata["xprnn"]))
    except (KeyError, ValueError, RecursionError, AttributeError, TypeError):
        return None


def _blank(model: Any) -> Params:
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in model.shapes().items()}


class Walk:
    """One walk through the graph; `done` are the pieces found so far."""

    def __init__(self, block: Block) -> None:
        self.block, self.done = block, list[Piece]()
        self.sizes = Sizes()
        self.lengths: set[Any] = set()
        self.time: str | None = None
        self.starts: list[list[Any]] = []
        self.source = ""
        self.scope: dict[str, Any] = dict(block.constants)
        self.scope |= {name: Host(a) for name, a in block.params.items()}

    def pieces(self) -> list[Piece]:
        """The pieces, checked against the graph's outputs."""
        self._inputs()
        for node in self.block.nodes:
            if node.bodies:
                raise OtherGraphError(f"{node} is control flow")
            try:
                found = self._node(node)
            except _TROUBLE as error:
                raise OtherGraphError(f"{node} does something of its own ({error})") from None
            self.scope.update(zip(node.outputs, found, strict=False))
        self._outputs()
        self._states()
        for before, after in pairwise(self.done):
            if after.inputs != before.outputs * max(1, len(before.ways)):
                raise OtherGraphError("the sizes of its layers do not fit each other")
        return [replace(p, batch_first=self.time == "1") if p.kind == "rnn" else p for p in self.done]

    def _inputs(self) -> None:
        if not self.block.inputs:
            raise OtherGraphError("it has no input")
        self.source = self.block.inputs[0]
        ranks = self.block.ranks[self.source]
        if len(ranks) not in (2, 3):
            raise OtherGraphError(f"its input {self.source!r} has {len(ranks)} axes")
        # An exporter that fixed an axis may say so of the output alone.
        ends = [self.block.ranks[name] for name in self.block.outputs]
        fixed = next((e for e in ends if len(e) == 3), (None,) * 3)
        for k, probe in enumerate(_PROBES):
            self.sizes[str(k)] = ranks[k] or fixed[k] or probe
        axes: tuple[Group, ...] = (("0",), ("1",))
        if len(ranks) == 3:
            self.sizes["x"] = ranks[2] or 0
            axes += (("x",),)
        self.scope[self.source] = Data(-1, axes)
        for name in self.block.inputs[1:] + self.block.optional:
            known = self.block.constants.get(name)
            rows = self.block.ranks[name][0] if self.block.ranks[name] else None
            self.scope[name] = Given(name, 0, rows or 0, None if known is None else known.array)

    def _node(self, node: Node) -> tuple[Any, ...]:
        values = [None if n == "" or self._own_weight(node, k) else self.scope[n] for k, n in enumerate(node.inputs)]
        if node.name in self.block.prepared:
            return self._recurrent(node, values)
        if all(v is None or isinstance(v, Host) for v in values):
            found = OPS[node.op](host_context(np.float32), node, values)
            return tuple(v if isinstance(v, Host) else Host(np.asarray(v)) for v in found)
        does = getattr(self, f"_on_{node.op.lower()}", None)
        if does is None:
            raise OtherGraphError(f"{node} is none of the plumbing around recurrent layers")
        out = does(node, *values)
        return out if isinstance(out, tuple) else (out,)

    def _own_weight(self, node: Node, k: int) -> bool:
        return node.name in self.block.prepared and k in (1, 2, 3, 7)

    # -- recurrent operators ---------------------------------------------------------------------------------------

    def _recurrent(self, node: Node, values: list[Any]) -> tuple[Any, ...]:
        x, rest = values[0], values[1:] + [None] * (7 - len(values))
        spec, names = self.block.prepared[node.name].spec, self.block.prepared[node.name].names
        if len(names) != 1 or not self._last(x) or len(x.axes) != 3:
            raise OtherGraphError(f"{node} does not read what stands before it, or its directions are not alike")
        time, batch = (x.axes[1], x.axes[0]) if spec.batch_first else (x.axes[0], x.axes[1])
        if len(time) != 1 or {*time, *batch} != {"0", "1"} or self.time not in (None, time[0]):
            raise OtherGraphError(f"{node} does not walk along the axis of time")
        self.time = time[0]
        self.lengths.add(self._lengths(node, rest[3]))
        own = {k: self.block.params[n] for k, n in names[0].items()}
        hidden, width = own["weight_hh_l0"].shape[1], own["weight_ih_l0"].shape[1]
        scope = node.name.strip("/").split("/")[0] if "/" in node.name.strip("/") else ""
        at = len(self.done)
        self.done.append(
            Piece(_identifier(scope), "rnn", width, hidden, "bias_ih_l0" in own, own, spec.cells[0], spec.reverse)
        )
        self.starts.append([at, *rest[4 : 4 + len(spec.cells[0].states)]])
        self.sizes.update({f"d{at}": len(spec.reverse), f"h{at}": hidden})
        d, h = (f"d{at}",), (f"h{at}",)
        axes = (batch, time, d, h) if spec.batch_first else (time, d, batch, h)
        return (Data(at, axes), Final((at,)), Final((at,)))

    def _last(self, x: Any) -> bool:
        """Whether x is what the last piece wrote."""
        return isinstance(x, Data) and x.piece == len(self.done) - 1

    def _lengths(self, node: Node, value: Any) -> str | None:
        if isinstance(value, Host):
            if (value.array == self.sizes[self.time or "0"]).all():
                return None
            raise OtherGraphError(f"{node} has lengths of its own")
        return None if value is None else value.name

    # -- plumbing --------------------------------------------------------------------------------------------------

    def _on_identity(self, node: Node, x: Any) -> Any:
        return x

    def _on_dropout(self, node: Node, x: Any, *rest: Any) -> Any:
        return x

    def _on_cast(self, node: Node, x: Any) -> Any:
        return x

    def _on_shape(self, node: Node, x: Data) -> Host:
        return self.sizes.shape(node, x)

    def _on_transpose(self, node: Node, x: Data) -> Data:
        return self.sizes.transpose(node, x)

    def _on_squeeze(self, node: Node, x: Data, axes: Host | None = None) -> Data:
        return self.sizes.squeeze(node, x, axes)

    def _on_reshape(self, node: Node, x: Data, shape: Host) -> Data:
        return self.sizes.reshape(node, x, shape)

    def _on_gather(self, node: Node, table: Any, ids: Any) -> Data:
        whole = isinstance(table, Host) and table.array.ndim == 2 and table.array.dtype.kind == "f"
        if not whole or not self._last(ids) or self.done or node.attrs.get("axis", 0) != 0:
            raise OtherGraphError(f"{node} picks steps or features")
        at, name = len(self.done), _part_name(node.inputs[0])
        self.sizes[f"h{at}"] = table.array.shape[1]
        self.done.append(
            Piece(
                name, "embedding", int(table.array.shape[0]), int(table.array.shape[1]), False, {"weight": table.array}
            )
        )
        return Data(at, (*ids.axes, (f"h{at}",)))

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

    def _on_gemm(self, node: Node, x: Any, weight: Any, bias: Any = None) -> Data:
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

    # -- states and lengths ----------------------------------------------------------------------------------------

    def _on_slice(self, node: Node, s: Any, *cuts: Any) -> Given:
        given = [c.array.reshape(-1).tolist() for c in cuts]
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
        if node.attrs["axis"] != 0 or not all(isinstance(f, Final) for f in finals):
            raise OtherGraphError(f"{node} joins data")
        return Final(tuple(k for f in finals for k in f.pieces))

    # -- ends ------------------------------------------------------------------------------------------------------

    def _outputs(self) -> None:
        kinds = [self.scope[name] for name in self.block.outputs]
        data = [v for v in kinds if isinstance(v, Data)]
        if not any(p.kind == "rnn" for p in self.done):
            raise OtherGraphError("it has no recurrent operator")
        if len(data) != 1 or not self._last(data[0]) or len(self.lengths) != 1:
            raise OtherGraphError("its outputs are not the last layer's, or its layers see different lengths")
        axes = data[0].axes
        if len(axes) != 3 or axes[:2] != (("0",), ("1",)):
            raise OtherGraphError("its output is not laid out as its input is")
        if any(not isinstance(v, (Data, Final)) for v in kinds):
            raise OtherGraphError("it has outputs of other kinds")

    def _states(self) -> None:
        """Put learned initial states into their pieces; states from outside are in the order of the layers."""
        rows: dict[str, int] = {}
        learned = any(start_of(v) is not None for s in self.starts for v in s[1:])
        for at, *values in self.starts:
            piece, d = self.done[at], len(self.done[at].ways)
            for state, value in zip(piece.cell.states, values, strict=False):
                if isinstance(value, Given):
                    if value.start != rows.get(value.name, 0) or value.stop != value.start + d:
                        raise OtherGraphError(f"its layers take their rows of {value.name!r} in another order")
                    rows[value.name] = value.stop
                elif value is not None and not isinstance(value, Host):
                    raise OtherGraphError("an initial state is computed")
                start = start_of(value)
                if learned:
                    weight = piece.own["weight_hh_l0"]
                    blank = np.zeros((d, piece.outputs), weight.dtype)
                    piece.own[f"initial_{state}"] = blank if start is None else start
            self.done[at] = replace(piece, learned=learned)


def _part_name(name: str) -> str:
    """The module that a weight belongs to, as torch calls it: "head" for "head.weight"."""
    part = name.rpartition(".")[0] if name.rpartition(".")[2] in ("weight", "bias") else ""
    return _identifier(part)


def _identifier(name: str) -> str:
    return name if name.isidentifier() else ""
