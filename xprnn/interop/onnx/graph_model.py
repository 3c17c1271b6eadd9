"""An ONNX graph as a model: it runs on every array library, but does not train."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np

from xprnn.arrays.namespace import Array, InputError, Params, is_integer, namespace, resolve_namespace, to_numpy
from xprnn.arrays.validation import check_param_shapes, check_params
from xprnn.interop.onnx.final_states import find_output_roles
from xprnn.interop.onnx.node import Context, HostValue, Node
from xprnn.interop.onnx.ops.recurrent import run_layers
from xprnn.interop.onnx.program import OPS, WEIGHT_INPUTS, CompiledGraph, RecurrentNode

__all__ = ["GraphModel"]

_MAX_ITERATIONS = 10_000_000
_Scope = MutableMapping[str, Any]
# The exceptions that array libraries raise if an operator cannot compute with its inputs.
_EVALUATION_ERRORS = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


class GraphModel:
    """An ONNX graph that is not a model of xprnn; `from_onnx` makes it. It can only be called.

    A call returns (y, state), as a layer does. `state` holds the outputs of the graph that are final states of RNN,
    LSTM, GRU or Scan nodes (Y_h and Y_c, or several of them stacked); `y` holds all other outputs.

    y: an array; if there are several such outputs, a dict of output name -> array.
    state: None if the graph outputs no final state; an array if it outputs one; a tuple (h, c) if it outputs both of
    one LSTM or of one stack; a dict of output name -> array if they come from several recurrent nodes.

    A graph that outputs nothing but final states returns them as y, and None as state. Values that a Loop carries, and
    states that are computed further, count as y.

    Args:
        compiled_graph: the compiled graph.
        reason: why the graph is not a model of xprnn.
    """

    __slots__ = ("_output_roles", "compiled_graph", "reason")
    compiled_graph: CompiledGraph
    reason: str

    def __init__(self, compiled_graph: CompiledGraph, reason: str) -> None:
        self.compiled_graph, self.reason = compiled_graph, reason
        self._output_roles = find_output_roles(compiled_graph)

    def __repr__(self) -> str:
        inputs, outputs = ", ".join(self.inputs), ", ".join(self.outputs)
        return f"GraphModel({inputs} -> {outputs}; {len(self.compiled_graph.nodes)} nodes)"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs: first those without a default value, then those with one."""
        return (*self.compiled_graph.inputs, *self.compiled_graph.optional_inputs)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of all outputs, final states included."""
        return self.compiled_graph.outputs

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every parameter."""
        return {name: tuple(a.shape) for name, a in self.compiled_graph.params.items()}

    def __call__(self, params: Params, *arrays: Array | Mapping[str, Array], **named: Array) -> tuple[Any, Any]:
        """Run the graph.

        Args:
            params: the parameters that from_onnx returned.
            arrays: the inputs in the order of `inputs`, or one dict of input name -> array.
            named: inputs by name.

        Returns:
            (y, state), as described for the class.

        Raises:
            InputError: inputs are missing, unknown, or of another array library, device, dtype or shape; or a node, by
                name, cannot compute with its inputs.
        """
        where = "GraphModel"
        check_params(where, params, self.shapes())
        inputs = self._bind_inputs(where, arrays, named)
        if not inputs and not params:
            raise InputError(f"{where}: there are no inputs and no parameters, so the array library is unknown")
        context = self._make_context(where, params, inputs)
        check_param_shapes(where, params, self.shapes())
        scope: _Scope = {**self.compiled_graph.constants, **inputs}
        _run_graph(self.compiled_graph, context, scope, params)
        return self._output_roles.pack({name: context.as_array(scope[name]) for name in self.outputs})

    def _bind_inputs(self, where: str, arrays: Sequence[Any], named: Mapping[str, Array]) -> dict[str, Array]:
        first = arrays[0] if len(arrays) == 1 else None
        if isinstance(first, Mapping):
            arrays, named = (), {**first, **named}
        if len(arrays) > len(self.inputs):
            raise InputError(f"{where}: expected {len(self.inputs)} inputs, found {len(arrays)}")
        inputs = dict(zip(self.inputs, arrays, strict=False))
        if repeated := inputs.keys() & named.keys():
            raise InputError(f"{where}: {', '.join(sorted(repeated))} passed twice")
        inputs |= named
        missing, unknown = set(self.compiled_graph.inputs) - inputs.keys(), inputs.keys() - set(self.inputs)
        if missing or unknown:
            problems = [
                f"{kind} {', '.join(sorted(names))}"
                for kind, names in (("missing", missing), ("unknown", unknown))
                if names
            ]
            raise InputError(f"{where}: inputs: {'; '.join(problems)} (expected {', '.join(self.inputs)})")
        return inputs

    def _make_context(self, where: str, params: Params, inputs: dict[str, Array]) -> Context:
        """The array library, device and float dtype that parameters and inputs share."""
        non_floats = {n: a for n, a in inputs.items() if hasattr(a, "dtype") and not _is_float(a)}
        floats = dict(params) | {n: a for n, a in inputs.items() if n not in non_floats}
        if floats:
            resolve_namespace(where, floats, non_floats)
        else:
            resolve_namespace(where, {}, non_floats)
        like = next(iter(floats.values()), None)
        like = next(iter(non_floats.values())) if like is None else like
        xp = namespace(like)
        for name, a in inputs.items():
            self._check_shape(where, name, tuple(a.shape))
        if not xp.isdtype(like.dtype, "real floating"):
            like = xp.zeros(0, dtype=xp.float32, device=like.device)
        return Context(xp, like)

    def _check_shape(self, where: str, name: str, shape: tuple[int, ...]) -> None:
        """Raise InputError unless `shape` fits the declared shape of an input, in which None is any size."""
        declared = self.compiled_graph.declared_shapes[name]
        if declared and (
            len(declared) != len(shape) or any(d is not None and d != s for d, s in zip(declared, shape, strict=True))
        ):
            shown = ", ".join("any" if d is None else str(d) for d in declared)
            raise InputError(f"{where}: {name} must have shape ({shown}), found {shape}")

    def _unsupported(self, method: str) -> InputError:
        return InputError(f"GraphModel.{method}: this ONNX graph can only be called, since {self.reason}")

    def init(self, rng: Any, like: Array, **options: Any) -> Params:
        """Raise InputError: the parameters are those of the file."""
        raise self._unsupported("init")

    def forward(self, params: Params, *args: Any, **flags: Any) -> Any:
        """Raise InputError with the reason: only models of xprnn compute gradients."""
        raise self._unsupported("forward")

    def backward(self, tape: Any, *args: Any) -> Any:
        """Raise InputError with the reason: only models of xprnn compute gradients."""
        raise self._unsupported("backward")

    def step(self, params: Params, x: Array, state: Any = None) -> Any:
        """Raise InputError with the reason: call the model, and pass states as inputs of the graph if it has them."""
        raise self._unsupported("step")

    def config(self) -> dict[str, Any]:
        """Raise InputError with the reason: only the ONNX file describes the graph."""
        raise self._unsupported("config")


