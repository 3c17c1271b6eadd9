"""Prints the source of a cell's compiled backward scan: the adjoint of forward_driver.py's kernel.

The time loop runs in reverse order. After the steps of a block, the kernel computes the block's DX and adds its
contributions to all parameter gradients. The cotangent of h before a step is the sum B + R0; it is added where it is
read, and once more after the last step. The letters are those of forward_driver.py. Hp is the width of h padded to
whole vectors; dx and dh are the cotangents of x W' and h U', as returned by the cell. The kernel's arrays are:

    X (J,R,X_stride)  dx of a block; for integer x (T,N,W)            B (R,Hp)    dh U
    Y                 dh if it differs from dx, with the layout of X  R0 (N,H)    cotangent of h that bypasses U
    Dk (N,H)          cotangents of the other states                  Ek (N,H)    cotangents of the reset states
    LA, LB            packed factors of the weight gradients          Pk (N,H)    cotangents of the cell's vectors
    Ik                the caller's cotangent of state k at each step  GI, GU      gradients of the weights
    G, Vj, Mk, Sk     the tape                                        SI, SH      gradients of the biases
    DX (T,N,D)        the cotangent of x                              O           zeros from O[zeros] on
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

ROW_INDICES = "q, h, x, g, v = r * H, r * Hp, (z + r) * X_stride, (t * N + r) * W, (t * N + r) * H"


def write_backward(
    cell: Cell, saved_buffers: tuple[str, ...], num_pregate_values: int, projected: bool
) -> tuple[KernelWriter, bool]:
    """Write the kernel.

    Args:
        cell: the cell.
        saved_buffers: the buffer of each saved value. The pregates save the first `num_pregate_values` of them.
        num_pregate_values: see above.
        projected: h is projected by weight_hr.

    Returns:
        The kernel, and whether dh is dx.
    """
    num_saved = len(saved_buffers) - num_pregate_values - bool(cell.pregates or projected)
    outputs, dx_is_dh, has_direct_path = trace_backward(cell, num_saved, num_pregate_values)
    if projected and has_direct_path:
        raise UntraceableError("an element of a projected h")
    out, dh = _prologue(cell, saved_buffers, projected), "X" if dx_is_dh else "Y"
    read = _input_loader(out, saved_buffers)
    _pointwise_loop(out, cell, outputs, dx_is_dh, has_direct_path, read)
    inner = "W"
    if cell.pregates:
        pregate_outputs = trace_pregates_backward(cell, num_pregate_values, {name for name, _ in outputs})
        pregates.emit_pregates_backward(out, ROW_INDICES, dh, pregate_outputs, read, dx_is_dh)
        inner = "W0"
    a = f"{dh}, z * X_stride"
    out.add(3, matmul_call(a, "X_stride", "U, 0", "B, 0", "Hp", "O, zeros", "0", "n", inner, "Hp"))
    _route_reset(out, range(len(cell.states)))
    _weight_gradients(out, dh, cell.pregates > 0)
    if projected:
        hidden_projection.emit_projection_gradients(out)
    cotangent = f"{out.load('R0', out.unit_index(0))} + {out.load('B', 'r * Hp + j')}"
    out.add(1, "for r in range(R):", f"    for j in range({out.h_width}):")
    out.add(3, out.store("R0", out.unit_index(0), cotangent))
    return out, dx_is_dh


def _prologue(cell: Cell, buffers: tuple[str, ...], projected: bool) -> KernelWriter:
    """Write the kernel up to the first loop of a step."""
    states, vectors = range(len(cell.states)), range(len(cell.vectors))
    v_buffers = dict.fromkeys(name for name in buffers if name[0] == "V")
    pointers = ["A", "WI", "WH", "Q", "U", "LA", "LB", "GI", "GU", "SI", "SH", "DX", "O", "X", "Y", "B", "R0", "G"]
    pointers += [f"{c}{k}" for c in "DEIMS" for k in states]
    pointers += [*v_buffers, *(f"{c}{k}" for c in "pP" for k in vectors)]
    scalars = [*SCALARS, "Hp", "X_stride", "capacity", "zeros"]
    scalars += [f"I{k}_{axis}_stride" for axis in ("step", "row") for k in states]
    if cell.pregates:
        scalars, pointers = [*scalars, "W0", "W0_packed"], [*pointers, "DQ"]
    if projected:
        scalars = [*scalars, "HP", "projection_stride"]
        pointers = [*pointers, *hidden_projection.PROJECTION_POINTERS]
    out = KernelWriter(scalars, pointers, projected)
    out.add(1, "if D > 0:", "    " + pack_rhs_call("WI, 0", "D", "1", "W", "D", "Q, 0"))
    h = out.h_width
    for start, span, panels in _gate_groups(cell.pregates > 0, "U, 0", "U, W0 * Hp"):
        out.add(1, pack_rhs_call(f"WH, {start} * {h}" if start != "0" else "WH, 0", h, "1", span, h, panels))
    if projected:
        hidden_projection.emit_pack_projection_backward(out)
    out.emit_block_loop(forward=False)
    out.emit_step_loop("(i if reverse else m - 1 - i)")
    out.add(3, "z = (t - t0) * R if D > 0 else t * N")
    return out


def _gate_groups(has_pregates: bool, first: str, second: str) -> list[tuple[str, str, str]]:
    """Return (first column, number of columns, array) of each group of gates with a recurrent product."""
    return [("0", "W0", first), ("W0", "W - W0", second)] if has_pregates else [("0", "W", first)]


def _injected_cotangent(out: KernelWriter, k: int) -> str:
    """Print the expression that reads the caller's cotangent of state k after this step."""
    return out.load(f"I{k}", f"t * I{k}_step_stride + r * I{k}_row_stride + j")


