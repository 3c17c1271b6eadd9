"""Prints the source of a cell's compiled forward scan: the whole time loop, with the traced cell inlined.

A kernel is one function of one argument, an int64 array of addresses and numbers. Its type does not depend on the
shapes of the arrays, so it is compiled once per cell and dtype. It processes R rows of a batch of N, in blocks of
J = block_steps steps. A block is small enough for its arrays to stay in the cache. At each step the kernel calls the
recurrent product (gemm_address is the address of gemm.py's functions). One loop over rows and units then evaluates the
cell in one pass over memory.

The gates form two groups, see gate_groups.py. W = G*H is the width of all gates, W0 that of the first group. Wp and
Wp0 are the same widths padded to whole vectors. Wr is the width of the groups whose h U' is stored apart from x W'. The
arrays of the forward kernel are:

    A (T,N,D)   x; for integer x, D = 0 and `ids` (T,N) are rows of WI    WI, WH, BI, BH  the parameters
    Q, U        both weights, packed into panels                          K (Wp,)  bias added to x W'
    P (J,R,Wp)  a block's x W' + K, and then x W' + h U' + K              L (Wr,)  bias of h U' stored in B
    B (R,Wr)    h U' + L of the groups whose h U' is stored apart         O        zeros, the start of a product
    G (T,N,W)   the first saved values; Vj (T,N,H) the others             pk (H,)  the cell's vectors
    Ck (N,H)    the running state k                                       Ek (N,H) the reset state k
    Mk (T,N,H)  state k after each step                                   Sk (T,N,H) state k before it, saved if reset

`saved_stride` is the number of elements between two steps of Vj and Sk, and `Mk_stride` of Mk. They are 0 if no tape
is recorded, except M0_stride, because M0 is also the output. In the loop over rows, q, h, x and g are the offsets of
the row in (N,H) arrays, B, P and G.

backward_driver.py prints the adjoint. pregates.py and hidden_projection.py print what pregates and a projected h add
to both kernels.
"""

from functools import lru_cache
from typing import Any, NamedTuple

from xprnn.cells.cell import Cell
from xprnn.kernels.jit import hidden_projection, pregates
from xprnn.kernels.jit.backward_driver import write_backward
from xprnn.kernels.jit.gate_groups import GateGroups
from xprnn.kernels.jit.kernel_writer import SCALARS, KernelWriter
from xprnn.kernels.tracing.cell_trace import assign_buffers, trace_step
from xprnn.kernels.tracing.graph import TraceGraph, UntraceableError, input_names
from xprnn.kernels.tracing.scalar_code import ScalarCode, literal

__all__ = ["KernelSources", "kernel_sources"]


class KernelSources(NamedTuple):
    """Source text of a cell's two kernels, and the names of their arguments."""

    forward: str
    backward: str
    forward_arguments: tuple[str, ...]
    backward_arguments: tuple[str, ...]
    gate_groups: GateGroups
    # The buffer of each entry of the cell's `saved`: Xk (column block k of G), Vj, Mk (state after the step) or Sk
    # (state before it); then the buffers that the kernels save for themselves.
    saved_buffers: tuple[str, ...]
    dx_is_dh: bool  # the cotangents of x and h are equal for every gate

    def __hash__(self) -> int:
        return hash(self.forward)  # Python caches the hash of a string


@lru_cache(maxsize=256)
def kernel_sources(cell: Cell, bits: int, projected: bool = False) -> KernelSources | None:
    """Print the kernels of a cell.

    Args:
        cell: the cell.
        bits: 32 or 64, of a float.
        projected: h is projected by weight_hr.

    Returns:
        The kernels, or None if the cell cannot be traced.
    """
    try:
        forward, gate_groups, buffers, num_pregate_values = _write_forward(cell, projected)
        backward, dx_is_dh = write_backward(cell, buffers, num_pregate_values, projected)
    except Exception:  # tracing runs user code; the reference scan runs it too and reports its errors
        return None
    texts = forward.source(cell.name, bits), backward.source(cell.name, bits)
    return KernelSources(*texts, forward.argument_names, backward.argument_names, gate_groups, buffers, dx_is_dh)


