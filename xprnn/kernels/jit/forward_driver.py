"""Prints the source of a cell's compiled scan: the whole time loop, with the traced cell inside it.

A kernel is one function of one argument, a table of addresses and numbers: its type never depends on an array's, so it
is compiled once for each cell and dtype. It walks R rows of a batch of N; steps are taken in blocks of J, so small that
what belongs to a block stays in the cache. Each step is the recurrent product (`go` is the address of gemm.py's), then
one loop over rows and units that does all of the cell's maths in one pass over memory. With W = G*H, `cut` = H times
the gates of which only x + h is used, and Y, Z the widths of panels for these and for all gates, forward:

    A (T,N,D)  x, or, with D = 0, `ids` (T,N) of WI's rows           WI, WH, BI, BH  the parameters
    Q, U       both weights in panels                                K (Z,), L (Z-Y,)  biases, L where h stays apart
    P (J,R,Z)  a block's x W' + K, and then x W' + h U' + K          B (R,Z-Y)  h U' + L where it stays apart
    G (T,N,W)  the first saved values; Vj (T,N,H) the others         pk (H,)  the cell's vectors
    Ck (N,H)   the running state k                                   Ek (N,H)  where a reset leads
    Mk (T,N,H) the states after each step                            Sk (T,N,H) before it, where a reset changes them

back_source.py has the adjoint, early_source.py what early gates add to both, projected_source.py what a projected h
adds.
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
    """A cell's kernels as text, and how to call them."""

    forward: str
    backward: str
    forward_arguments: tuple[str, ...]
    backward_arguments: tuple[str, ...]
    gate_groups: GateGroups
    saved_buffers: tuple[
        str, ...
    ]  # where each entry of `saved` is: Xk, Vj, Mk (after) or Sk (before); then what else is kept
    dx_is_dh: bool  # dh is dx, gate by gate

    def __hash__(self) -> int:
        return hash(self.forward)  # a text remembers its own


@lru_cache(maxsize=256)
def kernel_sources(cell: Cell, bits: int, projected: bool = False) -> KernelSources | None:
    """The cell's kernels for float32 or float64, or None where it can't be traced; `projected`: h by weight_hr."""
    try:
        forward, halves, slots, values = _write_forward(cell, projected)
        backward, same = write_backward(cell, slots, values, projected)
    except Exception:  # whatever goes wrong with stand-ins, another kernel goes on, and says so if it was the cell
        return None
    texts = forward.source(cell.name, bits), backward.source(cell.name, bits)
    return KernelSources(*texts, forward.argument_names, backward.argument_names, halves, slots, same)


def _write_forward(cell: Cell, projected: bool) -> tuple[KernelWriter, GateGroups, tuple[str, ...], int]:
    """The kernel, its gates' two groups, where all that is saved lies, and how much of it the early gates saved."""
    early = pregates.pregate_trace(cell) if cell.pregates else None
    new, saved, added = trace_step(cell, graph := TraceGraph())
    halves = GateGroups(added, (False, True), has_pregates=False)
    if early:
        halves = GateGroups(cell.pregates, (not early.is_summed, added < cell.gates), has_pregates=True)
    values = early.saved_buffers if early else ()
    if projected and (early or "s0" in set().union(*(input_names(v) for v in (*new, *saved)))):
        raise UntraceableError("a unit of an h that is projected")
    slots, own = assign_buffers(cell, graph, new, saved, values, hidden_projection.UNPROJECTED if projected else "M0")
    if projected:
        own[hidden_projection.UNPROJECTED] = new[0]
    kept = [pregates.GATED_STATE] if early else [hidden_projection.UNPROJECTED] if projected else []
    spare = [slot for slot in (*values, *own, *kept) if slot[0] == "V"]
    out = _prologue(cell, halves, list(dict.fromkeys(spare)), projected)
    halves.emit_recurrent_product(out, 0, "C0, 0", out.h_width)
    if early:
        pregates.emit_pregates(out, halves, early, set().union(*(input_names(v) for v in (*new, *own.values()))))
    halves.emit_recurrent_product(out, 1, f"{pregates.GATED_STATE}, t * v0" if early else "C0, 0", out.h_width)
    _pointwise_loop(out, halves, own, new, kept)
    return out, halves, (*values, *slots, *kept), len(values)


