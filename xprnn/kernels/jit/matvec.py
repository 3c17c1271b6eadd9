"""The matrix product of a single step, W x with W as it lies: sums of rows, a vector's width of them at once.

Imported only when a kernel is about to run, because it imports numba.

A sequence cuts its recurrent weight into panels once (lanes.py); one step can't afford that, and a copy kept between
steps would miss what is written into the weight. So each row is summed where it is, in vectors; as many rows as a
vector has lanes are added up crosswise in the end, pairs of neighbours first, so that a row's sum does not depend on
the rows beside it. A walk of many steps does turn its weights; each entry of x is then spread over a row.
"""

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from xprnn.kernels.jit.simd import ANY_SCOPE, LANES32, LANES64, offset, store


def _row_dots(typing: Any, w: Any, stride: Any, x: Any, inner: Any, out: Any, rows: Any, lanes: Any) -> Any:
    """out[r] = sum of w[r * stride + k] x[k] over k < inner, for r < rows, a power of two up to `lanes`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v, count, real = lanes.literal_value, rows.literal_value, context.get_value_type(w.dtype)
        vector, item, long = ir.VectorType(real, v), w.dtype.bitwidth // 8, ir.IntType(64)
        weights, step, given, length, to = args[:5]
        zero = ir.Constant(vector, [0.0] * v)
        sums = [cgutils.alloca_once_value(builder, zero) for _ in range(count)]
        masked = _masked_load(builder.module, vector, real, v)

        def at(pointer: Any, index: Any) -> Any:
            return builder.bitcast(builder.gep(pointer, [index]), vector.as_pointer())

        def add(first: Any, read: Any) -> None:
            one = read(at(given, first))
            for r, place in enumerate(sums):
                index = builder.add(builder.mul(ir.Constant(long, r), step), first)
                term = builder.fmul(read(at(weights, index)), one, flags=("contract",))
                builder.store(builder.fadd(builder.load(place), term, flags=("contract",)), place)

        whole = builder.sdiv(length, ir.Constant(long, v))
        with cgutils.for_range(builder, whole) as loop:
            add(builder.mul(loop.index, ir.Constant(long, v)), lambda p: builder.load(p, align=item))
        rest = builder.srem(length, ir.Constant(long, v))
        with builder.if_then(builder.icmp_signed(">", rest, ir.Constant(long, 0))):
            places = ir.VectorType(long, v)
            splat = builder.insert_element(ir.Constant(places, ir.Undefined), rest, ir.Constant(ir.IntType(32), 0))
            splat = builder.shuffle_vector(splat, splat, ir.Constant(ir.VectorType(ir.IntType(32), v), [0] * v))
            mask = builder.icmp_signed("<", ir.Constant(places, list(range(v))), splat)
            align = ir.Constant(ir.IntType(32), item)
            first = builder.mul(whole, ir.Constant(long, v))
            add(first, lambda p: builder.call(masked, [p, align, mask, zero]))
        total = _horizontal_sums(builder, [builder.load(place) for place in sums], v)
        for r in range(count):
            one = builder.extract_element(total, ir.Constant(ir.IntType(32), r))
            builder.store(one, builder.gep(to, [ir.Constant(long, r)]))
        return context.get_dummy_value()

    long_ = types.int64
    return types.void(w, long_, x, long_, out, rows, lanes), generate


def _masked_load(module: Any, vector: Any, real: Any, v: int) -> Any:
    """LLVM's load of some lanes; it puts its own mangling in the place of this name's."""
    kind = ir.FunctionType(vector, [vector.as_pointer(), ir.IntType(32), ir.VectorType(ir.IntType(1), v), vector])
    name = f"llvm.masked.load.v{v}f{32 if isinstance(real, ir.FloatType) else 64}.p0"
    return cgutils.get_or_insert_function(module, kind, name)


def _horizontal_sums(builder: Any, sums: list[Any], v: int) -> Any:
    """A vector whose first lanes are the sums of these vectors' lanes."""
    even, odd = (ir.Constant(ir.VectorType(ir.IntType(32), v), list(range(k, 2 * v, 2))) for k in (0, 1))

    def pairs(a: Any, b: Any) -> Any:
        return builder.fadd(builder.shuffle_vector(a, b, even), builder.shuffle_vector(a, b, odd))

    while v > 1:
        sums = (
            [pairs(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
            if len(sums) > 1
            else [pairs(sums[0], sums[0])]
        )
        v //= 2
    return sums[0]


def _axpy_rows(typing: Any, u: Any, width: Any, x: Any, inner: Any, out: Any, count: Any, lanes: Any) -> Any:
    """`count` vectors of out = the sum of x[k] u[k * width + .] over k < inner."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v, real = lanes.literal_value, context.get_value_type(u.dtype)
        vector, item, long = ir.VectorType(real, v), u.dtype.bitwidth // 8, ir.IntType(64)
        weights, step, given, length, to = args[:5]
        first, nothing = ir.Constant(ir.IntType(32), 0), ir.Constant(vector, ir.Undefined)
        everywhere = ir.Constant(ir.VectorType(ir.IntType(32), v), [0] * v)
        zero = ir.Constant(vector, [0.0] * v)
        sums = [cgutils.alloca_once_value(builder, zero) for _ in range(count.literal_value)]

        def at(pointer: Any, index: Any) -> Any:
            return builder.bitcast(builder.gep(pointer, [index]), vector.as_pointer())

        with cgutils.for_range(builder, length) as loop:
            one = builder.insert_element(nothing, builder.load(builder.gep(given, [loop.index])), first)
            one = builder.shuffle_vector(one, nothing, everywhere)
            for c, place in enumerate(sums):
                index = builder.add(builder.mul(loop.index, step), ir.Constant(long, c * v))
                term = builder.fmul(one, builder.load(at(weights, index), align=item), flags=("contract",))
                builder.store(builder.fadd(builder.load(place), term, flags=("contract",)), place)
        for c, place in enumerate(sums):
            builder.store(builder.load(place), at(to, ir.Constant(long, c * v)), align=item)
        return context.get_dummy_value()

    long_ = types.int64
    return types.void(u, long_, x, long_, out, count, lanes), generate


row_dots, axpy_rows = intrinsic(prefer_literal=True)(_row_dots), intrinsic(prefer_literal=True)(_axpy_rows)
_compile = njit(fastmath={"contract"}, error_model="numpy")


def _make_matvec(lanes: int) -> Any:
    @_compile
    def product(w, stride, x, inner, out, rows):  # type: ignore[no-untyped-def]
        """out (rows,) = W x for W (rows, inner) whose rows lie `stride` apart."""
        r = 0
        while r + lanes <= rows:
            row_dots(offset(w, r * stride), stride, x, inner, offset(out, r), lanes, lanes)
            r += lanes
        if r < rows and r > 0:  # once more some rows that are done, rather than one by one
            r = rows - lanes
            row_dots(offset(w, r * stride), stride, x, inner, offset(out, r), lanes, lanes)
            r = rows
        while r < rows:
            row_dots(offset(w, r * stride), stride, x, inner, offset(out, r), 1, lanes)
            r += 1

    return product


matvec32, matvec64 = _make_matvec(LANES32), _make_matvec(LANES64)


def _make_vecmat(lanes: int) -> Any:
    @_compile
    def turned(u, stride, x, inner, out, width):  # type: ignore[no-untyped-def]
        """out (width,) = x U for U (inner, width) whose rows lie `stride` apart, width a multiple of the lanes."""
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

    return turned


vecmat32, vecmat64 = _make_vecmat(LANES32), _make_vecmat(LANES64)


@_compile
def transpose(w, out, stride):  # type: ignore[no-untyped-def]
    """w (G*H, K) -> out (K, G*H), its rows `stride` apart."""
    for j in range(w.shape[0]):
        for k in range(w.shape[1]):
            store(out, k * stride + j, ANY_SCOPE, w[j, k])


@_compile
def is_unit_stride(a, count):  # type: ignore[no-untyped-def]
    """Whether a is (count,) and its entries lie side by side."""
    return a.shape[0] == count and (count < 2 or a.strides[0] == a.itemsize)


@_compile
def has_unit_stride_rows(a, rows, count):  # type: ignore[no-untyped-def]
    """Whether a is (rows, count) and a row's entries lie side by side."""
    return a.shape[0] == rows and a.shape[1] == count and (count < 2 or a.strides[1] == a.itemsize)
