"""Compilation of a GraphProto to nodes that run; one error names all unsupported operators, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xprnn.arrays.namespace import InputError, Params
from xprnn.interop.onnx.model_file import opset_version, require_onnx, tensor_to_numpy
from xprnn.interop.onnx.node import HostValue, Node, Op
from xprnn.interop.onnx.ops.math import MATH_OPS
from xprnn.interop.onnx.ops.recurrent import RECURRENT_OPS, RecurrentSpec, params_from_weights, spec_from_node
from xprnn.interop.onnx.ops.shape import SHAPE_OPS
from xprnn.interop.onnx.recurrent_attributes import GATE_COUNTS

__all__ = ["OPS", "WEIGHT_INPUTS", "CompiledGraph", "RecurrentNode", "compile_graph"]

OPS: dict[str, Op] = {**MATH_OPS, **SHAPE_OPS, **RECURRENT_OPS}
WEIGHT_INPUTS = {1: "W", 2: "R", 3: "B", 7: "P"}  # input number of a recurrent node -> name in the ONNX standard
_CONTROL_FLOW_BODIES = {"Loop": ("body",), "If": ("then_branch", "else_branch"), "Scan": ("body",)}
_GRAPH_ATTRIBUTE_TYPES = (5, 10)  # AttributeProto.GRAPH and GRAPHS


@dataclass(frozen=True)
class RecurrentNode:
    """A recurrent node whose weights are stored in the file.

    Args:
        spec: what the node computes.
        param_names: for each of its layers, parameter name in the layer -> name in the model's params.
    """

    spec: RecurrentSpec
    param_names: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class CompiledGraph:
    """A graph, or the body of a Loop, Scan or If.

    Args:
        inputs: names of the inputs without a default value.
        outputs: names of the outputs.
        nodes: the nodes in execution order.
        constants: values by name that are not parameters.
        params: the parameters, NumPy.
        recurrent_nodes: the recurrent nodes with weights in the file, by node name.
        optional_inputs: names of the inputs with a default value, which is in `constants`.
        declared_shapes: shape of each input and output; None for a free size.
        last_uses: for each node, the names that no later node and no output reads.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    constants: dict[str, HostValue]
    params: Params = field(default_factory=dict)
    recurrent_nodes: dict[str, RecurrentNode] = field(default_factory=dict)
    optional_inputs: tuple[str, ...] = ()
    declared_shapes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    last_uses: tuple[tuple[str, ...], ...] = ()


def compile_graph(where: str, model: Any) -> CompiledGraph:
    """Compile the graph of a ModelProto.

    Raises:
        InputError: operators, attributes or types of values that are not supported; the message names all of them,
            with their nodes.
    """
    onnx, opset = require_onnx(where), opset_version(where, model)
    problems: list[str] = []
    graph = _compile_graph_proto(onnx, model.graph, opset, problems, ir_version=model.ir_version)
    if problems:
        raise InputError(f"{where}: this graph cannot be run: {'; '.join(problems)}")
    return graph


def _compile_graph_proto(onnx: Any, graph: Any, opset: int, problems: list[str], ir_version: int = 0) -> CompiledGraph:
    """Compile a GraphProto and append what is not supported to `problems`. ir_version is 0 for a body."""
    is_main = ir_version > 0
    names = _unique_node_names(graph)
    nodes = [_compile_node(onnx, n, name, opset, problems) for n, name in zip(graph.node, names, strict=True)]
    if graph.sparse_initializer:
        problems.append(f"sparse weights {[s.values.name for s in graph.sparse_initializer]}")
    weights = {t.name: tensor_to_numpy(t) for t in graph.initializer}
    inputs = [v.name for v in graph.input]
    optional = tuple(n for n in inputs if n in weights) if ir_version >= 4 else ()
    params: Params = {}
    recurrent = {} if not is_main or problems else _extract_recurrent_weights(nodes, weights, params, problems)
    used = _all_names_read(nodes, recurrent) | {o.name for o in graph.output}
    constants = {}
    for name, a in weights.items():
        if name not in used:
            continue
        if is_main and a.dtype.kind == "f" and a.ndim and name not in optional:
            params[name] = a
        else:
            constants[name] = HostValue(a)
    if is_main:
        problems += [f"input {v.name!r} is not a tensor" for v in graph.input if not v.type.HasField("tensor_type")]
    outputs = tuple(o.name for o in graph.output)
    required = tuple(n for n in inputs if n not in weights)
    shapes = {v.name: _declared_shape(v) for v in (*graph.input, *graph.output)}
    last_uses = _last_uses(nodes, outputs) if is_main else ()
    return CompiledGraph(required, outputs, tuple(nodes), constants, params, recurrent, optional, shapes, last_uses)


