"""A GraphProto turned into nodes that can run; whatever cannot is named, all of it at once, before anything does."""

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

__all__ = ["OPS", "CompiledGraph", "RecurrentNode", "compile_graph"]

OPS: dict[str, Op] = {**MATH_OPS, **SHAPE_OPS, **RECURRENT_OPS}
_CONTROL_FLOW_BODIES = {"Loop": ("body",), "If": ("then_branch", "else_branch"), "Scan": ("body",)}


@dataclass(frozen=True)
class RecurrentNode:
    """A recurrent node whose weights are the file's: for each of its layers, own name -> name in params."""

    spec: RecurrentSpec
    param_names: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class CompiledGraph:
    """A graph or a body: nodes in their order, and what each name stands for before the first."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    constants: dict[str, HostValue]
    params: Params = field(default_factory=dict)  # NumPy
    recurrent_nodes: dict[str, RecurrentNode] = field(default_factory=dict)  # by node name
    optional_inputs: tuple[str, ...] = ()  # inputs that have a value of their own
    declared_shapes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)  # declared sizes, None where free
    last_uses: tuple[tuple[str, ...], ...] = ()  # after each node, what nobody needs any more


def compile_graph(where: str, model: Any) -> CompiledGraph:
    """The model's graph, ready to run.

    Raises:
        InputError: operators, attributes or kinds of values that are not supported: names every one with its node.
    """
    onnx, opset = require_onnx(where), opset_version(where, model)
    problems: list[str] = []
    block = _compile_graph_proto(onnx, model.graph, opset, problems, top=model.ir_version)
    if problems:
        raise InputError(f"{where}: this graph cannot be run: {'; '.join(problems)}")
    return block


def _compile_graph_proto(onnx: Any, graph: Any, opset: int, problems: list[str], top: int = 0) -> CompiledGraph:
    nodes = [_compile_node(onnx, n, k, opset, problems) for k, n in enumerate(graph.node)]
    if graph.sparse_initializer:
        problems.append(f"sparse weights {[s.values.name for s in graph.sparse_initializer]}")
    weights = {t.name: tensor_to_numpy(t) for t in graph.initializer}
    names = [v.name for v in graph.input]
    optional = tuple(n for n in names if n in weights) if top >= 4 else ()
    params: Params = {}
    prepared = {} if not top or problems else _extract_recurrent_weights(nodes, weights, params, problems)
    used = _all_names_read(nodes, prepared) | {o.name for o in graph.output}
    constants = {}
    for name, a in weights.items():
        if name not in used:
            continue
        if top and a.dtype.kind == "f" and a.ndim and name not in optional:
            params[name] = a
        else:
            constants[name] = HostValue(a)
    if top:
        problems += [f"input {v.name!r}, which is no tensor" for v in graph.input if not v.type.HasField("tensor_type")]
    outputs = tuple(o.name for o in graph.output)
    required = tuple(n for n in names if n not in weights)
    return CompiledGraph(
        required, outputs, tuple(nodes), constants, params, prepared, optional,
        {v.name: _declared_shape(v) for v in (*graph.input, *graph.output)}, _last_uses(nodes, outputs) if top else (),
    )  # fmt: skip


def _declared_shape(value: Any) -> tuple[int | None, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)


def _compile_node(onnx: Any, proto: Any, index: int, opset: int, problems: list[str]) -> Node:
    name = proto.name or f"{proto.op_type}_{index}"
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


_GRAPH_ATTRIBUTE_TYPES = (5, 10)  # AttributeProto.GRAPH and GRAPHS


def _unsupported_reasons(node: Node, domain: str) -> list[str]:
    if domain not in ("", "ai.onnx"):
        return [f"{domain}.{node} is of another domain"]
    if node.op in _CONTROL_FLOW_BODIES:
        return [f"{node} of opset 8"] if node.op == "Scan" and node.opset < 9 else []
    if node.op not in OPS:
        return [f"{node} is no operator known here"]
    op = OPS[node.op]
    found = [f"{node} has {name}={node.attrs[name]!r}" for name in node.attrs if name not in op.attrs]
    if not found and (reason := op.unsupported_reason(node)):
        found.append(f"{node} has {reason}")
    return found


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
    """A Constant's value, however it is written."""
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    return {"value" if k in kinds else k: np.asarray(v, kinds[k]) if k in kinds else v for k, v in attrs.items()}


def _extract_recurrent_weights(
    nodes: list[Node], weights: dict[str, Any], params: Params, problems: list[str]
) -> dict[str, RecurrentNode]:
    """Recurrent nodes whose weights are all in the file: the weights move to `params`, in our order and names."""
    out = {}
    for node in nodes:
        places = {"W": 1, "R": 2, "B": 3, "P": 7}
        names = {k: node.inputs[i] for k, i in places.items() if len(node.inputs) > i and node.inputs[i]}
        if node.op not in GATE_COUNTS or not all(n in weights for n in names.values()):
            continue
        spec = spec_from_node(node)
        try:
            each = params_from_weights(spec, {k: weights[n] for k, n in names.items()})
        except InputError as error:
            problems.append(f"{node}: {error}")
            continue
        labels = [node.name] if len(each) == 1 else [f"{node.name}.{i}" for i in range(len(each))]
        keys = tuple({k: f"{label}.{k}" for k in own} for label, own in zip(labels, each, strict=True))
        params.update({keys[i][k]: a for i, own in enumerate(each) for k, a in own.items()})
        out[node.name] = RecurrentNode(spec, keys)
    return out


def _names_read(node: Node, prepared: dict[str, RecurrentNode]) -> set[str]:
    """What a node needs, its bodies included."""
    names = set(node.inputs)
    if node.name in prepared:
        names = {n for i, n in enumerate(node.inputs) if i in (0, 4, 5, 6)}
    for body in node.bodies.values():
        names |= set().union(set(body.outputs), *(_names_read(n, {}) for n in body.nodes))
    return names - {""}


def _all_names_read(nodes: list[Node], prepared: dict[str, RecurrentNode]) -> set[str]:
    return set().union(*(_names_read(n, prepared) for n in nodes))


def _last_uses(nodes: list[Node], outputs: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """After each node, the names that no later node and no output needs."""
    seen, out = set(outputs), []
    for node in reversed(nodes):
        names = _names_read(node, {}) | set(node.outputs)
        out.append(tuple(names - seen - {""}))
        seen |= names
    return tuple(reversed(out))
