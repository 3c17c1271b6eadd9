"""Matrix products for the compiled loops: weights are packed into panels once, and multiplied at every step.

This module imports numba. Import it only when a kernel is about to run.

A scan multiplies many small matrices by the same large weight. A BLAS would pack the weight in every call; these
functions reuse the panels. A panel is TILE_VECTORS vectors wide; the last ones may be narrower. A packed matrix (K, J)
has K * panel_width(J) elements. The product is blocked over the inner dimension, so that the rows of a panel in use
stay in the L1 cache.

The functions are compiled once per dtype. Kernels call them by address, so that numba does not compile them again for
every cell.
"""

from typing import Any

import numpy as np
from numba import njit

from xprnn.kernels.jit import gemm_tile
from xprnn.kernels.jit.simd import LANES32, LANES64, cpu_features, load, offset, store

# The accumulators of a tile, TILE_ROWS * TILE_VECTORS vectors, must fit the registers: 32 vector registers, or 16 on
# x86 without AVX-512. With three vectors per row, each broadcast element of the left side is used three times.
TILE_ROWS = 4 if cpu_features.get("sse2") and not cpu_features.get("avx512f") else 8
TILE_VECTORS = 3 if cpu_features.get("avx512f") else 2
INNER_BLOCK = 256  # rows of a panel that stay in the L1 cache
PACKED_LHS_BYTES = 1 << 19  # bytes of the packed left side that stay in the L2 cache
_compile = njit(fastmath={"contract"}, error_model="numpy", inline="always")