def _declared_shape(value: Any) -> tuple[int | None, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)


def _unique_node_names(graph: Any) -> list[str]:
    """The names of the nodes; a missing or repeated name, which the standard allows, gets the node's number."""
    names: dict[str, None] = {}  # a set in order
    reserved = {n.name for n in graph.node}
    for k, node in enumerate(graph.node):
        name = node.name
        if not name or name in names:
            name = f"{name or node.op_type}_{k}"
            while name in reserved or name in names:
                name += "_"
        names[name] = None
    return list(names)


def _compile_node(onnx: Any, proto: Any, name: str, opset: int, problems: list[str]) -> Node:
    attrs = {a.name: _decode_attribute(onnx, a) for a in proto.attribute if a.type not in _GRAPH_ATTRIBUTE_TYPES}
    bodies = {
        a.name: _compile_graph_proto(onnx, a.g, opset, problems)
        for a in proto.attribute
        if a.type in _GRAPH_ATTRIBUTE_TYPES
    }
    if proto.op_type == "Constant":
        attrs = _normalize_constant(attrs)
    node = Node(name, proto.op_type, tuple(proto.input), tuple(proto.output), attrs, opset, bodies)
    problems += _unsupported_reasons(node, proto.domain)
    return node


def _unsupported_reasons(node: Node, domain: str) -> list[str]:
    if domain not in ("", "ai.onnx"):
        return [f"{domain}.{node} is of another domain"]
    if node.op in _CONTROL_FLOW_BODIES:
        return [f"{node} is of opset 8, expected 9 or later"] if node.op == "Scan" and node.opset < 9 else []
    if node.op not in OPS:
        return [f"{node} is not a supported operator"]
    op = OPS[node.op]
    reasons = [f"{node} has {name}={node.attrs[name]!r}" for name in node.attrs if name not in op.attrs]
    if not reasons and (reason := op.unsupported_reason(node)):
        reasons.append(f"{node} has {reason}")
    return reasons


def _decode_attribute(onnx: Any, attribute: Any) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return tensor_to_numpy(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, (str, int, float)):
        return value
    try:
        return [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in value]
    except TypeError:
        return value


def _normalize_constant(attrs: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a Constant, with value_int, value_floats and the like converted to `value`."""
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    return {"value" if k in kinds else k: np.asarray(v, kinds[k]) if k in kinds else v for k, v in attrs.items()}


def _extract_recurrent_weights(
    nodes: list[Node], weights: dict[str, Any], params: Params, problems: list[str]
) -> dict[str, RecurrentNode]:
    """Find the recurrent nodes with weights in the file; add their weights to `params`, converted to xprnn's layout."""
    out = {}
    for node in nodes:
        names = {k: node.inputs[i] for i, k in WEIGHT_INPUTS.items() if len(node.inputs) > i and node.inputs[i]}
        if node.op not in GATE_COUNTS or not all(n in weights for n in names.values()):
            continue
        spec = spec_from_node(node)
        try:
            layers = params_from_weights(spec, {k: weights[n] for k, n in names.items()})
        except InputError as error:
            problems.append(f"{node}: {error}")
            continue
        labels = [node.name] if len(layers) == 1 else [f"{node.name}.{i}" for i in range(len(layers))]
        keys = tuple({k: f"{label}.{k}" for k in layer} for label, layer in zip(labels, layers, strict=True))
        params.update({keys[i][k]: a for i, layer in enumerate(layers) for k, a in layer.items()})
        out[node.name] = RecurrentNode(spec, keys)
    return out


def _names_read(node: Node, recurrent_nodes: dict[str, RecurrentNode]) -> set[str]:
    """The names that a node and its bodies read, without weights that are in `params`."""
    names = set(node.inputs)
    if node.name in recurrent_nodes:
        names = {n for i, n in enumerate(node.inputs) if i not in WEIGHT_INPUTS}
    for body in node.bodies.values():
        names |= set().union(set(body.outputs), *(_names_read(n, {}) for n in body.nodes))
    return names - {""}


def _all_names_read(nodes: list[Node], recurrent_nodes: dict[str, RecurrentNode]) -> set[str]:
    return set().union(*(_names_read(n, recurrent_nodes) for n in nodes))


def _last_uses(nodes: list[Node], outputs: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """For each node, the names that no later node and no output reads."""
    read_later, out = set(outputs), []
    for node in reversed(nodes):
        names = _names_read(node, {}) | set(node.outputs)
        out.append(tuple(names - read_later - {""}))
        read_later |= names
    return tuple(reversed(out))
