"""Recognition of graphs that are models of xprnn: [look-up ->] recurrent layers [-> linear and stateless layers].

The graph is evaluated with symbolic values. A data array is represented by the labels of its axes, and shapes are
computed for two large prime sizes T and N. Values that are constants of the file are computed. Helper operators that
only move data thus disappear. The graph is a model of xprnn if each layer reads the output of the layer before it;
otherwise NotALayerGraphError says why it is not.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, get_type_hints

import numpy as np

from xprnn.arrays.namespace import Params
from xprnn.interop.onnx.layer_specs import LayerSpec, from_specs, params_for, specs_equal, to_specs
from xprnn.interop.onnx.node import HostValue, Node, host_context
from xprnn.interop.onnx.program import OPS, WEIGHT_INPUTS, CompiledGraph
from xprnn.interop.onnx.reader.pattern_ops import PatternOps, identifier_or_empty
from xprnn.interop.onnx.reader.symbolic_axes import (
    AxisLabels,
    FinalState,
    NotALayerGraphError,
    SymbolicArray,
    SymbolicInput,
    initial_state_value,
)
from xprnn.interop.onnx.recurrent_attributes import ACTIVATION_OPERATORS
from xprnn.io.archive import check_layer_count
from xprnn.layers.masking import LastStep
from xprnn.layers.sequential import from_config

__all__ = ["NotALayerGraphError", "declared_model_from_metadata", "match_layers"]

# The exceptions that the evaluation with symbolic values raises for a graph that is not a model of xprnn.
_MATCH_ERRORS = (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
_PROBE_SIZES = (1009, 1013)  # sizes of the two free axes: distinct primes, so that a product determines its factors


def match_layers(graph: CompiledGraph, declared_model: Any) -> tuple[Any, Params]:
    """Convert a graph to (model, params) with NumPy arrays.

    Args:
        graph: the compiled graph.
        declared_model: the model that the metadata of the file describes, or None. It is returned if it computes the
            same function as the graph; it has the names of layers and options that the graph does not show.

    Raises:
        NotALayerGraphError: the graph is not a model of xprnn; the message says why.
    """
    try:
        specs = PatternMatcher(graph).match()
        model, params = from_specs(specs)
    except _MATCH_ERRORS as error:
        raise NotALayerGraphError(f"it is not built like a model of xprnn ({error})") from None
    if declared_model is not None and specs_equal(specs, to_specs(declared_model, _placeholder_params(declared_model))):
        return declared_model, params_for(declared_model, specs)
    return model, params


def declared_model_from_metadata(metadata: dict[str, str], array_count: int) -> Any:
    """The model that the metadata of a file describes; None if the metadata describes no valid model.

    If the description has more layers than `array_count`, the number of arrays in the file, it is rejected before any
    layer is made.
    """
    try:
        config = json.loads(metadata["xprnn"])
        check_layer_count(config, array_count)
        return from_config(config)
    except (KeyError, ValueError, RecursionError, AttributeError, TypeError):
        return None


def _placeholder_params(model: Any) -> Params:
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in model.shapes().items()}


class PatternMatcher(PatternOps):
    """Evaluates a graph with symbolic values and collects the specs of its layers.

    Args:
        graph: the compiled graph.
    """

    def __init__(self, graph: CompiledGraph) -> None:
        super().__init__()
        self.graph = graph
        self.initial_states: list[list[Any]] = []  # [layer number, initial h, initial c]
        self.input_name = ""
        self.scope: dict[str, Any] = dict(graph.constants)
        self.scope |= {name: HostValue(a) for name, a in graph.params.items()}

    def match(self) -> list[LayerSpec]:
        """Return the specs of the layers, after checking the outputs of the graph.

        Raises:
            NotALayerGraphError: the graph is not a model of xprnn.
        """
        self._bind_inputs()
        for node in self.graph.nodes:
            if node.bodies:
                raise NotALayerGraphError(f"{node} is control flow")
            try:
                outputs = self._match_node(node)
            except _MATCH_ERRORS as error:
                raise NotALayerGraphError(f"{node} is not an operator of a model of xprnn ({error})") from None
            self.scope.update(zip(node.outputs, outputs, strict=False))
        self._check_outputs()
        self._assign_initial_states()
        width = 0
        for spec in self.specs:
            if width and spec.kind != "stateless" and spec.input_size != width:
                raise NotALayerGraphError("the sizes of its layers do not fit each other")
            width = spec.output_width(width)
        return [self._with_input_layout(spec) for spec in self.specs]

    def _with_input_layout(self, spec: LayerSpec) -> LayerSpec:
        """Set batch_first as in the input of the graph."""
        if isinstance(spec.layer, LastStep):
            return replace(spec, layer=replace(spec.layer, batch_first=self.time_label == "1"))
        return replace(spec, batch_first=self.time_label == "1") if spec.kind == "rnn" else spec

    def _bind_inputs(self) -> None:
        """Give each input of the graph a symbolic value: the first is data, the others are states or lengths."""
        if not self.graph.inputs:
            raise NotALayerGraphError("it has no input")
        self.input_name = self.graph.inputs[0]
        shape = self.graph.declared_shapes[self.input_name]
        if len(shape) not in (2, 3):
            raise NotALayerGraphError(f"its input {self.input_name!r} has {len(shape)} axes")
        # If an exporter fixed the size of an axis, only the shape of the output may show it.
        output_shapes = [self.graph.declared_shapes[name] for name in self.graph.outputs]
        fixed = next((s for s in output_shapes if len(s) == 3), (None,) * 3)
        for k, probe in enumerate(_PROBE_SIZES):
            self.axis_sizes[str(k)] = shape[k] or fixed[k] or probe
        axes: tuple[AxisLabels, ...] = (("0",), ("1",))
        if len(shape) == 3:
            self.axis_sizes["x"] = shape[2] or 0
            axes += (("x",),)
        self.scope[self.input_name] = SymbolicArray(-1, axes)
        for name in self.graph.inputs[1:] + self.graph.optional_inputs:
            default = self.graph.constants.get(name)
            rows = self.graph.declared_shapes[name][0] if self.graph.declared_shapes[name] else None
            self.scope[name] = SymbolicInput(name, 0, rows or 0, None if default is None else default.array)

    def _match_node(self, node: Node) -> tuple[Any, ...]:
        values = [
            None if n == "" or self._is_weight_input(node, k) else self.scope[n] for k, n in enumerate(node.inputs)
        ]
        if node.name in self.graph.recurrent_nodes:
            return self._match_recurrent(node, values)
        if all(v is None or isinstance(v, HostValue) for v in values):
            outputs = OPS[node.op](host_context(np.float32), node, values)
            return tuple(v if isinstance(v, HostValue) else HostValue(np.asarray(v)) for v in outputs)
        method = (
            self._match_activation if node.op in ACTIVATION_OPERATORS else getattr(self, f"_on_{node.op.lower()}", None)
        )
        if method is None:
            raise NotALayerGraphError(f"{node} is not an operator of a model of xprnn")
        self._check_value_types(node, method, values)
        out = method(node, *values)
        return out if isinstance(out, tuple) else (out,)

    def _check_value_types(self, node: Node, method: Any, values: list[Any]) -> None:
        """Raise NotALayerGraphError unless the values have the types in the annotations of a PatternOps method."""
        types = [t for name, t in get_type_hints(method).items() if name not in ("node", "return")]
        types += types[-1:] * (len(values) - len(types))  # for a *args parameter
        for name, expected, value in zip(node.inputs, types, values, strict=False):
            if expected is Any or isinstance(value, expected):
                continue
            kind = "lengths or states" if isinstance(value, (SymbolicInput, FinalState)) else "an unexpected value"
            raise NotALayerGraphError(f"{node} computes with {kind} ({name!r})")

    def _is_weight_input(self, node: Node, k: int) -> bool:
        return node.name in self.graph.recurrent_nodes and k in WEIGHT_INPUTS

    def _match_recurrent(self, node: Node, values: list[Any]) -> tuple[Any, ...]:
        x, rest = values[0], values[1:] + [None] * (7 - len(values))
        spec, names = self.graph.recurrent_nodes[node.name].spec, self.graph.recurrent_nodes[node.name].param_names
        if len(names) != 1 or not self._is_latest_output(x) or len(x.axes) != 3:
            raise NotALayerGraphError(
                f"{node} does not read the layer before it, or its directions have different cells"
            )
        time, batch = (x.axes[1], x.axes[0]) if spec.batch_first else (x.axes[0], x.axes[1])
        if len(time) != 1 or {*time, *batch} != {"0", "1"} or self.time_label not in (None, time[0]):
            raise NotALayerGraphError(f"{node} does not run along the time axis")
        self.time_label = time[0]
        self.length_inputs.add(self._match_lengths(node, rest[3]))
        params = {k: self.graph.params[n] for k, n in names[0].items()}
        hidden, width = params["weight_hh_l0"].shape[1], params["weight_ih_l0"].shape[1]
        module = node.name.strip("/").split("/")[0] if "/" in node.name.strip("/") else ""
        name, bias, cell = identifier_or_empty(module), "bias_ih_l0" in params, spec.cells[0]
        k = len(self.specs)
        self.specs.append(LayerSpec(name, "rnn", width, hidden, bias, params, cell, spec.reverse))
        self.initial_states.append([k, *rest[4 : 4 + len(cell.states)]])
        self.axis_sizes.update({f"d{k}": len(spec.reverse), f"h{k}": hidden})
        d, h = (f"d{k}",), (f"h{k}",)
        axes = (batch, time, d, h) if spec.batch_first else (time, d, batch, h)
        return SymbolicArray(k, axes), FinalState((k,), "h", spec.batch_first), FinalState((k,), "c", spec.batch_first)

    def _match_lengths(self, node: Node, value: Any) -> str | None:
        """The name of the input that holds the lengths of a recurrent node; None if every row has all steps."""
        if isinstance(value, HostValue):
            if (value.array == self.axis_sizes[self.time_label or "0"]).all():
                return None
            raise NotALayerGraphError(f"{node} has constant lengths")
        if value is not None and not isinstance(value, SymbolicInput):
            raise NotALayerGraphError(f"{node} has computed lengths")
        return None if value is None else value.name

    def _check_outputs(self) -> None:
        """Raise NotALayerGraphError unless the outputs are y, laid out as x is, and final states."""
        values = [self.scope[name] for name in self.graph.outputs]
        data = [v for v in values if isinstance(v, SymbolicArray)]
        if not any(spec.kind == "rnn" for spec in self.specs):
            raise NotALayerGraphError("it has no recurrent operator")
        if len(data) != 1 or not self._is_latest_output(data[0]) or len(self.length_inputs) != 1:
            raise NotALayerGraphError(
                "its outputs are not those of the last layer, or its layers have different lengths"
            )
        axes, batch = data[0].axes, ("0" if self.time_label == "1" else "1",)
        has_last_step = any(isinstance(spec.layer, LastStep) for spec in self.specs)
        if axes[:-1] != ((batch,) if has_last_step else (("0",), ("1",))):
            raise NotALayerGraphError("the axes of its output are not in the order of those of its input")
        if any(not isinstance(v, (SymbolicArray, FinalState)) for v in values):
            raise NotALayerGraphError("it has outputs that are neither data nor final states")

    def _assign_initial_states(self) -> None:
        """Add learned initial states to the specs; check that layers read the rows of an input of states in order."""
        next_rows: dict[str, int] = {}
        learned = any(initial_state_value(v) is not None for s in self.initial_states for v in s[1:])
        for k, *values in self.initial_states:
            spec, d = self.specs[k], len(self.specs[k].reverse)
            for state, value in zip(spec.cell.states, values, strict=False):
                if isinstance(value, SymbolicInput):
                    if value.start != next_rows.get(value.name, 0) or value.stop != value.start + d:
                        raise NotALayerGraphError(f"its layers read the rows of {value.name!r} in another order")
                    next_rows[value.name] = value.stop
                elif value is not None and not isinstance(value, HostValue):
                    raise NotALayerGraphError("an initial state is computed")
                initial = initial_state_value(value)
                if learned:
                    zeros = np.zeros((d, spec.output_size), spec.params["weight_hh_l0"].dtype)
                    spec.params[f"initial_{state}"] = zeros if initial is None else initial
            self.specs[k] = replace(spec, learned_state=learned)
