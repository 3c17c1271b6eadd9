"""Matrix products for the compiled loops: weights cut into panels once, rows of a batch against them at every step.

Imported only when a kernel is about to run, because it imports numba.

They are written here, and not left to a BLAS, because a scan multiplies many small matrices by the same large ones: a
BLAS would pack those in every call. Panels are WIDE vectors wide, the last ones fewer where that fits better; a matrix
(K, J) in panels takes K * padded(J) numbers. Blocks of the inner dimension keep a panel in the first-level cache.

All of it is compiled once for each dtype and called by address, so that no cell's kernel compiles it again.
"""

from typing import Any

import numpy as np
from numba import njit

from xprnn.kernels.jit import gemm_tile
from xprnn.kernels.jit.simd import LANES32, LANES64, cpu_features, load, offset, store

# The sums of a tile's rows, WIDE vectors each, must fit the registers: 32 of them, or 16 on x86 without AVX-512. With
# three vectors every number of the left side that is spread over a vector serves three sums.
TILE_ROWS = 4 if cpu_features.get("sse2") and not cpu_features.get("avx512f") else 8
TILE_VECTORS = 3 if cpu_features.get("avx512f") else 2
INNER_BLOCK = 256  # so many rows of a panel stay in the first-level cache
PACKED_LHS_BYTES = 1 << 19  # so many bytes of the packed left side stay in the second-level cache
_compile = njit(fastmath={"contract"}, error_model="numpy", inline="always")


