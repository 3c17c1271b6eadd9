"""Matrix-vector products of single steps: W x without packing W, and x U for a transposed weight.

This module imports numba. Import it only when a kernel is about to run.

A scan packs its recurrent weight into panels once (gemm.py). A single step cannot amortise that, and a copy cached
between steps would miss in-place changes of the weight. `matvec` therefore reads the rows of W in place. It computes
one vector of partial sums per row, for as many rows at once as a vector has lanes. A pairwise tree of horizontal
additions reduces these vectors, so that the result of a row does not depend on the other rows.

`vecmat` is for sequences whose weight has been transposed: each element of x is broadcast and multiplied by a row.
"""

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from xprnn.kernels.jit.simd import ANY_SCOPE, LANES32, LANES64, offset, store


def _row_dots(typing: Any, w: Any, stride: Any, x: Any, inner: Any, out: Any, rows: Any, lanes: Any) -> Any:
    """out[r] = sum of w[r * stride + k] x[k] over k < inner, for r < rows. `rows` is a power of two up to `lanes`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v, count, real = lanes.literal_value, rows.literal_value, context.get_value_type(w.dtype)
        vector, item, int64 = ir.VectorType(real, v), w.dtype.bitwidth // 8, ir.IntType(64)
        w_pointer, w_stride, x_pointer, length, out_pointer = args[:5]
        zero = ir.Constant(vector, [0.0] * v)
        sums = [cgutils.alloca_once_value(builder, zero) for _ in range(count)]
        masked = _masked_load(builder.module, vector, real, v)

        def vector_pointer(pointer: Any, index: Any) -> Any:
            return builder.bitcast(builder.gep(pointer, [index]), vector.as_pointer())

        def accumulate(first: Any, read: Any) -> None:
            x_vector = read(vector_pointer(x_pointer, first))
            for r, accumulator in enumerate(sums):
                index = builder.add(builder.mul(ir.Constant(int64, r), w_stride), first)
                term = builder.fmul(read(vector_pointer(w_pointer, index)), x_vector, flags=("contract",))
                builder.store(builder.fadd(builder.load(accumulator), term, flags=("contract",)), accumulator)

        full_vectors = builder.sdiv(length, ir.Constant(int64, v))
        with cgutils.for_range(builder, full_vectors) as loop:
            accumulate(builder.mul(loop.index, ir.Constant(int64, v)), lambda p: builder.load(p, align=item))
        rest = builder.srem(length, ir.Constant(int64, v))
        with builder.if_then(builder.icmp_signed(">", rest, ir.Constant(int64, 0))):
            indices = ir.VectorType(int64, v)
            splat = builder.insert_element(ir.Constant(indices, ir.Undefined), rest, ir.Constant(ir.IntType(32), 0))
            splat = builder.shuffle_vector(splat, splat, ir.Constant(ir.VectorType(ir.IntType(32), v), [0] * v))
            mask = builder.icmp_signed("<", ir.Constant(indices, list(range(v))), splat)
            align = ir.Constant(ir.IntType(32), item)
            first = builder.mul(full_vectors, ir.Constant(int64, v))
            accumulate(first, lambda p: builder.call(masked, [p, align, mask, zero]))
        totals = _horizontal_sums(builder, [builder.load(accumulator) for accumulator in sums], v)
        for r in range(count):
            total = builder.extract_element(totals, ir.Constant(ir.IntType(32), r))
            builder.store(total, builder.gep(out_pointer, [ir.Constant(int64, r)]))
        return context.get_dummy_value()

    return types.void(w, types.int64, x, types.int64, out, rows, lanes), generate


def _masked_load(module: Any, vector: Any, real: Any, v: int) -> Any:
    """Return LLVM's masked load intrinsic. LLVM normalises the type suffix of the name."""
    kind = ir.FunctionType(vector, [vector.as_pointer(), ir.IntType(32), ir.VectorType(ir.IntType(1), v), vector])
    name = f"llvm.masked.load.v{v}f{32 if isinstance(real, ir.FloatType) else 64}.p0"
    return cgutils.get_or_insert_function(module, kind, name)


