"""An ONNX graph as a model: it runs on every array library, and says why it cannot learn."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np

from xprnn.arrays.namespace import Array, InputError, Params, is_integer, namespace, resolve_namespace, to_numpy
from xprnn.arrays.validation import check_param_shapes, check_params
from xprnn.interop.onnx.node import Context, HostValue, Node
from xprnn.interop.onnx.ops.recurrent import run_layers
from xprnn.interop.onnx.program import OPS, CompiledGraph, RecurrentNode

__all__ = ["GraphModel"]

_MAX_ITERATIONS = 10_000_000
_Scope = MutableMapping[str, Any]
# What an operator raises for values that it cannot take, in one library or another.
_EVALUATION_ERRORS = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


class GraphModel:
    """A graph that is none of xprnn's own models; `from_onnx` makes them.

    Args:
        block: the compiled graph.
        reason: why it is not one of xprnn's own models.
    """

    __slots__ = ("compiled_graph", "reason")
    compiled_graph: CompiledGraph
    reason: str

    def __init__(self, compiled_graph: CompiledGraph, reason: str) -> None:
        self.compiled_graph, self.reason = compiled_graph, reason

    def __repr__(self) -> str:
        return f"Graph({', '.join(self.inputs)} -> {', '.join(self.outputs)}; {len(self.compiled_graph.nodes)} nodes)"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs, those without a value of their own first."""
        return (*self.compiled_graph.inputs, *self.compiled_graph.optional_inputs)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs."""
        return self.compiled_graph.outputs

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every parameter."""
        return {name: tuple(a.shape) for name, a in self.compiled_graph.params.items()}

    def __call__(self, params: Params, *arrays: Array | Mapping[str, Array], **named: Array) -> Any:
        """Run the graph.

        Args:
            params: as from_onnx returned them.
            arrays: the inputs in their order, or one dict from their names.
            named: inputs by name.

        Returns:
            the output; where there are several, a dict from their names.

        Raises:
            InputError: inputs missing, unknown, or of another library, device or dtype; a node that cannot take its
                values, by name.
        """
        where = "Graph"
        check_params(where, params, self.shapes())
        given = self._bind_inputs(where, arrays, named)
        if not given and not params:
            raise InputError(f"{where}: neither inputs nor parameters: nothing says which array library to use")
        home = self._make_context(where, params, given)
        check_param_shapes(where, params, self.shapes())
        scope: _Scope = {**self.compiled_graph.constants, **given}
        _run_graph(self.compiled_graph, home, scope, params)
        out = {name: home.as_array(scope[name]) for name in self.outputs}
        return out if len(out) != 1 else out[self.outputs[0]]

    def _bind_inputs(self, where: str, arrays: Sequence[Any], named: Mapping[str, Array]) -> dict[str, Array]:
        first = arrays[0] if len(arrays) == 1 else None
        if isinstance(first, Mapping):
            arrays, named = (), {**first, **named}
        if len(arrays) > len(self.inputs):
            raise InputError(f"{where}: expected {len(self.inputs)} inputs, found {len(arrays)}")
        given = dict(zip(self.inputs, arrays, strict=False))
        if twice := given.keys() & named.keys():
            raise InputError(f"{where}: {', '.join(sorted(twice))} given twice")
        given |= named
        missing, extra = set(self.compiled_graph.inputs) - given.keys(), given.keys() - set(self.inputs)
        if missing or extra:
            parts = [f"{what} {', '.join(sorted(n))}" for what, n in (("missing", missing), ("unknown", extra)) if n]
            raise InputError(f"{where}: inputs: {'; '.join(parts)} (expected {', '.join(self.inputs)})")
        return given

    def _make_context(self, where: str, params: Params, given: dict[str, Array]) -> Context:
        """The one library, device and float dtype of parameters and inputs."""
        plain = {n: a for n, a in given.items() if hasattr(a, "dtype") and not _is_float(a)}
        floats = dict(params) | {n: a for n, a in given.items() if n not in plain}
        if floats:
            resolve_namespace(where, floats, plain)
        else:
            resolve_namespace(where, {}, plain)
        like = next(iter(floats.values()), None)
        like = next(iter(plain.values())) if like is None else like
        xp = namespace(like)
        for name, a in given.items():
            self._check_shape(where, name, tuple(a.shape))
        if not xp.isdtype(like.dtype, "real floating"):
            like = xp.zeros(0, dtype=xp.float32, device=like.device)
        return Context(xp, like)

    def _check_shape(self, where: str, name: str, found: tuple[int, ...]) -> None:
        """The declared shape; an optional input's is that of its default, whose sizes of 1 are free."""
        wanted = self.compiled_graph.declared_shapes[name]
        if wanted and (
            len(wanted) != len(found) or any(w is not None and w != f for w, f in zip(wanted, found, strict=True))
        ):
            shown = ", ".join("any" if w is None else str(w) for w in wanted)
            raise InputError(f"{where}: {name} must have shape ({shown}), found {found}")

    def _unsupported(self, verb: str) -> InputError:
        return InputError(f"Graph.{verb}: this ONNX graph is only run, since {self.reason}")

    def init(self, rng: Any, like: Array, **options: Any) -> Params:
        """Refused: parameters are the file's."""
        raise self._unsupported("init")

    def forward(self, params: Params, *args: Any, **flags: Any) -> Any:
        """Refused, with the reason: gradients are for graphs that are one of xprnn's own models."""
        raise self._unsupported("forward")

    def backward(self, tape: Any, *args: Any) -> Any:
        """Refused, with the reason."""
        raise self._unsupported("backward")

    def step(self, params: Params, x: Array, state: Any = None) -> Any:
        """Refused, with the reason: call the model, with states as the graph's own inputs and outputs."""
        raise self._unsupported("step")

    def config(self) -> dict[str, Any]:
        """Refused: its file form is the ONNX file."""
        raise self._unsupported("config")


