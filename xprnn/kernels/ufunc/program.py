"""Programs of NumPy ufunc calls with output arrays, printed from a trace.

A program makes one call `ufunc(a, b, out)` for each node of the trace. It reuses a scratch array as soon as the value
in it is dead, and allocates nothing when it runs.
"""

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
    """A printed program: `make(*bound_args, *scratch arrays)` returns the function `body(*call_args)`."""

    source: str
    call_args: tuple[str, ...]  # names of the arrays that change from call to call
    bound_args: tuple[str, ...]  # names of the arrays that stay the same
    num_scratch: int  # scratch arrays of numbers
    num_masks: int  # scratch arrays of booleans

    def bind(self, bound_arrays: dict[str, Any], shape: tuple[int, ...], dtype: Any) -> Any:
        """Allocate the scratch arrays, of `shape`; return the function of the arrays `call_args`, in their order."""
        scratch = [np.empty(shape, dtype) for _ in range(self.num_scratch)] + [
            np.empty(shape, bool) for _ in range(self.num_masks)
        ]
        return _compile_source(self.source)(*(bound_arrays[name] for name in self.bound_args), *scratch)


_GLOBALS: dict[str, Any] = {**UFUNCS, "where": _where_out, "copyto": np.copyto, "inf": np.inf, "nan": np.nan}


@lru_cache(maxsize=1024)
def _compile_source(source: str) -> Any:
    """Compile the function `make` of a program. A Python function is the fastest representation of a list of calls."""
    scope = dict(_GLOBALS)
    exec(source, scope)  # this module printed it, from a finite list of names
    return scope["make"]


def build_program(
    outputs: Iterable[tuple[str, Any]],
    call_letters: str,
    precomputed: dict[Value, str] | None = None,
    may_alias: dict[str, str] | None = None,
) -> UfuncProgram:
    """Print the program that computes values and writes them to named arrays.

    Args:
        outputs: (name of the output array, Value or number), in the order of writing.
        call_letters: first letters of the arrays that change from call to call; the others are bound once.
        precomputed: nodes that the program reads from an array of this name instead of computing them.
        may_alias: output name -> name of the input that shares its memory. If that input is read after the output is
            computed, the output is computed in a scratch array and copied at the end.
    """
    return _ProgramPrinter(list(outputs), precomputed or {}, may_alias or {}).print(call_letters)


class _ProgramPrinter:
    """The state of one call of `build_program`."""

    def __init__(
        self, outputs: list[tuple[str, Any]], precomputed: dict[Value, str], may_alias: dict[str, str]
    ) -> None:
        self.outputs, self.precomputed, self.may_alias = outputs, precomputed, may_alias
        self.storage: dict[Value, str] = dict(precomputed)  # the array that holds each value
        self.order: list[Value] = []  # the operations; their positions are counted from 1
        self.last_use: dict[Value, int] = {}  # the position of the operation that last reads a value
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
        """The output array of each value that can be computed in place, without a scratch array and a copy."""
        targets: dict[Value, str] = {}
        positions = {id(v): k for k, v in enumerate(self.order, 1)}
        for name, value in self.outputs:
            shared, later = self.may_alias.get(name), self.order[positions.get(id(value), 0) :]
            overwrites = shared is not None and any(
                isinstance(a, Value) and a.name == shared for v in later for a in v.args
            )
            if isinstance(value, Value) and value in self.last_use and value not in targets and not overwrites:
                targets[value] = name
        return targets

    def _emit(self, position: int, value: Value, targets: dict[Value, str], output_values: set[Value]) -> None:
        """Print one operation. The scratch arrays of arguments that die here may hold its result or a later one."""
        args = [self._name(a) for a in value.args]
        dead = {
            a
            for a in value.args
            if isinstance(a, Value) and self.last_use.get(a) == position and a not in output_values
        }
        dead_scratch = [
            self.storage[a]
            for a in dead
            if self.storage[a][0] in "tb" and a not in self.precomputed and a.op != "input"
        ]
        # `where` copies twice: its first copy must not overwrite an argument of the second.
        needs_new = value.op == "where" and value not in targets
        new_scratch = self._allocate_scratch(value) if needs_new else None
        for s in dead_scratch:
            self.free_scratch[s[0]].append(s)
        self.storage[value] = targets.get(value) or new_scratch or self._allocate_scratch(value)
        # NumPy deprecates a third positional argument of these two.
        out = "out=" if value.op in ("maximum", "minimum") else ""
        self.lines.append(f"{value.op}({', '.join((*args, out + self._name(value)))})")

    def print(self, call_letters: str) -> UfuncProgram:
        """Print all operations, then the copies of the outputs that were not computed in place."""
        targets, output_values = self._output_targets(), {v for _, v in self.outputs if isinstance(v, Value)}
        for position, value in enumerate(self.order, 1):
            self._emit(position, value, targets, output_values)
        for name, value in self.outputs:
            if not isinstance(value, Value) or self.storage[value] != name:
                self.names.add(name)
                self.lines.append(f"copyto({name}, {self._name(value)})")
        scratch_names = {f"{k}{i}" for k in "tb" for i in range(self.scratch_counts[k])}
        names = sorted(self.names - scratch_names)
        call_args = tuple(n for n in names if n[0] in call_letters)
        bound_args = tuple(n for n in names if n[0] not in call_letters)
        scratch = [f"{k}{i}" for k in "tb" for i in range(self.scratch_counts[k])]
        body = "\n        ".join(self.lines or ["pass"])
        source = (
            f"def make({', '.join((*bound_args, *scratch))}):\n"
            f"    def body({', '.join(call_args)}):\n        {body}\n"
            "    return body\n"
        )
        return UfuncProgram(source, call_args, bound_args, self.scratch_counts["t"], self.scratch_counts["b"])
