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
from xprnn.interop.conventions import from_framework, to_framework
from xprnn.interop.onnx.layer_specs import LayerSpec, named_layers, to_specs
from xprnn.interop.onnx.model_file import require_onnx
from xprnn.interop.onnx.recurrent_attributes import MERGE_MODES, attributes_from_cell, operator_from_activation
from xprnn.interop.onnx.writer.masking import MaskedTimeWriter
from xprnn.interop.onnx.writer.scan import emit_scan, needs_scan, read_scan_weights
from xprnn.interop.onnx.writer.support_checks import check_supported
from xprnn.interop.onnx.writer.tracing_namespace import TracedValue, make_tracing_namespace
from xprnn.layers.context_shift import ContextShift
from xprnn.layers.elementwise import ActivationLayer, Softmax
from xprnn.layers.masking import HoldLastOutput, LastStep, Masking
from xprnn.layers.recurrent import Recurrent
from xprnn.layers.sequence_ops import MergeDirections

__all__ = ["ModelWriter", "build_model_proto"]

OPSET, IR_VERSION = 17, 8
_OPERATOR_BY_CELL = {"elman": "RNN", "lstm": "LSTM", "gru": "GRU", "gru_reset_before": "GRU"}
_FULL_LENGTH = np.iinfo(np.int32).max  # the length that stands for: to the end
InitializerReader = Callable[[str], Any]


def build_model_proto(model: Any, params: Params, *, lengths: bool, optional: bool, dtype: str) -> Any:
    """The ModelProto of a model, checked; see to_onnx."""
    where = "to_onnx"
    onnx = require_onnx(where)
    check_supported(where, model, dtype, lengths, optional)
    check_params(where, params, model.shapes())
    check_param_shapes(where, params, model.shapes())
    host = {name: np.asarray(to_numpy(a), dtype) for name, a in params.items()}
    if sum(a.nbytes for a in host.values()) >= 1 << 31:
        raise InputError(f"{where}: the parameters take 2 GiB or more, which one ONNX file cannot hold")
    proto = ModelWriter(onnx, model, dtype, lengths, optional).write(to_specs(model, host))
    onnx.checker.check_model(proto, full_check=True)
    return proto


