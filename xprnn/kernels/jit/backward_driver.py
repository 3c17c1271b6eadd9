"""Prints the adjoint of source.py's scan: the time loop in reverse order, and of a block dx and all gradients.

In the letters of source.py, where the adjoint of h before a step is B + R0, added where it is read, and at the end:

    X (J,R,Xw) a block's dx, (T,N,W) with D = 0; Y dh, or X          B (R,Hz), R0 (N,H)  dh U, and what comes directly
    Dk (N,H)   the other states' adjoints                            Ek, Pk (N,H)  those of home states and vectors
    LA, LB     a block's factors of the weights' gradients, packed   GI, GU, SI, SH  gradients of weights and biases
    Ik         what the caller sends into state k, by strides        G, Vj, Mk, Sk  the tape; DX (T,N,D) goes out
"""

from collections.abc import Callable
from typing import Any

from xprnn.cells.cell import Cell
from xprnn.kernels.jit import hidden_projection, pregates
from xprnn.kernels.jit.kernel_writer import (
    SCALARS,
    KernelWriter,
    matmul_call,
    matmul_lhs_transposed_call,
    pack_lhs_call,
    pack_rhs_call,
)
from xprnn.kernels.tracing.cell_trace import trace_backward, trace_pregates_backward
from xprnn.kernels.tracing.graph import UntraceableError
from xprnn.kernels.tracing.scalar_code import ScalarCode, literal

__all__ = ["write_backward"]

ROW_INDICES = "q, h, x, g, v = r * H, r * Hz, (z + r) * Xw, (t * N + r) * W, (t * N + r) * H"


def write_backward(
    cell: Cell, saved_buffers: tuple[str, ...], num_pregate_values: int, projected: bool
) -> tuple[KernelWriter, bool]:
    """The kernel, and whether dh is dx. The early gates saved the first `values` of what lies in these places."""
    own = len(saved_buffers) - num_pregate_values - bool(cell.pregates or projected)
    outputs, same, through = trace_backward(cell, own, num_pregate_values)
    if projected and through:
        raise UntraceableError("a unit of an h that is projected")
    out, dh = _prologue(cell, saved_buffers, projected), "X" if same else "Y"
    read = _input_loader(out, saved_buffers)
    _pointwise_loop(out, cell, outputs, same, through, read)
    whole = "W"
    if cell.pregates:
        added = trace_pregates_backward(cell, num_pregate_values, {name for name, _ in outputs})
        pregates.emit_pregates_backward(out, ROW_INDICES, dh, added, read, same)
        whole = "cut"
    out.add(3, matmul_call(f"{dh}, z * Xw", "Xw", "U, 0", "B, 0", "Hz", "O, zeros", "0", "n", whole, "Hz"))
    _route_reset(out, range(len(cell.states)))
    _weight_gradients(out, dh, cell.pregates > 0)
    if projected:
        hidden_projection.emit_projection_gradients(out)
    first = f"{out.load('R0', out.unit_index(0))} + {out.load('B', 'r * Hz + j')}"
    out.add(1, "for r in range(R):", f"    for j in range({out.h_width}):")
    out.add(3, out.store("R0", out.unit_index(0), first))
    return out, same


def _prologue(cell: Cell, slots: tuple[str, ...], projected: bool) -> KernelWriter:
    """The kernel up to a step's loop."""
    states, vectors = range(len(cell.states)), range(len(cell.vectors))
    spare = dict.fromkeys(s for s in slots if s[0] == "V")
    pointers = ["A", "WI", "WH", "Q", "U", "LA", "LB", "GI", "GU", "SI", "SH", "DX", "O", "X", "Y", "B", "R0", "G"]
    pointers += [*(f"{c}{k}" for c in "DEIMS" for k in states), *spare, *(f"{c}{k}" for c in "pP" for k in vectors)]
    numbers = [*SCALARS, "Hz", "Xw", "room", "zeros", *(f"{c}{k}" for c in "ab" for k in states)]
    if cell.pregates:
        numbers, pointers = [*numbers, "cut", "half"], [*pointers, "DQ"]
    if projected:
        numbers, pointers = [*numbers, "HP", "Hw"], [*pointers, *hidden_projection.PROJECTION_POINTERS]
    out = KernelWriter(numbers, pointers, projected)
    out.add(1, "if D > 0:", "    " + pack_rhs_call("WI, 0", "D", "1", "W", "D", "Q, 0"))
    h = out.h_width
    for start, span, to in _gate_groups(cell.pregates > 0, "U, 0", "U, cut * Hz"):
        out.add(1, pack_rhs_call(f"WH, {start} * {h}" if start != "0" else "WH, 0", h, "1", span, h, to))
    if projected:
        hidden_projection.emit_pack_projection_backward(out)
    out.emit_block_loop(forward=False)
    out.emit_step_loop("(i if turned else m - 1 - i)")
    out.add(3, "z = (t - t0) * R if D > 0 else t * N")
    return out


def _gate_groups(early: bool, one: str, two: str) -> list[tuple[str, str, str]]:
    """(first column, how many, place) of the gates that belong together."""
    return [("0", "cut", one), ("cut", "W - cut", two)] if early else [("0", "W", one)]


def _injected_cotangent(out: KernelWriter, k: int) -> str:
    """What the caller sends into state k."""
    return out.load(f"I{k}", f"t * a{k} + r * b{k} + j")


