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
from xprnn.kernels.jit.gate_groups import Halves
from xprnn.kernels.jit.kernel_writer import Text, product
from xprnn.kernels.tracing.cell_trace import slots_of, trace_early
from xprnn.kernels.tracing.graph import Graph
from xprnn.kernels.tracing.scalar_code import Body, literal

__all__ = ["Early", "Q", "back", "forward", "traced"]

Q = "Vq"


class Early(NamedTuple):
    """The traced early gates."""

    values: tuple[Any, ...]
    q: Any
    together: bool  # whether they are used only as the sum x + h
    slots: tuple[str, ...]  # where each value lies
    own: dict[str, Any]  # those that need a place


def traced(cell: Cell) -> Early:
    """Those of this cell."""
    graph = Graph()
    values, q, together = trace_early(cell, graph)
    slots, own = slots_of(cell, graph, (), values)
    return Early(values, q, together, slots, own)


def forward(out: Text, halves: Halves, early: Early, used: set[str]) -> None:
    """The loop over rows and units before the second product; the step reads those of its inputs that are `used`."""
    out.rows(halves.indices, [(1, out.store(Q, "t * v0 + r * H + j", literal(0.0)))])
    body = Body(lambda name: halves.read(out, name))
    passed = [(k, body.name(early.values[k])) for k in range(halves.first) if f"x{k}" in used]
    q, named = body.name(early.q), [(slot, body.name(value)) for slot, value in early.own.items()]
    out.add(5, *body.lines)
    for slot, value in named:
        out.save(slot, value)
    out.save(Q, q)
    out.add(5, *(out.store("P", f"x + {k} * H + j", value, f"P{k}") for k, value in passed))


def back(out: Text, indices: str, dh: str, outputs: list[tuple[str, Any]], read: Any, same: bool) -> None:
    """The adjoint: the second product's, then the loop over rows and units."""
    out.add(
        3, product(f"{dh}, z * Xw + cut", "Xw", "U, cut * Hz", "DQ, 0", "Hz", "O, zeros", "0", "n", "W - cut", "Hz")
    )
    out.rows(indices, [])
    body = Body(read)
    named = [(name, body.name(value)) for name, value in outputs]
    out.add(5, *body.lines)
    for name, value in named:
        letter, k = name[0], name[1:]
        if letter == "X":
            place = f"x + {k} * H + j"
            out.add(5, out.store("X", place, value, name))
            if not same:
                out.add(5, out.store("Y", place, value, f"U{k}"))
        else:
            to = {"P": f"P{k}", "r": "R0", "e": f"D{k}"}[letter]
            out.add(5, out.store(to, "q + j", f"{out.load(to, 'q + j')} + {value}"))
