"""Export of a layer or Sequential as an ONNX model with optional lengths, initial states and final states."""

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
_INT32 = 6  # TensorProto.INT32
_OPERATOR_BY_CELL = {"elman": "RNN", "lstm": "LSTM", "gru": "GRU", "gru_reset_before": "GRU"}
_FULL_LENGTH = np.iinfo(np.int32).max  # the default of the input `lengths`: all steps are valid
InitializerReader = Callable[[str], Any]  # name of an initializer -> NumPy array


def build_model_proto(model: Any, params: Params, *, lengths: bool, optional: bool, dtype: str) -> Any:
    """Write a model as a ModelProto and check it; the arguments are those of to_onnx."""
    where = "to_onnx"
    onnx = require_onnx(where)
    check_supported(where, model, dtype, lengths, optional)
    check_params(where, params, model.shapes())
    check_param_shapes(where, params, model.shapes())
    host = {name: np.asarray(to_numpy(a), dtype) for name, a in params.items()}
    if sum(a.nbytes for a in host.values()) >= 1 << 31:
        raise InputError(f"{where}: the parameters take 2 GiB or more, an ONNX file must be smaller")
    proto = ModelWriter(onnx, model, dtype, lengths, optional).write(to_specs(model, host))
    onnx.checker.check_model(proto, full_check=True)
    return proto