def _pointwise_loop(
    out: KernelWriter, cell: Cell, outputs: list[tuple[str, Any]], same: bool, through: bool, read: Callable[[str], str]
) -> None:
    """The step's loop over rows and units, and what happens to rows that sit it out."""
    projected, states = out.h_width != "H", range(len(cell.states))
    sent = [_injected_cotangent(out, k) for k in states]
    passed = [
        (k, out.store(f"D{k}", out.unit_index(k), f"{out.load(f'D{k}', out.unit_index(k))} + {sent[k]}"))
        for k in states
        if k
    ]
    idle = [
        (1, out.store(c, f"(z + r) * Xw + {k} * H + j", literal(0.0)))
        for c in "XY"[: 2 - same]
        for k in range(cell.gates)
    ]
    after = (0, out.store("R0", out.unit_index(0), f"{out.load('R0', out.unit_index(0))} + {sent[0]}"))
    incoming = f"{out.load('B', 'r * Hz + j')} + {out.load('R0', out.unit_index(0))} + {sent[0]}"
    if projected:
        out.emit_inactive_rows([after, (0, hidden_projection.zero_masked(out)), *passed, *idle])
        hidden_projection.emit_projection_backward(out, incoming)
        out.emit_row_loop(ROW_INDICES, [*passed, *idle])
    else:
        out.emit_inactive_rows([after, *passed, *idle])
        out.emit_row_loop(ROW_INDICES, [(0, out.store("R0", out.unit_index(0), incoming)), *passed, *idle])
    body = ScalarCode(read)
    named = [(name, body.emit(value)) for name, value in outputs]
    out.add(5, *body.lines)
    out.add(5, *(_store_output(out, name, value) for name, value in named))
    if not through and not projected:
        out.add(5, out.store("R0", "q + j", literal(0.0)))


def _route_reset(out: KernelWriter, states: range) -> None:
    """The adjoints of rows that were reset before this step go home."""
    out.add(3, "if resets:", "    for r in range(R):", "        if load(reset, t * N + r, ANY) != 0:")
    lines = []
    for k in states:
        at = out.unit_index(k)
        value = out.load(f"D{k}", at) if k else f"{out.load('B', 'r * Hz + j')} + {out.load('R0', at)}"
        lines.append((k, out.store(f"E{k}", at, f"{out.load(f'E{k}', at)} + {value}")))
    lines.append((0, out.store("B", "r * Hz + j", literal(0.0))))
    out.emit_unit_loop(
        6, [*lines, *((k, out.store(f"D{k}" if k else "R0", out.unit_index(k), literal(0.0))) for k in states)]
    )


def _weight_gradients(out: KernelWriter, dh: str, early: bool) -> None:
    """Of a block: dx, and the parts of all parameters' gradients."""
    h, halves = out.h_width, _gate_groups(early, "LA, 0", "LA, half * room")
    out.add(2, "if D > 0:", "    for s in range(groups):")
    out.add(
        4, matmul_call("X, s * R * Xw", "Xw", "Q, 0", "DX, (t0 + s) * N * D", "D", "O, zeros", "0", "many", "W", "D")
    )
    out.add(4, pack_rhs_call("A, (t0 + s) * N * D", "D", "1", "many", "D", "LB, 0", "room", "s * R"))
    _pack_cotangents(out, "X", "SI", halves)
    out.add(2, "if D > 0:")
    for start, span, left in halves:
        out.add(3, matmul_lhs_transposed_call(span, "D", f"GI, {start} * D" if start != "0" else "GI, 0", left))
    if dh != "X":
        _pack_cotangents(out, dh, "SH", halves)
    for (start, span, left), factor, width in zip(halves, ("S0", pregates.GATED_STATE), (h, "H"), strict=False):
        out.add(2, "for s in range(groups):")
        at = f"{factor}, (t0 + s) * N * {width}"
        out.add(3, pack_rhs_call(at, width, "1", "many", width, "LB, 0", "room", "s * R"))
        out.add(2, matmul_lhs_transposed_call(span, width, f"GU, {start} * {h}" if start != "0" else "GU, 0", left))


def _pack_cotangents(out: KernelWriter, name: str, sums: str, halves: list[tuple[str, str, str]]) -> None:
    """A block's dx or dh, and their sums: the rows are side by side, or, with D = 0, N apart."""
    out.add(2, "for s in range(1 if D > 0 else groups):")
    for start, span, left in halves:
        at = f"{name}, (t0 + s) * N * Xw * (D == 0)" + (f" + {start}" if start != "0" else "")
        rows = "m * R if D > 0 else many"
        out.add(3, pack_lhs_call(at, rows, "Xw", span, left, "s * R", f"{sums}, {start}"))


def _input_loader(out: KernelWriter, slots: tuple[str, ...]) -> Callable[[str], str]:
    """How the kernel reads an input of the traced adjoints."""

    def read(name: str) -> str:
        letter, k = name[0], int(name[1:])
        if letter == "d":
            own = out.load(f"D{k}", "q + j") if k else f"{out.load('B', 'h + j')} + {out.load('R0', 'q + j')}"
            return (
                hidden_projection.load_unprojected_cotangent(out)
                if out.h_width != "H" and not k
                else f"{own} + {_injected_cotangent(out, k)}"
            )
        if letter == "p":
            return out.load(f"p{k}", "j")
        if letter == "q":
            return out.load("DQ", "h + j")
        if letter == "X":
            return out.load("X", f"x + {k} * H + j", name)
        slot = f"S{k}" if letter == "s" else slots[k]
        return out.load("G", f"g + {slot[1:]} * H + j") if slot[0] == "X" else out.load(slot, "v + j")

    return read


def _store_output(out: KernelWriter, name: str, value: str) -> str:
    letter, k = name[0], name[1:]
    if letter == "P":
        return out.store(name, "q + j", f"{out.load(name, 'q + j')} + {value}")
    if letter in "XU":
        return out.store("X" if letter == "X" else "Y", f"x + {k} * H + j", value, name)
    return out.store("R0" if letter == "r" else f"D{k}", "q + j", value)
