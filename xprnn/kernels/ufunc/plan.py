"""Plan of a cell for the in-place NumPy scan: forward and backward programs."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from xprnn.cells.cell import Cell
from xprnn.kernels.tracing.cell_trace import fusable_gates, trace_backward, trace_step
from xprnn.kernels.tracing.graph import TraceGraph, Value, input_names, nodes
from xprnn.kernels.ufunc.program import UfuncProgram, build_program

__all__ = [
    "UfuncPlan",
    "ufunc_plan",
]


class UfuncPlan(NamedTuple):
    """A cell's programs and how they are wired."""

    summed_gates: int  # the first gates, of which only x + h is used
    gate_activations: tuple[
        str, ...
    ]  # "tanh" or "sigmoid" of each of them, where that is all that happens to their sum
    forward_program: UfuncProgram  # (g or a, x h s p) -> n states, v saved
    saved_names: tuple[
        str, ...
    ]  # each entry of `saved`: its own array v*, a gate a*, or a state n* (after) or s* (before)
    hoisted_names: tuple[str, ...]  # k*: factors of the adjoint that need no adjoint
    hoisted_program: UfuncProgram  # (v s p) -> k*
    backward_program: (
        UfuncProgram  # (d v s p k) -> X (dx), U (dh), r (dh of the state before), e* (the other states'), P (vectors)
    )
    dx_is_dh: bool  # dh is dx, gate by gate
    has_direct_path: bool  # the adjoint of h has a direct path, r


@lru_cache(maxsize=256)
def ufunc_plan(cell: Cell) -> UfuncPlan | None:
    """The cell's plan, or None where it can't be traced.

    Whatever goes wrong with stand-ins, the generic scan goes on with arrays: if it was the cell's fault, it says so.
    """
    try:
        half = _forward_program(cell, sigmoid=True) or _forward_program(cell, sigmoid=False)
        assert half is not None
        added, squash, forward, saved = half
        return UfuncPlan(added, squash, forward, saved, *_backward_programs(cell, len(saved)))
    except Exception:
        return None


def _forward_program(cell: Cell, *, sigmoid: bool) -> tuple[int, tuple[str, ...], UfuncProgram, tuple[str, ...]] | None:
    """The forward half of a plan; None if sigmoids remain that only a squash could have taken."""
    graph = TraceGraph(sigmoid=sigmoid)
    new, saved, added = trace_step(cell, graph)
    gates = fusable_gates(graph, [*new, *saved], added) if cell.gates > 1 else []
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
    return added, squash, build_program([*own, *((f"n{k}", v) for k, v in enumerate(new))], "axsnv"), names


def _backward_programs(cell: Cell, saved: int) -> tuple[tuple[str, ...], UfuncProgram, UfuncProgram, bool, bool]:
    """The adjoint's half of a plan."""
    outputs, same, through = trace_backward(cell, saved)
    hoisted = _hoistable_factors([d for _, d in outputs])
    factors = {value: f"k{i}" for i, value in enumerate(hoisted)}
    back = build_program(outputs, "vskXUP", factors, {f"e{k}": f"d{k}" for k in range(1, len(cell.states))})
    before = build_program([(name, value) for value, name in factors.items()], "vsk")
    return tuple(factors.values()), before, back, same, through


def _hoistable_factors(outputs: Sequence[Any]) -> list[Value]:
    """The largest operations that need no incoming adjoint."""
    found: dict[Value, None] = {}

    def visit(value: Any) -> None:
        if not isinstance(value, Value) or value.op == "input":
            return
        names = input_names(value)
        if names and not value.is_boolean and not any(n[0] == "d" for n in names):
            found[value] = None
        else:
            for a in value.args:
                visit(a)

    for value in outputs:
        visit(value)
    return list(found)