@_compile
def _panel_vectors(columns_left, lanes):  # type: ignore[no-untyped-def]
    """Return the width of the next panel in vectors. Four vectors are split into two and two, not three and one."""
    n = -(-columns_left // lanes)
    return min(n, TILE_VECTORS if n != 4 else 2)


@_compile
def _add_partial_tile(tile, tile_stride, out, ldo, start, lds, rows, columns):  # type: ignore[no-untyped-def]
    """out = start + tile, for the first rows and columns of the tile."""
    for r in range(rows):
        for c in range(columns):
            store(out, r * ldo + c, 64, load(start, r * lds + c, 64) + load(tile, r * tile_stride + c, 64))


def _make_matmul(lanes: int) -> Any:
    one, two, three = (gemm_tile.row_strip(TILE_ROWS, vectors, lanes) for vectors in (1, 2, TILE_VECTORS))
    tile_columns = TILE_VECTORS * lanes

    @_compile
    def matmul(a, lda, b, out, ldo, start, lds, n, inner, columns, edge):  # type: ignore[no-untyped-def]
        """out (n, columns) = start + a (n, inner) b, where b is packed into panels.

        A stride lds = 0 adds the same row `start` to every row. `edge` is scratch memory: a tile, followed by a row of
        zeros. The product with a panel that has unused columns goes to `edge`, and its used columns are added to `out`.
        """
        p = 0
        while p < columns and n > 0:
            columns_left = columns - p
            width = lanes * _panel_vectors(columns_left, lanes)
            panel, p_out, tile_start = offset(b, p * inner), offset(out, p), offset(start, p)
            start_stride, target, target_stride, k, block, height = lds, p_out, ldo, 0, INNER_BLOCK, n
            if columns_left < width:  # through `edge`, in one block
                target, target_stride, block, height = edge, tile_columns, inner + 1, TILE_ROWS
            while k == 0 or k < inner:
                block_inner, block_panel = min(inner - k, block), offset(panel, k * width)
                for r in range(0, n, height):
                    rows = min(n - r, height)
                    if columns_left < width:
                        tile_start, start_stride = offset(edge, TILE_ROWS * tile_columns), 0
                    x = offset(a, r * lda + k)
                    if width == tile_columns:
                        three(x, lda, block_panel, block_inner, target, target_stride, tile_start, start_stride, rows)
                    elif width == 2 * lanes:
                        two(x, lda, block_panel, block_inner, target, target_stride, tile_start, start_stride, rows)
                    else:
                        one(x, lda, block_panel, block_inner, target, target_stride, tile_start, start_stride, rows)
                    if columns_left < width:
                        r_out, r_start = offset(p_out, r * ldo), offset(start, p + r * lds)
                        _add_partial_tile(edge, tile_columns, r_out, ldo, r_start, lds, rows, columns_left)
                tile_start, start_stride, k = p_out, ldo, k + block
            p += width

    return matmul


@_compile
def _zero_columns(panel, inner, first, width, zero):  # type: ignore[no-untyped-def]
    """Zero the columns of a panel from `first` on."""
    for k in range(inner if first < width else 0):
        for j in range(first, width):
            store(panel, k * width + j, 1, zero)


def _make_pack_rhs(lanes: int, zero: Any) -> Any:
    @_compile
    def pack_rhs(src, row_stride, column_stride, inner, columns, out, capacity, first_row):  # type: ignore[no-untyped-def]
        """Pack src (inner, columns) into the rows from `first_row` on of panels that have `capacity` rows."""
        p = 0
        while p < columns:
            columns_left = columns - p
            width = lanes * _panel_vectors(columns_left, lanes)
            panel, count = offset(out, p * capacity + first_row * width), min(width, columns_left)
            if column_stride == 1:
                for k in range(inner):
                    for j in range(count):
                        store(panel, k * width + j, 1, load(src, k * row_stride + p + j, 0))
            else:
                for k0 in range(0, inner, 32):
                    for j in range(count):
                        for k in range(k0, min(inner, k0 + 32)):
                            store(panel, k * width + j, 1, load(src, k * row_stride + (p + j) * column_stride, 0))
            _zero_columns(panel, inner, count, width, zero)
            p += width

    return pack_rhs


def _make_pack_lhs(zero: Any) -> Any:
    copy_group = gemm_tile.copy_vector(TILE_ROWS)

    @_compile
    def pack_lhs(src, stride, n, columns, out, capacity, first_row, sums):  # type: ignore[no-untyped-def]
        """Pack src (n, columns) into groups of TILE_ROWS columns, and add its column sums to `sums`.

        Each group has `capacity` rows of TILE_ROWS elements; src goes into the rows from `first_row` on.
        """
        for r0 in range(0, n, 8):
            r1 = min(n, r0 + 8)
            for i in range(0, columns, TILE_ROWS):
                group = offset(out, i * capacity + first_row * TILE_ROWS)
                for r in range(r0, r1):
                    if i + TILE_ROWS <= columns:
                        copy_group(offset(src, r * stride + i), offset(group, r * TILE_ROWS))
                    else:
                        for j in range(i, columns):
                            store(group, r * TILE_ROWS + j - i, 1, load(src, r * stride + j, 0))
                        for j in range(columns, i + TILE_ROWS):
                            store(group, r * TILE_ROWS + j - i, 1, zero)
            for r in range(r0, r1):
                for i in range(columns):
                    store(sums, i, 2, load(sums, i, 2) + load(src, r * stride + i, 0))

    return pack_lhs


def _make_matmul_lhs_transposed(lanes: int, itemsize: int) -> Any:
    one, two, three = (gemm_tile.packed_tile(TILE_ROWS, vectors, lanes) for vectors in (1, 2, TILE_VECTORS))
    tile_columns = TILE_VECTORS * lanes

    @_compile
    def matmul_lhs_transposed(a, b, inner, capacity, rows, columns, out, start, lds, edge):  # type: ignore[no-untyped-def]
        """out (rows, columns) = start + a' b. Both are packed with `capacity` rows, of which `inner` are used."""
        block = PACKED_LHS_BYTES // (inner * itemsize + 1) // TILE_ROWS * TILE_ROWS + TILE_ROWS
        for i0 in range(0, rows, block):
            p = 0
            while p < columns:
                width = lanes * _panel_vectors(columns - p, lanes)
                for i in range(i0, min(rows, i0 + block), TILE_ROWS):
                    lhs, panel = offset(a, i * capacity), offset(b, p * capacity)
                    target, stride = offset(out, i * columns + p), columns
                    tile_start, start_stride = offset(start, i * lds + p), lds
                    is_full = i + TILE_ROWS <= rows and p + width <= columns
                    if not is_full:
                        target, stride = edge, tile_columns
                        tile_start, start_stride = offset(edge, TILE_ROWS * tile_columns), 0
                    if width == tile_columns:
                        three(lhs, panel, inner, target, stride, tile_start, start_stride)
                    elif width == 2 * lanes:
                        two(lhs, panel, inner, target, stride, tile_start, start_stride)
                    else:
                        one(lhs, panel, inner, target, stride, tile_start, start_stride)
                    if not is_full:
                        i_out, i_start = offset(out, i * columns + p), offset(start, i * lds + p)
                        height = min(rows - i, TILE_ROWS)
                        _add_partial_tile(
                            edge, tile_columns, i_out, columns, i_start, lds, height, min(columns - p, width)
                        )
                p += width

    return matmul_lhs_transposed


def gemm_source(bits: int) -> str:
    """Print a module whose `kernel` calls one of these functions, selected by number, on addresses and sizes."""
    return _SOURCE.format(bits=bits)


matmul32, matmul64 = _make_matmul(LANES32), _make_matmul(LANES64)
matmul_lhs_transposed32, matmul_lhs_transposed64 = (
    _make_matmul_lhs_transposed(LANES32, 4),
    _make_matmul_lhs_transposed(LANES64, 8),
)
pack_rhs32, pack_rhs64 = _make_pack_rhs(LANES32, np.float32(0)), _make_pack_rhs(LANES64, np.float64(0))
pack_lhs32, pack_lhs64 = _make_pack_lhs(np.float32(0)), _make_pack_lhs(np.float64(0))
_SOURCE = '''"""Matrix products, printed by xprnn (a cache entry, safe to delete)"""
from xprnn.kernels.jit.gemm import matmul{bits}, matmul_lhs_transposed{bits}, pack_lhs{bits}, pack_rhs{bits}
from xprnn.kernels.jit.matvec import multiply_in_place, multiply_rows, pack_rows
from xprnn.kernels.jit.simd import float{bits}_pointer as pointer


def kernel(op, a, b, c, d, e, f, g, h, i, j, k):
    if op == 0:
        matmul{bits}(pointer(a), b, pointer(c), pointer(d), e, pointer(f), g, h, i, j, pointer(k))
    elif op == 1:
        multiply_rows(pointer(a), b, pointer(c), pointer(d), e, pointer(f), g, h, i, j, k)
    elif op == 2:
        multiply_in_place(pointer(a), b, pointer(c), pointer(d), e, pointer(f), g, h, i, j, k)
    elif op == 3:
        pack_rhs{bits}(pointer(a), b, c, d, e, pointer(f), g, h)
    elif op == 4:
        pack_rows(pointer(a), b, c, d, e, pointer(f), g)
    elif op == 5:
        pack_lhs{bits}(pointer(a), b, c, d, pointer(e), f, g, pointer(h))
    else:
        matmul_lhs_transposed{bits}(pointer(a), pointer(b), c, d, e, f, pointer(g), pointer(h), i, pointer(j))
    return 0
'''
