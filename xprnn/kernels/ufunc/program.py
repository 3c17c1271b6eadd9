"""Programs of NumPy ufunc calls with output buffers, printed from a graph."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from xprnn.kernels.tracing.graph import UFUNCS, Value

__all__ = [
    "UfuncProgram",
    "build_program",
]


def _where_out(condition: Any, a: Any, b: Any, out: Any) -> None:
    np.copyto(out, b)
    np.copyto(out, a, where=condition)


class UfuncProgram(NamedTuple):
    """A printed program: `make(*static arrays, *scratch)` returns `body(*moving arrays)`."""

    source: str
    call_args: tuple[str, ...]
    bound_args: tuple[str, ...]
    num_scratch: int
    num_masks: int

    def bind(self, bound_arrays: dict[str, Any], shape: tuple[int, ...], dtype: Any) -> Any:
        """The program over these fixed arrays, with scratch of `shape`; call it with the moving ones in order."""
        scratch = [np.empty(shape, dtype) for _ in range(self.num_scratch)] + [
            np.empty(shape, bool) for _ in range(self.num_masks)
        ]
        return _compile_source(self.source)(*(bound_arrays[name] for name in self.bound_args), *scratch)


_GLOBALS: dict[str, Any] = {**UFUNCS, "where": _where_out, "copyto": np.copyto, "inf": np.inf, "nan": np.nan}


@lru_cache(maxsize=1024)
def _compile_source(source: str) -> Any:
    """`make` of a printed program: fixed arrays -> body. A Python function is the fastest list of calls there is."""
    scope = dict(_GLOBALS)
    exec(source, scope)  # printed by this file, from a finite list of names
    return scope["make"]


def build_program(
    outputs: Iterable[tuple[str, Any]],
    call_letters: str,
    precomputed: dict[Value, str] | None = None,
    may_alias: dict[str, str] | None = None,
) -> UfuncProgram:
    """Print the program that writes each value into the array of its name.

    Args:
        outputs: (name of the target array, Value or number), written in this order.
        moving: first letters of the arrays that change from call to call; the others are fixed when bound.
        given: nodes that are passed in under a name instead of being computed.
        over: target -> input that shares its memory; such a target is written through scratch if read later.
    """
    return _ProgramPrinter(list(outputs), precomputed or {}, may_alias or {}).print(call_letters)


class _ProgramPrinter:
    def __init__(self, outputs: list[tuple[str, Any]], given: dict[Value, str], over: dict[str, str]) -> None:
        self.outputs, self.precomputed, self.may_alias = outputs, given, over
        self.storage: dict[Value, str] = dict(given)
        self.order: list[Value] = []
        self.last_use: dict[Value, int] = {}
        for _, value in outputs:
            self._visit(value)
        self.lines: list[str] = []
        self.names: set[str] = set()
        self.free_scratch: dict[str, list[str]] = {"t": [], "b": []}
        self.scratch_counts = {"t": 0, "b": 0}

    def _visit(self, value: Any) -> None:
        if not isinstance(value, Value) or value in self.storage or value in self.last_use:
            return
        if value.op == "input":
            self.storage[value] = value.name
            return
        for a in value.args:
            self._visit(a)
        self.order.append(value)
        for a in (value, *value.args):
            if isinstance(a, Value):
                self.last_use[a] = len(self.order)

    def _name(self, value: Any) -> str:
        if not isinstance(value, Value):
            return repr(float(value))
        name = self.storage[value]
        self.names.add(name)
        return name

    def _allocate_scratch(self, value: Value) -> str:
        kind = "b" if value.is_boolean else "t"
        if self.free_scratch[kind]:
            return self.free_scratch[kind].pop()
        self.scratch_counts[kind] += 1
        return f"{kind}{self.scratch_counts[kind] - 1}"

    def _output_targets(self) -> dict[Value, str]:
        """Which values are written straight into the array of an output."""
        target: dict[Value, str] = {}
        made = {id(v): k for k, v in enumerate(self.order, 1)}
        for name, value in self.outputs:
            shared = self.may_alias.get(name)
            late = shared is not None and any(
                isinstance(a, Value) and a.name == shared for v in self.order[made.get(id(value), 0) :] for a in v.args
            )
            if isinstance(value, Value) and value in self.last_use and value not in target and not late:
                target[value] = name
        return target

    def _emit(self, index: int, value: Value, target: dict[Value, str], kept: set[Value]) -> None:
        """One line; scratch that dies with it is free for the next, or for itself where that is safe."""
        args = [self._name(a) for a in value.args]
        dead = {a for a in value.args if isinstance(a, Value) and self.last_use.get(a) == index and a not in kept}
        scratch = [
            self.storage[a]
            for a in dead
            if self.storage[a][0] in "tb" and a not in self.precomputed and a.op != "input"
        ]
        twice = value.op == "where"  # its two copies must not overwrite what the second still reads
        taken = self._allocate_scratch(value) if twice and value not in target else None
        for s in scratch:
            self.free_scratch[s[0]].append(s)
        self.storage[value] = target.get(value) or taken or self._allocate_scratch(value)
        # NumPy is giving a third positional argument of these two another meaning.
        out = "out=" if value.op in ("maximum", "minimum") else ""
        self.lines.append(f"{value.op}({', '.join((*args, out + self._name(value)))})")

    def print(self, call_letters: str) -> UfuncProgram:
        target, kept = self._output_targets(), {v for _, v in self.outputs if isinstance(v, Value)}
        for index, value in enumerate(self.order, 1):
            self._emit(index, value, target, kept)
        for name, value in self.outputs:
            if not isinstance(value, Value) or self.storage[value] != name:
                self.names.add(name)
                self.lines.append(f"copyto({name}, {self._name(value)})")
        scratch_names = {f"{k}{i}" for k in "tb" for i in range(self.scratch_counts[k])}
        names = sorted(self.names - scratch_names)
        args = tuple(n for n in names if n[0] in call_letters)
        static = tuple(n for n in names if n[0] not in call_letters)
        scratch = [f"{k}{i}" for k in "tb" for i in range(self.scratch_counts[k])]
        body = "\n        ".join(self.lines or ["pass"])
        source = (
            f"def make({', '.join((*static, *scratch))}):\n"
            f"    def body({', '.join(args)}):\n        {body}\n"
            "    return body\n"
        )
        return UfuncProgram(source, args, static, self.scratch_counts["t"], self.scratch_counts["b"])
