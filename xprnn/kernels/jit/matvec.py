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

from xprnn.kernels.jit.simd import ANY_SCOPE, LANES32, LANES64, lanes_of, load, offset, store


def _row_dots(typing: Any, w: Any, stride: Any, x: Any, inner: Any, start: Any, out: Any, divisor: Any) -> Any:
    """out[r] = start[r] + sum of w[r * stride + k] x[k] over k < inner, for r < lanes / divisor, at least one row."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v, real = LANES32 if w.dtype.bitwidth == 32 else LANES64, context.get_value_type(w.dtype)
        count = max(1, v // divisor.literal_value)
        vector, item, int64 = ir.VectorType(real, v), w.dtype.bitwidth // 8, ir.IntType(64)
        w_pointer, w_stride, x_pointer, length, start_pointer, out_pointer = args[:6]
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
            mask = _first_lanes(builder, rest, v)
            align = ir.Constant(ir.IntType(32), item)
            first = builder.mul(full_vectors, ir.Constant(int64, v))
            accumulate(first, lambda p: builder.call(masked, [p, align, mask, zero]))
        totals = _horizontal_sums(builder, [builder.load(accumulator) for accumulator in sums], v)
        for r in range(count):
            total = builder.extract_element(totals, ir.Constant(ir.IntType(32), r))
            first = builder.load(builder.gep(start_pointer, [ir.Constant(int64, r)]))
            builder.store(builder.fadd(first, total), builder.gep(out_pointer, [ir.Constant(int64, r)]))
        return context.get_dummy_value()

    return types.void(w, types.int64, x, types.int64, start, out, divisor), generate


def _first_lanes(builder: Any, count: Any, v: int) -> Any:
    """Return the mask of the first `count` of v lanes."""
    int64 = ir.IntType(64)
    indices = ir.VectorType(int64, v)
    splat = builder.insert_element(ir.Constant(indices, ir.Undefined), count, ir.Constant(ir.IntType(32), 0))
    splat = builder.shuffle_vector(splat, splat, ir.Constant(ir.VectorType(ir.IntType(32), v), [0] * v))
    return builder.icmp_signed("<", ir.Constant(indices, list(range(v))), splat)


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


class _AxpyEmitter:
    """Emits the LLVM instructions of `axpy_rows`."""

    def __init__(self, context: Any, builder: Any, args: Any, kind: Any, count: int) -> None:
        self.builder, self.item = builder, kind.bitwidth // 8
        self.lanes, self.int64 = LANES32 if kind.bitwidth == 32 else LANES64, ir.IntType(64)
        self.vector = ir.VectorType(context.get_value_type(kind), self.lanes)
        self.u, self.u_stride, self.x, self.length, self.start, self.out = args[:6]
        self.columns, self.chains = range(count), max(1, 8 // count)
        self.sums = {
            (c, i): cgutils.alloca_once(builder, self.vector) for c in self.columns for i in range(self.chains)
        }

    def vector_pointer(self, pointer: Any, index: Any) -> Any:
        """Return the pointer to the vector that starts at pointer[index]."""
        return self.builder.bitcast(self.builder.gep(pointer, [index]), self.vector.as_pointer())

    def accumulate(self, k: Any, chain: int) -> None:
        """Emit the products of x[k], added to one partial sum of each vector."""
        b, undefined = self.builder, ir.Constant(self.vector, ir.Undefined)
        every_lane = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        x = b.insert_element(undefined, b.load(b.gep(self.x, [k])), ir.Constant(ir.IntType(32), 0))
        x = b.shuffle_vector(x, undefined, every_lane)
        for c in self.columns:
            index = b.add(b.mul(k, self.u_stride), ir.Constant(self.int64, c * self.lanes))
            term = b.fmul(x, b.load(self.vector_pointer(self.u, index), align=self.item), flags=("contract",))
            b.store(b.fadd(b.load(self.sums[c, chain]), term, flags=("contract",)), self.sums[c, chain])

    def emit(self) -> None:
        """Emit the loads of the start, the loop over k, and the stores."""
        b, chains = self.builder, ir.Constant(self.int64, self.chains)
        for (c, i), accumulator in self.sums.items():
            first = b.load(self.vector_pointer(self.start, ir.Constant(self.int64, c * self.lanes)), align=self.item)
            b.store(ir.Constant(self.vector, [0.0] * self.lanes) if i else first, accumulator)
        main = b.sdiv(self.length, chains)
        with cgutils.for_range(b, main) as loop:
            for i in range(self.chains):
                self.accumulate(b.add(b.mul(loop.index, chains), ir.Constant(self.int64, i)), i)
        with cgutils.for_range_slice(b, b.mul(main, chains), self.length, ir.Constant(self.int64, 1)) as (k, _):
            self.accumulate(k, 0)
        for c in self.columns:
            total = b.load(self.sums[c, 0])
            for i in range(1, self.chains):
                total = b.fadd(total, b.load(self.sums[c, i]))
            pointer = self.vector_pointer(self.out, ir.Constant(self.int64, c * self.lanes))
            b.store(total, pointer, align=self.item)


def _axpy_rows(typing: Any, u: Any, width: Any, x: Any, inner: Any, start: Any, out: Any, count: Any) -> Any:
    """out[j] = start[j] + sum of x[k] u[k * width + j] over k < inner, for the first `count` vectors of j.

    At least 8 sums run side by side, which hides the latency of an addition: few vectors get several partial sums.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _AxpyEmitter(context, builder, args, u.dtype, count.literal_value).emit()
        return context.get_dummy_value()

    return types.void(u, types.int64, x, types.int64, start, out, count), generate


