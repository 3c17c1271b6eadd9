"""An ONNX graph as a model: it runs on every array library, and says why it cannot learn."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np

from xprnn.arrays.namespace import Array, InputError, Params, is_integer, namespace, resolve, to_numpy
from xprnn.arrays.validation import check_param_shapes, check_params
from xprnn.interop.onnx.node import Context, Host, Node
from xprnn.interop.onnx.ops.recurrent import apply
from xprnn.interop.onnx.program import OPS, Block, Prepared

__all__ = ["Graph"]

_MOST_TURNS = 10_000_000
_Scope = MutableMapping[str, Any]
# What an operator raises for values that it cannot take, in one library or another.
_TROUBLE = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


class Graph:
    """A graph that is none of xprnn's own models; `from_onnx` makes them.

    Args:
        block: the compiled graph.
        reason: why it is not one of xprnn's own models.
    """

    __slots__ = ("block", "reason")
    block: Block
    reason: str

    def __init__(self, block: Block, reason: str) -> None:
        self.block, self.reason = block, reason

    def __repr__(self) -> str:
        return f"Graph({', '.join(self.inputs)} -> {', '.join(self.outputs)}; {len(self.block.nodes)} nodes)"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs, those without a value of their own first."""
        return (*self.block.inputs, *self.block.optional)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs."""
        return self.block.outputs

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every parameter."""
        return {name: tuple(a.shape) for name, a in self.block.params.items()}

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
        given = self._named(where, arrays, named)
        if not given and not params:
            raise InputError(f"{where}: neither inputs nor parameters: nothing says which array library to use")
        home = self._home(where, params, given)
        check_param_shapes(where, params, self.shapes())
        scope: _Scope = {**self.block.constants, **given}
        _run(self.block, home, scope, params)
        out = {name: home.put(scope[name]) for name in self.outputs}
        return out if len(out) != 1 else out[self.outputs[0]]

    def _named(self, where: str, arrays: Sequence[Any], named: Mapping[str, Array]) -> dict[str, Array]:
        first = arrays[0] if len(arrays) == 1 else None
        if isinstance(first, Mapping):
            arrays, named = (), {**first, **named}
        if len(arrays) > len(self.inputs):
            raise InputError(f"{where}: expected {len(self.inputs)} inputs, found {len(arrays)}")
        given = dict(zip(self.inputs, arrays, strict=False))
        if twice := given.keys() & named.keys():
            raise InputError(f"{where}: {', '.join(sorted(twice))} given twice")
        given |= named
        missing, extra = set(self.block.inputs) - given.keys(), given.keys() - set(self.inputs)
        if missing or extra:
            parts = [f"{what} {', '.join(sorted(n))}" for what, n in (("missing", missing), ("unknown", extra)) if n]
            raise InputError(f"{where}: inputs: {'; '.join(parts)} (expected {', '.join(self.inputs)})")
        return given

    def _home(self, where: str, params: Params, given: dict[str, Array]) -> Context:
        """The one library, device and float dtype of parameters and inputs."""
        plain = {n: a for n, a in given.items() if hasattr(a, "dtype") and not _is_float(a)}
        floats = dict(params) | {n: a for n, a in given.items() if n not in plain}
        if floats:
            resolve(where, floats, plain)
        else:
            resolve(where, {}, plain)
        like = next(iter(floats.values()), None)
        like = next(iter(plain.values())) if like is None else like
        xp = namespace(like)
        for name, a in given.items():
            self._check_sizes(where, name, tuple(a.shape))
        if not xp.isdtype(like.dtype, "real floating"):
            like = xp.zeros(0, dtype=xp.float32, device=like.device)
        return Context(xp, like)

    def _check_sizes(self, where: str, name: str, found: tuple[int, ...]) -> None:
        """The declared shape; an optional input's is that of its default, whose sizes of 1 are free."""
        wanted = self.block.ranks[name]
        if wanted and (
            len(wanted) != len(found) or any(w is not None and w != f for w, f in zip(wanted, found, strict=True))
        ):
            shown = ", ".join("any" if w is None else str(w) for w in wanted)
            raise InputError(f"{where}: {name} must have shape ({shown}), found {found}")

    def _refuse(self, verb: str) -> InputError:
        return InputError(f"Graph.{verb}: this ONNX graph is only run, since {self.reason}")

    def init(self, rng: Any, like: Array, **options: Any) -> Params:
        """Refused: parameters are the file's."""
        raise self._refuse("init")

    def forward(self, params: Params, *args: Any, **flags: Any) -> Any:
        """Refused, with the reason: gradients are for graphs that are one of xprnn's own models."""
        raise self._refuse("forward")

    def backward(self, tape: Any, *args: Any) -> Any:
        """Refused, with the reason."""
        raise self._refuse("backward")

    def step(self, params: Params, x: Array, state: Any = None) -> Any:
        """Refused, with the reason: call the model, with states as the graph's own inputs and outputs."""
        raise self._refuse("step")

    def config(self) -> dict[str, Any]:
        """Refused: its file form is the ONNX file."""
        raise self._refuse("config")


def _is_float(a: Array) -> bool:
    xp = namespace(a)
    return not is_integer(xp, a) and not xp.isdtype(a.dtype, "bool")


