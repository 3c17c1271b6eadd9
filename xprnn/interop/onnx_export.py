"""A layer or Sequential as an ONNX model whose state streams and whose batch may be ragged."""

from __future__ import annotations

import json
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np

from xprnn.activations import activation
from xprnn.around import Around
from xprnn.arrays import InputError, Params, to_numpy
from xprnn.checks import check_param_shapes, check_params
from xprnn.dense import Embedding, Linear
from xprnn.interop.conventions import to_system
from xprnn.interop.onnx_attributes import attributes_of, operator_of
from xprnn.interop.onnx_file import need_onnx
from xprnn.interop.onnx_pieces import Piece, pieces_of
from xprnn.interop.onnx_plumbing import MERGES
from xprnn.masks import Last
from xprnn.model import Sequential
from xprnn.parts import Apply, Merge, Part, Softmax
from xprnn.recurrent import Recurrent

__all__ = ["exported"]

OPSET, IR = 17, 8
_OPS = {"elman": "RNN", "lstm": "LSTM", "gru": "GRU", "gru_reset_before": "GRU"}
_WHOLE = np.iinfo(np.int32).max  # the length that stands for: to the end


def exported(model: Any, params: Params, *, lengths: bool, optional: bool, dtype: str) -> Any:
    """The ModelProto of a model, checked; see to_onnx."""
    where = "to_onnx"
    onnx = need_onnx(where)
    _refuse(where, model, dtype, lengths, optional)
    check_params(where, params, model.shapes())
    check_param_shapes(where, params, model.shapes())
    host = {name: np.asarray(to_numpy(a), dtype) for name, a in params.items()}
    if sum(a.nbytes for a in host.values()) >= 1 << 31:
        raise InputError(f"{where}: the parameters take 2 GiB or more, which one ONNX file cannot hold")
    proto = _Writer(onnx, model, dtype, lengths, optional).write(pieces_of(model, host))
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _refuse(where: str, model: Any, dtype: str, lengths: bool, optional: bool) -> None:
    if not isinstance(model, (Sequential, Recurrent, Linear, Embedding, Part)):
        raise InputError(f"{where}: model must be a layer or Sequential, found {type(model).__name__}")
    if dtype not in ("float32", "float64"):
        raise InputError(f"{where}: dtype must be float32 or float64, found {dtype!r}")
    parts = model.parts if isinstance(model, Sequential) else {type(model).__name__: model}
    reasons = [f"{name}: {reason}" for name, part in parts.items() if (reason := _reason(part))]
    recurrent = [p for p in parts.values() if isinstance(p, Recurrent)]
    reasons += _order(list(parts.items()), lengths)
    if len({p.batch_first for p in recurrent}) > 1:
        reasons.append("some parts are batch_first and some are not")
    if any(isinstance(p, Embedding) for p in list(parts.values())[1:]):
        reasons.append("an Embedding must come first")
    if not optional and any(p.learned_state for p in recurrent):
        reasons.append("a learned_state is the value of an input that may be left out: optional=False has none")
    if not recurrent and not any(isinstance(p, Sequential) for p in parts.values()):
        reasons.append("there is no recurrent layer")
    if reasons:
        raise InputError(f"{where}: ONNX's operators cannot express this model: {'; '.join(reasons)}")


def _order(parts: list[tuple[str, Any]], lengths: bool) -> list[str]:
    """What is said against the places of parts that take the last step."""
    out = []
    for (_, before), (name, part) in pairwise([("", None), *parts]):
        if not isinstance(part, Last):
            continue
        walk = isinstance(before, Recurrent) and (
            "both" if before.bidirectional else "reverse" if before.reverse else "forward"
        )
        if (lengths or part.walk != "forward") and walk != part.walk:
            what = "with lengths, Last" if part.walk == "forward" else f"Last(walk={part.walk!r})"
            out.append(f"{name}: {what} must stand behind a recurrent layer of the same walk")
        if any(isinstance(p, (Recurrent, Last)) for n, p in parts[[n for n, _ in parts].index(name) + 1 :]):
            out.append(f"{name}: behind Last there is no time to walk in")
        if any(isinstance(p, Recurrent) and p.batch_first != part.batch_first for _, p in parts):
            out.append(f"{name}: its batch_first is not that of the recurrent layers")
    return out