def _is_float(a: Array) -> bool:
    xp = namespace(a)
    return not is_integer(xp, a) and not xp.isdtype(a.dtype, "bool")


def _run_graph(graph: CompiledGraph, context: Context, scope: _Scope, params: Params) -> None:
    """Evaluate every node in order; delete each value from `scope` after its last use."""
    scope.update({name: params[name] for name in graph.params if name in params})
    for k, node in enumerate(graph.nodes):
        try:
            outputs = _evaluate_node(graph, node, context, scope, params)
        except InputError as error:
            raise InputError(f"{node}: {error}") from None
        except _EVALUATION_ERRORS as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{node} cannot compute with its inputs: {text}") from error
        scope.update(zip(node.outputs, outputs, strict=False))
        for name in graph.last_uses[k] if graph.last_uses else ():
            scope.pop(name, None)


def _evaluate_node(graph: CompiledGraph, node: Node, context: Context, scope: _Scope, params: Params) -> Sequence[Any]:
    recurrent = graph.recurrent_nodes.get(node.name)
    inputs = [scope[n] if n and not (recurrent and k in WEIGHT_INPUTS) else None for k, n in enumerate(node.inputs)]
    if node.op == "Loop":
        return _run_loop(node, context, scope, params, inputs)
    if node.op == "Scan":
        return _run_scan(node, context, scope, params, inputs)
    if node.op == "If":
        branch = node.bodies["then_branch" if _to_bool(inputs[0]) else "else_branch"]
        inner = ChainMap(dict[str, Any](branch.constants), scope)
        _run_graph(branch, context, inner, params)
        return [inner[name] for name in branch.outputs]
    if recurrent:
        return _run_recurrent(recurrent, context, params, inputs)
    return OPS[node.op](context, node, inputs)


