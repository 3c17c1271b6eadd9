"""A cell's gates in two groups, each with a product of its own: where a forward kernel keeps them.

The first group has `cut` columns, in panels Y wide. x W' of both lies in P. Where only x + h of a group is used, the
recurrent product is added onto that; the other's stays apart in B and its bias in L. A cell with early gates has those
as its first group, and the second's product is not of h but of what they let through.
"""

from typing import NamedTuple

from xprnn.kernels.jit.kernel_writer import KernelWriter, matmul_call, pack_rhs_call
from xprnn.kernels.tracing.scalar_code import literal

__all__ = ["GateGroups"]


class GateGroups(NamedTuple):
    """The two groups."""

    first_gates: int  # gates of the first
    separate_recurrent: tuple[bool, bool]  # whether h U' of each is kept apart from x W'
    has_pregates: bool

    @property
    def recurrent_width(self) -> str:
        """The width of B and L."""
        return {(False, False): "0", (False, True): "Z - Y", (True, False): "Y", (True, True): "Z"}[
            self.separate_recurrent
        ]

    @property
    def second_offset(self) -> str:
        """Where the second group begins in a row of B and L."""
        return "Y" if self.separate_recurrent[0] else "0"

    @property
    def row_indices(self) -> str:
        """Where a row begins in the arrays of the step's loop."""
        return f"q, h, x, g = r * H, r * ({self.recurrent_width}), z + r * Z, (t * N + r) * W * keep"

    def emit_pack_weights(self, out: KernelWriter) -> None:
        """Both weights into panels and both biases into rows."""
        h = out.h_width
        out.add(1, "if D > 0:", "    " + pack_rhs_call("WI, 0", "1", "D", "D", "cut", "Q, 0"))
        out.add(2, pack_rhs_call("WI, cut * D", "1", "D", "D", "W - cut", "Q, Y * D"))
        out.add(1, pack_rhs_call("WH, 0", "1", h, h, "cut", "U, 0"))
        out.add(1, pack_rhs_call(f"WH, cut * {h}", "1", h, h, "W - cut", f"U, Y * {h}"))
        out.add(1, "for j in range(Z):", "    " + out.store("K", "j", literal(0.0)))
        out.add(1, f"for j in range({self.recurrent_width}):", "    " + out.store("L", "j", literal(0.0)))
        behind = "Y - cut + j" if self.separate_recurrent[0] else "j - cut"
        for apart, span, k, at in zip(
            self.separate_recurrent, ("cut", "cut, W"), ("j", "Y - cut + j"), ("j", behind), strict=True
        ):
            bi, bh = out.load("BI", "j"), out.load("BH", "j")
            out.add(1, f"for j in range({span}):", "    " + out.store("K", k, bi if apart else f"{bi} + {bh}"))
            if apart:
                out.add(2, out.store("L", at, bh))

    def emit_input_projection(self, out: KernelWriter) -> None:
        """P = x W' + K for a block: a product, or rows of W' looked up."""
        out.add(2, "if D > 0:", "    for s in range(groups):")
        for start, span in (("0", "Y"), ("Y", "Z - Y")):
            x, panels, to = "A, (t0 + s) * N * D", f"Q, {start} * D", f"P, s * R * Z + {start}"
            out.add(4, matmul_call(x, "D", panels, to, "Z", f"K, {start}", "0", "many", "D", span))
        out.add(2, "else:", "    for s in range(m):", "        for r in range(R):")
        out.add(5, "v, z = load(ids, (t0 + s) * N + r, ANY) * W, (s * R + r) * Z")
        for span, to in (("cut", "j"), ("cut, W", "Y - cut + j")):
            value = f"{out.load('WI', 'v + j')} + {out.load('K', to)}"
            out.add(5, f"for j in range({span}):", "    " + out.store("P", f"z + {to}", value))

    def emit_recurrent_product(self, out: KernelWriter, group: int, a: str, inner: str) -> None:
        """A group's recurrent product, of all rows of the step."""
        panels, span = (f"U, Y * {inner}", "Z - Y") if group else ("U, 0", "Y")
        if self.separate_recurrent[group]:
            start = self.second_offset if group else "0"
            call = matmul_call(
                a, inner, panels, f"B, {start}", self.recurrent_width, f"L, {start}", "0", "n", inner, span
            )
        else:
            to = "P, z + Y" if group else "P, z"
            call = matmul_call(a, inner, panels, to, "Z", to, "Z", "n", inner, span)
        out.add(3, *(["if Y < Z:", "    " + call] if group else [call]))

    def load_input(self, out: KernelWriter, name: str) -> str:
        """How the kernel reads an input of the traced functions."""
        letter, k = name[0], int(name[1:])
        group = k >= self.first_gates
        at = k - self.first_gates * group
        sum_ = out.load("P", f"x + {'Y + ' if group else ''}{at} * H + j", f"P{k}" if self.has_pregates else "")
        return {
            "g": sum_,
            "x": sum_,
            "h": out.load("B", f"h + {'Y + ' if group and self.separate_recurrent[0] else ''}{at} * H + j"),
            "s": out.load(f"C{k}", "q + j"),
            "p": out.load(f"p{k}", "j"),
        }[letter]
