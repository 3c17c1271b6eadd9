"""A cell's programs for the in-place scan: traced once, and what is wired to what."""

from collections.abc import Sequence
from typing import Any

from xprnn.cells.cell import Cell
from xprnn.kernels.tracing.graph import TraceGraph, UntraceableError, Value, input_names, nodes

__all__ = [
    "assign_buffers",
    "fusable_gates",
    "trace_backward",
    "trace_pregates",
    "trace_pregates_backward",
    "trace_step",
]


def trace_step(cell: Cell, graph: TraceGraph) -> tuple[tuple[Any, ...], tuple[Any, ...], int]:
    """(new states, saved, up to which gate they are used only as the sum g = x + h).

    Gates are numbered through: with early gates, x0... are their values, and of the others all or none are sums.
    """
    s, p, e = graph.inputs("s", len(cell.states)), graph.inputs("p", len(cell.vectors)), cell.pregates
    new, saved = cell.bind(graph).step(graph.inputs("x", cell.gates), graph.inputs("h", cell.gates)[e:], s, p)
    used = _used_inputs((*new, *saved))
    added = next((k for k in range(e, cell.gates) if {f"x{k}", f"h{k}"} & used), cell.gates)
    if e and added < cell.gates:
        added = e
    _expand_gate_sums(graph, range(added, cell.gates), used)
    return tuple(new), tuple(saved), added


def trace_pregates(cell: Cell, graph: TraceGraph) -> tuple[tuple[Any, ...], Any, bool]:
    """(the early gates' values, q, whether these gates are used only as the sum g = x + h)."""
    s, p, e = graph.inputs("s", len(cell.states)), graph.inputs("p", len(cell.vectors)), range(cell.pregates)
    early = cell.bind(graph).pregate
    assert early is not None
    values, q = early(graph.inputs("x", len(e)), graph.inputs("h", len(e)), s, p)
    used = _used_inputs((*values, q))
    together = not any({f"x{k}", f"h{k}"} & used for k in e)
    if not together:
        _expand_gate_sums(graph, e, used)
    return tuple(values), q, together


def _used_inputs(values: Sequence[Any]) -> set[str]:
    """The names of all inputs that the values are made of."""
    if any(isinstance(v, Value) and v.is_boolean for v in values):
        raise UntraceableError("a state or saved value that is true or false")
    return set().union(*(input_names(v) for v in values))


def _expand_gate_sums(graph: TraceGraph, gates: range, used: set[str]) -> None:
    """Where a kernel has no room for the sum g of these gates, it is an operation like any other."""
    for k in gates:
        g = graph.input(f"g{k}")
        if f"g{k}" in used:
            g.op, g.args, g.name = "add", (graph.input(f"x{k}"), graph.input(f"h{k}")), ""


def trace_backward(cell: Cell, num_saved: int, num_pregate_values: int = 0) -> tuple[list[tuple[str, Any]], bool, bool]:
    """(name, value) of what the adjoint writes, whether dh is dx, whether the adjoint of h has a direct path.

    With early gates, X0... are the adjoints of their values, where they have any; v0... are these, `saved` come behind.
    """
    graph, count, e = TraceGraph(), len(cell.states), cell.pregates
    s, p, v = (
        graph.inputs("s", count),
        graph.inputs("p", len(cell.vectors)),
        graph.inputs("v", num_pregate_values + num_saved),
    )
    dx, dh, dprev, dp = cell.bind(graph).backward(graph.inputs("d", count), v[num_pregate_values:], s, p)
    outputs = [(f"X{k}", 0.0 if d is None else d) for k, d in enumerate(dx) if k >= e or d is not None]
    same = all(a is b for a, b in zip(dx[e:], dh, strict=True))
    if not same:
        outputs += [(f"U{k}", d) for k, d in enumerate(dh, e)]
    outputs += [(f"P{k}", d) for k, d in enumerate(dp) if not e or d is not None]
    if dprev[0] is not None:
        outputs.append(("r0", dprev[0]))
    outputs += [(f"e{k}", 0.0 if d is None else d) for k, d in enumerate(dprev) if k]
    return outputs, same, dprev[0] is not None


def trace_pregates_backward(cell: Cell, num_pregate_values: int, cotangent_names: set[str]) -> list[tuple[str, Any]]:
    """(name, value) of what the early gates' adjoint writes or, but for X0..., adds; `given` are trace_backward's names."""
    graph, count, e = TraceGraph(), len(cell.states), range(cell.pregates)
    s, p, v = graph.inputs("s", count), graph.inputs("p", len(cell.vectors)), graph.inputs("v", num_pregate_values)
    dvalues = tuple(graph.input(f"X{k}") if f"X{k}" in cotangent_names else None for k in e)
    early_back = cell.bind(graph).pregate_backward
    assert early_back is not None
    dx, dprev, dp = early_back(dvalues, graph.input("q0"), v, s, p)
    outputs = [(f"X{k}", 0.0 if d is None else d) for k, d in enumerate(dx)]
    outputs += [(f"P{k}", d) for k, d in enumerate(dp) if d is not None]
    return outputs + [(f"{'e' if k else 'r'}{k}", d) for k, d in enumerate(dprev) if d is not None]


def assign_buffers(
    cell: Cell,
    graph: TraceGraph,
    new: tuple[Any, ...],
    saved: tuple[Any, ...],
    pregate_buffers: tuple[str, ...] = (),
    first_state_buffer: str = "M0",
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Where each saved value lies, and those that need a place of their own: the first of them beside the gates.

    `values` is where those of early gates lie, which the step gets as x0...; `first` where the first new state does.
    """
    known = {id(graph.input(f"x{k}")): slot for k, slot in enumerate(pregate_buffers[: cell.pregates])}
    known |= {id(graph.input(f"s{k}")): f"S{k}" for k in range(len(cell.states))}
    known |= {id(v): f"M{k}" if k else first_state_buffer for k, v in enumerate(new)}
    taken = len({slot for slot in pregate_buffers if slot[0] in "XV"})
    own: dict[str, Any] = {}
    slots = []
    for value in saved:
        slot = known.get(id(value))
        if slot is None:
            k = taken + len(own)
            slot = f"X{k}" if k < cell.gates else f"V{k}"
            own[slot] = value
        slots.append(slot)
    return tuple(slots), own


def fusable_gates(graph: TraceGraph, outputs: Sequence[Any], summed_gates: int) -> list[Value]:
    """For each added gate the one tanh or sigmoid that takes it; empty unless that holds for all."""
    found = []
    every = nodes(outputs)
    for k in range(summed_gates):
        g = graph.input(f"g{k}")
        users = [v for v in every if any(a is g for a in v.args)]
        if len(users) != 1 or users[0].op not in ("tanh", "sigmoid") or any(v is g for v in outputs):
            return []
        found.append(users[0])
    return found