def _run_recurrent(node: RecurrentNode, context: Context, params: Params, inputs: list[Any]) -> Sequence[Any]:
    """Evaluate a recurrent node whose weights are parameters of the model, in the layout of xprnn."""
    values = [*inputs, *[None] * (8 - len(inputs))]
    layer_params = [{k: params[name] for k, name in names.items()} for names in node.param_names]
    lengths = values[4].array if isinstance(values[4], HostValue) else values[4]
    states = [None if s is None else context.as_array(s) for s in values[5:7]]
    return run_layers(context.xp, node.spec, layer_params, context.as_array(values[0]), lengths, states)


def _to_bool(value: Any) -> bool:
    return bool(_to_scalar(value))


def _to_scalar(value: Any) -> Any:
    return (value.array if isinstance(value, HostValue) else to_numpy(value)).reshape(())


def _run_loop(node: Node, context: Context, scope: _Scope, params: Params, inputs: list[Any]) -> Sequence[Any]:
    """Run the body of a Loop while its condition holds; return the carried values and the stacked scan outputs."""
    body = node.bodies["body"]
    trip_count = None if inputs[0] is None else int(_to_scalar(inputs[0]))
    condition = inputs[1] is None or _to_bool(inputs[1])
    carried, rows, iteration = list(inputs[2:]), list[Any](), 0
    num_carried = len(carried)
    while condition and (trip_count is None or iteration < trip_count):
        if iteration >= _MAX_ITERATIONS:
            raise InputError(f"more than {_MAX_ITERATIONS} iterations")
        values = (HostValue(np.asarray(iteration, np.int64)), HostValue(np.asarray(condition)), *carried)
        inner = ChainMap({**body.constants, **dict(zip(body.inputs, values, strict=True))}, scope)
        _run_graph(body, context, inner, params)
        outputs = [inner[name] for name in body.outputs]
        condition, carried = _to_bool(outputs[0]), outputs[1 : num_carried + 1]
        rows.append(outputs[num_carried + 1 :])
        iteration += 1
    columns = list(zip(*rows, strict=True)) if rows else [()] * (len(body.outputs) - 1 - num_carried)
    return [*carried, *(_stack_outputs(context, column) for column in columns)]


def _run_scan(node: Node, context: Context, scope: _Scope, params: Params, inputs: list[Any]) -> Sequence[Any]:
    """Run the body of a Scan once for each slice of its scan inputs; return the final states and the scan outputs."""
    body, xp, num_states = node.bodies["body"], context.xp, len(inputs) - node.attrs["num_scan_inputs"]
    num_outputs = len(body.outputs) - num_states

    def per_value(attribute: str, count: int) -> list[int]:
        return list(node.attrs.get(f"scan_{attribute}") or [0] * count)

    axes = per_value("input_axes", len(inputs) - num_states)
    reverse = per_value("input_directions", len(inputs) - num_states)
    output_axes, output_reverse = per_value("output_axes", num_outputs), per_value("output_directions", num_outputs)
    xs = [context.as_array(x) for x in inputs[num_states:]]
    xs = [xp.moveaxis(x, axis, 0) for x, axis in zip(xs, axes, strict=True)]
    if len({x.shape[0] for x in xs}) != 1:
        raise InputError(f"the scan inputs have lengths {[x.shape[0] for x in xs]}, expected equal lengths")
    states, rows, steps = list(inputs[:num_states]), list[Any](), xs[0].shape[0]
    for t in range(steps):
        slices = [x[steps - 1 - t if r else t, ...] for x, r in zip(xs, reverse, strict=True)]
        inner = ChainMap({**body.constants, **dict(zip(body.inputs, [*states, *slices], strict=True))}, scope)
        _run_graph(body, context, inner, params)
        outputs = [inner[name] for name in body.outputs]
        states = outputs[:num_states]
        rows.append(outputs[num_states:])
    columns = list(zip(*rows, strict=True)) if rows else [()] * num_outputs
    stacked = [
        _stack_outputs(context, column[::-1] if r else column)
        for column, r in zip(columns, output_reverse, strict=True)
    ]
    return [*states, *(xp.moveaxis(context.as_array(y), 0, k) for y, k in zip(stacked, output_axes, strict=True))]


def _stack_outputs(context: Context, rows: Sequence[Any]) -> Any:
    if not rows:
        raise InputError("the body never ran, so the shape of its outputs is unknown")
    if all(isinstance(r, HostValue) for r in rows):
        return HostValue(np.stack([r.array for r in rows]))
    return context.xp.stack([context.as_array(r) for r in rows])
