"""Turns a cell's elementwise functions into straight-line programs that write into given arrays.

The functions are called once with stand-ins for their arguments. Each operator and each namespace function they use
becomes a node; equal nodes are one. A program prints the nodes it needs, in order, as calls `ufunc(a, b, out)`, with
as few scratch arrays as their lifetimes allow: no allocation is left, and a cell's maths is written once, in cells.py.

What can't be traced (a function outside `FUNCTIONS`, a branch on a value) raises UntraceableError, and the generic
scan runs.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Graph", "Program", "UntraceableError", "Value", "leaves", "nodes", "program"]

_NAMES = """
    abs add cos cosh divide exp expm1 log log1p maximum minimum multiply negative positive pow sign sin sinh sqrt square
    subtract tanh less less_equal greater greater_equal equal not_equal
"""
FUNCTIONS = {name: getattr(np, name) for name in _NAMES.split()}
_BOOLEAN = frozenset({"less", "less_equal", "greater", "greater_equal", "equal", "not_equal"})


def _where(condition: Any, a: Any, b: Any, out: Any) -> None:
    np.copyto(out, b)
    np.copyto(out, a, where=condition)


class UntraceableError(AttributeError):
    """A function does something other than elementwise arithmetic with the supported functions."""


class Value:
    """A stand-in for an array: arithmetic on it is written down, not done."""

    __slots__ = ("args", "boolean", "graph", "name", "op")
    __hash__ = object.__hash__

    def __init__(self, graph: "Graph", op: str, args: tuple[Any, ...], name: str = "") -> None:
        self.graph, self.op, self.args, self.name = graph, op, args, name
        self.boolean = op in _BOOLEAN

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


class Graph:
    """The nodes of one trace; also the namespace that traced functions see."""

    def __init__(self, *, sigmoid: bool = False) -> None:
        self._extra = {"sigmoid"} if sigmoid else set()
        self._nodes: dict[Any, Value] = {}
        self._inputs: dict[str, Value] = {}

    def input(self, name: str) -> Value:
        """The stand-in called `name`."""
        return self._inputs.setdefault(name, Value(self, "input", (), name))

    def inputs(self, letter: str, count: int) -> tuple[Value, ...]:
        """Stand-ins letter0, letter1, ..."""
        return tuple(self.input(f"{letter}{k}") for k in range(count))

    def node(self, op: str, *args: Any) -> Value:
        """The node op(*args), the same object whenever it is asked for again."""
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
            return self.input("g" + names[0][1:])  # the two halves of a gate, which the scan can add for all gates
        key = (op, *(id(a) if isinstance(a, Value) else ("number", float(a)) for a in args))
        return self._nodes.setdefault(key, Value(self, op, args))

    def where(self, condition: Any, a: Any, b: Any) -> Value:
        """The namespace's where."""
        return self.node("where", condition, a, b)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in FUNCTIONS.keys() | self._extra:
            raise UntraceableError(f"the function {name!r}")
        return lambda *args: self.node(name, *args)


def nodes(values: Iterable[Any]) -> dict[Value, None]:
    """All nodes that `values` are made of, themselves included."""
    found: dict[Value, None] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Value) and value not in found:
            found[value] = None
            for a in value.args:
                visit(a)

    for value in values:
        visit(value)
    return found


def leaves(value: Value) -> set[str]:
    """The names of the inputs that `value` is made of."""
    if value.op == "input":
        return {value.name}
    return set().union(*(leaves(a) for a in value.args if isinstance(a, Value)))


class Program(NamedTuple):
    """A printed program: `make(*static arrays, *scratch)` returns `body(*moving arrays)`."""

    source: str
    moving: tuple[str, ...]
    static: tuple[str, ...]
    scratch: int
    masks: int

    def bind(self, static: dict[str, Any], shape: tuple[int, ...], dtype: Any) -> Any:
        """The program over these fixed arrays, with scratch of `shape`; call it with the moving ones in order."""
        scratch = [np.empty(shape, dtype) for _ in range(self.scratch)] + [
            np.empty(shape, bool) for _ in range(self.masks)
        ]
        return _maker(self.source)(*(static[name] for name in self.static), *scratch)


_SCOPE: dict[str, Any] = {**FUNCTIONS, "where": _where, "copyto": np.copyto, "inf": np.inf, "nan": np.nan}


@lru_cache(maxsize=1024)
def _maker(source: str) -> Any:
    """`make` of a printed program: fixed arrays -> body. A Python function is the fastest list of calls there is."""
    scope = dict(_SCOPE)
    exec(source, scope)  # printed by this file, from a finite list of names
    return scope["make"]


