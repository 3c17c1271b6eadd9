"""A cell's programs for the in-place scan: traced once, and what is wired to what."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from xprnn.cells import Cell
from xprnn.kernels.trace import Graph, Program, UntraceableError, Value, leaves, program

__all__ = ["Plan", "plan_of"]


class Plan(NamedTuple):
    """A cell's programs and how they are wired."""

    added: int  # the first gates, of which only x + h is used
    forward: Program  # (g x h s p) -> n states, v saved
    saved: tuple[
        str, ...
    ]  # for each entry of `saved`: its own array v*, or what it equals: n* (state after), s* (before)
    hoisted: tuple[str, ...]  # k*: factors of the adjoint that need no adjoint
    before: Program  # (v s p) -> k*
    back: Program  # (d v s p k) -> X (dx), U (dh), r (dh of the state before), e* (the other states'), P (vectors)
    same: bool  # dh is dx, gate by gate
    through: bool  # the adjoint of h has a direct path, r


@lru_cache(maxsize=256)
def plan_of(cell: Cell) -> Plan | None:
    """The cell's plan, or None where it can't be traced."""
    try:
        return _trace(cell)
    except UntraceableError:
        return None


def _trace(cell: Cell) -> Plan:
    graph = Graph()
    fns = cell.over(graph)
    s, p = graph.inputs("s", len(cell.states)), graph.inputs("p", len(cell.vectors))
    new, saved = fns.step(graph.inputs("x", cell.gates), graph.inputs("h", cell.gates), s, p)
    new, saved = tuple(new), tuple(saved)
    used = set().union(*(leaves(v) for v in (*new, *saved)))
    added = next((k for k in range(cell.gates) if {f"x{k}", f"h{k}"} & used), cell.gates)
    for k in range(added, cell.gates):
        g = graph.input(f"g{k}")
        if f"g{k}" in used:  # beyond the added prefix, the sum is an operation like any other
            g.op, g.args, g.name = "add", (graph.input(f"x{k}"), graph.input(f"h{k}")), ""
    names = _saved_names(new, saved, s)
    outputs = [
        *((n, v) for n, v in zip(names, saved, strict=True) if n[0] == "v"),
        *((f"n{k}", v) for k, v in enumerate(new)),
    ]
    forward_ = program(outputs, "xsnv")

    graph = Graph()
    fns = cell.over(graph)
    s, p, v = graph.inputs("s", len(s)), graph.inputs("p", len(p)), graph.inputs("v", len(saved))
    dx, dh, dprev, dp = fns.back(graph.inputs("d", len(s)), v, s, p)
    outputs = [(f"X{k}", 0.0 if d is None else d) for k, d in enumerate(dx)]
    same = all(a is b for a, b in zip(dx, dh, strict=True))
    if not same:
        outputs += [(f"U{k}", d) for k, d in enumerate(dh)]
    outputs += [(f"P{k}", d) for k, d in enumerate(dp)]
    through = dprev[0] is not None
    if through:
        outputs.append(("r0", dprev[0]))
    outputs += [(f"e{k}", 0.0 if d is None else d) for k, d in enumerate(dprev) if k]
    hoisted = _hoist([d for _, d in outputs])
    factors = {value: f"k{i}" for i, value in enumerate(hoisted)}
    back = program(outputs, "vskXUP", factors, {f"e{k}": f"d{k}" for k in range(1, len(s))})
    before = program([(name, value) for value, name in factors.items()], "vsk")
    return Plan(added, forward_, names, tuple(factors.values()), before, back, same, through)


def _saved_names(new: Sequence[Any], saved: Sequence[Any], states: Sequence[Value]) -> tuple[str, ...]:
    """Where each saved value is found: a state after or before the step, or an array of its own."""
    known = {id(v): f"s{k}" for k, v in enumerate(states)} | {id(v): f"n{k}" for k, v in enumerate(new)}
    return tuple(known.get(id(v), f"v{j}") for j, v in enumerate(saved))


def _hoist(outputs: Sequence[Any]) -> list[Value]:
    """The largest operations that need no incoming adjoint."""
    found: dict[Value, None] = {}

    def visit(value: Any) -> None:
        if not isinstance(value, Value) or value.op == "input":
            return
        names = leaves(value)
        if names and not any(n[0] == "d" for n in names):
            found[value] = None
        else:
            for a in value.args:
                visit(a)

    for value in outputs:
        visit(value)
    return list(found)