class ModelWriter(MaskedTimeWriter):
    """The graph of a model under construction.

    Args:
        onnx: the onnx package.
        model: the layer or Sequential.
        dtype, lengths, optional: as for to_onnx.
    """

    def __init__(self, onnx: Any, model: Any, dtype: str, lengths: bool, optional: bool) -> None:
        super().__init__(onnx, dtype)
        self.model, self.lengths, self.optional = model, lengths, optional
        self.inputs, self.outputs = list[Any](), list[Any]()
        # For each spec, a function that reads its parameters back from the initializers of the file.
        self.weight_readers: list[Callable[[InitializerReader], Params]] = []
        self.recurrent_layers = [p for p in named_layers(model).values() if isinstance(p, Recurrent)]
        self.batch_first = self.recurrent_layers[0].batch_first
        self.final_hidden = self.recurrent_output = self.direction = ""
        self.has_time_axis, self.integer_input = True, False

    def write(self, specs: list[LayerSpec]) -> Any:
        """Write the layers and return the ModelProto."""
        make = self.onnx.helper
        lead = ["N", "T"] if self.batch_first else ["T", "N"]
        self.integer_input = next(s.kind for s in specs if not isinstance(s.layer, Masking)) == "embedding"
        if self.integer_input:
            x = make.make_tensor_value_info("x", self.onnx.TensorProto.INT64, lead)
        else:
            width = next(w for s in specs if (w := _input_width(s)))
            x = make.make_tensor_value_info("x", self.elem_type, [*lead, width])
        self._emit_batch_size_and_lengths()
        y = self._emit_layers(specs)
        self.add_node("Identity", [y], "y")
        shape = [*(lead if self.has_time_axis else ["N"]), reduce(lambda width, s: s.output_width(width), specs, 0)]
        outputs = [make.make_tensor_value_info("y", self.elem_type, shape), *self.outputs]
        graph = make.make_graph(self.nodes, "xprnn", [x, *self.inputs], outputs, list(self.initializers.values()))
        proto = make.make_model(graph, opset_imports=[make.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        proto.producer_name = "xprnn"
        with suppress(InputError):  # user-defined code cannot be stored as a configuration
            make.set_model_props(proto, {"xprnn": json.dumps(self.model.config())})
        return proto

    def _emit_layers(self, specs: list[LayerSpec]) -> str:
        """Write all layers; return the name of the output of the last one."""
        y, k = "x", 0
        while k < len(specs):
            stack = [s for s in specs[k:] if s.kind == "rnn" and s.name == specs[k].name]
            emit_layer = {"rnn": self._emit_recurrent_stack, "stateless": self._emit_stateless_layer}.get(
                specs[k].kind, self._emit_linear_or_embedding
            )
            y = emit_layer(stack or specs[k : k + 1], y)
            k += len(stack) or 1
        return y

    def _emit_batch_size_and_lengths(self) -> None:
        """Write the batch size N, and min(lengths, T) if the model has the input `lengths`."""
        t, n = (1, 0) if self.batch_first else (0, 1)
        self.add_node("Shape", ["x"], "N", start=n, end=n + 1)
        self.add_node("Concat", [self.int64_vector(1), "N", self.int64_vector(1)], "state_shape", axis=0)
        if self.lengths:
            self._add_input("lengths", _INT32, ["rows" if self.optional else "N"], np.asarray([_FULL_LENGTH], np.int32))
            self.add_node("Shape", ["x"], "T", start=t, end=t + 1)
            self.add_node("Cast", ["T"], "T_int32", to=_INT32)
            self.add_node("Expand", ["T_int32", "N"], "whole")
            self.row_lengths = self.add_node("Min", ["lengths", "whole"], "row_lengths")

    def _emit_stateless_layer(self, specs: list[LayerSpec], x: str) -> str:
        """Write a layer without parameters; return the name of its output."""
        layer, name = specs[0].layer, specs[0].name
        self.weight_readers.append(lambda read: {})
        if isinstance(layer, Softmax):
            return self.add_node("LogSoftmax" if layer.log else "Softmax", [x], f"{name}.y", axis=-1)
        if isinstance(layer, ActivationLayer):
            f = activation(layer.f)
            if operator := operator_from_activation(f):
                return self.add_node(operator[0], [x], f"{name}.y", "", **operator[1])
            y: TracedValue = f.build(make_tracing_namespace(self))[0](TracedValue(self, x))
            return y.name
        if isinstance(layer, MergeDirections):
            halves = [f"{name}.forward", f"{name}.backward"]
            self.add_node("Split", [x, self.int64_vector(layer.hidden_size, layer.hidden_size)], halves, axis=-1)
            return self.add_node({mode: op for op, mode in MERGE_MODES.items()}[layer.mode], halves, f"{name}.y")
        if isinstance(layer, LastStep):
            return self._emit_last_step_or_final_state(layer, name, x)
        if isinstance(layer, Masking):
            return self.emit_masking(layer, x, self.integer_input, self.has_time_axis)
        if isinstance(layer, ContextShift):
            return self.emit_context_shift(layer.hidden_size, x)
        if isinstance(layer, HoldLastOutput):
            return self.emit_hold_last_output(layer, x)
        return self.emit_reverse_time(layer, x)

    def _emit_last_step_or_final_state(self, layer: LastStep, name: str, x: str) -> str:
        """Write a LastStep: as the final state if x is the unmasked output of a recurrent layer, else by gathering."""
        self.has_time_axis = False
        direction = self.direction if self.recurrent_output == x and not self.valid_mask and layer.valid_only else ""
        last = self.add_initializer("last", np.asarray(-1, np.int64))
        if direction == layer.direction == "both":
            transposed = self.add_node("Transpose", [self.final_hidden], f"{name}.turned", perm=[1, 0, 2])
            return self.add_node("Reshape", [transposed, self.int64_vector(0, -1)], f"{name}.y")
        if direction == layer.direction and (self.lengths or layer.direction == "reverse"):
            return self.add_node("Gather", [self.final_hidden, last], f"{name}.y", axis=0)
        if layer.direction == "forward" and not (layer.valid_only and (self.row_lengths or self.valid_mask)):
            return self.add_node("Gather", [x, last], f"{name}.y", axis=int(self.batch_first))
        return self.emit_last_step(layer, x)

    def _emit_linear_or_embedding(self, specs: list[LayerSpec], x: str) -> str:
        """Write an Embedding or a Linear layer; return the name of its output."""
        spec = specs[0]
        prefix = f"{spec.name or spec.kind}."
        if spec.kind == "embedding":
            self.integer_input = False
            self.weight_readers.append(lambda read: {"weight": read(prefix + "weight")})
            table = self.add_initializer(prefix + "weight", spec.params["weight"])
            return self.add_node("Gather", [table, x], prefix + "rows")
        weight = self.add_initializer(prefix + "weight", spec.params["weight"].T)
        y = self.add_node("MatMul", [x, weight], prefix + "product")
        bias = {"bias": prefix + "bias"} if spec.bias else {}
        self.weight_readers.append(
            lambda read: {"weight": read(prefix + "weight").T, **{k: read(n) for k, n in bias.items()}}
        )
        if not spec.bias:
            return y
        return self.add_node("Add", [y, self.add_initializer(prefix + "bias", spec.params["bias"])], prefix + "y")

    def _emit_recurrent_stack(self, specs: list[LayerSpec], x: str) -> str:
        """Write the layers of one stack, its initial states and its final states; return the name of its output."""
        name, cell = specs[0].name, specs[0].cell
        prefix = f"{name}." if len(self.recurrent_layers) > 1 else ""
        if self.batch_first:
            x = self.add_node("Transpose", [x], f"{name}.time_major", perm=[1, 0, 2])
        initial = {s: self._emit_initial_states(prefix, s, specs) for s in cell.states}
        finals: dict[str, list[str]] = {s: [] for s in cell.states}
        as_scan = needs_scan(cell, specs[0].projected)
        compacted = bool(self.valid_mask) and not as_scan
        x = self.compact(x) if compacted else x
        for k, spec in enumerate(specs):
            states = [initial[s][k] for s in cell.states]
            label = f"{name or 'rnn'}/l{k}"
            if as_scan:
                x, final = emit_scan(self, label, spec, x, states)
                read_weights = partial(read_scan_weights, label, spec)
            else:
                x, final, read_weights = self._emit_recurrent_layer(label, spec, x, states)
            learned = {s: f"{prefix}initial_{s}" for s in cell.states} if spec.learned_state else {}
            self.weight_readers.append(self._make_weight_reader(read_weights, learned, k, specs))
            for s, end, start in zip(cell.states, final, states, strict=True):
                finals[s].append(self._keep_initial_if_empty(end, start) if compacted else end)
        x = self.scatter_back(x) if compacted else x
        self.final_hidden = finals[cell.states[0]][-1]
        for s in cell.states:
            self._emit_final_states(prefix, s, specs, finals[s])
        x = self.add_node("Transpose", [x], f"{name}.batch_first", perm=[1, 0, 2]) if self.batch_first else x
        reverse = specs[0].reverse
        self.recurrent_output = x
        self.direction = "both" if len(reverse) == 2 else "reverse" if reverse[0] else "forward"
        return x

    def _keep_initial_if_empty(self, final: str, initial: str) -> str:
        """The final state; for a row without a valid step the initial state. ONNX Runtime 1.32 returns 0 there."""
        has_step = self.emit(
            "Unsqueeze", self.emit("Greater", self.valid_count, self.int64_scalar(0)), self.int64_vector(0, 2)
        )
        return self.emit("Where", has_step, final, initial)

    def _make_weight_reader(
        self, read_weights: Any, learned: dict[str, str], k: int, specs: list[LayerSpec]
    ) -> Callable[[InitializerReader], Params]:
        """A function that reads the weights and the learned initial states of layer k of a stack."""
        d, one_input = len(specs[0].reverse), self._same_state_sizes(specs)

        def read_all(read: InitializerReader) -> Params:
            states = {
                s: read(n)[k * d : k * d + d, 0] if one_input else read(f"{n}_l{k}")[:, 0] for s, n in learned.items()
            }
            weights: Params = read_weights(read)
            return weights | {f"initial_{s}": a for s, a in states.items()}

        return read_all

    def _add_input(self, name: str, elem_type: int, shape: list[Any], default: Any) -> None:
        """Add an input of the model; its default value has a batch axis of size 1."""
        self.inputs.append(self.onnx.helper.make_tensor_value_info(name, elem_type, shape))
        if self.optional:
            self.add_initializer(name, default)

    def _same_state_sizes(self, specs: list[LayerSpec]) -> bool:
        return len({tuple(spec.state_width(s) for s in spec.cell.states) for spec in specs}) == 1

    def _emit_initial_states(self, prefix: str, state: str, specs: list[LayerSpec]) -> list[str]:
        """Add the inputs for an initial state, with default zero or learned; return the name of each layer's state."""
        d = len(specs[0].reverse)
        rows = [s.params.get(f"initial_{state}", np.zeros((d, s.state_width(state)), self.dtype)) for s in specs]
        if not self._same_state_sizes(specs):
            return [self._add_state_input(f"{prefix}initial_{state}_l{k}", row) for k, row in enumerate(rows)]
        stacked = self._add_state_input(f"{prefix}initial_{state}", np.concatenate(rows))
        if len(specs) == 1:
            return [stacked]
        bounds = [(self.int64_vector(k * d), self.int64_vector(k * d + d)) for k in range(len(specs))]
        return [
            self.add_node("Slice", [stacked, start, stop, self.int64_vector(0)], f"{stacked}.l{k}")
            for k, (start, stop) in enumerate(bounds)
        ]

    def _add_state_input(self, name: str, rows: Any) -> str:
        """Add an input for initial states; return the name of the states of all N rows."""
        shape = [rows.shape[0], "rows" if self.optional else "N", rows.shape[1]]
        self._add_input(name, self.elem_type, shape, rows[:, None, :].astype(self.dtype))
        return self.add_node("Expand", [name, "state_shape"], f"{name}.all")

    def _emit_recurrent_layer(
        self, name: str, spec: LayerSpec, x: str, states: list[str]
    ) -> tuple[str, list[str], Any]:
        """Write one layer as RNN, LSTM or GRU.

        Returns:
            The name of y, the names of the final states, and a function that reads the weights back.
        """
        cell, suffixes = spec.cell, ("_l0", "_l0_reverse")[: len(spec.reverse)]
        directions = [{n.removesuffix(e): a for n, a in spec.params.items() if n.endswith(e)} for e in suffixes]
        weights = [to_framework("onnx", cell.name, params) for params in directions]
        names = {k: self.add_initializer(f"{name}.{k}", np.stack([w[k] for w in weights])) for k in weights[0]}
        lengths = self.emit("Cast", self.valid_count, to=_INT32) if self.valid_mask else self.row_lengths
        inputs = [x, names["W"], names["R"], names.get("B", ""), lengths, *states]
        inputs += [names["P"]] if "P" in names else []
        outputs = [f"{name}.Y", *(f"{name}.Y_{s}" for s in cell.states)]
        attrs = attributes_from_cell(cell, spec.output_size, spec.reverse)
        self.add_node(_OPERATOR_BY_CELL[cell.name], inputs, outputs, name, **attrs)

        def read_weights(read: InitializerReader) -> Params:
            arrays = [
                from_framework("onnx", cell.name, {k: read(n)[d] for k, n in names.items()})
                for d in range(len(suffixes))
            ]
            return {n + e: a for e, params in zip(suffixes, arrays, strict=True) for n, a in params.items()}

        if len(spec.reverse) == 1:
            y = self.add_node("Squeeze", [outputs[0], self.int64_vector(1)], f"{name}.y")
        else:
            transposed = self.add_node("Transpose", [outputs[0]], f"{name}.turned", perm=[0, 2, 1, 3])
            shape = self.int64_vector(0, 0, 2 * spec.output_size)
            y = self.add_node("Reshape", [transposed, shape], f"{name}.y")
        return y, outputs[1:], read_weights

    def _emit_final_states(self, prefix: str, state: str, specs: list[LayerSpec], finals: list[str]) -> None:
        """Add the outputs for a final state: one for the stack, or one for each layer if their sizes differ."""
        if self._same_state_sizes(specs):
            name = f"{prefix}final_{state}"
            self.add_node("Concat", finals, name, axis=0)
            self._add_output(name, len(finals) * len(specs[0].reverse), specs[0].state_width(state))
            return
        for k, final in enumerate(finals):
            name = f"{prefix}final_{state}_l{k}"
            self.add_node("Identity", [final], name)
            self._add_output(name, len(specs[0].reverse), specs[k].state_width(state))

    def _add_output(self, name: str, rows: int, width: int) -> None:
        self.outputs.append(self.onnx.helper.make_tensor_value_info(name, self.elem_type, [rows, "N", width]))


def _input_width(spec: LayerSpec) -> int:
    """The number of input features of a layer; 0 if it accepts any number."""
    return spec.input_size or 2 * int(getattr(spec.layer, "hidden_size", 0))