def _is_float(a: Array) -> bool:
    xp = namespace(a)
    return not is_integer(xp, a) and not xp.isdtype(a.dtype, "bool")


def _run_graph(block: CompiledGraph, home: Context, scope: _Scope, params: Params) -> None:
    """Every node of the block, in order; what is done with is let go."""
    scope.update({name: params[name] for name in block.params if name in params})
    for k, node in enumerate(block.nodes):
        try:
            found = _evaluate_node(block, node, home, scope, params)
        except InputError as error:
            raise InputError(f"{node}: {error}") from None
        except _EVALUATION_ERRORS as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{node} cannot take what it is given: {text}") from error
        scope.update(zip(node.outputs, found, strict=False))
        for name in block.last_uses[k] if block.last_uses else ():
            scope.pop(name, None)


def _evaluate_node(block: CompiledGraph, node: Node, home: Context, scope: _Scope, params: Params) -> Sequence[Any]:
    inputs = [scope[n] if n and not (node.name in block.recurrent_nodes and k in _WEIGHT_INPUTS) else None
              for k, n in enumerate(node.inputs)]  # fmt: skip
    if node.op == "Loop":
        return _run_loop(node, home, scope, params, inputs)
    if node.op == "Scan":
        return _run_scan(node, home, scope, params, inputs)
    if node.op == "If":
        branch = node.bodies["then_branch" if _to_bool(inputs[0]) else "else_branch"]
        inner = ChainMap(dict[str, Any](branch.constants), scope)
        _run_graph(branch, home, inner, params)
        return [inner[name] for name in branch.outputs]
    if node.name in block.recurrent_nodes:
        return _run_recurrent(block.recurrent_nodes[node.name], home, params, inputs)
    return OPS[node.op](home, node, inputs)


_WEIGHT_INPUTS = (1, 2, 3, 7)


def _run_recurrent(p: RecurrentNode, home: Context, params: Params, inputs: list[Any]) -> Sequence[Any]:
    """A recurrent node whose weights are parameters in our own layout."""
    values = [*inputs, *[None] * (8 - len(inputs))]
    own = [{k: params[name] for k, name in names.items()} for names in p.param_names]
    lengths = values[4].array if isinstance(values[4], HostValue) else values[4]
    states = [None if s is None else home.as_array(s) for s in values[5:7]]
    return run_layers(home.xp, p.spec, own, home.as_array(values[0]), lengths, states)