def _horizontal_sums(builder: Any, sums: list[Any], v: int) -> Any:
    """Return a vector whose lane i is the sum of all lanes of vector i."""
    even, odd = (ir.Constant(ir.VectorType(ir.IntType(32), v), list(range(k, 2 * v, 2))) for k in (0, 1))

    def add_pairs(a: Any, b: Any) -> Any:
        return builder.fadd(builder.shuffle_vector(a, b, even), builder.shuffle_vector(a, b, odd))

    while v > 1:
        sums = (
            [add_pairs(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
            if len(sums) > 1
            else [add_pairs(sums[0], sums[0])]
        )
        v //= 2
    return sums[0]


def _axpy_rows(typing: Any, u: Any, width: Any, x: Any, inner: Any, out: Any, count: Any, lanes: Any) -> Any:
    """out[j] = sum of x[k] u[k * width + j] over k < inner, for the first `count` vectors of j."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v, real = lanes.literal_value, context.get_value_type(u.dtype)
        vector, item, int64 = ir.VectorType(real, v), u.dtype.bitwidth // 8, ir.IntType(64)
        u_pointer, u_stride, x_pointer, length, out_pointer = args[:5]
        first_lane, undefined = ir.Constant(ir.IntType(32), 0), ir.Constant(vector, ir.Undefined)
        every_lane = ir.Constant(ir.VectorType(ir.IntType(32), v), [0] * v)
        zero = ir.Constant(vector, [0.0] * v)
        sums = [cgutils.alloca_once_value(builder, zero) for _ in range(count.literal_value)]

        def vector_pointer(pointer: Any, index: Any) -> Any:
            return builder.bitcast(builder.gep(pointer, [index]), vector.as_pointer())

        with cgutils.for_range(builder, length) as loop:
            x_value = builder.load(builder.gep(x_pointer, [loop.index]))
            x_vector = builder.insert_element(undefined, x_value, first_lane)
            x_vector = builder.shuffle_vector(x_vector, undefined, every_lane)
            for c, accumulator in enumerate(sums):
                index = builder.add(builder.mul(loop.index, u_stride), ir.Constant(int64, c * v))
                u_vector = builder.load(vector_pointer(u_pointer, index), align=item)
                term = builder.fmul(x_vector, u_vector, flags=("contract",))
                builder.store(builder.fadd(builder.load(accumulator), term, flags=("contract",)), accumulator)
        for c, accumulator in enumerate(sums):
            pointer = vector_pointer(out_pointer, ir.Constant(int64, c * v))
            builder.store(builder.load(accumulator), pointer, align=item)
        return context.get_dummy_value()

    return types.void(u, types.int64, x, types.int64, out, count, lanes), generate


row_dots, axpy_rows = intrinsic(prefer_literal=True)(_row_dots), intrinsic(prefer_literal=True)(_axpy_rows)
_compile = njit(fastmath={"contract"}, error_model="numpy")


def _make_matvec(lanes: int) -> Any:
    @_compile
    def matvec(w, stride, x, inner, out, rows):  # type: ignore[no-untyped-def]
        """out (rows,) = W x, for W (rows, inner) with `stride` elements between its rows."""
        r = 0
        while r + lanes <= rows:
            row_dots(offset(w, r * stride), stride, x, inner, offset(out, r), lanes, lanes)
            r += lanes
        if r < rows and r > 0:  # recompute some rows in a full group: faster than the rest one by one
            r = rows - lanes
            row_dots(offset(w, r * stride), stride, x, inner, offset(out, r), lanes, lanes)
            r = rows
        while r < rows:
            row_dots(offset(w, r * stride), stride, x, inner, offset(out, r), 1, lanes)
            r += 1

    return matvec


matvec32, matvec64 = _make_matvec(LANES32), _make_matvec(LANES64)


def _make_vecmat(lanes: int) -> Any:
    @_compile
    def vecmat(u, stride, x, inner, out, width):  # type: ignore[no-untyped-def]
        """out (width,) = x U, for U (inner, width) with `stride` elements between rows; width a multiple of `lanes`."""
        c = 0
        while c + 8 * lanes <= width:
            axpy_rows(offset(u, c), stride, x, inner, offset(out, c), 8, lanes)
            c += 8 * lanes
        while c + 4 * lanes <= width:
            axpy_rows(offset(u, c), stride, x, inner, offset(out, c), 4, lanes)
            c += 4 * lanes
        while c < width:
            axpy_rows(offset(u, c), stride, x, inner, offset(out, c), 1, lanes)
            c += lanes

    return vecmat


vecmat32, vecmat64 = _make_vecmat(LANES32), _make_vecmat(LANES64)


@_compile
def transpose(w, out, stride):  # type: ignore[no-untyped-def]
    """out (K, J) = w', for w (J, K), with `stride` elements between the rows of `out`."""
    for j in range(w.shape[0]):
        for k in range(w.shape[1]):
            store(out, k * stride + j, ANY_SCOPE, w[j, k])


@_compile
def is_unit_stride(a, count):  # type: ignore[no-untyped-def]
    """Return True if a is (count,) and contiguous."""
    return a.shape[0] == count and (count < 2 or a.strides[0] == a.itemsize)


@_compile
def has_unit_stride_rows(a, rows, count):  # type: ignore[no-untyped-def]
    """Return True if a is (rows, count) and each of its rows is contiguous."""
    return a.shape[0] == rows and a.shape[1] == count and (count < 2 or a.strides[1] == a.itemsize)
