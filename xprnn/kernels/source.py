"""Prints the source of a cell's compiled scan: the whole time loop, with the traced cell inside it.

A kernel is one function of one argument, a table of addresses and numbers: its type never depends on an array's, so it
is compiled once for each cell and dtype. Each step is the recurrent product, then one loop over rows and units that
does all of the cell's maths in one pass over memory. With W = G*H, and Z the
width of U's panels (lanes.py), forward:

    X (T,N,W)  in: the projection; out: the first saved values, in its place      Vj (T,N,H)  the other saved values
    B (N,Z)    the step's product       U (H,Z)  the weight, in panels    pk (H,)  the cell's vectors
    K (W,)     b_ih, and b_hh where the two are added before anything else                L (W,)   b_hh elsewhere
    Ck (N,H)   the running state k      Ek (N,H)  where a reset leads
    Mk (T,N,H) the states after each step                 Sk (T,N,H) those before it, where resets make them differ

and backward, where the adjoint of h before a step is B + R, so that no pass is needed to add the two:

    X (T,N,W)  dx     Y (T,N,W)  dh, or X     B (N,Z)  the product with U (W,Z)     R (N,H)  the direct path
    Dk (N,H)   the other states' adjoints     Ek (N,H) those of the home states     Pk (N,H) those of the vectors
    Ik         what the caller sends into state k at each step, by strides          G, Vj, Mk, Sk  the tape
"""

from functools import lru_cache
from typing import Any, NamedTuple

from xprnn.cells import Cell
from xprnn.kernels.plan import trace_back, trace_step
from xprnn.kernels.scalar import Body, literal
from xprnn.kernels.trace import Graph, UntraceableError

__all__ = ["Sources", "slots_of", "sources_of"]

_HEAD = '''"""Written by xprnn for the cell {cell!r}; it may be deleted at any time."""
import math
import numpy as np
from xprnn.kernels.lanes import ANY, bytes_, exp64, f{bits} as real, load, longs, panels{bits} as panels, shift, store
from xprnn.kernels.lanes import tanh{bits} as tanh

F = np.float{bits}


def kernel(a):
'''
_COMMON = ("T", "N", "H", "W", "Z", "turned", "some", "resets", "counts", "active", "reset")
_KINDS = {"counts": "longs", "active": "bytes_", "reset": "bytes_"}


class Sources(NamedTuple):
    """A cell's kernels as text, and how to call them."""

    forward: str
    backward: str
    forward_table: tuple[str, ...]
    backward_table: tuple[str, ...]
    added: int  # the first gates, of which only x + h is used
    slots: tuple[str, ...]  # where each entry of `saved` is: Xk, Vj, Mk (after) or Sk (before)
    same: bool  # dh is dx, gate by gate


@lru_cache(maxsize=256)
def sources_of(cell: Cell, bits: int) -> Sources | None:
    """The cell's kernels for float32 or float64, or None where it can't be traced."""
    if cell.early:
        return None
    try:
        forward, added, slots = _forward(cell)
        backward, same = _backward(cell, slots)
    except Exception:  # whatever goes wrong with stand-ins, another kernel goes on, and says so if it was the cell
        return None
    head = _HEAD.format(cell=cell.name, bits=bits)
    return Sources(head + forward.text(), head + backward.text(), forward.table, backward.table, added, slots, same)


