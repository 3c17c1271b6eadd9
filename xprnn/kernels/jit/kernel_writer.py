"""Text of a printed kernel: argument unpacking, loads and stores with alias scopes, loops, calls into gemm.py.

Every printed kernel uses these loop variables:

    b, m       first step of the block, counted in processing order; number of steps in the block
    t0, t      first step of the block, and current step, as indices into the time axis
    n          number of rows of step t that are processed; rows n to R - 1 are inactive
    r, j       row of the batch, unit within the row

Rows of consecutive steps are adjacent in memory only if the kernel processes the whole batch (R = N). The steps of a
block are therefore `row_blocks` contiguous blocks of `rows_per_block` rows each.
"""

from xprnn.kernels.tracing.graph import UntraceableError

__all__ = ["SCALARS", "KernelWriter", "matmul_call", "matmul_lhs_transposed_call", "pack_lhs_call", "pack_rhs_call"]

_KERNEL_HEADER = '''"""Scan kernel printed by xprnn for the cell {cell!r} (a cache entry, safe to delete)"""
import math
import numpy as np
from xprnn.kernels.jit.simd import ANY_SCOPE, call_address, element_address, exp64, float{bits}_pointer as float_pointer
from xprnn.kernels.jit.simd import int64_pointer, load, offset, prefer_widest_vectors, store, tanh{bits} as tanh
from xprnn.kernels.jit.simd import uint8_pointer

F = np.float{bits}


def kernel(arguments):
'''
SCALARS = ("T", "N", "R", "H", "W", "D", "block_steps", "gemm_address", "reverse", "has_mask", "has_reset")
_POINTER_TYPES = {
    "active_counts": "int64_pointer",
    "active": "uint8_pointer",
    "reset": "uint8_pointer",
    "ids": "int64_pointer",
}
_GEMM_ARGUMENTS = 11  # of the functions in gemm.py, after the number that selects one of them
_MAX_ALIAS_SCOPES = 64