def _run(block: Block, home: Context, scope: _Scope, params: Params) -> None:
    """Every node of the block, in order; what is done with is let go."""
    scope.update({name: params[name] for name in block.params if name in params})
    for k, node in enumerate(block.nodes):
        try:
            found = _outputs(block, node, home, scope, params)
        except InputError as error:
            raise InputError(f"{node}: {error}") from None
        except _TROUBLE as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{node} cannot take what it is given: {text}") from error
        scope.update(zip(node.outputs, found, strict=False))
        for name in block.last[k] if block.last else ():
            scope.pop(name, None)


def _outputs(block: Block, node: Node, home: Context, scope: _Scope, params: Params) -> Sequence[Any]:
    inputs = [scope[n] if n and not (node.name in block.prepared and k in _WEIGHTS) else None
              for k, n in enumerate(node.inputs)]  # fmt: skip
    if node.op == "Loop":
        return _loop(node, home, scope, params, inputs)
    if node.op == "Scan":
        return _scan(node, home, scope, params, inputs)
    if node.op == "If":
        branch = node.bodies["then_branch" if _truth(inputs[0]) else "else_branch"]
        inner = ChainMap(dict[str, Any](branch.constants), scope)
        _run(branch, home, inner, params)
        return [inner[name] for name in branch.outputs]
    if node.name in block.prepared:
        return _prepared(block.prepared[node.name], home, params, inputs)
    return OPS[node.op](home, node, inputs)


_WEIGHTS = (1, 2, 3, 7)


def _prepared(p: Prepared, home: Context, params: Params, inputs: list[Any]) -> Sequence[Any]:
    """A recurrent node whose weights are parameters in our own layout."""
    values = [*inputs, *[None] * (8 - len(inputs))]
    own = [{k: params[name] for k, name in names.items()} for names in p.names]
    lengths = values[4].array if isinstance(values[4], Host) else values[4]
    states = [None if s is None else home.put(s) for s in values[5:7]]
    return apply(home.xp, p.spec, own, home.put(values[0]), lengths, states)


def _truth(value: Any) -> bool:
    return bool((value.array if isinstance(value, Host) else to_numpy(value)).reshape(()))


def _loop(node: Node, home: Context, scope: _Scope, params: Params, inputs: list[Any]) -> Sequence[Any]:
    """Turns of the body while the condition holds; values carried, and the scan outputs of all turns stacked."""
    body = node.bodies["body"]
    count = None if inputs[0] is None else int(_number(inputs[0]))
    goes = inputs[1] is None or _truth(inputs[1])
    carried, rows, turn = list(inputs[2:]), list[Any](), 0
    kept = len(carried)
    while goes and (count is None or turn < count):
        if turn >= _MOST_TURNS:
            raise InputError(f"more than {_MOST_TURNS} turns")
        given = (Host(np.asarray(turn, np.int64)), Host(np.asarray(goes)), *carried)
        inner = ChainMap({**body.constants, **dict(zip(body.inputs, given, strict=True))}, scope)
        _run(body, home, inner, params)
        found = [inner[name] for name in body.outputs]
        goes, carried = _truth(found[0]), found[1 : kept + 1]
        rows.append(found[kept + 1 :])
        turn += 1
    columns = list(zip(*rows, strict=True)) if rows else [()] * (len(body.outputs) - 1 - kept)
    return [*carried, *(_stacked(home, node, column) for column in columns)]


def _scan(node: Node, home: Context, scope: _Scope, params: Params, inputs: list[Any]) -> Sequence[Any]:
    """A turn of the body for each entry along the scanned axes: states carried, outputs of all turns joined."""
    body, kept = node.bodies["body"], len(inputs) - node.attrs["num_scan_inputs"]
    made = len(body.outputs) - kept

    def given(what: str, count: int) -> list[int]:
        return list(node.attrs.get(f"scan_{what}") or [0] * count)

    axes, backs = given("input_axes", len(inputs) - kept), given("input_directions", len(inputs) - kept)
    out_axes, out_backs = given("output_axes", made), given("output_directions", made)
    xs = [home.put(x) for x in inputs[kept:]]
    xs = [home.xp.moveaxis(x, axis, 0) for x, axis in zip(xs, axes, strict=True)]
    if len({x.shape[0] for x in xs}) != 1:
        raise InputError(f"its scanned inputs have {[x.shape[0] for x in xs]} entries: expected as many of each")
    carried, rows, count = list(inputs[:kept]), list[Any](), xs[0].shape[0]
    for t in range(count):
        now = [x[count - 1 - t if back else t, ...] for x, back in zip(xs, backs, strict=True)]
        inner = ChainMap({**body.constants, **dict(zip(body.inputs, [*carried, *now], strict=True))}, scope)
        _run(body, home, inner, params)
        found = [inner[name] for name in body.outputs]
        carried = found[:kept]
        rows.append(found[kept:])
    columns = list(zip(*rows, strict=True)) if rows else [()] * made
    joined = [
        _stacked(home, node, column[::-1] if back else column) for column, back in zip(columns, out_backs, strict=True)
    ]
    return [*carried, *(home.xp.moveaxis(home.put(y), 0, axis) for y, axis in zip(joined, out_axes, strict=True))]


def _number(value: Any) -> Any:
    return (value.array if isinstance(value, Host) else to_numpy(value)).reshape(())


def _stacked(home: Context, node: Node, rows: Sequence[Any]) -> Any:
    if not rows:
        raise InputError("no turn at all: the shape of its outputs is then unknown")
    if all(isinstance(r, Host) for r in rows):
        return Host(np.stack([r.array for r in rows]))
    return home.xp.stack([home.put(r) for r in rows])
