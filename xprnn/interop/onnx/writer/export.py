"""A layer or Sequential as an ONNX model whose state streams and whose batch may be ragged."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial, reduce
from typing import Any

import numpy as np

from xprnn.arrays.namespace import InputError, Params, to_numpy
from xprnn.arrays.validation import check_param_shapes, check_params
from xprnn.cells.activations import activation
from xprnn.interop.conventions import from_system, to_system
from xprnn.interop.onnx.layer_specs import Piece, flat_parts, pieces_of
from xprnn.interop.onnx.model_file import need_onnx
from xprnn.interop.onnx.recurrent_attributes import MERGES, attributes_of, operator_of
from xprnn.interop.onnx.writer.masking import OverTimeWriter
from xprnn.interop.onnx.writer.scan import by_scan, own_of, scanned
from xprnn.interop.onnx.writer.support_checks import refuse
from xprnn.interop.onnx.writer.tracing_namespace import Traced, namespace_of
from xprnn.layers.context_shift import Around
from xprnn.layers.elementwise import Apply, Softmax
from xprnn.layers.masking import Hold, Last, Masking
from xprnn.layers.recurrent import Recurrent
from xprnn.layers.sequence_ops import Merge

__all__ = ["Writer", "exported"]

OPSET, IR = 17, 8
_OPS = {"elman": "RNN", "lstm": "LSTM", "gru": "GRU", "gru_reset_before": "GRU"}
_WHOLE = np.iinfo(np.int32).max  # the length that stands for: to the end
Read = Callable[[str], Any]


def exported(model: Any, params: Params, *, lengths: bool, optional: bool, dtype: str) -> Any:
    """The ModelProto of a model, checked; see to_onnx."""
    where = "to_onnx"
    onnx = need_onnx(where)
    refuse(where, model, dtype, lengths, optional)
    check_params(where, params, model.shapes())
    check_param_shapes(where, params, model.shapes())
    host = {name: np.asarray(to_numpy(a), dtype) for name, a in params.items()}
    if sum(a.nbytes for a in host.values()) >= 1 << 31:
        raise InputError(f"{where}: the parameters take 2 GiB or more, which one ONNX file cannot hold")
    proto = Writer(onnx, model, dtype, lengths, optional).write(pieces_of(model, host))
    onnx.checker.check_model(proto, full_check=True)
    return proto


class Writer(OverTimeWriter):
    """The graph as it grows: nodes and what they read, in order."""

    def __init__(self, onnx: Any, model: Any, dtype: str, lengths: bool, optional: bool) -> None:
        super().__init__(onnx, dtype)
        self.model, self.lengths, self.optional = model, lengths, optional
        self.inputs, self.outputs = list[Any](), list[Any]()
        self.readers: list[Callable[[Read], Params]] = []  # for each piece: its arrays, from those of the file
        self.recurrent = [p for p in flat_parts(model).values() if isinstance(p, Recurrent)]
        self.batch_first = self.recurrent[0].batch_first
        self.final = self.walked = self.walk = ""
        self.timed, self.integers = True, False

    def write(self, pieces: list[Piece]) -> Any:
        """The ModelProto."""
        make = self.onnx.helper
        lead = ["N", "T"] if self.batch_first else ["T", "N"]
        self.integers = next(p.kind for p in pieces if not isinstance(p.part, Masking)) == "embedding"
        if self.integers:
            x = make.make_tensor_value_info("x", self.onnx.TensorProto.INT64, lead)
        else:
            x = make.make_tensor_value_info("x", self.kind, [*lead, next(w for p in pieces if (w := _taken(p)))])
        self._frame()
        y, k = "x", 0
        while k < len(pieces):
            same = [p for p in pieces[k:] if p.kind == "rnn" and p.name == pieces[k].name]
            does = {"rnn": self._stack, "part": self._part}.get(pieces[k].kind, self._dense)
            y = does(same or pieces[k : k + 1], y)
            k += len(same) or 1
        self.node("Identity", [y], "y")
        shape = [*(lead if self.timed else ["N"]), reduce(lambda width, p: p.width(width), pieces, 0)]
        outputs = [make.make_tensor_value_info("y", self.kind, shape), *self.outputs]
        graph = make.make_graph(self.nodes, "xprnn", [x, *self.inputs], outputs, list(self.weights.values()))
        proto = make.make_model(graph, opset_imports=[make.make_opsetid("", OPSET)], ir_version=IR)
        proto.producer_name = "xprnn"
        with suppress(InputError):  # code of the user's own has no file form, but its graph has
            make.set_model_props(proto, {"xprnn": json.dumps(self.model.config())})
        return proto

    def _frame(self) -> None:
        """N, and each row's length: the whole, unless `lengths` says less."""
        t, n = (1, 0) if self.batch_first else (0, 1)
        self.node("Shape", ["x"], "N", start=n, end=n + 1)
        self.node("Concat", [self.numbers(1), "N", self.numbers(1)], "state_shape", axis=0)
        if self.lengths:
            self._input("lengths", 6, ["rows" if self.optional else "N"], np.asarray([_WHOLE], np.int32))
            self.node("Shape", ["x"], "T", start=t, end=t + 1)
            self.node("Cast", ["T"], "T_int32", to=6)
            self.node("Expand", ["T_int32", "N"], "whole")
            self.lens = self.node("Min", ["lengths", "whole"], "row_lengths")

    def _part(self, pieces: list[Piece], x: str) -> str:
        """What has no parameters."""
        part, name = pieces[0].part, pieces[0].name
        self.readers.append(lambda read: {})
        if isinstance(part, Softmax):
            return self.node("LogSoftmax" if part.log else "Softmax", [x], f"{name}.y", axis=-1)
        if isinstance(part, Apply):
            f = activation(part.f)
            if found := operator_of(f):
                return self.node(found[0], [x], f"{name}.y", "", **found[1])
            y: Traced = f.build(namespace_of(self))[0](Traced(self, x))
            return y.name
        if isinstance(part, Merge):
            halves = [f"{name}.forward", f"{name}.backward"]
            self.node("Split", [x, self.numbers(part.hidden_size, part.hidden_size)], halves, axis=-1)
            return self.node({mode: op for op, mode in MERGES.items()}[part.mode], halves, f"{name}.y")
        if isinstance(part, Last):
            return self._last(part, name, x)
        if isinstance(part, Masking):
            return self.masking(part, x, self.integers, self.timed)
        if isinstance(part, Around):
            return self.around(part.hidden_size, x)
        return self.hold(part, x) if isinstance(part, Hold) else self.flip(part, x)

    def _last(self, part: Last, name: str, x: str) -> str:
        """A Last: of a layer's own outputs, where nothing is skipped, what its final state is."""
        self.timed = False
        known = self.walk if self.walked == x and not self.valid and part.valid else ""
        last = self.weight("last", np.asarray(-1, np.int64))
        if known == part.walk == "both":
            turned = self.node("Transpose", [self.final], f"{name}.turned", perm=[1, 0, 2])
            return self.node("Reshape", [turned, self.numbers(0, -1)], f"{name}.y")
        if known == part.walk and (self.lengths or part.walk == "reverse"):
            return self.node("Gather", [self.final, last], f"{name}.y", axis=0)
        if part.walk == "forward" and not (part.valid and (self.lens or self.valid)):
            return self.node("Gather", [x, last], f"{name}.y", axis=int(self.batch_first))
        return self.last(part, x)

    def _dense(self, pieces: list[Piece], x: str) -> str:
        piece = pieces[0]
        prefix = f"{piece.name or piece.kind}."
        if piece.kind == "embedding":
            self.integers = False
            self.readers.append(lambda read: {"weight": read(prefix + "weight")})
            return self.node("Gather", [self.weight(prefix + "weight", piece.own["weight"]), x], prefix + "rows")
        y = self.node("MatMul", [x, self.weight(prefix + "weight", piece.own["weight"].T)], prefix + "product")
        bias = {"bias": prefix + "bias"} if piece.bias else {}
        self.readers.append(lambda read: {"weight": read(prefix + "weight").T, **{k: read(n) for k, n in bias.items()}})
        return self.node("Add", [y, self.weight(prefix + "bias", piece.own["bias"])], prefix + "y") if piece.bias else y

    def _stack(self, pieces: list[Piece], x: str) -> str:
        """The layers of one part, and its states."""
        name, cell = pieces[0].name, pieces[0].cell
        prefix = f"{name}." if len(self.recurrent) > 1 else ""
        if self.batch_first:
            x = self.node("Transpose", [x], f"{name}.time_major", perm=[1, 0, 2])
        starts = {s: self._initial(prefix, s, pieces) for s in cell.states}
        finals: dict[str, list[str]] = {s: [] for s in cell.states}
        scans = by_scan(cell, pieces[0].projected)
        packs = bool(self.valid) and not scans
        x = self.packed(x) if packs else x
        for k, piece in enumerate(pieces):
            states = [starts[s][k] for s in cell.states]
            label = f"{name or 'rnn'}/l{k}"
            if scans:
                x, ends = scanned(self, label, piece, x, states)
                own = partial(own_of, label, piece)
            else:
                x, ends, own = self._layer(label, piece, x, states)
            learned = {s: f"{prefix}initial_{s}" for s in cell.states} if piece.learned else {}
            self.readers.append(self._reader(own, learned, k, pieces))
            for s, end, start in zip(cell.states, ends, states, strict=True):
                finals[s].append(self._kept(end, start) if packs else end)
        x = self.spread(x) if packs else x
        self.final = finals[cell.states[0]][-1]
        for s in cell.states:
            self._final(prefix, s, pieces, finals[s])
        x = self.node("Transpose", [x], f"{name}.batch_first", perm=[1, 0, 2]) if self.batch_first else x
        ways = pieces[0].ways
        self.walked = x
        self.walk = "both" if len(ways) == 2 else "reverse" if ways[0] else "forward"
        return x

    def _kept(self, end: str, start: str) -> str:
        """A row without a valid step keeps its initial state; ONNX Runtime 1.32 has 0 there."""
        some = self.emit("Unsqueeze", self.emit("Greater", self.count, self.integer(0)), self.numbers(0, 2))
        return self.emit("Where", some, end, start)

    def _reader(self, own: Any, learned: dict[str, str], k: int, pieces: list[Piece]) -> Callable[[Read], Params]:
        d, alike = len(pieces[0].ways), self._alike(pieces)

        def read_all(read: Read) -> Params:
            rows = {s: read(n)[k * d : k * d + d, 0] if alike else read(f"{n}_l{k}")[:, 0] for s, n in learned.items()}
            found: Params = own(read)
            return found | {f"initial_{s}": a for s, a in rows.items()}

        return read_all

    def _input(self, name: str, kind: int, shape: list[Any], own: Any) -> None:
        """An input with a value of its own, which has one row for all."""
        self.inputs.append(self.onnx.helper.make_tensor_value_info(name, kind, shape))
        if self.optional:
            self.weight(name, own)

    def _alike(self, pieces: list[Piece]) -> bool:
        return len({tuple(p.state_width(s) for s in p.cell.states) for p in pieces}) == 1

    def _initial(self, prefix: str, state: str, pieces: list[Piece]) -> list[str]:
        """Each layer's initial state: an input whose own value is zero, or what was learned."""
        d = len(pieces[0].ways)
        rows = [p.own.get(f"initial_{state}", np.zeros((d, p.state_width(state)), self.dtype)) for p in pieces]
        if not self._alike(pieces):
            return [self._state_input(f"{prefix}initial_{state}_l{k}", row) for k, row in enumerate(rows)]
        whole = self._state_input(f"{prefix}initial_{state}", np.concatenate(rows))
        if len(pieces) == 1:
            return [whole]
        cuts = [(self.numbers(k * d), self.numbers(k * d + d)) for k in range(len(pieces))]
        return [self.node("Slice", [whole, a, b, self.numbers(0)], f"{whole}.l{k}") for k, (a, b) in enumerate(cuts)]

    def _state_input(self, name: str, rows: Any) -> str:
        shape = [rows.shape[0], "rows" if self.optional else "N", rows.shape[1]]
        self._input(name, self.kind, shape, rows[:, None, :].astype(self.dtype))
        return self.node("Expand", [name, "state_shape"], f"{name}.all")

    def _layer(self, name: str, piece: Piece, x: str, states: list[str]) -> tuple[str, list[str], Any]:
        """One layer by its operator: y, the final states, and how to read its arrays back."""
        cell, ends = piece.cell, ("_l0", "_l0_reverse")[: len(piece.ways)]
        one = [{n.removesuffix(e): a for n, a in piece.own.items() if n.endswith(e)} for e in ends]
        each = [to_system("onnx", cell.name, own) for own in one]
        given = {k: self.weight(f"{name}.{k}", np.stack([w[k] for w in each])) for k in each[0]}
        lens = self.emit("Cast", self.count, to=6) if self.valid else self.lens
        inputs = [x, given["W"], given["R"], given.get("B", ""), lens, *states]
        inputs += [given["P"]] if "P" in given else []
        outs = [f"{name}.Y", *(f"{name}.Y_{s}" for s in cell.states)]
        self.node(_OPS[cell.name], inputs, outs, name, **attributes_of(piece.cell, piece.outputs, piece.ways))

        def own(read: Read) -> Params:
            found = [
                from_system("onnx", cell.name, {k: read(n)[i] for k, n in given.items()}) for i in range(len(ends))
            ]
            return {n + e: a for e, arrays in zip(ends, found, strict=True) for n, a in arrays.items()}

        if len(piece.ways) == 1:
            return self.node("Squeeze", [outs[0], self.numbers(1)], f"{name}.y"), outs[1:], own
        turned = self.node("Transpose", [outs[0]], f"{name}.turned", perm=[0, 2, 1, 3])
        return self.node("Reshape", [turned, self.numbers(0, 0, 2 * piece.outputs)], f"{name}.y"), outs[1:], own

    def _final(self, prefix: str, state: str, pieces: list[Piece], ends: list[str]) -> None:
        if self._alike(pieces):
            name = f"{prefix}final_{state}"
            self.node("Concat", ends, name, axis=0)
            self._declare(name, len(ends) * len(pieces[0].ways), pieces[0].state_width(state))
            return
        for k, end in enumerate(ends):
            name = f"{prefix}final_{state}_l{k}"
            self.node("Identity", [end], name)
            self._declare(name, len(pieces[0].ways), pieces[k].state_width(state))

    def _declare(self, name: str, rows: int, width: int) -> None:
        self.outputs.append(self.onnx.helper.make_tensor_value_info(name, self.kind, [rows, "N", width]))


def _taken(piece: Piece) -> int:
    """How many features a piece takes; 0 where it takes any number."""
    return piece.inputs or 2 * int(getattr(piece.part, "hidden_size", 0))
