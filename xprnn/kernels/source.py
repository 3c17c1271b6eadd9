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

and backward, where the adjoint of h before a step is B + R0, so that no pass is needed to add the two:

    X (J,R,W)  a block's dx, (T,N,W) with D = 0; Y dh, or X          B (R,Hz), R0 (N,H)  dh U, and what comes directly
    Dk (N,H)   the other states' adjoints                            Ek, Pk (N,H)  those of home states and vectors
    LA, LB     a block's factors of the weights' gradients, packed   GI, GU, SI, SH  gradients of weights and biases
    Ik         what the caller sends into state k, by strides        G, Vj, Mk, Sk  the tape; DX (T,N,D) goes out
"""

from functools import lru_cache
from typing import Any, NamedTuple

from xprnn.cells import Cell
from xprnn.kernels.plan import trace_back, trace_step
from xprnn.kernels.scalar import Body, literal
from xprnn.kernels.text import Text, gradient, pack_left, pack_right, product
from xprnn.kernels.trace import Graph

__all__ = ["Sources", "slots_of", "sources_of"]

_NUMBERS = ["T", "N", "R", "H", "W", "D", "J", "go", "turned", "some", "resets"]


class Sources(NamedTuple):
    """A cell's kernels as text, and how to call them."""

    forward: str
    backward: str
    forward_table: tuple[str, ...]
    backward_table: tuple[str, ...]
    added: int  # the first gates, of which only x + h is used
    slots: tuple[str, ...]  # where each entry of `saved` is: Xk, Vj, Mk (after) or Sk (before)
    same: bool  # dh is dx, gate by gate

    def __hash__(self) -> int:
        return hash(self.forward)  # a text remembers its own


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
    texts = forward.text(cell.name, bits), backward.text(cell.name, bits)
    return Sources(*texts, forward.table, backward.table, added, slots, same)


# --- forward


def _forward(cell: Cell) -> tuple[Text, int, tuple[str, ...]]:
    new, saved, added = trace_step(cell, graph := Graph())
    states, vectors = range(len(cell.states)), range(len(cell.vectors))
    slots, own = slots_of(cell, graph, new, saved)
    spare = [slot for slot in own if slot[0] == "V"]
    pointers = ["A", "WI", "WH", "BI", "BH", "Q", "U", "P", "B", "K", "L", "O", "G"]
    pointers += [*(f"{c}{k}" for c in "CEMS" for k in states), *spare, *(f"p{k}" for k in vectors)]
    out = Text([*_NUMBERS, "cut", "Y", "Z", "keep", "v0", *(f"m{k}" for k in states)], pointers)
    _weights(out)
    out.blocks(turned=True)
    _project(out)
    out.steps("(m - 1 - i if turned else i)")
    out.add(3, "if resets:", "    for r in range(R):", "        if load(reset, t * N + r, ANY) != 0:")
    out.add(6, "for j in range(H):")
    out.add(7, *(out.store(f"C{k}", "r * H + j", out.load(f"E{k}", "r * H + j")) for k in states))
    out.add(4, "for j in range(R * H):")
    out.add(5, *(out.store(f"S{k}", "t * v0 + j", out.load(f"C{k}", "j")) for k in states))
    out.add(3, "z = (t - t0) * R * Z")
    out.add(3, product("C0, 0", "H", "U, 0", "P, z", "Z", "P, z", "Z", "n", "H", "Y"))
    out.add(3, "if Y < Z:", "    " + product("C0, 0", "H", "U, Y * H", "B, 0", "Z - Y", "L, 0", "0", "n", "H", "Z - Y"))
    carried = [out.load(f"C{k}", "r * H + j") for k in states]
    carried[0] = f"{carried[0]} if keep else F(0.0)"
    carry = [out.store(f"M{k}", f"t * m{k} + r * H + j", value) for k, value in enumerate(carried)]
    out.rows("q, h, x, g = r * H, r * (Z - Y), z + r * Z, (t * N + r) * W * keep", carry)
    body = Body(lambda name: _read(out, name, added))
    named = [(slot, body.name(value)) for slot, value in own.items()]
    after = body.names(new)
    out.add(5, *body.lines)
    for slot, value in named:
        place = ("G", f"g + {slot[1:]} * H + j") if slot[0] == "X" else (slot, "t * v0 + q + j")
        out.add(5, out.store(*place, value, slot))
    for k, value in enumerate(after):
        out.add(5, out.store(f"M{k}", f"t * m{k} + q + j", value), out.store(f"C{k}", "q + j", value))
    out.add(3, "if some:", "    for r in range(n, R):", "        for j in range(H):")
    out.add(6, *carry)
    return out, added, slots


