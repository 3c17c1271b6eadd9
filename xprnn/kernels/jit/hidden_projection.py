"""Prints what a projected h (Sak et al. 2014) adds to a cell's kernels: a product after each step, and its adjoint.

HP is the width of the projected h. The array names are those of forward_driver.py and backward_driver.py. Vh is h
before its projection, HN and DR have rows of `projection_stride` elements:

    forward                                                  backward
    for rows and units: the step, which writes Vh (T,N,H)    for rows: DH (J,R,HP) = cotangent of h, for a block
    HN (R,.) = Vh W_hr'                                      DR (R,.) = DH W_hr, the cotangent of Vh
    for rows: h = HN                                         for rows and units: adjoint of the step

WR is W_hr; UR holds the panels of W_hr' (forward) or W_hr (backward). After a block, GR += DH' Vh is the gradient of
W_hr. SR receives the column sums of DH, which are not used.
"""

from xprnn.kernels.jit.kernel_writer import (
    KernelWriter,
    matmul_call,
    matmul_lhs_transposed_call,
    pack_lhs_call,
    pack_rhs_call,
)
from xprnn.kernels.tracing.scalar_code import literal

__all__ = [
    "PROJECTION_POINTERS",
    "UNPROJECTED",
    "emit_pack_projection",
    "emit_pack_projection_backward",
    "emit_projection",
    "emit_projection_backward",
    "emit_projection_gradients",
    "load_unprojected_cotangent",
    "zero_masked",
]

UNPROJECTED = "Vh"
PROJECTION_POINTERS = ("WR", "UR", "DH", "DR", "GR", "SR")
_COTANGENT_INDEX = "((t - t0) * R + r) * HP + j"


def emit_pack_projection(out: KernelWriter) -> None:
    """Emit the packing of W_hr' into panels, and zeros as the start of its product."""
    out.add(1, pack_rhs_call("WR, 0", "1", "H", "H", "HP", "UR, 0"))
    out.add(1, "for j in range(projection_stride):", "    " + out.store("O", "j", literal(0.0)))


def emit_projection(out: KernelWriter, masked_line: tuple[int, str]) -> None:
    """Emit the projection of a step, and the stores of h for the active rows."""
    a, stride = f"{UNPROJECTED}, t * saved_stride", "projection_stride"
    out.add(3, matmul_call(a, "H", "UR, 0", "HN, 0", stride, "O, 0", "0", "n", "H", stride))
    out.emit_row_loop(f"q, h = r * HP, r * {stride}", [masked_line], "HP")
    value = out.load("HN", "h + j")
    out.add(5, out.store("M0", "t * M0_stride + q + j", value), out.store("C0", "q + j", value))


def emit_pack_projection_backward(out: KernelWriter) -> None:
    """Emit the packing of W_hr into panels."""
    out.add(1, pack_rhs_call("WR, 0", "H", "1", "HP", "H", "UR, 0"))


def zero_masked(out: KernelWriter) -> str:
    """Print the statement that zeroes the cotangent of h in a masked row."""
    return out.store("DH", _COTANGENT_INDEX, literal(0.0))


def emit_projection_backward(out: KernelWriter, cotangent: str) -> None:
    """Emit the adjoint of the projection of a step."""
    index, stride = out.unit_index(0), "projection_stride"
    out.emit_row_loop("q = r * HP", [(0, out.store("R0", index, cotangent)), (0, zero_masked(out))], "HP")
    out.add(5, out.store("DH", _COTANGENT_INDEX, cotangent), out.store("R0", index, literal(0.0)))
    a = "DH, (t - t0) * R * HP"
    out.add(3, matmul_call(a, "HP", "UR, 0", "DR, 0", stride, "O, zeros", "0", "n", "HP", stride))


def load_unprojected_cotangent(out: KernelWriter) -> str:
    """Print the expression that reads the cotangent of h before its projection."""
    return out.load("DR", "r * projection_stride + j")


def emit_projection_gradients(out: KernelWriter) -> None:
    """Emit a block's contribution to the gradient of W_hr."""
    out.add(2, pack_lhs_call("DH, 0", "m * R", "HP", "HP", "LA, 0", "0", "SR, 0"))
    out.add(2, "for s in range(row_blocks):")
    source, n = f"{UNPROJECTED}, (t0 + s) * N * H", "rows_per_block"
    out.add(3, pack_rhs_call(source, "H", "1", n, "H", "LB, 0", "capacity", "s * R"))
    out.add(2, matmul_lhs_transposed_call("HP", "H", "GR, 0"))