def _prologue(cell: Cell, halves: GateGroups, spare: list[str], projected: bool) -> KernelWriter:
    """The kernel up to a step's first product."""
    states, vectors = range(len(cell.states)), range(len(cell.vectors))
    pointers = ["A", "WI", "WH", "BI", "BH", "Q", "U", "P", "B", "K", "L", "O", "G"]
    pointers += [*(f"{c}{k}" for c in "CEMS" for k in states), *spare, *(f"p{k}" for k in vectors)]
    numbers = [*SCALARS, "cut", "Y", "Z", "keep", "v0", *(f"m{k}" for k in states)]
    if projected:
        numbers, pointers = [*numbers, "HP", "Hw"], [*pointers, "WR", "UR", "HN"]
    out = KernelWriter(numbers, pointers, projected)
    halves.emit_pack_weights(out)
    if projected:
        hidden_projection.emit_pack_projection(out)
    out.emit_block_loop(forward=True)
    halves.emit_input_projection(out)
    out.emit_step_loop("(m - 1 - i if turned else i)")
    out.add(3, "if resets:", "    for r in range(R):", "        if load(reset, t * N + r, ANY) != 0:")
    out.emit_unit_loop(
        6, [(k, out.store(f"C{k}", out.unit_index(k), out.load(f"E{k}", out.unit_index(k)))) for k in states]
    )
    _save_previous_states(out, states)
    out.add(3, "z = (t - t0) * R * Z")
    return out


def _save_previous_states(out: KernelWriter, states: range) -> None:
    """Of rows that may have been reset, the states before this step."""
    copied = [out.load(f"C{k}", "j") for k in states]
    seats = [out.store(f"S{k}", "t * v0 + j", value) for k, value in enumerate(copied)]
    if out.h_width == "H":
        out.add(4, "for j in range(R * H):")
        out.add(5, *seats)
        return
    out.add(
        4,
        f"for j in range(R * {out.h_width}):",
        "    " + out.store("S0", f"t * N * {out.h_width} * keep + j", copied[0]),
    )
    if seats[1:]:
        out.add(4, "for j in range(R * H):")
        out.add(5, *seats[1:])


def _pointwise_loop(
    out: KernelWriter, halves: GateGroups, own: dict[str, Any], new: tuple[Any, ...], kept: list[str]
) -> None:
    """The step's loop over rows and units, and what happens to rows that sit it out."""
    states, projected = range(len(new)), out.h_width != "H"
    carried = [out.load(f"C{k}", out.unit_index(k)) for k in states]
    carried[0] = f"{carried[0]} if keep else F(0.0)"
    carry = [(k, out.store(f"M{k}", f"t * m{k} + {out.unit_index(k)}", value)) for k, value in enumerate(carried)]
    nothing = [(1, out.store(name, "t * v0 + r * H + j", literal(0.0))) for name in kept]
    out.emit_row_loop(halves.row_indices, [*nothing, *carry[1:]] if projected else carry)
    body = ScalarCode(lambda name: halves.load_input(out, name))
    named = [(slot, body.emit(value)) for slot, value in own.items()]
    after = body.emit_all(new)
    out.add(5, *body.lines)
    for slot, value in named:
        out.emit_save(slot, value)
    for k, value in enumerate(after):
        if k or not projected:
            out.add(5, out.store(f"M{k}", f"t * m{k} + q + j", value), out.store(f"C{k}", "q + j", value))
    if projected:
        hidden_projection.emit_projection(out, carry[0])
    out.emit_inactive_rows([*carry, *nothing])
