"""Plan of a cell for the in-place NumPy scan: forward and backward programs."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from xprnn.cells.cell import Cell
from xprnn.kernels.tracing.cell_trace import squashed, trace_back, trace_step
from xprnn.kernels.tracing.graph import Graph, Value, leaves, nodes
from xprnn.kernels.ufunc.program import Program, program

__all__ = [
    "Plan",
    "plan_of",
]


class Plan(NamedTuple):
    """A cell's programs and how they are wired."""

    added: int  # the first gates, of which only x + h is used
    squash: tuple[str, ...]  # "tanh" or "sigmoid" of each of them, where that is all that happens to their sum
    forward: Program  # (g or a, x h s p) -> n states, v saved
    saved: tuple[str, ...]  # each entry of `saved`: its own array v*, a gate a*, or a state n* (after) or s* (before)
    hoisted: tuple[str, ...]  # k*: factors of the adjoint that need no adjoint
    before: Program  # (v s p) -> k*
    back: Program  # (d v s p k) -> X (dx), U (dh), r (dh of the state before), e* (the other states'), P (vectors)
    same: bool  # dh is dx, gate by gate
    through: bool  # the adjoint of h has a direct path, r


@lru_cache(maxsize=256)
def plan_of(cell: Cell) -> Plan | None:
    """The cell's plan, or None where it can't be traced.

    Whatever goes wrong with stand-ins, the generic scan goes on with arrays: if it was the cell's fault, it says so.
    """
    try:
        half = _forward(cell, sigmoid=True) or _forward(cell, sigmoid=False)
        assert half is not None
        added, squash, forward, saved = half
        return Plan(added, squash, forward, saved, *_back(cell, len(saved)))
    except Exception:
        return None


def _forward(cell: Cell, *, sigmoid: bool) -> tuple[int, tuple[str, ...], Program, tuple[str, ...]] | None:
    """The forward half of a plan; None if sigmoids remain that only a squash could have taken."""
    graph = Graph(sigmoid=sigmoid)
    new, saved, added = trace_step(cell, graph)
    gates = squashed(graph, [*new, *saved], added) if cell.gates > 1 else []
    if sigmoid and any(v.op == "sigmoid" and not any(v is g for g in gates) for v in nodes([*new, *saved])):
        return None
    squash = tuple(v.op for v in gates)
    for k, gate in enumerate(gates):
        gate.op, gate.args, gate.name = "input", (), f"a{k}"
    known = {id(graph.input(f"s{k}")): f"s{k}" for k in range(len(cell.states))}
    known |= {id(v): f"a{k}" for k, v in enumerate(gates)}
    known |= {id(v): f"n{k}" for k, v in enumerate(new)}
    names = tuple(known.get(id(v), f"v{j}") for j, v in enumerate(saved))
    own = [(n, v) for n, v in zip(names, saved, strict=True) if n[0] == "v"]
    return added, squash, program([*own, *((f"n{k}", v) for k, v in enumerate(new))], "axsnv"), names


def _back(cell: Cell, saved: int) -> tuple[tuple[str, ...], Program, Program, bool, bool]:
    """The adjoint's half of a plan."""
    outputs, same, through = trace_back(cell, saved)
    hoisted = _hoist([d for _, d in outputs])
    factors = {value: f"k{i}" for i, value in enumerate(hoisted)}
    back = program(outputs, "vskXUP", factors, {f"e{k}": f"d{k}" for k in range(1, len(cell.states))})
    before = program([(name, value) for value, name in factors.items()], "vsk")
    return tuple(factors.values()), before, back, same, through


def _hoist(outputs: Sequence[Any]) -> list[Value]:
    """The largest operations that need no incoming adjoint."""
    found: dict[Value, None] = {}

    def visit(value: Any) -> None:
        if not isinstance(value, Value) or value.op == "input":
            return
        names = leaves(value)
        if names and not value.boolean and not any(n[0] == "d" for n in names):
            found[value] = None
        else:
            for a in value.args:
                visit(a)

    for value in outputs:
        visit(value)
    return list(found)
