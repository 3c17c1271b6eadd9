"""Programs of NumPy ufunc calls with output buffers, printed from a graph."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from xprnn.kernels.tracing.graph import FUNCTIONS, Value

__all__ = [
    "Program",
    "program",
]


def _where(condition: Any, a: Any, b: Any, out: Any) -> None:
    np.copyto(out, b)
    np.copyto(out, a, where=condition)


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