def _weights(out: Text) -> None:
    """Both weights into panels and both biases into rows, the gates that are added first."""
    out.add(1, "if D > 0:", "    " + pack_right("WI, 0", "1", "D", "D", "cut", "Q, 0"))
    out.add(2, pack_right("WI, cut * D", "1", "D", "D", "W - cut", "Q, Y * D"))
    out.add(1, pack_right("WH, 0", "1", "H", "H", "cut", "U, 0"))
    out.add(1, pack_right("WH, cut * H", "1", "H", "H", "W - cut", "U, Y * H"))
    out.add(1, "for j in range(Z):", "    " + out.store("K", "j", literal(0.0)))
    out.add(1, "for j in range(Z - Y):", "    " + out.store("L", "j", literal(0.0)))
    out.add(1, "for j in range(cut):", "    " + out.store("K", "j", f"{out.load('BI', 'j')} + {out.load('BH', 'j')}"))
    out.add(1, "for j in range(cut, W):", "    " + out.store("K", "Y - cut + j", out.load("BI", "j")))
    out.add(2, out.store("L", "j - cut", out.load("BH", "j")))


def _project(out: Text) -> None:
    """P = x W' + K for a block: a product, or rows of W' looked up."""
    out.add(2, "if D > 0:", "    for s in range(groups):")
    for start, span in (("0", "Y"), ("Y", "Z - Y")):
        x, panels, to = "A, (t0 + s) * N * D", f"Q, {start} * D", f"P, s * R * Z + {start}"
        out.add(4, product(x, "D", panels, to, "Z", f"K, {start}", "0", "many", "D", span))
    out.add(2, "else:", "    for s in range(m):", "        for r in range(R):")
    out.add(5, "v, z = load(ids, (t0 + s) * N + r, ANY) * W, (s * R + r) * Z")
    for span, to in (("cut", "j"), ("cut, W", "Y - cut + j")):
        value = f"{out.load('WI', 'v + j')} + {out.load('K', to)}"
        out.add(5, f"for j in range({span}):", "    " + out.store("P", f"z + {to}", value))


