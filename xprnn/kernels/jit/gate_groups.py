"""The two groups of a cell's gates, and where a forward kernel stores their sums.

Each group has a recurrent product of its own. The first group has W0 columns, padded to Wp0 in the panels; both groups
together have W columns, padded to Wp. The array P stores x W' of both groups. If the cell uses only the sum x + h of a
group's gates, the recurrent product is added to P. Otherwise that group's recurrent product is stored in B and its
recurrent bias in L. A cell with pregates has these as its first group. The second group's recurrent product then
multiplies the gated state that the pregates compute, instead of h.
"""

from typing import NamedTuple

from xprnn.kernels.jit.kernel_writer import KernelWriter, matmul_call, pack_rhs_call
from xprnn.kernels.tracing.scalar_code import literal

__all__ = ["GateGroups"]


class GateGroups(NamedTuple):
    """Split of a cell's gates into two groups."""

    first_gates: int  # number of gates in the first group
    separate_recurrent: tuple[bool, bool]  # per group: h U' is stored apart from x W'
    has_pregates: bool

    @property
    def recurrent_width(self) -> str:
        """Width of B and L, as an expression in the kernel."""
        return {(False, False): "0", (False, True): "Wp - Wp0", (True, False): "Wp0", (True, True): "Wp"}[
            self.separate_recurrent
        ]

    @property
    def second_offset(self) -> str:
        """First column of the second group in B and L."""
        return "Wp0" if self.separate_recurrent[0] else "0"

    @property
    def row_indices(self) -> str:
        """Statement that sets the offsets of row r: q in (N,H) arrays, h in B, x in P, g in G."""
        return f"q, h, x, g = r * H, r * ({self.recurrent_width}), z + r * Wp, (t * N + r) * W * record_tape"

    def emit_pack_weights(self, out: KernelWriter) -> None:
        """Emit the packing of both weights into panels, and of the biases into the rows K and L."""
        h = out.h_width
        out.add(1, "if D > 0:", "    " + pack_rhs_call("WI, 0", "1", "D", "D", "W0", "Q, 0"))
        out.add(2, pack_rhs_call("WI, W0 * D", "1", "D", "D", "W - W0", "Q, Wp0 * D"))
        out.add(1, pack_rhs_call("WH, 0", "1", h, h, "W0", "U, 0"))
        out.add(1, pack_rhs_call(f"WH, W0 * {h}", "1", h, h, "W - W0", f"U, Wp0 * {h}"))
        out.add(1, "for j in range(Wp):", "    " + out.store("K", "j", literal(0.0)))
        out.add(1, f"for j in range({self.recurrent_width}):", "    " + out.store("L", "j", literal(0.0)))
        second = "Wp0 - W0 + j" if self.separate_recurrent[0] else "j - W0"
        for separate, span, k, index in zip(
            self.separate_recurrent, ("W0", "W0, W"), ("j", "Wp0 - W0 + j"), ("j", second), strict=True
        ):
            bi, bh = out.load("BI", "j"), out.load("BH", "j")
            out.add(1, f"for j in range({span}):", "    " + out.store("K", k, bi if separate else f"{bi} + {bh}"))
            if separate:
                out.add(2, out.store("L", index, bh))

    def emit_input_projection(self, out: KernelWriter) -> None:
        """Emit P = x W' + K for a block: a product, or for integer x a gather of rows of W'."""
        out.add(2, "if D > 0:", "    for s in range(row_blocks):")
        for start, span in (("0", "Wp0"), ("Wp0", "Wp - Wp0")):
            x, panels, target = "A, (t0 + s) * N * D", f"Q, {start} * D", f"P, s * R * Wp + {start}"
            bias, n = f"K, {start}", "rows_per_block"
            out.add(4, matmul_call(x, "D", panels, target, "Wp", bias, "0", n, "D", span))
        out.add(2, "else:", "    for s in range(m):", "        for r in range(R):")
        out.add(5, "v, z = load(ids, (t0 + s) * N + r, ANY_SCOPE) * W, (s * R + r) * Wp")
        for span, column in (("W0", "j"), ("W0, W", "Wp0 - W0 + j")):
            value = f"{out.load('WI', 'v + j')} + {out.load('K', column)}"
            out.add(5, f"for j in range({span}):", "    " + out.store("P", f"z + {column}", value))

    def emit_recurrent_product(self, out: KernelWriter, group: int, a: str, inner: str) -> None:
        """Emit a group's recurrent product for all rows of the step."""
        panels, span = (f"U, Wp0 * {inner}", "Wp - Wp0") if group else ("U, 0", "Wp0")
        if self.separate_recurrent[group]:
            start = self.second_offset if group else "0"
            call = matmul_call(
                a, inner, panels, f"B, {start}", self.recurrent_width, f"L, {start}", "0", "n", inner, span
            )
        else:
            target = "P, z + Wp0" if group else "P, z"
            call = matmul_call(a, inner, panels, target, "Wp", target, "Wp", "n", inner, span)
        out.add(3, *(["if Wp0 < Wp:", "    " + call] if group else [call]))

    def load_input(self, out: KernelWriter, name: str) -> str:
        """Return the expression that reads an input of the traced cell functions."""
        letter, k = name[0], int(name[1:])
        group = k >= self.first_gates
        column = k - self.first_gates * group
        p_index = f"x + {'Wp0 + ' if group else ''}{column} * H + j"
        gate_sum = out.load("P", p_index, f"P{k}" if self.has_pregates else "")
        return {
            "g": gate_sum,
            "x": gate_sum,
            "h": out.load("B", f"h + {'Wp0 + ' if group and self.separate_recurrent[0] else ''}{column} * H + j"),
            "s": out.load(f"C{k}", "q + j"),
            "p": out.load(f"p{k}", "j"),
        }[letter]