def _reason(part: Any) -> str:
    if isinstance(part, Sequential):
        return "a Sequential inside another: put its parts into the outer one"
    if isinstance(part, Around):
        return "Around, which moves its two directions apart"
    if isinstance(part, (Linear, Embedding, Softmax)):
        return ""
    if isinstance(part, Apply):
        return "" if operator_of(activation(part.f)) else f"{part.f!r} is no operator of its own"
    if isinstance(part, Merge) and part.mode != "pair":
        return ""
    if isinstance(part, Last):
        return "" if part.valid else "Last(valid=False)"
    if not isinstance(part, Recurrent):
        return f"{type(part).__name__} is no part that ONNX has an operator for"
    if part.projection:
        return "proj_size: the LSTM operator has no projection"
    if part.core.options is None or part.core.name not in _OPS:
        return f"the cell {part.core.name!r} is not one of xprnn.cells, or has an activation of your own"
    return ""


class _Writer:
    """The graph as it grows: nodes and what they read, in order."""

    def __init__(self, onnx: Any, model: Any, dtype: str, lengths: bool, optional: bool) -> None:
        self.onnx, self.model, self.dtype = onnx, model, np.dtype(dtype)
        self.lengths, self.optional = lengths, optional
        self.nodes, self.weights, self.inputs = list[Any](), list[Any](), list[Any]()
        self.outputs: list[Any] = []
        self.kind = onnx.helper.np_dtype_to_tensor_dtype(self.dtype)
        parts = model.parts.values() if isinstance(model, Sequential) else [model]
        self.recurrent = [p for p in parts if isinstance(p, Recurrent)]
        self.batch_first = self.recurrent[0].batch_first
        self.lens = self.final = ""
        self.timed = True

    def node(self, op: str, inputs: list[str], output: str | list[str], name: str = "", **attrs: Any) -> str:
        """Add a node; the name of its first output."""
        outs = [output] if isinstance(output, str) else output
        self.nodes.append(self.onnx.helper.make_node(op, inputs, outs, name=name or f"{op}_{outs[0]}", **attrs))
        return outs[0]

    def weight(self, name: str, array: Any) -> str:
        """Add a constant; its name."""
        if all(w.name != name for w in self.weights):
            self.weights.append(self.onnx.numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def numbers(self, *values: int) -> str:
        """Add integers, as axes and shapes are; their name."""
        return self.weight("int_" + "_".join(map(str, values)), np.asarray(values, np.int64))

    def write(self, pieces: list[Piece]) -> Any:
        """The ModelProto."""
        make, first = self.onnx.helper, pieces[0]
        lead = ["N", "T"] if self.batch_first else ["T", "N"]
        if first.kind == "embedding":
            x = make.make_tensor_value_info("x", self.onnx.TensorProto.INT64, lead)
        else:
            x = make.make_tensor_value_info("x", self.kind, [*lead, first.inputs])
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
        graph = make.make_graph(self.nodes, "xprnn", [x, *self.inputs], outputs, self.weights)
        proto = make.make_model(graph, opset_imports=[make.make_opsetid("", OPSET)], ir_version=IR)
        proto.producer_name = "xprnn"
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
        if isinstance(part, Softmax):
            return self.node("LogSoftmax" if part.log else "Softmax", [x], f"{name}.y", axis=-1)
        if isinstance(part, Apply):
            op, constants = operator_of(activation(part.f)) or ("", {})
            return self.node(op, [x], f"{name}.y", "", **constants)
        if isinstance(part, Merge):
            halves = [f"{name}.forward", f"{name}.backward"]
            self.node("Split", [x, self.numbers(part.hidden_size, part.hidden_size)], halves, axis=-1)
            return self.node({mode: op for op, mode in MERGES.items()}[part.mode], halves, f"{name}.y")
        self.timed, last = False, self.weight("last", np.asarray(-1, np.int64))
        if part.walk == "both":
            turned = self.node("Transpose", [self.final], f"{name}.turned", perm=[1, 0, 2])
            return self.node("Reshape", [turned, self.numbers(0, -1)], f"{name}.y")
        if self.lengths or part.walk == "reverse":  # what a row's last step put out is its final state
            return self.node("Gather", [self.final, last], f"{name}.y", axis=0)
        return self.node("Gather", [x, last], f"{name}.y", axis=int(self.batch_first))

    def _dense(self, pieces: list[Piece], x: str) -> str:
        piece = pieces[0]
        prefix = f"{piece.name or piece.kind}."
        if piece.kind == "embedding":
            return self.node("Gather", [self.weight(prefix + "weight", piece.own["weight"]), x], prefix + "rows")
        y = self.node("MatMul", [x, self.weight(prefix + "weight", piece.own["weight"].T)], prefix + "product")
        return self.node("Add", [y, self.weight(prefix + "bias", piece.own["bias"])], prefix + "y") if piece.bias else y

    def _stack(self, pieces: list[Piece], x: str) -> str:
        """The layers of one part, and its states."""
        name = pieces[0].name
        prefix = f"{name}." if len(self.recurrent) > 1 else ""
        states = pieces[0].cell.states
        if self.batch_first:
            x = self.node("Transpose", [x], f"{name}.time_major", perm=[1, 0, 2])
        starts = {s: self._initial(prefix, s, pieces) for s in states}
        finals: dict[str, list[str]] = {s: [] for s in states}
        for k, piece in enumerate(pieces):
            x, ends = self._layer(f"{name or 'rnn'}/l{k}", piece, x, [starts[s][k] for s in states])
            for s, end in zip(states, ends, strict=True):
                finals[s].append(end)
        self.final = finals["h"][-1]
        for s in states:
            self._final(prefix, s, pieces, finals[s])
        return self.node("Transpose", [x], f"{name}.batch_first", perm=[1, 0, 2]) if self.batch_first else x

    def _input(self, name: str, kind: int, shape: list[Any], own: Any) -> None:
        """An input with a value of its own, which has one row for all."""
        self.inputs.append(self.onnx.helper.make_tensor_value_info(name, kind, shape))
        if self.optional:
            self.weight(name, own)

    def _alike(self, pieces: list[Piece]) -> bool:
        return len({p.outputs for p in pieces}) == 1

    def _initial(self, prefix: str, state: str, pieces: list[Piece]) -> list[str]:
        """Each layer's initial state: an input whose own value is zero, or what was learned."""
        d = len(pieces[0].ways)
        rows = [p.own.get(f"initial_{state}", np.zeros((d, p.outputs), self.dtype)) for p in pieces]
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

    def _layer(self, name: str, piece: Piece, x: str, states: list[str]) -> tuple[str, list[str]]:
        cell, ends = piece.cell, ("_l0", "_l0_reverse")
        one = [{n.removesuffix(e): a for n, a in piece.own.items() if n.endswith(e)} for e in ends[: len(piece.ways)]]
        each = [to_system("onnx", cell.name, own) for own in one]
        given = {k: self.weight(f"{name}.{k}", np.stack([w[k] for w in each])) for k in each[0]}
        inputs = [x, given["W"], given["R"], given.get("B", ""), self.lens, *states]
        inputs += [given["P"]] if "P" in given else []
        outs = [f"{name}.Y", *(f"{name}.Y_{s}" for s in cell.states)]
        self.node(_OPS[cell.name], inputs, outs, name, **attributes_of(piece.cell, piece.outputs, piece.ways))
        if len(piece.ways) == 1:
            return self.node("Squeeze", [outs[0], self.numbers(1)], f"{name}.y"), outs[1:]
        turned = self.node("Transpose", [outs[0]], f"{name}.turned", perm=[0, 2, 1, 3])
        return self.node("Reshape", [turned, self.numbers(0, 0, 2 * piece.outputs)], f"{name}.y"), outs[1:]

    def _final(self, prefix: str, state: str, pieces: list[Piece], ends: list[str]) -> None:
        if self._alike(pieces):
            name = f"{prefix}final_{state}"
            self.node("Concat", ends, name, axis=0)
            self._declare(name, len(ends) * len(pieces[0].ways), pieces[0].outputs)
            return
        for k, end in enumerate(ends):
            name = f"{prefix}final_{state}_l{k}"
            self.node("Identity", [end], name)
            self._declare(name, len(pieces[0].ways), pieces[k].outputs)

    def _declare(self, name: str, rows: int, width: int) -> None:
        self.outputs.append(self.onnx.helper.make_tensor_value_info(name, self.kind, [rows, "N", width]))
