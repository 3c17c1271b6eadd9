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
from xprnn.interop.onnx.layer_specs import LayerSpec, from_specs, params_for, specs_equal, to_specs
from xprnn.interop.onnx.node import HostValue, Node, host_context
from xprnn.interop.onnx.program import OPS, CompiledGraph
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

# What a graph that is none of ours may make of a stand-in.
_MATCH_ERRORS = (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
_PROBE_SIZES = (1009, 1013)  # sizes for the two free axes: primes, so that products tell them apart


def match_layers(graph: CompiledGraph, declared_model: Any) -> tuple[Any, Params]:
    """The model and its parameters (NumPy); `told`, what the file says it is, if it computes the same.

    Raises:
        NotALayerGraphError: not one of ours; says why.
    """
    try:
        pieces = PatternMatcher(graph).match()
        model, params = from_specs(pieces)
    except _MATCH_ERRORS as error:
        raise NotALayerGraphError(f"it does something of its own ({error})") from None
    if declared_model is not None and specs_equal(
        pieces, to_specs(declared_model, _placeholder_params(declared_model))
    ):
        return declared_model, params_for(declared_model, pieces)
    return model, params


def declared_model_from_metadata(metadata: dict[str, str], array_count: int) -> Any:
    """The model that to_onnx wrote beside a graph of so many arrays; None where there is none that could be it."""
    try:
        config = json.loads(metadata["xprnn"])
        check_layer_count(config, array_count)
        return from_config(config)
    except (KeyError, ValueError, RecursionError, AttributeError, TypeError):
        return None


def _placeholder_params(model: Any) -> Params:
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in model.shapes().items()}


