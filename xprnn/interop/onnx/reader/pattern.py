"""Whether a graph is one of xprnn's own models: [look-up] -> recurrent layers, in any plumbing -> [matrix products].

The graph is walked with stand-ins: data is the labels of its axes, shapes are worked out for lengths that nobody
would choose, and everything known from the file is computed. What is then left of the plumbing is nothing, and each
piece reads what the piece before it wrote; or the graph is something else, and the reason is said.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, get_type_hints

import numpy as np

from xprnn.arrays.namespace import Params
from xprnn.interop.onnx.layer_specs import Piece, from_pieces, pieces_of, same, with_structure
from xprnn.interop.onnx.node import Host, Node, host_context
from xprnn.interop.onnx.program import OPS, Block
from xprnn.interop.onnx.reader.pattern_ops import Plumbing, identifier
from xprnn.interop.onnx.reader.symbolic_axes import Data, Final, Given, Group, OtherGraphError, start_of
from xprnn.interop.onnx.recurrent_attributes import FUNCTIONS
from xprnn.io.archive import check_depth
from xprnn.layers.masking import Last
from xprnn.layers.sequential import from_config

__all__ = ["OtherGraphError", "recognised", "told_in"]

# What a graph that is none of ours may make of a stand-in.
_TROUBLE = (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
_PROBES = (1009, 1013)  # sizes for the two free axes: primes, so that products tell them apart


def recognised(block: Block, told: Any) -> tuple[Any, Params]:
    """The model and its parameters (NumPy); `told`, what the file says it is, if it computes the same.

    Raises:
        OtherGraphError: not one of ours; says why.
    """
    try:
        pieces = Walk(block).pieces()
        model, params = from_pieces(pieces)
    except _TROUBLE as error:
        raise OtherGraphError(f"it does something of its own ({error})") from None
    if told is not None and same(pieces, pieces_of(told, _blank(told))):
        return told, with_structure(told, pieces)
    return model, params


def told_in(metadata: dict[str, str], arrays: int) -> Any:
    """The model that to_onnx wrote beside a graph of so many arrays; None where there is none that could be it."""
    try:
        config = json.loads(metadata["xprnn"])
        check_depth(config, arrays)
        return from_config(config)
    except (KeyError, ValueError, RecursionError, AttributeError, TypeError):
        return None


def _blank(model: Any) -> Params:
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in model.shapes().items()}


class Walk(Plumbing):
    """One walk through the graph; `done` are the pieces found so far."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
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
        width = 0
        for piece in self.done:
            if width and piece.kind != "part" and piece.inputs != width:
                raise OtherGraphError("the sizes of its layers do not fit each other")
            width = piece.width(width)
        return [self._laid_out(p) for p in self.done]

    def _laid_out(self, piece: Piece) -> Piece:
        """With the axes of the input."""
        if isinstance(piece.part, Last):
            return replace(piece, part=replace(piece.part, batch_first=self.time == "1"))
        return replace(piece, batch_first=self.time == "1") if piece.kind == "rnn" else piece

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
        does = self._function if node.op in FUNCTIONS else getattr(self, f"_on_{node.op.lower()}", None)
        if does is None:
            raise OtherGraphError(f"{node} is none of the plumbing around recurrent layers")
        self._check_kinds(node, does, values)
        out = does(node, *values)
        return out if isinstance(out, tuple) else (out,)

    def _check_kinds(self, node: Node, does: Any, values: list[Any]) -> None:
        """What an operator of the plumbing may read is what its annotations say."""
        kinds = [k for name, k in get_type_hints(does).items() if name not in ("node", "return")]
        kinds += kinds[-1:] * (len(values) - len(kinds))  # of *rest
        for name, kind, value in zip(node.inputs, kinds, values, strict=False):
            if kind is Any or isinstance(value, kind):
                continue
            what = "lengths or states" if isinstance(value, (Given, Final)) else "what it is not known to read"
            raise OtherGraphError(f"{node} computes with {what} ({name!r})")

    def _own_weight(self, node: Node, k: int) -> bool:
        return node.name in self.block.prepared and k in (1, 2, 3, 7)

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
            Piece(identifier(scope), "rnn", width, hidden, "bias_ih_l0" in own, own, spec.cells[0], spec.reverse)
        )
        self.starts.append([at, *rest[4 : 4 + len(spec.cells[0].states)]])
        self.sizes.update({f"d{at}": len(spec.reverse), f"h{at}": hidden})
        d, h = (f"d{at}",), (f"h{at}",)
        axes = (batch, time, d, h) if spec.batch_first else (time, d, batch, h)
        return (Data(at, axes), Final((at,), "h", spec.batch_first), Final((at,), "c", spec.batch_first))

    def _lengths(self, node: Node, value: Any) -> str | None:
        if isinstance(value, Host):
            if (value.array == self.sizes[self.time or "0"]).all():
                return None
            raise OtherGraphError(f"{node} has lengths of its own")
        if value is not None and not isinstance(value, Given):
            raise OtherGraphError(f"{node} has lengths that are computed")
        return None if value is None else value.name

    def _outputs(self) -> None:
        kinds = [self.scope[name] for name in self.block.outputs]
        data = [v for v in kinds if isinstance(v, Data)]
        if not any(p.kind == "rnn" for p in self.done):
            raise OtherGraphError("it has no recurrent operator")
        if len(data) != 1 or not self._last(data[0]) or len(self.lengths) != 1:
            raise OtherGraphError("its outputs are not the last layer's, or its layers see different lengths")
        axes, batch = data[0].axes, ("0" if self.time == "1" else "1",)
        wanted = (batch,) if any(isinstance(p.part, Last) for p in self.done) else (("0",), ("1",))
        if axes[:-1] != wanted:
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