def _to_bool(value: Any) -> bool:
    return bool((value.array if isinstance(value, HostValue) else to_numpy(value)).reshape(()))


def _run_loop(node: Node, home: Context, scope: _Scope, params: Params, inputs: list[Any]) -> Sequence[Any]:
    """Turns of the body while the condition holds; values carried, and the scan outputs of all turns stacked."""
    body = node.bodies["body"]
    count = None if inputs[0] is None else int(_to_scalar(inputs[0]))
    goes = inputs[1] is None or _to_bool(inputs[1])
    carried, rows, turn = list(inputs[2:]), list[Any](), 0
    kept = len(carried)
    while goes and (count is None or turn < count):
        if turn >= _MAX_ITERATIONS:
            raise InputError(f"more than {_MAX_ITERATIONS} turns")
        given = (HostValue(np.asarray(turn, np.int64)), HostValue(np.asarray(goes)), *carried)
        inner = ChainMap({**body.constants, **dict(zip(body.inputs, given, strict=True))}, scope)
        _run_graph(body, home, inner, params)
        found = [inner[name] for name in body.outputs]
        goes, carried = _to_bool(found[0]), found[1 : kept + 1]
        rows.append(found[kept + 1 :])
        turn += 1
    columns = list(zip(*rows, strict=True)) if rows else [()] * (len(body.outputs) - 1 - kept)
    return [*carried, *(_stack_outputs(home, node, column) for column in columns)]


def _run_scan(node: Node, home: Context, scope: _Scope, params: Params, inputs: list[Any]) -> Sequence[Any]:
    """A turn of the body for each entry along the scanned axes: states carried, outputs of all turns joined."""
    body, kept = node.bodies["body"], len(inputs) - node.attrs["num_scan_inputs"]
    made = len(body.outputs) - kept

    def given(what: str, count: int) -> list[int]:
        return list(node.attrs.get(f"scan_{what}") or [0] * count)

    axes, backs = given("input_axes", len(inputs) - kept), given("input_directions", len(inputs) - kept)
    out_axes, out_backs = given("output_axes", made), given("output_directions", made)
    xs = [home.as_array(x) for x in inputs[kept:]]
    xs = [home.xp.moveaxis(x, axis, 0) for x, axis in zip(xs, axes, strict=True)]
    if len({x.shape[0] for x in xs}) != 1:
        raise InputError(f"its scanned inputs have {[x.shape[0] for x in xs]} entries: expected as many of each")
    carried, rows, count = list(inputs[:kept]), list[Any](), xs[0].shape[0]
    for t in range(count):
        now = [x[count - 1 - t if back else t, ...] for x, back in zip(xs, backs, strict=True)]
        inner = ChainMap({**body.constants, **dict(zip(body.inputs, [*carried, *now], strict=True))}, scope)
        _run_graph(body, home, inner, params)
        found = [inner[name] for name in body.outputs]
        carried = found[:kept]
        rows.append(found[kept:])
    columns = list(zip(*rows, strict=True)) if rows else [()] * made
    joined = [
        _stack_outputs(home, node, column[::-1] if back else column)
        for column, back in zip(columns, out_backs, strict=True)
    ]
    return [*carried, *(home.xp.moveaxis(home.as_array(y), 0, axis) for y, axis in zip(joined, out_axes, strict=True))]


def _to_scalar(value: Any) -> Any:
    return (value.array if isinstance(value, HostValue) else to_numpy(value)).reshape(())


def _stack_outputs(home: Context, node: Node, rows: Sequence[Any]) -> Any:
    if not rows:
        raise InputError("no turn at all: the shape of its outputs is then unknown")
    if all(isinstance(r, HostValue) for r in rows):
        return HostValue(np.stack([r.array for r in rows]))
    return home.xp.stack([home.as_array(r) for r in rows])
