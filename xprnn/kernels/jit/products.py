"""Products of many small matrices with the same weight: the weight is packed once in a call, or read in place.

    PANELS      panels of the weight (gemm.py), for many rows
    ROWS        the weight transposed to rows of whole vectors (matvec.vecmat), for few rows and a small weight
    IN_PLACE    the rows of the weight as they are (matvec.matvec), for few rows in all: packing would take longer

Each row of a product has the same bits whatever the number of rows. A weight B (inner, columns) is described by the
address of its first element and two strides. The functions are compiled once for each dtype and called by their address
`gemm`, so that no caller compiles them again.

This module imports numba. Import it only when a kernel is about to run.
"""

from numba import njit

from xprnn.kernels.jit.simd import call_address

__all__ = ["IN_PLACE", "PANELS", "ROWS", "add_lhs_transposed", "multiply", "pack", "pack_lhs", "pack_rhs"]

PANELS, ROWS, IN_PLACE = 0, 1, 2
# Numbers of the functions in gemm.py. Those of the three products are PANELS, ROWS and IN_PLACE.
_PACK_RHS, _PACK_ROWS, _PACK_LHS, _MATMUL_LHS_TRANSPOSED = 3, 4, 5, 6
_compile = njit(fastmath={"contract"}, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


@_compile
def pack(gemm, strategy, b, row_stride, column_stride, inner, columns, out, stride):  # type: ignore[no-untyped-def]
    """Pack B for `multiply`. ROWS: rows of `stride` elements, of which those beyond `columns` are not written."""
    if strategy == PANELS:
        call_address(gemm, (_PACK_RHS, b, row_stride, column_stride, inner, columns, out, inner, 0, 0, 0, 0))
    elif strategy == ROWS:
        call_address(gemm, (_PACK_ROWS, b, row_stride, column_stride, inner, columns, out, stride, 0, 0, 0, 0))


@_compile
def multiply(gemm, strategy, a, lda, b, stride, start, lds, out, ldo, n, inner, columns, edge):  # type: ignore[no-untyped-def]
    """out (n, columns) = start + a (n, inner) B. `columns` is in whole vectors for ROWS.

    Args:
        b: packed by `pack` with this stride; for IN_PLACE the address of B', whose rows are `stride` elements apart.
        lds: 0 adds the same row `start` to every row.
        edge: scratch memory of gemm.matmul.
    """
    last = edge if strategy == PANELS else stride
    call_address(gemm, (strategy, a, lda, b, out, ldo, start, lds, n, inner, columns, last))


@_compile
def pack_rhs(gemm, b, row_stride, column_stride, inner, columns, out, capacity, first_row):  # type: ignore[no-untyped-def]
    """Pack B into the rows from `first_row` on of panels that have `capacity` rows."""
    call_address(gemm, (_PACK_RHS, b, row_stride, column_stride, inner, columns, out, capacity, first_row, 0, 0, 0))


@_compile
def pack_lhs(gemm, a, lda, n, columns, out, capacity, first_row, sums):  # type: ignore[no-untyped-def]
    """Pack a (n, columns) for `add_lhs_transposed`, and add its column sums to `sums`."""
    call_address(gemm, (_PACK_LHS, a, lda, n, columns, out, capacity, first_row, sums, 0, 0, 0))


@_compile
def add_lhs_transposed(gemm, a, b, inner, capacity, rows, columns, out, first, zeros, edge):  # type: ignore[no-untyped-def]
    """out (rows, columns) += a' b for packed a and b of `inner` rows; out = a' b if `first`."""
    start, lds = (zeros, 0) if first else (out, columns)
    call_address(gemm, (_MATMUL_LHS_TRANSPOSED, a, b, inner, capacity, rows, columns, out, start, lds, edge, 0))
