"""Prints what pregates (see xprnn.Cell) add to a cell's kernels: a loop before the second recurrent product.

The forward kernel and the backward kernel run these loops at each step:

    forward                                                backward, followed by dh U of the pregates
    for rows and units: the pregates and q (e.g. r * h)    for rows and units: adjoint of the step
    recurrent product of the other gates with q            DQ (R,Hp) = dh U of the other gates, cotangent of q
    for rows and units: the step                           for rows and units: adjoint of the pregates, added

The values that the step reads overwrite the sums of the pregates in P. Their cotangents are stored in the columns of X
that later receive the cotangents of the pregates. The gated state q is saved in Vq (T,N,H).
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
    """Traced pregates of a cell."""

    values: tuple[Any, ...]
    gated_state: Any
    is_summed: bool  # the pregates use x and h only as the sum x + h
    saved_buffers: tuple[str, ...]  # the buffer of each value
    new_buffers: dict[str, Any]  # buffer -> value, for values that no other buffer holds


def pregate_trace(cell: Cell) -> PregateTrace:
    """Trace the pregates of a cell and assign their buffers."""
    graph = TraceGraph()
    values, gated_state, is_summed = trace_pregates(cell, graph)
    saved_buffers, new_buffers = assign_buffers(cell, graph, (), values)
    return PregateTrace(values, gated_state, is_summed, saved_buffers, new_buffers)


def emit_pregates(out: KernelWriter, gate_groups: GateGroups, pregates: PregateTrace, used: set[str]) -> None:
    """Emit the loop before the second product. `used` names the inputs that the step reads."""
    zero_gated_state = out.store(GATED_STATE, "t * saved_stride + r * H + j", literal(0.0))
    out.emit_row_loop(gate_groups.row_indices, [(1, zero_gated_state)])
    body = ScalarCode(lambda name: gate_groups.load_input(out, name))
    step_inputs = [(k, body.emit(pregates.values[k])) for k in range(gate_groups.first_gates) if f"x{k}" in used]
    gated_state = body.emit(pregates.gated_state)
    saved = [(buffer, body.emit(value)) for buffer, value in pregates.new_buffers.items()]
    out.add(5, *body.lines)
    for buffer, value in saved:
        out.emit_save(buffer, value)
    out.emit_save(GATED_STATE, gated_state)
    out.add(5, *(out.store("P", f"x + {k} * H + j", value, f"P{k}") for k, value in step_inputs))


def emit_pregates_backward(
    out: KernelWriter, indices: str, dh: str, outputs: list[tuple[str, Any]], read: Any, dx_is_dh: bool
) -> None:
    """Emit the adjoint of the second product, then the adjoint loop over rows and units."""
    a, panels = f"{dh}, z * X_stride + W0", "U, W0 * Hp"
    out.add(3, matmul_call(a, "X_stride", panels, "DQ, 0", "Hp", "O, zeros", "0", "n", "W - W0", "Hp"))
    out.emit_row_loop(indices, [])
    body = ScalarCode(read)
    emitted = [(name, body.emit(value)) for name, value in outputs]
    out.add(5, *body.lines)
    for name, value in emitted:
        letter, k = name[0], name[1:]
        if letter == "X":
            index = f"x + {k} * H + j"
            out.add(5, out.store("X", index, value, name))
            if not dx_is_dh:
                out.add(5, out.store("Y", index, value, f"U{k}"))
        else:
            target = {"P": f"P{k}", "r": "R0", "e": f"D{k}"}[letter]
            out.add(5, out.store(target, "q + j", f"{out.load(target, 'q + j')} + {value}"))