def program(
    outputs: Iterable[tuple[str, Any]],
    moving: str,
    given: dict[Value, str] | None = None,
    over: dict[str, str] | None = None,
) -> Program:
    """Print the program that writes each value into the array of its name.

    Args:
        outputs: (name of the target array, Value or number), written in this order.
        moving: first letters of the arrays that change from call to call; the others are fixed when bound.
        given: nodes that are passed in under a name instead of being computed.
        over: target -> input that shares its memory; such a target is written through scratch if read later.
    """
    return _Printer(list(outputs), given or {}, over or {}).print(moving)


class _Printer:
    def __init__(self, outputs: list[tuple[str, Any]], given: dict[Value, str], over: dict[str, str]) -> None:
        self.outputs, self.given, self.over = outputs, given, over
        self.place: dict[Value, str] = dict(given)
        self.order: list[Value] = []
        self.last: dict[Value, int] = {}
        for _, value in outputs:
            self._visit(value)
        self.lines: list[str] = []
        self.names: set[str] = set()
        self.free: dict[str, list[str]] = {"t": [], "b": []}
        self.made = {"t": 0, "b": 0}

    def _visit(self, value: Any) -> None:
        if not isinstance(value, Value) or value in self.place or value in self.last:
            return
        if value.op == "input":
            self.place[value] = value.name
            return
        for a in value.args:
            self._visit(a)
        self.order.append(value)
        for a in (value, *value.args):
            if isinstance(a, Value):
                self.last[a] = len(self.order)

    def _name(self, value: Any) -> str:
        if not isinstance(value, Value):
            return repr(float(value))
        name = self.place[value]
        self.names.add(name)
        return name

    def _take(self, value: Value) -> str:
        kind = "b" if value.boolean else "t"
        if self.free[kind]:
            return self.free[kind].pop()
        self.made[kind] += 1
        return f"{kind}{self.made[kind] - 1}"

    def _targets(self) -> dict[Value, str]:
        """Which values are written straight into the array of an output."""
        target: dict[Value, str] = {}
        made = {id(v): k for k, v in enumerate(self.order, 1)}
        for name, value in self.outputs:
            shared = self.over.get(name)
            late = shared is not None and any(
                isinstance(a, Value) and a.name == shared for v in self.order[made.get(id(value), 0) :] for a in v.args
            )
            if isinstance(value, Value) and value in self.last and value not in target and not late:
                target[value] = name
        return target

    def _emit(self, index: int, value: Value, target: dict[Value, str], kept: set[Value]) -> None:
        """One line; scratch that dies with it is free for the next, or for itself where that is safe."""
        args = [self._name(a) for a in value.args]
        dead = {a for a in value.args if isinstance(a, Value) and self.last.get(a) == index and a not in kept}
        scratch = [self.place[a] for a in dead if self.place[a][0] in "tb" and a not in self.given and a.op != "input"]
        twice = value.op == "where"  # its two copies must not overwrite what the second still reads
        taken = self._take(value) if twice and value not in target else None
        for s in scratch:
            self.free[s[0]].append(s)
        self.place[value] = target.get(value) or taken or self._take(value)
        # NumPy is giving a third positional argument of these two another meaning.
        out = "out=" if value.op in ("maximum", "minimum") else ""
        self.lines.append(f"{value.op}({', '.join((*args, out + self._name(value)))})")

    def print(self, moving: str) -> Program:
        target, kept = self._targets(), {v for _, v in self.outputs if isinstance(v, Value)}
        for index, value in enumerate(self.order, 1):
            self._emit(index, value, target, kept)
        for name, value in self.outputs:
            if not isinstance(value, Value) or self.place[value] != name:
                self.names.add(name)
                self.lines.append(f"copyto({name}, {self._name(value)})")
        scratch_names = {f"{k}{i}" for k in "tb" for i in range(self.made[k])}
        names = sorted(self.names - scratch_names)
        args = tuple(n for n in names if n[0] in moving)
        static = tuple(n for n in names if n[0] not in moving)
        scratch = [f"{k}{i}" for k in "tb" for i in range(self.made[k])]
        body = "\n        ".join(self.lines or ["pass"])
        source = (
            f"def make({', '.join((*static, *scratch))}):\n"
            f"    def body({', '.join(args)}):\n        {body}\n"
            "    return body\n"
        )
        return Program(source, args, static, self.made["t"], self.made["b"])
