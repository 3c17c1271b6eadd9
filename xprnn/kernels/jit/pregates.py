"""Prints what a cell with early gates (cells.py) adds to its kernels: a loop before the second product, its adjoint.

    for rows and units: the early gates; q = r * h, say        for rows and units: what the step's back says
    the other gates' product, of q                             DQ (R,Hz) = dh U of the other gates, the adjoint of q
    for rows and units: the step                               for rows and units: what the early gates' back adds
    (forward)                                                  (backward; then dh U of the early gates)

The values that the step gets are left where the gates' sums were, in P; their adjoints where the gates' will be, in X.
Vq (T,N,H) is q.
"""

from typing import Any, NamedTuple

from xprnn.cells.cell import Cell
from xprnn.kernels.jit.gate_groups import GateGroups
from xprnn.kernels.jit.kernel_writer import KernelWriter, matmul_call
from xprnn.kernels.tracing.cell_trace import assign_buffers, trace_pregates
from xprnn.kernels.tracing.graph import TraceGraph
from xprnn.kernels.tracing.scalar_code import ScalarCode, literal

__all__ = ["GATED_STATE", "PregateTrace", "emit_pregates", "emit_pregates_backward", "pregate_trace"]

GATED_STATE = "Vq"


class PregateTrace(NamedTuple):
    """The traced early gates."""

    values: tuple[Any, ...]
    gated_state: Any
    is_summed: bool  # whether they are used only as the sum x + h
    saved_buffers: tuple[str, ...]  # where each value lies
    new_buffers: dict[str, Any]  # those that need a place


def pregate_trace(cell: Cell) -> PregateTrace:
    """Those of this cell."""
    graph = TraceGraph()
    values, q, together = trace_pregates(cell, graph)
    slots, own = assign_buffers(cell, graph, (), values)
    return PregateTrace(values, q, together, slots, own)


def emit_pregates(out: KernelWriter, gate_groups: GateGroups, pregates: PregateTrace, used: set[str]) -> None:
    """The loop over rows and units before the second product; the step reads those of its inputs that are `used`."""
    out.emit_row_loop(gate_groups.row_indices, [(1, out.store(GATED_STATE, "t * v0 + r * H + j", literal(0.0)))])
    body = ScalarCode(lambda name: gate_groups.load_input(out, name))
    passed = [(k, body.emit(pregates.values[k])) for k in range(gate_groups.first_gates) if f"x{k}" in used]
    q, named = (
        body.emit(pregates.gated_state),
        [(slot, body.emit(value)) for slot, value in pregates.new_buffers.items()],
    )
    out.add(5, *body.lines)
    for slot, value in named:
        out.emit_save(slot, value)
    out.emit_save(GATED_STATE, q)
    out.add(5, *(out.store("P", f"x + {k} * H + j", value, f"P{k}") for k, value in passed))


def emit_pregates_backward(
    out: KernelWriter, indices: str, dh: str, outputs: list[tuple[str, Any]], read: Any, dx_is_dh: bool
) -> None:
    """The adjoint: the second product's, then the loop over rows and units."""
    out.add(
        3, matmul_call(f"{dh}, z * Xw + cut", "Xw", "U, cut * Hz", "DQ, 0", "Hz", "O, zeros", "0", "n", "W - cut", "Hz")
    )
    out.emit_row_loop(indices, [])
    body = ScalarCode(read)
    named = [(name, body.emit(value)) for name, value in outputs]
    out.add(5, *body.lines)
    for name, value in named:
        letter, k = name[0], name[1:]
        if letter == "X":
            place = f"x + {k} * H + j"
            out.add(5, out.store("X", place, value, name))
            if not dx_is_dh:
                out.add(5, out.store("Y", place, value, f"U{k}"))
        else:
            to = {"P": f"P{k}", "r": "R0", "e": f"D{k}"}[letter]
            out.add(5, out.store(to, "q + j", f"{out.load(to, 'q + j')} + {value}"))