row_dots, axpy_rows = intrinsic(prefer_literal=True)(_row_dots), intrinsic(prefer_literal=True)(_axpy_rows)
_compile = njit(fastmath={"contract"}, error_model="numpy")


@_compile
def matvec(w, stride, x, inner, start, out, rows):  # type: ignore[no-untyped-def]
    """out (rows,) = start + W x, for W (rows, inner) with `stride` elements between its rows."""
    r, lanes = 0, lanes_of(load(x, 0, ANY_SCOPE))
    while r + lanes <= rows:
        row_dots(offset(w, r * stride), stride, x, inner, offset(start, r), offset(out, r), 1)
        r += lanes
    while r + lanes // 4 <= rows:
        row_dots(offset(w, r * stride), stride, x, inner, offset(start, r), offset(out, r), 4)
        r += max(1, lanes // 4)
    while r < rows:
        row_dots(offset(w, r * stride), stride, x, inner, offset(start, r), offset(out, r), 16)
        r += 1


@_compile
def vecmat(u, stride, x, inner, start, out, width):  # type: ignore[no-untyped-def]
    """out (width,) = start + x U, for U (inner, width) with `stride` elements between rows; width in whole vectors."""
    c, lanes = 0, lanes_of(load(x, 0, ANY_SCOPE))
    while c + 8 * lanes <= width:
        axpy_rows(offset(u, c), stride, x, inner, offset(start, c), offset(out, c), 8)
        c += 8 * lanes
    while c + 4 * lanes <= width:
        axpy_rows(offset(u, c), stride, x, inner, offset(start, c), offset(out, c), 4)
        c += 4 * lanes
    while c + 2 * lanes <= width:
        axpy_rows(offset(u, c), stride, x, inner, offset(start, c), offset(out, c), 2)
        c += 2 * lanes
    if c < width:
        axpy_rows(offset(u, c), stride, x, inner, offset(start, c), offset(out, c), 1)


@_compile
def multiply_rows(a, lda, b, out, ldo, start, lds, n, inner, columns, stride):  # type: ignore[no-untyped-def]
    """out (n, columns) = start + a (n, inner) B, for B packed by `pack_rows`; `columns` in whole vectors."""
    for r in range(n):
        vecmat(b, stride, offset(a, r * lda), inner, offset(start, r * lds), offset(out, r * ldo), columns)


@_compile
def multiply_in_place(a, lda, w, out, ldo, start, lds, n, inner, columns, stride):  # type: ignore[no-untyped-def]
    """out (n, columns) = start + a (n, inner) W', for W (columns, inner) with `stride` elements between its rows."""
    for r in range(n):
        matvec(w, stride, offset(a, r * lda), inner, offset(start, r * lds), offset(out, r * ldo), columns)


@_compile
def pack_rows(b, row_stride, column_stride, inner, columns, out, stride):  # type: ignore[no-untyped-def]
    """Copy B (inner, columns) to rows of `stride` elements."""
    for j0 in range(0, columns, 8):
        for k in range(inner):
            for j in range(j0, min(j0 + 8, columns)):
                store(out, k * stride + j, 1, load(b, k * row_stride + j * column_stride, 0))