def _pointwise_loop(
    out: KernelWriter,
    cell: Cell,
    outputs: list[tuple[str, Any]],
    dx_is_dh: bool,
    has_direct_path: bool,
    read: Callable[[str], str],
) -> None:
    """Emit the step's loop over rows and units. Masked rows keep their state cotangents and have zero dx and dh."""
    projected, states = out.h_width != "H", range(len(cell.states))
    injected = [_injected_cotangent(out, k) for k in states]
    carry = [
        (k, out.store(f"D{k}", out.unit_index(k), f"{out.load(f'D{k}', out.unit_index(k))} + {injected[k]}"))
        for k in states
        if k
    ]
    zero_gates = [
        (1, out.store(c, f"(z + r) * X_stride + {k} * H + j", literal(0.0)))
        for c in "XY"[: 2 - dx_is_dh]
        for k in range(cell.gates)
    ]
    carry_h = (0, out.store("R0", out.unit_index(0), f"{out.load('R0', out.unit_index(0))} + {injected[0]}"))
    incoming = f"{out.load('B', 'r * Hp + j')} + {out.load('R0', out.unit_index(0))} + {injected[0]}"
    if projected:
        out.emit_inactive_rows([carry_h, (0, hidden_projection.zero_masked(out)), *carry, *zero_gates])
        hidden_projection.emit_projection_backward(out, incoming)
        out.emit_row_loop(ROW_INDICES, [*carry, *zero_gates])
    else:
        out.emit_inactive_rows([carry_h, *carry, *zero_gates])
        out.emit_row_loop(ROW_INDICES, [(0, out.store("R0", out.unit_index(0), incoming)), *carry, *zero_gates])
    body = ScalarCode(read)
    emitted = [(name, body.emit(value)) for name, value in outputs]
    out.add(5, *body.lines)
    out.add(5, *(_store_output(out, name, value) for name, value in emitted))
    if not has_direct_path and not projected:
        out.add(5, out.store("R0", "q + j", literal(0.0)))


def _route_reset(out: KernelWriter, states: range) -> None:
    """Emit the loop that adds the state cotangents of reset rows to those of the reset state, and zeroes them."""
    out.add(3, "if has_reset:", "    for r in range(R):", "        if load(reset, t * N + r, ANY_SCOPE) != 0:")
    lines = []
    for k in states:
        index = out.unit_index(k)
        value = out.load(f"D{k}", index) if k else f"{out.load('B', 'r * Hp + j')} + {out.load('R0', index)}"
        lines.append((k, out.store(f"E{k}", index, f"{out.load(f'E{k}', index)} + {value}")))
    lines.append((0, out.store("B", "r * Hp + j", literal(0.0))))
    out.emit_unit_loop(
        6, [*lines, *((k, out.store(f"D{k}" if k else "R0", out.unit_index(k), literal(0.0))) for k in states)]
    )


