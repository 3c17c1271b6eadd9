"""Plan of a cell for the NumPy scan: its forward and backward programs."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from xprnn.cells.cell import Cell
from xprnn.kernels.tracing.cell_trace import fusable_gates, trace_backward, trace_step
from xprnn.kernels.tracing.graph import TraceGraph, UntraceableError, Value, input_names, nodes
from xprnn.kernels.ufunc.program import UfuncProgram, build_program

__all__ = [
    "UfuncPlan",
    "ufunc_plan",
]


class UfuncPlan(NamedTuple):
    """The programs of a cell.

    cell_trace.py explains the names of the arrays. In addition, a<k> is the activation of gate k, n<k> a state after
    the step, and k<k> a hoisted factor: a part of the adjoint that needs no cotangent.
    """

    summed_gates: int  # the number of leading gates of which only the sum g = x + h is used
    gate_activations: tuple[str, ...]  # "tanh" or "sigmoid" for each summed gate; empty if a gate is used otherwise
    forward_program: UfuncProgram  # (a or g, x, h, s, p) -> n, v
    saved_names: tuple[str, ...]  # the array of each saved value: v<k>, a<k>, n<k> or s<k>
    hoisted_names: tuple[str, ...]
    hoisted_program: UfuncProgram  # (v, s, p) -> k
    backward_program: UfuncProgram  # (d, v, s, p, k) -> X, U, r, e, P
    dx_is_dh: bool  # True if the cotangents of x and h are the same, so that there is no U
    has_direct_path: bool  # True if there is an r


@lru_cache(maxsize=256)
def ufunc_plan(cell: Cell) -> UfuncPlan | None:
    """Return the plan of a cell, or None if it cannot be traced.

    Every exception means that it cannot. The reference scan then runs the cell on arrays, and raises the exception
    again if it is an error of the cell.
    """
    try:
        traced = _forward_program(cell, sigmoid=True) or _forward_program(cell, sigmoid=False)
        assert traced is not None
        summed_gates, gate_activations, forward_program, saved_names = traced
        programs = _backward_programs(cell, len(saved_names))
        return UfuncPlan(summed_gates, gate_activations, forward_program, saved_names, *programs)
    except UntraceableError:
        return None


def _forward_program(cell: Cell, *, sigmoid: bool) -> tuple[int, tuple[str, ...], UfuncProgram, tuple[str, ...]] | None:
    """Return (summed_gates, gate_activations, forward_program, saved_names) of a plan.

    With `sigmoid`, a sigmoid is one node of the trace; the result is None if such a node is not a fusable gate, because
    NumPy has no sigmoid.
    """
    graph = TraceGraph(sigmoid=sigmoid)
    new, saved, summed_gates = trace_step(cell, graph)
    gates = fusable_gates(graph, [*new, *saved], summed_gates) if cell.gates > 1 else []
    if sigmoid and any(v.op == "sigmoid" and not any(v is g for g in gates) for v in nodes([*new, *saved])):
        return None
    gate_activations = tuple(v.op for v in gates)
    for k, gate in enumerate(gates):
        gate.op, gate.args, gate.name = "input", (), f"a{k}"
    known = {id(graph.input(f"s{k}")): f"s{k}" for k in range(len(cell.states))}
    known |= {id(v): f"a{k}" for k, v in enumerate(gates)}
    known |= {id(v): f"n{k}" for k, v in enumerate(new)}
    names = tuple(known.get(id(v), f"v{j}") for j, v in enumerate(saved))
    outputs = [(name, v) for name, v in zip(names, saved, strict=True) if name[0] == "v"]
    outputs += [(f"n{k}", v) for k, v in enumerate(new)]
    return summed_gates, gate_activations, build_program(outputs, "axsnv"), names


def _backward_programs(cell: Cell, num_saved: int) -> tuple[tuple[str, ...], UfuncProgram, UfuncProgram, bool, bool]:
    """Return (hoisted_names, hoisted_program, backward_program, dx_is_dh, has_direct_path) of a plan."""
    outputs, dx_is_dh, has_direct_path = trace_backward(cell, num_saved)
    hoisted = _hoistable_factors([value for _, value in outputs])
    factors = {value: f"k{i}" for i, value in enumerate(hoisted)}
    in_place = {f"e{k}": f"d{k}" for k in range(1, len(cell.states))}
    backward_program = build_program(outputs, "vskXUP", factors, in_place)
    hoisted_program = build_program([(name, value) for value, name in factors.items()], "vsk")
    return tuple(factors.values()), hoisted_program, backward_program, dx_is_dh, has_direct_path


def _hoistable_factors(outputs: Sequence[Any]) -> list[Value]:
    """The largest subexpressions that depend on no cotangent d<k>."""
    factors: dict[Value, None] = {}

    def visit(value: Any) -> None:
        if not isinstance(value, Value) or value.op == "input":
            return
        names = input_names(value)
        if names and not value.is_boolean and not any(n[0] == "d" for n in names):
            factors[value] = None
        else:
            for a in value.args:
                visit(a)

    for value in outputs:
        visit(value)
    return list(factors)