def slots_of(
    cell: Cell, graph: Graph, new: tuple[Any, ...], saved: tuple[Any, ...]
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Where each saved value lies, and those that need a place of their own: the first of them beside the gates."""
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


def _read(out: Text, name: str, added: int) -> str:
    """How the forward kernel reads an input of the traced step."""
    letter, k = name[0], int(name[1:])
    return {
        "g": out.load("P", f"x + {k} * H + j"),
        "x": out.load("P", f"x + Y + {k - added} * H + j"),
        "h": out.load("B", f"h + {k - added} * H + j"),
        "s": out.load(f"C{k}", "q + j"),
        "p": out.load(f"p{k}", "j"),
    }[letter]


# --- and its adjoint


def _backward(cell: Cell, slots: tuple[str, ...]) -> tuple[Text, bool]:
    outputs, same, through = trace_back(cell, len(slots))
    states, vectors = range(len(cell.states)), range(len(cell.vectors))
    spare = dict.fromkeys(s for s in slots if s[0] == "V")
    pointers = ["A", "WI", "WH", "Q", "U", "LA", "LB", "GI", "GU", "SI", "SH", "DX", "O", "X", "Y", "B", "R0", "G"]
    pointers += [*(f"{c}{k}" for c in "DEIMS" for k in states), *spare, *(f"{c}{k}" for c in "pP" for k in vectors)]
    out = Text([*_NUMBERS, "Hz", "room", "zeros", *(f"{c}{k}" for c in "ab" for k in states)], pointers)
    others = [k for k in states if k]
    sent = {k: out.load(f"I{k}", f"t * a{k} + r * b{k} + j") for k in states}
    passed = [out.store(f"D{k}", "r * H + j", f"{out.load(f'D{k}', 'r * H + j')} + {sent[k]}") for k in others]
    idle = [
        out.store(c, f"(z + r) * W + {k} * H + j", literal(0.0)) for c in "XY"[: 2 - same] for k in range(cell.gates)
    ]
    out.add(1, "if D > 0:", "    " + pack_right("WI, 0", "D", "1", "W", "D", "Q, 0"))
    out.add(1, pack_right("WH, 0", "H", "1", "W", "H", "U, 0"))
    out.blocks(turned=False)
    out.steps("(i if turned else m - 1 - i)")
    out.add(3, "z = (t - t0) * R if D > 0 else t * N")
    out.add(3, "if some:", "    for r in range(n, R):", "        for j in range(H):")
    out.add(6, out.store("R0", "r * H + j", f"{out.load('R0', 'r * H + j')} + {sent[0]}"), *passed, *idle)
    incoming = f"{out.load('B', 'r * Hz + j')} + {out.load('R0', 'r * H + j')} + {sent[0]}"
    indices = "q, h, x, g, v = r * H, r * Hz, (z + r) * W, (t * N + r) * W, (t * N + r) * H"
    out.rows(indices, [out.store("R0", "r * H + j", incoming), *passed, *idle])
    body = Body(lambda name: _read_back(out, name, slots, sent))
    named = [(name, body.name(value)) for name, value in outputs]
    out.add(5, *body.lines)
    out.add(5, *(_write_back(out, name, value) for name, value in named))
    if not through:
        out.add(5, out.store("R0", "q + j", literal(0.0)))
    dh = "X" if same else "Y"
    out.add(3, product(f"{dh}, z * W", "W", "U, 0", "B, 0", "Hz", "O, zeros", "0", "n", "W", "Hz"))
    _resets(out, list(states))
    _gradients(out, dh)
    return out, same


def _resets(out: Text, states: list[int]) -> None:
    """The adjoints of rows that were reset before this step go home."""
    out.add(3, "if resets:", "    for r in range(R):", "        if load(reset, t * N + r, ANY) != 0:")
    out.add(6, "for j in range(H):")
    for k in states:
        direct = f"{out.load('B', 'r * Hz + j')} + {out.load('R0', 'r * H + j')}"
        value = out.load(f"D{k}", "r * H + j") if k else direct
        out.add(7, out.store(f"E{k}", "r * H + j", f"{out.load(f'E{k}', 'r * H + j')} + {value}"))
    out.add(7, out.store("B", "r * Hz + j", literal(0.0)))
    out.add(7, *(out.store(f"D{k}" if k else "R0", "r * H + j", literal(0.0)) for k in states))


def _gradients(out: Text, dh: str) -> None:
    """Of a block: dx, and the parts of all parameters' gradients."""
    out.add(2, "if D > 0:", "    for s in range(groups):")
    out.add(4, product("X, s * R * W", "W", "Q, 0", "DX, (t0 + s) * N * D", "D", "O, zeros", "0", "many", "W", "D"))
    out.add(4, pack_right("A, (t0 + s) * N * D", "D", "1", "many", "D", "LB, 0", "room", "s * R"))
    _pack(out, "X", "SI")
    out.add(2, "if D > 0:", "    " + gradient("W", "D", "GI"))
    if dh != "X":
        _pack(out, dh, "SH")
    out.add(2, "for s in range(groups):")
    out.add(3, pack_right("S0, (t0 + s) * N * H", "H", "1", "many", "H", "LB, 0", "room", "s * R"))
    out.add(2, gradient("W", "H", "GU"))


def _pack(out: Text, name: str, sums: str) -> None:
    """A block's dx or dh, and their sums: the rows are side by side, or, with D = 0, N apart."""
    out.add(2, "for s in range(1 if D > 0 else groups):")
    start, rows = f"{name}, (t0 + s) * N * W * (D == 0)", "m * R if D > 0 else many"
    out.add(3, pack_left(start, rows, "W", "LA, 0", "s * R", f"{sums}, 0"))


def _read_back(out: Text, name: str, slots: tuple[str, ...], sent: dict[int, str]) -> str:
    """How the backward kernel reads an input of the traced adjoint."""
    letter, k = name[0], int(name[1:])
    if letter == "d":
        own = out.load(f"D{k}", "q + j") if k else f"{out.load('B', 'h + j')} + {out.load('R0', 'q + j')}"
        return f"{own} + {sent[k]}"
    if letter == "p":
        return out.load(f"p{k}", "j")
    slot = f"S{k}" if letter == "s" else slots[k]
    return out.load("G", f"g + {slot[1:]} * H + j") if slot[0] == "X" else out.load(slot, "v + j")


def _write_back(out: Text, name: str, value: str) -> str:
    letter, k = name[0], name[1:]
    if letter == "P":
        return out.store(name, "q + j", f"{out.load(name, 'q + j')} + {value}")
    if letter in "XU":
        return out.store("X" if letter == "X" else "Y", f"x + {k} * H + j", value, name)
    return out.store("R0" if letter == "r" else f"D{k}", "q + j", value)