def _weight_gradients(out: KernelWriter, dh: str, has_pregates: bool) -> None:
    """Emit a block's dx and its contributions to the gradients of weights and biases."""
    h, groups, n = out.h_width, _gate_groups(has_pregates, "LA, 0", "LA, W0_packed * capacity"), "rows_per_block"
    out.add(2, "if D > 0:", "    for s in range(row_blocks):")
    a, dx = "X, s * R * X_stride", "DX, (t0 + s) * N * D"
    out.add(4, matmul_call(a, "X_stride", "Q, 0", dx, "D", "O, zeros", "0", n, "W", "D"))
    out.add(4, pack_rhs_call("A, (t0 + s) * N * D", "D", "1", n, "D", "LB, 0", "capacity", "s * R"))
    _pack_cotangents(out, "X", "SI", groups)
    out.add(2, "if D > 0:")
    for start, span, packed in groups:
        out.add(3, matmul_lhs_transposed_call(span, "D", f"GI, {start} * D" if start != "0" else "GI, 0", packed))
    if dh != "X":
        _pack_cotangents(out, dh, "SH", groups)
    for (start, span, packed), factor, width in zip(groups, ("S0", pregates.GATED_STATE), (h, "H"), strict=False):
        out.add(2, "for s in range(row_blocks):")
        source = f"{factor}, (t0 + s) * N * {width}"
        out.add(3, pack_rhs_call(source, width, "1", n, width, "LB, 0", "capacity", "s * R"))
        out.add(2, matmul_lhs_transposed_call(span, width, f"GU, {start} * {h}" if start != "0" else "GU, 0", packed))


def _pack_cotangents(out: KernelWriter, name: str, sums: str, groups: list[tuple[str, str, str]]) -> None:
    """Emit the packing of a block's dx or dh, and their sums. The rows of two steps are R or, if D = 0, N apart."""
    out.add(2, "for s in range(1 if D > 0 else row_blocks):")
    for start, span, packed in groups:
        source = f"{name}, (t0 + s) * N * X_stride * (D == 0)" + (f" + {start}" if start != "0" else "")
        n = "m * R if D > 0 else rows_per_block"
        out.add(3, pack_lhs_call(source, n, "X_stride", span, packed, "s * R", f"{sums}, {start}"))


def _input_loader(out: KernelWriter, buffers: tuple[str, ...]) -> Callable[[str], str]:
    """Return the function that prints how the kernel reads an input of the traced adjoints."""

    def read(name: str) -> str:
        letter, k = name[0], int(name[1:])
        if letter == "d":
            carried = out.load(f"D{k}", "q + j") if k else f"{out.load('B', 'h + j')} + {out.load('R0', 'q + j')}"
            if out.h_width != "H" and not k:
                return hidden_projection.load_unprojected_cotangent(out)
            return f"{carried} + {_injected_cotangent(out, k)}"
        if letter == "p":
            return out.load(f"p{k}", "j")
        if letter == "q":
            return out.load("DQ", "h + j")
        if letter == "X":
            return out.load("X", f"x + {k} * H + j", name)
        buffer = f"S{k}" if letter == "s" else buffers[k]
        return out.load("G", f"g + {buffer[1:]} * H + j") if buffer[0] == "X" else out.load(buffer, "v + j")

    return read


def _store_output(out: KernelWriter, name: str, value: str) -> str:
    letter, k = name[0], name[1:]
    if letter == "P":
        return out.store(name, "q + j", f"{out.load(name, 'q + j')} + {value}")
    if letter in "XU":
        return out.store("X" if letter == "X" else "Y", f"x + {k} * H + j", value, name)
    return out.store("R0" if letter == "r" else f"D{k}", "q + j", value)
