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
from xprnn.kernels.jit.simd import LANES32, LANES64, features, load, shift, store

# The sums of a tile's rows, WIDE vectors each, must fit the registers: 32 of them, or 16 on x86 without AVX-512. With
# three vectors every number of the left side that is spread over a vector serves three sums.
ROWS = 4 if features.get("sse2") and not features.get("avx512f") else 8
WIDE = 3 if features.get("avx512f") else 2
INNER = 256  # so many rows of a panel stay in the first-level cache
LEFT = 1 << 19  # so many bytes of the packed left side stay in the second-level cache
_compile = njit(fastmath={"contract"}, error_model="numpy", inline="always")


@_compile
def _vectors(left, lanes):  # type: ignore[no-untyped-def]
    """How many vectors wide the next panel is, if so many columns are left: twice two rather than three and one."""
    n = -(-left // lanes)
    return min(n, WIDE if n != 4 else 2)


@_compile
def _add_edge(edge, wide, out, ldo, start, lds, rows, columns):  # type: ignore[no-untyped-def]
    """out = start + edge, of which only some columns are meant."""
    for r in range(rows):
        for c in range(columns):
            store(out, r * ldo + c, 64, load(start, r * lds + c, 64) + load(edge, r * wide + c, 64))


def _product(lanes: int) -> Any:
    one, two, three = (gemm_tile.strip(ROWS, wide, lanes) for wide in (1, 2, WIDE))
    w = WIDE * lanes

    @_compile
    def product(a, lda, b, out, ldo, start, lds, n, inner, columns, edge):  # type: ignore[no-untyped-def]
        """out (n, columns) = start + a (n, inner) b, for b in panels; a stride of 0 repeats start's one row."""
        p = 0
        while p < columns and n > 0:
            left = columns - p
            wide = lanes * _vectors(left, lanes)
            panel, to, given = shift(b, p * inner), shift(out, p), shift(start, p)
            block = INNER if left >= wide else inner + 1  # what is only partly meant goes through `edge`
            height = n if left >= wide else ROWS
            stride, target, target_stride, k = lds, to, ldo, 0
            if left < wide:
                target, target_stride = edge, w
            while k == 0 or k < inner:
                some, rest = min(inner - k, block), shift(panel, k * wide)
                for r in range(0, n, height):
                    rows = min(n - r, height)
                    if left < wide:
                        given, stride = shift(edge, ROWS * w), 0
                    x = shift(a, r * lda + k)
                    if wide == w:
                        three(x, lda, rest, some, target, target_stride, given, stride, rows)
                    elif wide == 2 * lanes:
                        two(x, lda, rest, some, target, target_stride, given, stride, rows)
                    else:
                        one(x, lda, rest, some, target, target_stride, given, stride, rows)
                    if left < wide:
                        _add_edge(edge, w, shift(to, r * ldo), ldo, shift(start, p + r * lds), lds, rows, left)
                given, stride, k = to, ldo, k + block
            p += wide

    return product


@_compile
def _clear(panel, inner, first, wide, zero):  # type: ignore[no-untyped-def]
    """Set the columns of a panel from the first on."""
    for k in range(inner if first < wide else 0):
        for j in range(first, wide):
            store(panel, k * wide + j, 1, zero)


def _pack_right(lanes: int, zero: Any) -> Any:
    @_compile
    def pack_right(src, across, down, inner, columns, out, room, first):  # type: ignore[no-untyped-def]
        """(inner, columns) with these strides into rows `first`... of panels that have room for `room` rows."""
        p = 0
        while p < columns:
            left = columns - p
            wide = lanes * _vectors(left, lanes)
            to, count = shift(out, p * room + first * wide), min(wide, left)
            if down == 1:
                for k in range(inner):
                    for j in range(count):
                        store(to, k * wide + j, 1, load(src, k * across + p + j, 0))
            else:
                for k0 in range(0, inner, 32):
                    for j in range(count):
                        for k in range(k0, min(inner, k0 + 32)):
                            store(to, k * wide + j, 1, load(src, k * across + (p + j) * down, 0))
            _clear(to, inner, count, wide, zero)
            p += wide

    return pack_right


def _pack_left(zero: Any) -> Any:
    move = gemm_tile.move(ROWS)

    @_compile
    def pack_left(src, stride, n, columns, out, room, first, sums):  # type: ignore[no-untyped-def]
        """(n, columns) into groups of ROWS columns, each (room, ROWS), rows `first`...; their sums are added up."""
        for r0 in range(0, n, 8):
            r1 = min(n, r0 + 8)
            for i in range(0, columns, ROWS):
                to = shift(out, i * room + first * ROWS)
                for r in range(r0, r1):
                    if i + ROWS <= columns:
                        move(shift(src, r * stride + i), shift(to, r * ROWS))
                    else:
                        for j in range(i, columns):
                            store(to, r * ROWS + j - i, 1, load(src, r * stride + j, 0))
                        for j in range(columns, i + ROWS):
                            store(to, r * ROWS + j - i, 1, zero)
            for r in range(r0, r1):
                for i in range(columns):
                    store(sums, i, 2, load(sums, i, 2) + load(src, r * stride + i, 0))

    return pack_left


def _gradient(lanes: int, item: int) -> Any:
    one, two, three = (gemm_tile.tile(ROWS, wide, lanes) for wide in (1, 2, WIDE))
    w = WIDE * lanes

    @_compile
    def gradient(left, b, inner, room, rows, columns, out, start, lds, edge):  # type: ignore[no-untyped-def]
        """out (rows, columns) = start + left' b, both packed with room for `room` rows, of which `inner` are there."""
        some = LEFT // (inner * item + 1) // ROWS * ROWS + ROWS
        for i0 in range(0, rows, some):
            p = 0
            while p < columns:
                wide = lanes * _vectors(columns - p, lanes)
                for i in range(i0, min(rows, i0 + some), ROWS):
                    to, stride, given, given_stride = (
                        shift(out, i * columns + p),
                        columns,
                        shift(start, i * lds + p),
                        lds,
                    )
                    whole = i + ROWS <= rows and p + wide <= columns
                    if not whole:
                        to, stride, given, given_stride = edge, w, shift(edge, ROWS * w), 0
                    if wide == w:
                        three(shift(left, i * room), shift(b, p * room), inner, to, stride, given, given_stride)
                    elif wide == 2 * lanes:
                        two(shift(left, i * room), shift(b, p * room), inner, to, stride, given, given_stride)
                    else:
                        one(shift(left, i * room), shift(b, p * room), inner, to, stride, given, given_stride)
                    if not whole:
                        here, there = shift(out, i * columns + p), shift(start, i * lds + p)
                        height = min(rows - i, ROWS)
                        _add_edge(edge, w, here, columns, there, lds, height, min(columns - p, wide))
                p += wide

    return gradient


def source(bits: int) -> str:
    """A module whose `kernel` does them all, chosen by number, on addresses and lengths."""
    return _SOURCE.format(bits=bits)


product32, product64 = _product(LANES32), _product(LANES64)
gradient32, gradient64 = _gradient(LANES32, 4), _gradient(LANES64, 8)
pack_right32, pack_right64 = _pack_right(LANES32, np.float32(0)), _pack_right(LANES64, np.float64(0))
pack_left32, pack_left64 = _pack_left(np.float32(0)), _pack_left(np.float64(0))
_SOURCE = '''"""Written by xprnn; it may be deleted at any time."""
from xprnn.kernels.jit.gemm import gradient{bits} as gradient, pack_left{bits} as pack_left
from xprnn.kernels.jit.gemm import pack_right{bits} as pack_right, product{bits} as product
from xprnn.kernels.jit.simd import f{bits} as real


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