class KernelWriter:
    """Lines of one kernel, its argument names, and the alias scope of each array."""

    def __init__(self, scalars: list[str], pointers: list[str], projected: bool = False) -> None:
        self.argument_names = (*scalars, *_POINTER_TYPES, *pointers)
        self.h_width = "HP" if projected else "H"  # width of state 0
        self.alias_scopes: dict[str, int] = {}
        self.lines = ["    prefer_widest_vectors()"]
        for k, name in enumerate(self.argument_names):
            cast = "float_pointer" if name in pointers else _POINTER_TYPES.get(name, "")
            self.add(1, f"{name} = {cast}(arguments[{k}])")

    def add(self, depth: int, *lines: str) -> None:
        """Append lines, indented by `depth` levels."""
        self.lines += ["    " * depth + line for line in lines]

    def alias_scope(self, name: str) -> int:
        """Return the number of the alias scope called `name`; allocate one at the first use."""
        scope = self.alias_scopes.setdefault(name, len(self.alias_scopes))
        if scope >= _MAX_ALIAS_SCOPES:
            raise UntraceableError(f"a kernel with more than {_MAX_ALIAS_SCOPES} arrays")
        return scope

    def load(self, name: str, index: str, scope: str = "") -> str:
        """Return the expression that reads one element of an array."""
        return f"load({name}, {index}, {self.alias_scope(scope or name)})"

    def store(self, name: str, index: str, value: str, scope: str = "") -> str:
        """Return the statement that writes one element of an array."""
        return f"store({name}, {index}, {self.alias_scope(scope or name)}, {value})"

    def emit_block_loop(self, forward: bool) -> None:
        """Emit the loop over blocks of steps."""
        first, last = "b", "T - b - m"
        self.add(1, "for b in range(0, T, block_steps):", "    m = block_steps if block_steps < T - b else T - b")
        self.add(2, f"t0 = {last} if reverse else {first}" if forward else f"t0 = {first} if reverse else {last}")
        self.add(2, "row_blocks, rows_per_block = (1, m * N) if R == N else (m, R)")

    def emit_step_loop(self, order: str) -> None:
        """Emit the loop over the steps of a block; `order` is the offset of step i from t0."""
        self.add(2, "for i in range(m):", f"    t = t0 + {order}")
        self.add(3, "n = load(active_counts, t, ANY_SCOPE) if has_mask else R")

    def unit_index(self, k: int) -> str:
        """Return the index of unit j of row r in a C-contiguous array of state k."""
        return f"r * {'H' if k else self.h_width} + j"

    def emit_unit_loop(self, depth: int, lines: list[tuple[int, str]]) -> None:
        """Emit statements over the units of a row. Each comes with the number of the state whose width it covers."""
        if self.h_width == "H":
            loops = [("H", [line for _, line in lines])]
        else:
            loops = [("HP", [line for k, line in lines if not k]), ("H", [line for k, line in lines if k])]
        for width, body in loops:
            if body:
                self.add(depth, f"for j in range({width}):", *(f"    {line}" for line in body))

    def emit_row_loop(self, indices: str, masked_lines: list[tuple[int, str]], width: str = "H") -> None:
        """Open the loops over rows and units of a step; masked rows run `masked_lines` instead of the body."""
        self.add(3, "for r in range(n):", f"    {indices}")
        self.add(4, "if has_mask and load(active, t * N + r, ANY_SCOPE) == 0:")
        self.emit_unit_loop(5, masked_lines)
        self.add(5, "continue")
        self.add(4, f"for j in range({width}):")

    def emit_inactive_rows(self, lines: list[tuple[int, str]]) -> None:
        """Emit statements for rows n to R - 1, which are inactive at this step."""
        self.add(3, "if has_mask:", "    for r in range(n, R):")
        self.emit_unit_loop(5, lines)

    def emit_save(self, buffer: str, value: str) -> None:
        """Emit the store of a value into a buffer of the tape: a column block of G, or an array (T,N,H)."""
        array, index = ("G", f"g + {buffer[1:]} * H + j") if buffer[0] == "X" else (buffer, "t * saved_stride + q + j")
        self.add(5, self.store(array, index, value, buffer))

    def source(self, cell: str, bits: int) -> str:
        """Return the source of the module that defines `kernel`."""
        return _KERNEL_HEADER.format(cell=cell, bits=bits) + "\n".join((*self.lines, ""))


def _gemm_call(number: int, *args: str) -> str:
    padded = [str(number), *args, *["0"] * (_GEMM_ARGUMENTS - len(args))]
    return f"call_address(gemm_address, ({', '.join(padded)}))"


def matmul_call(
    a: str, lda: str, b: str, out: str, ldo: str, start: str, lds: str, n: str, inner: str, columns: str
) -> str:
    """Print a call of gemm.py's matmul, out = start + a b. Matrices are written as `array, index`."""
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
    """Print a call of gemm.py's pack_rhs. The panels have `capacity` rows, by default `inner`."""
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
    """Print a call of gemm.py's pack_lhs, which also adds the column sums to `sums`."""
    return _gemm_call(
        2,
        _address_expression(src),
        stride,
        n,
        columns,
        _address_expression(out),
        "capacity",
        first_row,
        _address_expression(sums),
    )


def matmul_lhs_transposed_call(rows: str, columns: str, out: str, packed_lhs: str = "LA, 0") -> str:
    """Print a call of gemm.py's matmul_lhs_transposed. Every block after the first adds to `out`."""
    start = f"{_address_expression(out)} if b else {_address_expression('O, zeros')}", f"{columns} if b else 0"
    return _gemm_call(
        3,
        _address_expression(packed_lhs),
        _address_expression("LB, 0"),
        "m * R",
        "capacity",
        rows,
        columns,
        _address_expression(out),
        *start,
        _address_expression("O, 0"),
    )


def _address_expression(element: str) -> str:
    return f"element_address({element})"