@_compile
def _panel_vectors(left, lanes):  # type: ignore[no-untyped-def]
    """How many vectors wide the next panel is, if so many columns are left: twice two rather than three and one."""
    n = -(-left // lanes)
    return min(n, TILE_VECTORS if n != 4 else 2)


@_compile
def _add_partial_tile(edge, wide, out, ldo, start, lds, rows, columns):  # type: ignore[no-untyped-def]
    """out = start + edge, of which only some columns are meant."""
    for r in range(rows):
        for c in range(columns):
            store(out, r * ldo + c, 64, load(start, r * lds + c, 64) + load(edge, r * wide + c, 64))


def _make_matmul(lanes: int) -> Any:
    one, two, three = (gemm_tile.row_strip(TILE_ROWS, wide, lanes) for wide in (1, 2, TILE_VECTORS))
    w = TILE_VECTORS * lanes

    @_compile
    def product(a, lda, b, out, ldo, start, lds, n, inner, columns, edge):  # type: ignore[no-untyped-def]
        """out (n, columns) = start + a (n, inner) b, for b in panels; a stride of 0 repeats start's one row."""
        p = 0
        while p < columns and n > 0:
            left = columns - p
            wide = lanes * _panel_vectors(left, lanes)
            panel, to, given = offset(b, p * inner), offset(out, p), offset(start, p)
            block = INNER_BLOCK if left >= wide else inner + 1  # what is only partly meant goes through `edge`
            height = n if left >= wide else TILE_ROWS
            stride, target, target_stride, k = lds, to, ldo, 0
            if left < wide:
                target, target_stride = edge, w
            while k == 0 or k < inner:
                some, rest = min(inner - k, block), offset(panel, k * wide)
                for r in range(0, n, height):
                    rows = min(n - r, height)
                    if left < wide:
                        given, stride = offset(edge, TILE_ROWS * w), 0
                    x = offset(a, r * lda + k)
                    if wide == w:
                        three(x, lda, rest, some, target, target_stride, given, stride, rows)
                    elif wide == 2 * lanes:
                        two(x, lda, rest, some, target, target_stride, given, stride, rows)
                    else:
                        one(x, lda, rest, some, target, target_stride, given, stride, rows)
                    if left < wide:
                        _add_partial_tile(
                            edge, w, offset(to, r * ldo), ldo, offset(start, p + r * lds), lds, rows, left
                        )
                given, stride, k = to, ldo, k + block
            p += wide

    return product


@_compile
def _zero_columns(panel, inner, first, wide, zero):  # type: ignore[no-untyped-def]
    """Set the columns of a panel from the first on."""
    for k in range(inner if first < wide else 0):
        for j in range(first, wide):
            store(panel, k * wide + j, 1, zero)


def _make_pack_rhs(lanes: int, zero: Any) -> Any:
    @_compile
    def pack_right(src, across, down, inner, columns, out, room, first):  # type: ignore[no-untyped-def]
        """(inner, columns) with these strides into rows `first`... of panels that have room for `room` rows."""
        p = 0
        while p < columns:
            left = columns - p
            wide = lanes * _panel_vectors(left, lanes)
            to, count = offset(out, p * room + first * wide), min(wide, left)
            if down == 1:
                for k in range(inner):
                    for j in range(count):
                        store(to, k * wide + j, 1, load(src, k * across + p + j, 0))
            else:
                for k0 in range(0, inner, 32):
                    for j in range(count):
                        for k in range(k0, min(inner, k0 + 32)):
                            store(to, k * wide + j, 1, load(src, k * across + (p + j) * down, 0))
            _zero_columns(to, inner, count, wide, zero)
            p += wide

    return pack_right


def _make_pack_lhs(zero: Any) -> Any:
    move = gemm_tile.copy_vector(TILE_ROWS)

    @_compile
    def pack_left(src, stride, n, columns, out, room, first, sums):  # type: ignore[no-untyped-def]
        """(n, columns) into groups of ROWS columns, each (room, ROWS), rows `first`...; their sums are added up."""
        for r0 in range(0, n, 8):
            r1 = min(n, r0 + 8)
            for i in range(0, columns, TILE_ROWS):
                to = offset(out, i * room + first * TILE_ROWS)
                for r in range(r0, r1):
                    if i + TILE_ROWS <= columns:
                        move(offset(src, r * stride + i), offset(to, r * TILE_ROWS))
                    else:
                        for j in range(i, columns):
                            store(to, r * TILE_ROWS + j - i, 1, load(src, r * stride + j, 0))
                        for j in range(columns, i + TILE_ROWS):
                            store(to, r * TILE_ROWS + j - i, 1, zero)
            for r in range(r0, r1):
                for i in range(columns):
                    store(sums, i, 2, load(sums, i, 2) + load(src, r * stride + i, 0))

    return pack_left


def _make_matmul_lhs_transposed(lanes: int, item: int) -> Any:
    one, two, three = (gemm_tile.packed_tile(TILE_ROWS, wide, lanes) for wide in (1, 2, TILE_VECTORS))
    w = TILE_VECTORS * lanes

    @_compile
    def gradient(left, b, inner, room, rows, columns, out, start, lds, edge):  # type: ignore[no-untyped-def]
        """out (rows, columns) = start + left' b, both packed with room for `room` rows, of which `inner` are there."""
        some = PACKED_LHS_BYTES // (inner * item + 1) // TILE_ROWS * TILE_ROWS + TILE_ROWS
        for i0 in range(0, rows, some):
            p = 0
            while p < columns:
                wide = lanes * _panel_vectors(columns - p, lanes)
                for i in range(i0, min(rows, i0 + some), TILE_ROWS):
                    to, stride, given, given_stride = (
                        offset(out, i * columns + p),
                        columns,
                        offset(start, i * lds + p),
                        lds,
                    )
                    whole = i + TILE_ROWS <= rows and p + wide <= columns
                    if not whole:
                        to, stride, given, given_stride = edge, w, offset(edge, TILE_ROWS * w), 0
                    if wide == w:
                        three(offset(left, i * room), offset(b, p * room), inner, to, stride, given, given_stride)
                    elif wide == 2 * lanes:
                        two(offset(left, i * room), offset(b, p * room), inner, to, stride, given, given_stride)
                    else:
                        one(offset(left, i * room), offset(b, p * room), inner, to, stride, given, given_stride)
                    if not whole:
                        here, there = offset(out, i * columns + p), offset(start, i * lds + p)
                        height = min(rows - i, TILE_ROWS)
                        _add_partial_tile(edge, w, here, columns, there, lds, height, min(columns - p, wide))
                p += wide

    return gradient


def gemm_source(bits: int) -> str:
    """A module whose `kernel` does them all, chosen by number, on addresses and lengths."""
    return _SOURCE.format(bits=bits)


matmul32, matmul64 = _make_matmul(LANES32), _make_matmul(LANES64)
matmul_lhs_transposed32, matmul_lhs_transposed64 = (
    _make_matmul_lhs_transposed(LANES32, 4),
    _make_matmul_lhs_transposed(LANES64, 8),
)
pack_rhs32, pack_rhs64 = _make_pack_rhs(LANES32, np.float32(0)), _make_pack_rhs(LANES64, np.float64(0))
pack_lhs32, pack_lhs64 = _make_pack_lhs(np.float32(0)), _make_pack_lhs(np.float64(0))
_SOURCE = '''"""Written by xprnn; it may be deleted at any time."""
from xprnn.kernels.jit.gemm import matmul_lhs_transposed{bits} as gradient, pack_lhs{bits} as pack_left
from xprnn.kernels.jit.gemm import pack_rhs{bits} as pack_right, matmul{bits} as product
from xprnn.kernels.jit.simd import float{bits}_pointer as real


def kernel(op, a, b, c, d, e, f, g, h, i, j, k):
    if op == 0:
        product(real(a), b, real(c), real(d), e, real(f), g, h, i, j, real(k))
    elif op == 1:
        pack_right(real(a), b, c, d, e, real(f), g, h)
    elif op == 2:
        pack_left(real(a), b, c, d, real(e), f, g, real(h))
    else:
        gradient(real(a), real(b), c, d, e, f, real(g), real(h), i, real(j))
    return 0
'''