class _Text:
    """The lines of a kernel, its table, and the scopes of its arrays."""

    def __init__(self, numbers: list[str], pointers: list[str]) -> None:
        self.table = (*_COMMON, *numbers, *pointers)
        self.scopes: dict[str, int] = {}
        self.lines: list[str] = []
        for k, name in enumerate(self.table):
            kind = "real" if name in pointers else _KINDS.get(name, "")
            self.add(1, f"{name} = {kind}(a[{k}])")

    def add(self, depth: int, *lines: str) -> None:
        """More lines, `depth` levels in."""
        self.lines += ["    " * depth + line for line in lines]

    def scope(self, name: str) -> int:
        """The number of the memory called `name`."""
        scope = self.scopes.setdefault(name, len(self.scopes))
        if scope >= 64:
            raise UntraceableError("more arrays than scopes")
        return scope

    def load(self, name: str, index: str, scope: str = "") -> str:
        """The expression that reads an array."""
        return f"load({name}, {index}, {self.scope(scope or name)})"

    def store(self, name: str, index: str, value: str, scope: str = "") -> str:
        """The statement that writes it."""
        return f"store({name}, {index}, {self.scope(scope or name)}, {value})"

    def steps(self, order: str) -> None:
        """The time loop."""
        self.add(1, "for i in range(T):", f"    t = {order}", "    n = load(counts, t, ANY) if some else N")

    def rows(self, sit_out: list[str]) -> None:
        """The loops over the step's rows and units, up to where the cell's statements begin."""
        self.add(2, "for r in range(n):", "    q, b, x, m = r * H, r * Z, (t * N + r) * W, (t * N + r) * H")
        self.add(3, "if some and load(active, t * N + r, ANY) == 0:", "    for j in range(H):")
        self.add(5, *sit_out)
        self.add(4, "continue")
        self.add(3, "for j in range(H):")

    def text(self) -> str:
        """All of it."""
        return "\n".join((*self.lines, ""))


def _forward(cell: Cell) -> tuple[_Text, int, tuple[str, ...]]:
    new, saved, added = trace_step(cell, graph := Graph())
    states, vectors = range(len(cell.states)), range(len(cell.vectors))
    slots, own = slots_of(cell, graph, new, saved)
    spare = [slot for slot in own if slot[0] == "V"]
    pointers = ["X", "U", "B", "K", "L", *(f"{c}{k}" for c in "CEMS" for k in states), *spare]
    pointers += [f"p{k}" for k in vectors]
    out = _Text(["blank", "v0", *(f"m{k}" for k in states)], pointers)
    out.steps("T - 1 - i if turned else i")
    out.add(2, "if resets:", "    for r in range(N):", "        if load(reset, t * N + r, ANY) != 0:")
    out.add(5, "for j in range(H):")
    out.add(6, *(out.store(f"C{k}", "r * H + j", out.load(f"E{k}", "r * H + j")) for k in states))
    out.add(3, "for j in range(N * H):")
    out.add(4, *(out.store(f"S{k}", "t * v0 + j", out.load(f"C{k}", "j")) for k in states))
    out.add(2, "panels(C0, U, B, n, H, Z)")
    carried = [out.load(f"C{k}", "r * H + j") for k in states]
    carried[0] = f"F(0.0) if blank else {carried[0]}"
    carry = [out.store(f"M{k}", f"t * m{k} + r * H + j", value) for k, value in enumerate(carried)]
    out.rows(carry)
    body = Body(lambda name: _read(out, name))
    named = [(slot, body.name(value)) for slot, value in own.items()]
    after = body.names(new)
    out.add(4, *body.lines)
    for slot, value in named:
        gate = slot[0] == "X"
        place = ("X", f"x + {slot[1:]} * H + j") if gate else (slot, "t * v0 + q + j")
        out.add(4, out.store(*place, value, slot))
    for k, value in enumerate(after):
        out.add(4, out.store(f"M{k}", f"t * m{k} + q + j", value), out.store(f"C{k}", "q + j", value))
    out.add(2, "if some:", "    for r in range(n, N):", "        for j in range(H):")
    out.add(5, *carry)
    return out, added, slots