class ModelWriter(MaskedTimeWriter):
    """The graph as it grows: nodes and what they read, in order."""

    def __init__(self, onnx: Any, model: Any, dtype: str, lengths: bool, optional: bool) -> None:
        super().__init__(onnx, dtype)
        self.model, self.lengths, self.optional = model, lengths, optional
        self.inputs, self.outputs = list[Any](), list[Any]()
        self.weight_readers: list[
            Callable[[InitializerReader], Params]
        ] = []  # for each piece: its arrays, from those of the file
        self.recurrent_layers = [p for p in named_layers(model).values() if isinstance(p, Recurrent)]
        self.batch_first = self.recurrent_layers[0].batch_first
        self.final_hidden = self.recurrent_output = self.direction = ""
        self.has_time_axis, self.integer_input = True, False

    def write(self, specs: list[LayerSpec]) -> Any:
        """The ModelProto."""
        make = self.onnx.helper
        lead = ["N", "T"] if self.batch_first else ["T", "N"]
        self.integer_input = next(p.kind for p in specs if not isinstance(p.layer, Masking)) == "embedding"
        if self.integer_input:
            x = make.make_tensor_value_info("x", self.onnx.TensorProto.INT64, lead)
        else:
            x = make.make_tensor_value_info(
                "x", self.elem_type, [*lead, next(w for p in specs if (w := _input_width(p)))]
            )
        self._emit_batch_size_and_lengths()
        y, k = "x", 0
        while k < len(specs):
            same = [p for p in specs[k:] if p.kind == "rnn" and p.name == specs[k].name]
            does = {"rnn": self._emit_recurrent_stack, "part": self._emit_stateless_layer}.get(
                specs[k].kind, self._emit_linear_or_embedding
            )
            y = does(same or specs[k : k + 1], y)
            k += len(same) or 1
        self.add_node("Identity", [y], "y")
        shape = [*(lead if self.has_time_axis else ["N"]), reduce(lambda width, p: p.output_width(width), specs, 0)]
        outputs = [make.make_tensor_value_info("y", self.elem_type, shape), *self.outputs]
        graph = make.make_graph(self.nodes, "xprnn", [x, *self.inputs], outputs, list(self.initializers.values()))
        proto = make.make_model(graph, opset_imports=[make.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        proto.producer_name = "xprnn"
        with suppress(InputError):  # code of the user's own has no file form, but its graph has
            make.set_model_props(proto, {"xprnn": json.dumps(self.model.config())})
        return proto

    def _emit_batch_size_and_lengths(self) -> None:
        """N, and each row's length: the whole, unless `lengths` says less."""
        t, n = (1, 0) if self.batch_first else (0, 1)
        self.add_node("Shape", ["x"], "N", start=n, end=n + 1)
        self.add_node("Concat", [self.int64_vector(1), "N", self.int64_vector(1)], "state_shape", axis=0)
        if self.lengths:
            self._add_input("lengths", 6, ["rows" if self.optional else "N"], np.asarray([_FULL_LENGTH], np.int32))
            self.add_node("Shape", ["x"], "T", start=t, end=t + 1)
            self.add_node("Cast", ["T"], "T_int32", to=6)
            self.add_node("Expand", ["T_int32", "N"], "whole")
            self.row_lengths = self.add_node("Min", ["lengths", "whole"], "row_lengths")

    def _emit_stateless_layer(self, pieces: list[LayerSpec], x: str) -> str:
        """What has no parameters."""
        part, name = pieces[0].layer, pieces[0].name
        self.weight_readers.append(lambda read: {})
        if isinstance(part, Softmax):
            return self.add_node("LogSoftmax" if part.log else "Softmax", [x], f"{name}.y", axis=-1)
        if isinstance(part, ActivationLayer):
            f = activation(part.f)
            if found := operator_from_activation(f):
                return self.add_node(found[0], [x], f"{name}.y", "", **found[1])
            y: TracedValue = f.build(make_tracing_namespace(self))[0](TracedValue(self, x))
            return y.name
        if isinstance(part, MergeDirections):
            halves = [f"{name}.forward", f"{name}.backward"]
            self.add_node("Split", [x, self.int64_vector(part.hidden_size, part.hidden_size)], halves, axis=-1)
            return self.add_node({mode: op for op, mode in MERGE_MODES.items()}[part.mode], halves, f"{name}.y")
        if isinstance(part, LastStep):
            return self._emit_last_step_or_final_state(part, name, x)
        if isinstance(part, Masking):
            return self.emit_masking(part, x, self.integer_input, self.has_time_axis)
        if isinstance(part, ContextShift):
            return self.emit_context_shift(part.hidden_size, x)
        return (
            self.emit_hold_last_output(part, x) if isinstance(part, HoldLastOutput) else self.emit_reverse_time(part, x)
        )

    def _emit_last_step_or_final_state(self, part: LastStep, name: str, x: str) -> str:
        """A Last: of a layer's own outputs, where nothing is skipped, what its final state is."""
        self.has_time_axis = False
        known = self.direction if self.recurrent_output == x and not self.valid_mask and part.valid_only else ""
        last = self.add_initializer("last", np.asarray(-1, np.int64))
        if known == part.direction == "both":
            turned = self.add_node("Transpose", [self.final_hidden], f"{name}.turned", perm=[1, 0, 2])
            return self.add_node("Reshape", [turned, self.int64_vector(0, -1)], f"{name}.y")
        if known == part.direction and (self.lengths or part.direction == "reverse"):
            return self.add_node("Gather", [self.final_hidden, last], f"{name}.y", axis=0)
        if part.direction == "forward" and not (part.valid_only and (self.row_lengths or self.valid_mask)):
            return self.add_node("Gather", [x, last], f"{name}.y", axis=int(self.batch_first))
        return self.emit_last_step(part, x)

    def _emit_linear_or_embedding(self, pieces: list[LayerSpec], x: str) -> str:
        piece = pieces[0]
        prefix = f"{piece.name or piece.kind}."
        if piece.kind == "embedding":
            self.integer_input = False
            self.weight_readers.append(lambda read: {"weight": read(prefix + "weight")})
            return self.add_node(
                "Gather", [self.add_initializer(prefix + "weight", piece.params["weight"]), x], prefix + "rows"
            )
        y = self.add_node(
            "MatMul", [x, self.add_initializer(prefix + "weight", piece.params["weight"].T)], prefix + "product"
        )
        bias = {"bias": prefix + "bias"} if piece.bias else {}
        self.weight_readers.append(
            lambda read: {"weight": read(prefix + "weight").T, **{k: read(n) for k, n in bias.items()}}
        )
        return (
            self.add_node("Add", [y, self.add_initializer(prefix + "bias", piece.params["bias"])], prefix + "y")
            if piece.bias
            else y
        )

    def _emit_recurrent_stack(self, pieces: list[LayerSpec], x: str) -> str:
        """The layers of one part, and its states."""
        name, cell = pieces[0].name, pieces[0].cell
        prefix = f"{name}." if len(self.recurrent_layers) > 1 else ""
        if self.batch_first:
            x = self.add_node("Transpose", [x], f"{name}.time_major", perm=[1, 0, 2])
        starts = {s: self._emit_initial_states(prefix, s, pieces) for s in cell.states}
        finals: dict[str, list[str]] = {s: [] for s in cell.states}
        scans = needs_scan(cell, pieces[0].projected)
        packs = bool(self.valid_mask) and not scans
        x = self.compact(x) if packs else x
        for k, piece in enumerate(pieces):
            states = [starts[s][k] for s in cell.states]
            label = f"{name or 'rnn'}/l{k}"
            if scans:
                x, ends = emit_scan(self, label, piece, x, states)
                own = partial(read_scan_weights, label, piece)
            else:
                x, ends, own = self._emit_recurrent_layer(label, piece, x, states)
            learned = {s: f"{prefix}initial_{s}" for s in cell.states} if piece.learned_state else {}
            self.weight_readers.append(self._make_weight_reader(own, learned, k, pieces))
            for s, end, start in zip(cell.states, ends, states, strict=True):
                finals[s].append(self._keep_initial_if_empty(end, start) if packs else end)
        x = self.scatter_back(x) if packs else x
        self.final_hidden = finals[cell.states[0]][-1]
        for s in cell.states:
            self._emit_final_states(prefix, s, pieces, finals[s])
        x = self.add_node("Transpose", [x], f"{name}.batch_first", perm=[1, 0, 2]) if self.batch_first else x
        ways = pieces[0].reverse
        self.recurrent_output = x
        self.direction = "both" if len(ways) == 2 else "reverse" if ways[0] else "forward"
        return x

    def _keep_initial_if_empty(self, end: str, start: str) -> str:
        """A row without a valid step keeps its initial state; ONNX Runtime 1.32 has 0 there."""
        some = self.emit(
            "Unsqueeze", self.emit("Greater", self.valid_count, self.int64_scalar(0)), self.int64_vector(0, 2)
        )
        return self.emit("Where", some, end, start)

    def _make_weight_reader(
        self, own: Any, learned: dict[str, str], k: int, pieces: list[LayerSpec]
    ) -> Callable[[InitializerReader], Params]:
        d, alike = len(pieces[0].reverse), self._same_state_sizes(pieces)

        def read_all(read: InitializerReader) -> Params:
            rows = {s: read(n)[k * d : k * d + d, 0] if alike else read(f"{n}_l{k}")[:, 0] for s, n in learned.items()}
            found: Params = own(read)
            return found | {f"initial_{s}": a for s, a in rows.items()}

        return read_all

    def _add_input(self, name: str, kind: int, shape: list[Any], own: Any) -> None:
        """An input with a value of its own, which has one row for all."""
        self.inputs.append(self.onnx.helper.make_tensor_value_info(name, kind, shape))
        if self.optional:
            self.add_initializer(name, own)

    def _same_state_sizes(self, pieces: list[LayerSpec]) -> bool:
        return len({tuple(p.state_width(s) for s in p.cell.states) for p in pieces}) == 1

    def _emit_initial_states(self, prefix: str, state: str, pieces: list[LayerSpec]) -> list[str]:
        """Each layer's initial state: an input whose own value is zero, or what was learned."""
        d = len(pieces[0].reverse)
        rows = [p.params.get(f"initial_{state}", np.zeros((d, p.state_width(state)), self.dtype)) for p in pieces]
        if not self._same_state_sizes(pieces):
            return [self._add_state_input(f"{prefix}initial_{state}_l{k}", row) for k, row in enumerate(rows)]
        whole = self._add_state_input(f"{prefix}initial_{state}", np.concatenate(rows))
        if len(pieces) == 1:
            return [whole]
        cuts = [(self.int64_vector(k * d), self.int64_vector(k * d + d)) for k in range(len(pieces))]
        return [
            self.add_node("Slice", [whole, a, b, self.int64_vector(0)], f"{whole}.l{k}")
            for k, (a, b) in enumerate(cuts)
        ]

    def _add_state_input(self, name: str, rows: Any) -> str:
        shape = [rows.shape[0], "rows" if self.optional else "N", rows.shape[1]]
        self._add_input(name, self.elem_type, shape, rows[:, None, :].astype(self.dtype))
        return self.add_node("Expand", [name, "state_shape"], f"{name}.all")

    def _emit_recurrent_layer(
        self, name: str, piece: LayerSpec, x: str, states: list[str]
    ) -> tuple[str, list[str], Any]:
        """One layer by its operator: y, the final states, and how to read its arrays back."""
        cell, ends = piece.cell, ("_l0", "_l0_reverse")[: len(piece.reverse)]
        one = [{n.removesuffix(e): a for n, a in piece.params.items() if n.endswith(e)} for e in ends]
        each = [to_framework("onnx", cell.name, own) for own in one]
        given = {k: self.add_initializer(f"{name}.{k}", np.stack([w[k] for w in each])) for k in each[0]}
        lens = self.emit("Cast", self.valid_count, to=6) if self.valid_mask else self.row_lengths
        inputs = [x, given["W"], given["R"], given.get("B", ""), lens, *states]
        inputs += [given["P"]] if "P" in given else []
        outs = [f"{name}.Y", *(f"{name}.Y_{s}" for s in cell.states)]
        self.add_node(
            _OPERATOR_BY_CELL[cell.name],
            inputs,
            outs,
            name,
            **attributes_from_cell(piece.cell, piece.output_size, piece.reverse),
        )

        def own(read: InitializerReader) -> Params:
            found = [
                from_framework("onnx", cell.name, {k: read(n)[i] for k, n in given.items()}) for i in range(len(ends))
            ]
            return {n + e: a for e, arrays in zip(ends, found, strict=True) for n, a in arrays.items()}

        if len(piece.reverse) == 1:
            return self.add_node("Squeeze", [outs[0], self.int64_vector(1)], f"{name}.y"), outs[1:], own
        turned = self.add_node("Transpose", [outs[0]], f"{name}.turned", perm=[0, 2, 1, 3])
        return (
            self.add_node("Reshape", [turned, self.int64_vector(0, 0, 2 * piece.output_size)], f"{name}.y"),
            outs[1:],
            own,
        )

    def _emit_final_states(self, prefix: str, state: str, pieces: list[LayerSpec], ends: list[str]) -> None:
        if self._same_state_sizes(pieces):
            name = f"{prefix}final_{state}"
            self.add_node("Concat", ends, name, axis=0)
            self._add_output(name, len(ends) * len(pieces[0].reverse), pieces[0].state_width(state))
            return
        for k, end in enumerate(ends):
            name = f"{prefix}final_{state}_l{k}"
            self.add_node("Identity", [end], name)
            self._add_output(name, len(pieces[0].reverse), pieces[k].state_width(state))

    def _add_output(self, name: str, rows: int, width: int) -> None:
        self.outputs.append(self.onnx.helper.make_tensor_value_info(name, self.elem_type, [rows, "N", width]))


def _input_width(piece: LayerSpec) -> int:
    """How many features a piece takes; 0 where it takes any number."""
    return piece.input_size or 2 * int(getattr(piece.layer, "hidden_size", 0))