def _write_forward(cell: Cell, projected: bool) -> tuple[KernelWriter, GateGroups, tuple[str, ...], int]:
    """Return the kernel, the gate groups, the saved buffers, and how many of these the pregates save."""
    pregate = pregates.pregate_trace(cell) if cell.pregates else None
    new, saved, summed_gates = trace_step(cell, graph := TraceGraph())
    gate_groups = GateGroups(summed_gates, (False, True), has_pregates=False)
    if pregate:
        separate = (not pregate.is_summed, summed_gates < cell.gates)
        gate_groups = GateGroups(cell.pregates, separate, has_pregates=True)
    pregate_buffers = pregate.saved_buffers if pregate else ()
    if projected and (pregate or "s0" in set().union(*(input_names(v) for v in (*new, *saved)))):
        raise UntraceableError("an element of a projected h")
    first_state_buffer = hidden_projection.UNPROJECTED if projected else "M0"
    buffers, new_buffers = assign_buffers(cell, graph, new, saved, pregate_buffers, first_state_buffer)
    if projected:
        new_buffers[hidden_projection.UNPROJECTED] = new[0]
    extra_buffers = [pregates.GATED_STATE] if pregate else [hidden_projection.UNPROJECTED] if projected else []
    v_buffers = [name for name in (*pregate_buffers, *new_buffers, *extra_buffers) if name[0] == "V"]
    out = _prologue(cell, gate_groups, list(dict.fromkeys(v_buffers)), projected)
    gate_groups.emit_recurrent_product(out, 0, "C0, 0", out.h_width)
    if pregate:
        used = set().union(*(input_names(v) for v in (*new, *new_buffers.values())))
        pregates.emit_pregates(out, gate_groups, pregate, used)
    second_lhs = f"{pregates.GATED_STATE}, t * saved_stride" if pregate else "C0, 0"
    gate_groups.emit_recurrent_product(out, 1, second_lhs, out.h_width)
    _pointwise_loop(out, gate_groups, new_buffers, new, extra_buffers)
    return out, gate_groups, (*pregate_buffers, *buffers, *extra_buffers), len(pregate_buffers)


def _prologue(cell: Cell, gate_groups: GateGroups, v_buffers: list[str], projected: bool) -> KernelWriter:
    """Write the kernel up to the first recurrent product of a step."""
    states, vectors = range(len(cell.states)), range(len(cell.vectors))
    pointers = ["A", "WI", "WH", "BI", "BH", "Q", "U", "P", "B", "K", "L", "O", "G"]
    pointers += [*(f"{c}{k}" for c in "CEMS" for k in states), *v_buffers, *(f"p{k}" for k in vectors)]
    scalars = [*SCALARS, "W0", "Wp0", "Wp", "record_tape", "saved_stride", *(f"M{k}_stride" for k in states)]
    if projected:
        scalars, pointers = [*scalars, "HP", "projection_stride"], [*pointers, "WR", "UR", "HN"]
    out = KernelWriter(scalars, pointers, projected)
    gate_groups.emit_pack_weights(out)
    if projected:
        hidden_projection.emit_pack_projection(out)
    out.emit_block_loop(forward=True)
    gate_groups.emit_input_projection(out)
    out.emit_step_loop("(m - 1 - i if reverse else i)")
    out.add(3, "if has_reset:", "    for r in range(R):", "        if load(reset, t * N + r, ANY_SCOPE) != 0:")
    out.emit_unit_loop(
        6, [(k, out.store(f"C{k}", out.unit_index(k), out.load(f"E{k}", out.unit_index(k)))) for k in states]
    )
    _save_previous_states(out, states)
    out.add(3, "z = (t - t0) * R * Wp")
    return out


def _save_previous_states(out: KernelWriter, states: range) -> None:
    """Emit the stores of the states before this step, inside `if has_reset`."""
    values = [out.load(f"C{k}", "j") for k in states]
    stores = [out.store(f"S{k}", "t * saved_stride + j", value) for k, value in enumerate(values)]
    if out.h_width == "H":
        out.add(4, "for j in range(R * H):")
        out.add(5, *stores)
        return
    out.add(4, f"for j in range(R * {out.h_width}):")
    out.add(5, out.store("S0", f"t * N * {out.h_width} * record_tape + j", values[0]))
    if stores[1:]:
        out.add(4, "for j in range(R * H):")
        out.add(5, *stores[1:])


def _pointwise_loop(
    out: KernelWriter,
    gate_groups: GateGroups,
    new_buffers: dict[str, Any],
    new: tuple[Any, ...],
    extra_buffers: list[str],
) -> None:
    """Emit the step's loop over rows and units, and the state updates of inactive rows."""
    states, projected = range(len(new)), out.h_width != "H"
    carried = [out.load(f"C{k}", out.unit_index(k)) for k in states]
    carried[0] = f"{carried[0]} if record_tape else F(0.0)"
    carry = [(k, out.store(f"M{k}", f"t * M{k}_stride + {out.unit_index(k)}", v)) for k, v in enumerate(carried)]
    zero_extra = [(1, out.store(name, "t * saved_stride + r * H + j", literal(0.0))) for name in extra_buffers]
    out.emit_row_loop(gate_groups.row_indices, [*zero_extra, *carry[1:]] if projected else carry)
    body = ScalarCode(lambda name: gate_groups.load_input(out, name))
    saved = [(buffer, body.emit(value)) for buffer, value in new_buffers.items()]
    after = body.emit_all(new)
    out.add(5, *body.lines)
    for buffer, value in saved:
        out.emit_save(buffer, value)
    for k, value in enumerate(after):
        if k or not projected:
            out.add(5, out.store(f"M{k}", f"t * M{k}_stride + q + j", value), out.store(f"C{k}", "q + j", value))
    if projected:
        hidden_projection.emit_projection(out, carry[0])
    out.emit_inactive_rows([*carry, *zero_extra])
