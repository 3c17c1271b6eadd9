"""Prints what a projected h (Sak et al. 2014) adds to a cell's kernels: a product after each step, its adjoint.

With P the width of h, `HP` in a table, and Hw a width of panels, in the letters of source.py and back_source.py:

    for rows and units: the step, whose h is Vh                for rows: DH = the adjoint of h, (J,R,HP) for a block
    HN (R,Hw) = Vh W_hr'                                       DR (R,Hw) = DH W_hr, the adjoint of Vh
    for rows: h after the step                                 for rows and units: the step's back
    (forward; Vh is (T,N,H), UR are W_hr's panels)             (backward; GR and SR are DH' Vh and sums nobody reads)
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
    """W_hr' into panels; where its product starts, zeros."""
    out.add(1, pack_rhs_call("WR, 0", "1", "H", "H", "HP", "UR, 0"))
    out.add(1, "for j in range(Hw):", "    " + out.store("O", "j", literal(0.0)))


def emit_projection(out: KernelWriter, masked_line: tuple[int, str]) -> None:
    """The product, and h of the rows that took part."""
    out.add(3, matmul_call(f"{UNPROJECTED}, t * v0", "H", "UR, 0", "HN, 0", "Hw", "O, 0", "0", "n", "H", "Hw"))
    out.emit_row_loop("q, h = r * HP, r * Hw", [masked_line], "HP")
    value = out.load("HN", "h + j")
    out.add(5, out.store("M0", "t * m0 + q + j", value), out.store("C0", "q + j", value))


def emit_pack_projection_backward(out: KernelWriter) -> None:
    """W_hr into panels."""
    out.add(1, pack_rhs_call("WR, 0", "H", "1", "HP", "H", "UR, 0"))


def zero_masked(out: KernelWriter) -> str:
    """Nothing comes from a row that sits a step out."""
    return out.store("DH", _COTANGENT_INDEX, literal(0.0))


def emit_projection_backward(out: KernelWriter, cotangent: str) -> None:
    """The adjoint of `forward`."""
    at = out.unit_index(0)
    out.emit_row_loop("q = r * HP", [(0, out.store("R0", at, cotangent)), (0, zero_masked(out))], "HP")
    out.add(5, out.store("DH", _COTANGENT_INDEX, cotangent), out.store("R0", at, literal(0.0)))
    out.add(3, matmul_call("DH, (t - t0) * R * HP", "HP", "UR, 0", "DR, 0", "Hw", "O, zeros", "0", "n", "HP", "Hw"))


def load_unprojected_cotangent(out: KernelWriter) -> str:
    """The adjoint of the step's own h."""
    return out.load("DR", "r * Hw + j")


def emit_projection_gradients(out: KernelWriter) -> None:
    """A block's part of W_hr's gradient."""
    out.add(2, pack_lhs_call("DH, 0", "m * R", "HP", "HP", "LA, 0", "0", "SR, 0"))
    out.add(2, "for s in range(groups):")
    out.add(3, pack_rhs_call(f"{UNPROJECTED}, (t0 + s) * N * H", "H", "1", "many", "H", "LB, 0", "room", "s * R"))
    out.add(2, matmul_lhs_transposed_call("HP", "H", "GR, 0"))
