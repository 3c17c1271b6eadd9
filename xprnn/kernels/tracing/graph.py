"""Records a cell's elementwise functions as a graph of operations.

The functions are called once, with a `Value` in place of each array and a `TraceGraph` in place of the namespace. Each
operator and each namespace function that they use adds a node; equal operations share one node. The kernels are printed
from this graph, so a cell's mathematics is written once, in xprnn.cells.

A function that cannot be traced, because it branches on a value or calls a function outside UFUNCS, raises
UntraceableError. Such a cell runs on the reference scan.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

__all__ = [
    "TraceGraph",
    "UntraceableError",
    "Value",
    "input_names",
    "nodes",
]

_UFUNC_NAMES = """
    abs add cos cosh divide exp expm1 log log1p maximum minimum multiply negative positive pow sign sin sinh sqrt square
    subtract tanh less less_equal greater greater_equal equal not_equal
"""
UFUNCS = {name: getattr(np, name) for name in _UFUNC_NAMES.split()}
_COMPARISONS = frozenset({"less", "less_equal", "greater", "greater_equal", "equal", "not_equal"})


class UntraceableError(AttributeError):
    """A function does something other than elementwise arithmetic with the supported functions."""


class Value:
    """A node of a trace, used in place of an array: operators add nodes to its graph."""

    __slots__ = ("args", "graph", "is_boolean", "name", "op")
    __hash__ = object.__hash__

    def __init__(self, graph: "TraceGraph", op: str, args: tuple[Any, ...], name: str = "") -> None:
        self.graph, self.op, self.args, self.name = graph, op, args, name
        self.is_boolean = op in _COMPARISONS

    def __bool__(self) -> bool:
        raise UntraceableError("a branch on a value")

    def __getattr__(self, name: str) -> Any:
        raise UntraceableError(f"attribute {name!r} of a value")

    def __neg__(self) -> "Value":
        return self.graph.node("negative", self)

    def __abs__(self) -> "Value":
        return self.graph.node("abs", self)


def _operator(op: str, swapped: bool = False) -> Any:
    def method(self: Value, other: Any) -> Value:
        return self.graph.node(op, other, self) if swapped else self.graph.node(op, self, other)

    return method


for _name, _op in {"add": "add", "sub": "subtract", "mul": "multiply", "truediv": "divide", "pow": "pow"}.items():
    setattr(Value, f"__{_name}__", _operator(_op))
    setattr(Value, f"__r{_name}__", _operator(_op, swapped=True))
for _name, _op in {
    "lt": "less",
    "le": "less_equal",
    "gt": "greater",
    "ge": "greater_equal",
    "eq": "equal",
    "ne": "not_equal",
}.items():
    setattr(Value, f"__{_name}__", _operator(_op))


class TraceGraph:
    """The nodes of one trace, and the namespace that the traced functions see.

    Args:
        sigmoid: True to record a call of `xp.sigmoid` as one node. By default it raises UntraceableError, and the
            library's activations compute a sigmoid from tanh.
    """

    def __init__(self, *, sigmoid: bool = False) -> None:
        self._extra = {"sigmoid"} if sigmoid else set()
        self._nodes: dict[Any, Value] = {}
        self._inputs: dict[str, Value] = {}

    def input(self, name: str) -> Value:
        """Return the input node called `name`."""
        return self._inputs.setdefault(name, Value(self, "input", (), name))

    def inputs(self, letter: str, count: int) -> tuple[Value, ...]:
        """Return the input nodes letter0, letter1, ..."""
        return tuple(self.input(f"{letter}{k}") for k in range(count))

    def node(self, op: str, *args: Any) -> Value:
        """Return the node op(*args), the same object for equal arguments.

        The sum of the inputs x<k> and h<k>, the two halves of gate k, is the input g<k>: a kernel can add them for all
        gates in one call.
        """
        for a in args:
            if not isinstance(a, (Value, int, float)):
                raise UntraceableError(f"{type(a).__name__} among the operands of {op}")
        names = tuple(a.name for a in args if isinstance(a, Value))
        if (
            op == "add"
            and len(names) == 2
            and {n[0] for n in names if n} == {"x", "h"}
            and names[0][1:] == names[1][1:]
        ):
            return self.input("g" + names[0][1:])
        key = (op, *(id(a) if isinstance(a, Value) else ("number", float(a)) for a in args))
        return self._nodes.setdefault(key, Value(self, op, args))

    def where(self, condition: Any, a: Any, b: Any) -> Value:
        """Record a call of the namespace's `where`."""
        return self.node("where", condition, a, b)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in UFUNCS.keys() | self._extra:
            raise UntraceableError(f"the function {name!r}")
        return lambda *args: self.node(name, *args)


def nodes(values: Iterable[Any]) -> dict[Value, None]:
    """Return all nodes that `values` depend on, themselves included, in preorder."""
    visited: dict[Value, None] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Value) and value not in visited:
            visited[value] = None
            for a in value.args:
                visit(a)

    for value in values:
        visit(value)
    return visited


def input_names(value: Value) -> set[str]:
    """Return the names of the inputs that `value` depends on."""
    if value.op == "input":
        return {value.name}
    return set().union(*(input_names(a) for a in value.args if isinstance(a, Value)))