class PatternMatcher(PatternOps):
    """One walk through the graph; `done` are the pieces found so far."""

    def __init__(self, graph: CompiledGraph) -> None:
        super().__init__()
        self.graph = graph
        self.initial_states: list[list[Any]] = []
        self.input_name = ""
        self.scope: dict[str, Any] = dict(graph.constants)
        self.scope |= {name: HostValue(a) for name, a in graph.params.items()}

    def match(self) -> list[LayerSpec]:
        """The pieces, checked against the graph's outputs."""
        self._bind_inputs()
        for node in self.graph.nodes:
            if node.bodies:
                raise NotALayerGraphError(f"{node} is control flow")
            try:
                found = self._match_node(node)
            except _MATCH_ERRORS as error:
                raise NotALayerGraphError(f"{node} does something of its own ({error})") from None
            self.scope.update(zip(node.outputs, found, strict=False))
        self._check_outputs()
        self._assign_initial_states()
        width = 0
        for piece in self.specs:
            if width and piece.kind != "part" and piece.input_size != width:
                raise NotALayerGraphError("the sizes of its layers do not fit each other")
            width = piece.output_width(width)
        return [self._with_input_layout(p) for p in self.specs]

    def _with_input_layout(self, piece: LayerSpec) -> LayerSpec:
        """With the axes of the input."""
        if isinstance(piece.layer, LastStep):
            return replace(piece, layer=replace(piece.layer, batch_first=self.time_label == "1"))
        return replace(piece, batch_first=self.time_label == "1") if piece.kind == "rnn" else piece

    def _bind_inputs(self) -> None:
        if not self.graph.inputs:
            raise NotALayerGraphError("it has no input")
        self.input_name = self.graph.inputs[0]
        ranks = self.graph.declared_shapes[self.input_name]
        if len(ranks) not in (2, 3):
            raise NotALayerGraphError(f"its input {self.input_name!r} has {len(ranks)} axes")
        # An exporter that fixed an axis may say so of the output alone.
        ends = [self.graph.declared_shapes[name] for name in self.graph.outputs]
        fixed = next((e for e in ends if len(e) == 3), (None,) * 3)
        for k, probe in enumerate(_PROBE_SIZES):
            self.axis_sizes[str(k)] = ranks[k] or fixed[k] or probe
        axes: tuple[AxisLabels, ...] = (("0",), ("1",))
        if len(ranks) == 3:
            self.axis_sizes["x"] = ranks[2] or 0
            axes += (("x",),)
        self.scope[self.input_name] = SymbolicArray(-1, axes)
        for name in self.graph.inputs[1:] + self.graph.optional_inputs:
            known = self.graph.constants.get(name)
            rows = self.graph.declared_shapes[name][0] if self.graph.declared_shapes[name] else None
            self.scope[name] = SymbolicInput(name, 0, rows or 0, None if known is None else known.array)

    def _match_node(self, node: Node) -> tuple[Any, ...]:
        values = [
            None if n == "" or self._is_weight_input(node, k) else self.scope[n] for k, n in enumerate(node.inputs)
        ]
        if node.name in self.graph.recurrent_nodes:
            return self._match_recurrent(node, values)
        if all(v is None or isinstance(v, HostValue) for v in values):
            found = OPS[node.op](host_context(np.float32), node, values)
            return tuple(v if isinstance(v, HostValue) else HostValue(np.asarray(v)) for v in found)
        does = (
            self._match_activation if node.op in ACTIVATION_OPERATORS else getattr(self, f"_on_{node.op.lower()}", None)
        )
        if does is None:
            raise NotALayerGraphError(f"{node} is none of the plumbing around recurrent layers")
        self._check_value_types(node, does, values)
        out = does(node, *values)
        return out if isinstance(out, tuple) else (out,)

    def _check_value_types(self, node: Node, does: Any, values: list[Any]) -> None:
        """What an operator of the plumbing may read is what its annotations say."""
        kinds = [k for name, k in get_type_hints(does).items() if name not in ("node", "return")]
        kinds += kinds[-1:] * (len(values) - len(kinds))  # of *rest
        for name, kind, value in zip(node.inputs, kinds, values, strict=False):
            if kind is Any or isinstance(value, kind):
                continue
            what = (
                "lengths or states"
                if isinstance(value, (SymbolicInput, FinalState))
                else "what it is not known to read"
            )
            raise NotALayerGraphError(f"{node} computes with {what} ({name!r})")

    def _is_weight_input(self, node: Node, k: int) -> bool:
        return node.name in self.graph.recurrent_nodes and k in (1, 2, 3, 7)

    def _match_recurrent(self, node: Node, values: list[Any]) -> tuple[Any, ...]:
        x, rest = values[0], values[1:] + [None] * (7 - len(values))
        spec, names = self.graph.recurrent_nodes[node.name].spec, self.graph.recurrent_nodes[node.name].param_names
        if len(names) != 1 or not self._is_latest_output(x) or len(x.axes) != 3:
            raise NotALayerGraphError(f"{node} does not read what stands before it, or its directions are not alike")
        time, batch = (x.axes[1], x.axes[0]) if spec.batch_first else (x.axes[0], x.axes[1])
        if len(time) != 1 or {*time, *batch} != {"0", "1"} or self.time_label not in (None, time[0]):
            raise NotALayerGraphError(f"{node} does not walk along the axis of time")
        self.time_label = time[0]
        self.length_inputs.add(self._match_lengths(node, rest[3]))
        own = {k: self.graph.params[n] for k, n in names[0].items()}
        hidden, width = own["weight_hh_l0"].shape[1], own["weight_ih_l0"].shape[1]
        scope = node.name.strip("/").split("/")[0] if "/" in node.name.strip("/") else ""
        at = len(self.specs)
        self.specs.append(
            LayerSpec(
                identifier_or_empty(scope), "rnn", width, hidden, "bias_ih_l0" in own, own, spec.cells[0], spec.reverse
            )
        )
        self.initial_states.append([at, *rest[4 : 4 + len(spec.cells[0].states)]])
        self.axis_sizes.update({f"d{at}": len(spec.reverse), f"h{at}": hidden})
        d, h = (f"d{at}",), (f"h{at}",)
        axes = (batch, time, d, h) if spec.batch_first else (time, d, batch, h)
        return (
            SymbolicArray(at, axes),
            FinalState((at,), "h", spec.batch_first),
            FinalState((at,), "c", spec.batch_first),
        )

    def _match_lengths(self, node: Node, value: Any) -> str | None:
        if isinstance(value, HostValue):
            if (value.array == self.axis_sizes[self.time_label or "0"]).all():
                return None
            raise NotALayerGraphError(f"{node} has lengths of its own")
        if value is not None and not isinstance(value, SymbolicInput):
            raise NotALayerGraphError(f"{node} has lengths that are computed")
        return None if value is None else value.name

    def _check_outputs(self) -> None:
        kinds = [self.scope[name] for name in self.graph.outputs]
        data = [v for v in kinds if isinstance(v, SymbolicArray)]
        if not any(p.kind == "rnn" for p in self.specs):
            raise NotALayerGraphError("it has no recurrent operator")
        if len(data) != 1 or not self._is_latest_output(data[0]) or len(self.length_inputs) != 1:
            raise NotALayerGraphError("its outputs are not the last layer's, or its layers see different lengths")
        axes, batch = data[0].axes, ("0" if self.time_label == "1" else "1",)
        wanted = (batch,) if any(isinstance(p.layer, LastStep) for p in self.specs) else (("0",), ("1",))
        if axes[:-1] != wanted:
            raise NotALayerGraphError("its output is not laid out as its input is")
        if any(not isinstance(v, (SymbolicArray, FinalState)) for v in kinds):
            raise NotALayerGraphError("it has outputs of other kinds")

    def _assign_initial_states(self) -> None:
        """Put learned initial states into their pieces; states from outside are in the order of the layers."""
        rows: dict[str, int] = {}
        learned = any(initial_state_value(v) is not None for s in self.initial_states for v in s[1:])
        for at, *values in self.initial_states:
            piece, d = self.specs[at], len(self.specs[at].reverse)
            for state, value in zip(piece.cell.states, values, strict=False):
                if isinstance(value, SymbolicInput):
                    if value.start != rows.get(value.name, 0) or value.stop != value.start + d:
                        raise NotALayerGraphError(f"its layers take their rows of {value.name!r} in another order")
                    rows[value.name] = value.stop
                elif value is not None and not isinstance(value, HostValue):
                    raise NotALayerGraphError("an initial state is computed")
                start = initial_state_value(value)
                if learned:
                    weight = piece.params["weight_hh_l0"]
                    blank = np.zeros((d, piece.output_size), weight.dtype)
                    piece.params[f"initial_{state}"] = blank if start is None else start
            self.specs[at] = replace(piece, learned_state=learned)
