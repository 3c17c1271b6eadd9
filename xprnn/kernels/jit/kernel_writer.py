"""The lines of a printed kernel: its table of numbers and addresses, its loads and stores, its calls of gemm.py."""

from xprnn.kernels.tracing.graph import UntraceableError

__all__ = ["SCALARS", "KernelWriter", "matmul_call", "matmul_lhs_transposed_call", "pack_lhs_call", "pack_rhs_call"]

_KERNEL_HEADER = '''"""Written by xprnn for the cell {cell!r}; it may be deleted at any time."""
import math
import numpy as np
from xprnn.kernels.jit.simd import ANY_SCOPE as ANY, uint8_pointer as bytes_, exp64, float{bits}_pointer as real
from xprnn.kernels.jit.simd import call_address as invoke, load, int64_pointer as longs, offset as shift
from xprnn.kernels.jit.simd import element_address as spot, store, tanh{bits} as tanh
from xprnn.kernels.jit.simd import prefer_widest_vectors as widest

F = np.float{bits}


def kernel(a):
'''
SCALARS = ("T", "N", "R", "H", "W", "D", "J", "go", "turned", "some", "resets")
_POINTER_TYPES = {"counts": "longs", "active": "bytes_", "reset": "bytes_", "ids": "longs"}


class KernelWriter:
    """The lines of a kernel, its table, and the scopes of its arrays."""

    def __init__(self, scalars: list[str], pointers: list[str], projected: bool = False) -> None:
        self.argument_names = (*scalars, *_POINTER_TYPES, *pointers)
        self.h_width = "HP" if projected else "H"  # the width of state 0
        self.alias_scopes: dict[str, int] = {}
        self.lines = ["    widest()"]
        for k, name in enumerate(self.argument_names):
            kind = "real" if name in pointers else _POINTER_TYPES.get(name, "")
            self.add(1, f"{name} = {kind}(a[{k}])")

    def add(self, depth: int, *lines: str) -> None:
        """More lines, `depth` levels in."""
        self.lines += ["    " * depth + line for line in lines]

    def alias_scope(self, name: str) -> int:
        """The number of the memory called `name`."""
        scope = self.alias_scopes.setdefault(name, len(self.alias_scopes))
        if scope >= 64:
            raise UntraceableError("more arrays than scopes")
        return scope

    def load(self, name: str, index: str, scope: str = "") -> str:
        """The expression that reads an array."""
        return f"load({name}, {index}, {self.alias_scope(scope or name)})"

    def store(self, name: str, index: str, value: str, scope: str = "") -> str:
        """The statement that writes it."""
        return f"store({name}, {index}, {self.alias_scope(scope or name)}, {value})"

    def emit_block_loop(self, forward: bool) -> None:
        """The loop over blocks of J steps: `m` steps from t0 on, in `groups` pieces of `many` rows side by side."""
        first, last = "b", "T - b - m"
        self.add(1, "for b in range(0, T, J):", "    m = J if J < T - b else T - b")
        self.add(2, f"t0 = {last} if turned else {first}" if forward else f"t0 = {first} if turned else {last}")
        self.add(2, "groups, many = (1, m * N) if R == N else (m, R)")

    def emit_step_loop(self, order: str) -> None:
        """The loop over a block's steps."""
        self.add(2, "for i in range(m):", f"    t = t0 + {order}", "    n = load(counts, t, ANY) if some else R")

    def unit_index(self, k: int) -> str:
        """Where unit j of row r is in an array of state k that lies row by row."""
        return f"r * {'H' if k else self.h_width} + j"

    def emit_unit_loop(self, depth: int, lines: list[tuple[int, str]]) -> None:
        """Statements over the units of a row, each with the number of the state whose width it has."""
        if self.h_width == "H":
            loops = [("H", [line for _, line in lines])]
        else:
            loops = [("HP", [line for k, line in lines if not k]), ("H", [line for k, line in lines if k])]
        for width, some in loops:
            if some:
                self.add(depth, f"for j in range({width}):", *(f"    {line}" for line in some))

    def emit_row_loop(self, indices: str, masked_lines: list[tuple[int, str]], width: str = "H") -> None:
        """The loops over the step's rows and units, up to where the cell's statements begin."""
        self.add(3, "for r in range(n):", f"    {indices}")
        self.add(4, "if some and load(active, t * N + r, ANY) == 0:")
        self.emit_unit_loop(5, masked_lines)
        self.add(5, "continue")
        self.add(4, f"for j in range({width}):")

    def emit_inactive_rows(self, lines: list[tuple[int, str]]) -> None:
        """Statements for the rows that have ended, or not begun."""
        self.add(3, "if some:", "    for r in range(n, R):")
        self.emit_unit_loop(5, lines)

    def emit_save(self, buffer: str, value: str) -> None:
        """Keep a value of the step's loop on the tape."""
        place = ("G", f"g + {buffer[1:]} * H + j") if buffer[0] == "X" else (buffer, "t * v0 + q + j")
        self.add(5, self.store(*place, value, buffer))

    def source(self, cell: str, bits: int) -> str:
        """All of it."""
        return _KERNEL_HEADER.format(cell=cell, bits=bits) + "\n".join((*self.lines, ""))


def _gemm_call(number: int, *args: str) -> str:
    return f"invoke(go, ({', '.join([str(number), *args, *['0'] * (11 - len(args))])}))"


def matmul_call(
    a: str, lda: str, b: str, out: str, ldo: str, start: str, lds: str, n: str, inner: str, columns: str
) -> str:
    """out = start + a b; see gemm.py, and so below. Matrices are `name, index`."""
    return _gemm_call(
        0,
        _address_expression(a),
        lda,
        _address_expression(b),
        _address_expression(out),
        ldo,
        _address_expression(start),
        lds,
        n,
        inner,
        columns,
        _address_expression("O, 0"),
    )


def pack_rhs_call(
    src: str,
    row_stride: str,
    column_stride: str,
    inner: str,
    columns: str,
    out: str,
    capacity: str = "",
    first_row: str = "0",
) -> str:
    """A matrix into panels; without `room`, by itself."""
    return _gemm_call(
        1,
        _address_expression(src),
        row_stride,
        column_stride,
        inner,
        columns,
        _address_expression(out),
        capacity or inner,
        first_row,
    )


def pack_lhs_call(src: str, n: str, stride: str, columns: str, out: str, first_row: str, sums: str) -> str:
    """The left side of a gradient into groups of columns, and their sums."""
    return _gemm_call(
        2,
        _address_expression(src),
        stride,
        n,
        columns,
        _address_expression(out),
        "room",
        first_row,
        _address_expression(sums),
    )


def matmul_lhs_transposed_call(rows: str, columns: str, out: str, packed_lhs: str = "LA, 0") -> str:
    """The gradient of a weight, added to what earlier blocks gave."""
    start = f"{_address_expression(out)} if b else spot(O, zeros)", f"{columns} if b else 0"
    return _gemm_call(
        3,
        _address_expression(packed_lhs),
        _address_expression("LB, 0"),
        "m * R",
        "room",
        rows,
        columns,
        _address_expression(out),
        *start,
        _address_expression("O, 0"),
    )


def _address_expression(place: str) -> str:
    return f"spot({place})"
