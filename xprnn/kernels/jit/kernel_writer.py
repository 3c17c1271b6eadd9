"""The lines of a printed kernel: its table of numbers and addresses, its loads and stores, its calls of gemm.py."""

from xprnn.kernels.tracing.graph import UntraceableError

__all__ = ["NUMBERS", "Text", "gradient", "pack_left", "pack_right", "product"]

_HEAD = '''"""Written by xprnn for the cell {cell!r}; it may be deleted at any time."""
import math
import numpy as np
from xprnn.kernels.jit.simd import ANY, bytes_, exp64, f{bits} as real, invoke, load, longs, shift, spot, store
from xprnn.kernels.jit.simd import tanh{bits} as tanh, widest

F = np.float{bits}


def kernel(a):
'''
NUMBERS = ("T", "N", "R", "H", "W", "D", "J", "go", "turned", "some", "resets")
_KINDS = {"counts": "longs", "active": "bytes_", "reset": "bytes_", "ids": "longs"}


class Text:
    """The lines of a kernel, its table, and the scopes of its arrays."""

    def __init__(self, numbers: list[str], pointers: list[str], projected: bool = False) -> None:
        self.table = (*numbers, *_KINDS, *pointers)
        self.wide = "HP" if projected else "H"  # the width of state 0
        self.scopes: dict[str, int] = {}
        self.lines = ["    widest()"]
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

    def blocks(self, turned: bool) -> None:
        """The loop over blocks of J steps: `m` steps from t0 on, in `groups` pieces of `many` rows side by side."""
        first, last = "b", "T - b - m"
        self.add(1, "for b in range(0, T, J):", "    m = J if J < T - b else T - b")
        self.add(2, f"t0 = {last} if turned else {first}" if turned else f"t0 = {first} if turned else {last}")
        self.add(2, "groups, many = (1, m * N) if R == N else (m, R)")

    def steps(self, order: str) -> None:
        """The loop over a block's steps."""
        self.add(2, "for i in range(m):", f"    t = t0 + {order}", "    n = load(counts, t, ANY) if some else R")

    def unit(self, k: int) -> str:
        """Where unit j of row r is in an array of state k that lies row by row."""
        return f"r * {'H' if k else self.wide} + j"

    def units(self, depth: int, lines: list[tuple[int, str]]) -> None:
        """Statements over the units of a row, each with the number of the state whose width it has."""
        if self.wide == "H":
            loops = [("H", [line for _, line in lines])]
        else:
            loops = [("HP", [line for k, line in lines if not k]), ("H", [line for k, line in lines if k])]
        for width, some in loops:
            if some:
                self.add(depth, f"for j in range({width}):", *(f"    {line}" for line in some))

    def rows(self, indices: str, sit_out: list[tuple[int, str]], width: str = "H") -> None:
        """The loops over the step's rows and units, up to where the cell's statements begin."""
        self.add(3, "for r in range(n):", f"    {indices}")
        self.add(4, "if some and load(active, t * N + r, ANY) == 0:")
        self.units(5, sit_out)
        self.add(5, "continue")
        self.add(4, f"for j in range({width}):")

    def others(self, lines: list[tuple[int, str]]) -> None:
        """Statements for the rows that have ended, or not begun."""
        self.add(3, "if some:", "    for r in range(n, R):")
        self.units(5, lines)

    def save(self, slot: str, value: str) -> None:
        """Keep a value of the step's loop on the tape."""
        place = ("G", f"g + {slot[1:]} * H + j") if slot[0] == "X" else (slot, "t * v0 + q + j")
        self.add(5, self.store(*place, value, slot))

    def text(self, cell: str, bits: int) -> str:
        """All of it."""
        return _HEAD.format(cell=cell, bits=bits) + "\n".join((*self.lines, ""))


def _call(number: int, *args: str) -> str:
    return f"invoke(go, ({', '.join([str(number), *args, *['0'] * (11 - len(args))])}))"


def product(
    a: str, lda: str, b: str, out: str, ldo: str, start: str, lds: str, n: str, inner: str, columns: str
) -> str:
    """out = start + a b; see gemm.py, and so below. Matrices are `name, index`."""
    return _call(0, _at(a), lda, _at(b), _at(out), ldo, _at(start), lds, n, inner, columns, _at("O, 0"))


def pack_right(
    src: str, across: str, down: str, inner: str, columns: str, out: str, room: str = "", first: str = "0"
) -> str:
    """A matrix into panels; without `room`, by itself."""
    return _call(1, _at(src), across, down, inner, columns, _at(out), room or inner, first)


def pack_left(src: str, n: str, stride: str, columns: str, out: str, first: str, sums: str) -> str:
    """The left side of a gradient into groups of columns, and their sums."""
    return _call(2, _at(src), stride, n, columns, _at(out), "room", first, _at(sums))


def gradient(rows: str, columns: str, out: str, left: str = "LA, 0") -> str:
    """The gradient of a weight, added to what earlier blocks gave."""
    start = f"{_at(out)} if b else spot(O, zeros)", f"{columns} if b else 0"
    return _call(3, _at(left), _at("LB, 0"), "m * R", "room", rows, columns, _at(out), *start, _at("O, 0"))


def _at(place: str) -> str:
    return f"spot({place})"