def slots_of(
    cell: Cell, graph: Graph, new: tuple[Any, ...], saved: tuple[Any, ...]
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Where each saved value lies, and those that need a place of their own: the first of them where the gates were."""
    known = {id(graph.input(f"s{k}")): f"S{k}" for k in range(len(cell.states))}
    known |= {id(v): f"M{k}" for k, v in enumerate(new)}
    own: dict[str, Any] = {}
    slots = []
    for value in saved:
        slot = known.get(id(value))
        if slot is None:
            slot = f"X{len(own)}" if len(own) < cell.gates else f"V{len(own)}"
            own[slot] = value
        slots.append(slot)
    return tuple(slots), own


def _read(out: _Text, name: str) -> str:
    """How the forward kernel reads an input of the traced step."""
    letter, k = name[0], name[1:]
    gate = f"{out.load('X', f'x + {k} * H + j', f'X{k}')} + {out.load('K', f'{k} * H + j')}"
    product = out.load("B", f"b + {k} * H + j")
    return {
        "g": f"{gate} + {product}",
        "x": gate,
        "h": f"{product} + {out.load('L', f'{k} * H + j')}",
        "s": out.load(f"C{k}", "q + j"),
        "p": out.load(f"p{k}", "j"),
    }[letter]


def _backward(cell: Cell, slots: tuple[str, ...]) -> tuple[_Text, bool]:
    outputs, same, through = trace_back(cell, len(slots))
    states, vectors = range(len(cell.states)), range(len(cell.vectors))
    spare = dict.fromkeys(s for s in slots if s[0] == "V")
    pointers = ["X", "Y", "U", "B", "R", "G", *(f"{c}{k}" for c in "DEIMS" for k in states), *spare]
    pointers += [f"{c}{k}" for c in "pP" for k in vectors]
    out = _Text([f"{c}{k}" for c in "ab" for k in states], pointers)
    others = [k for k in states if k]
    sent = {k: out.load(f"I{k}", f"t * a{k} + r * b{k} + j") for k in states}
    passed = [out.store(f"D{k}", "r * H + j", f"{out.load(f'D{k}', 'r * H + j')} + {sent[k]}") for k in others]
    out.steps("i if turned else T - 1 - i")
    out.add(2, "if some:", "    for r in range(n, N):", "        for j in range(H):")
    out.add(5, out.store("R", "r * H + j", f"{out.load('R', 'r * H + j')} + {sent[0]}"), *passed)
    incoming = f"{out.load('B', 'r * Z + j')} + {out.load('R', 'r * H + j')} + {sent[0]}"
    out.rows([out.store("R", "r * H + j", incoming), *passed])
    body = Body(lambda name: _read_back(out, name, slots, sent))
    named = [(name, body.name(value)) for name, value in outputs]
    out.add(4, *body.lines)
    out.add(4, *(_write_back(out, name, value) for name, value in named))
    if not through:
        out.add(4, out.store("R", "q + j", literal(0.0)))
    out.add(2, f"panels(shift({'X' if same else 'Y'}, t * N * W), U, B, n, W, Z)")
    out.add(2, "if resets:", "    for r in range(N):", "        if load(reset, t * N + r, ANY) != 0:")
    out.add(5, "for j in range(H):")
    direct = f"{out.load('B', 'r * Z + j')} + {out.load('R', 'r * H + j')}"
    for k in states:
        value = out.load(f"D{k}", "r * H + j") if k else direct
        out.add(6, out.store(f"E{k}", "r * H + j", f"{out.load(f'E{k}', 'r * H + j')} + {value}"))
    out.add(6, out.store("B", "r * Z + j", literal(0.0)))
    out.add(6, *(out.store(name, "r * H + j", literal(0.0)) for name in ("R", *(f"D{k}" for k in others))))
    return out, same


def _read_back(out: _Text, name: str, slots: tuple[str, ...], sent: dict[int, str]) -> str:
    """How the backward kernel reads an input of the traced adjoint."""
    letter, k = name[0], int(name[1:])
    if letter == "d":
        own = out.load(f"D{k}", "q + j") if k else f"{out.load('B', 'b + j')} + {out.load('R', 'q + j')}"
        return f"{own} + {sent[k]}"
    if letter == "p":
        return out.load(f"p{k}", "j")
    slot = f"S{k}" if letter == "s" else slots[k]
    return out.load("G", f"x + {slot[1:]} * H + j") if slot[0] == "X" else out.load(slot, "m + j")


def _write_back(out: _Text, name: str, value: str) -> str:
    letter, k = name[0], name[1:]
    if letter == "P":
        return out.store(name, "q + j", f"{out.load(name, 'q + j')} + {value}")
    if letter in "XU":
        return out.store("X" if letter == "X" else "Y", f"x + {k} * H + j", value, name)
    return out.store("R" if letter == "r" else f"D{k}", "q + j", value)
