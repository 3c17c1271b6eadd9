"""What the compiled loops are made of: memory by address, the recurrent product, and functions LLVM can vectorise.

Imported only when a kernel is about to run, because it imports numba.

The product is written here, and not left to a BLAS, because its right side is the same for all steps: it is cut into
panels once, where a BLAS would do so in every call. Of a step of 32 to 128 rows that makes half as much again.

Loads and stores name a scope, a small number: two accesses of different scopes never touch the same memory. Without
that promise a loop over twenty arrays would need a hundred overlap tests and stay scalar.

numba's wheels carry no vector math library, so a call of tanh or exp in a loop keeps it scalar. `tanh32`, `tanh64`,
`exp32` and `exp64` are branch-free arithmetic instead. NaN goes through all of them.
"""

from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

SCOPES, ANY = 64, 64

_F32, _F64 = types.CPointer(types.float32), types.CPointer(types.float64)
_BYTES, _LONGS = types.CPointer(types.uint8), types.CPointer(types.int64)


def _pointer(kind: Any) -> Any:
    def declare(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(kind))

        return kind(types.int64), generate

    return intrinsic(declare)


f32, f64, bytes_, longs = _pointer(_F32), _pointer(_F64), _pointer(_BYTES), _pointer(_LONGS)


def _alone(module: Any, instruction: Any, scope: int) -> None:
    """Mark an access as one of its scope and of no other; scope ANY may touch everything."""
    if scope == ANY:
        return
    domain = module.add_metadata(["xprnn"])
    scopes = [module.add_metadata([f"xprnn {k}", domain]) for k in range(SCOPES)]
    instruction.set_metadata("alias.scope", module.add_metadata([scopes[scope]]))
    instruction.set_metadata("noalias", module.add_metadata(scopes[:scope] + scopes[scope + 1 :]))


def _load(typing: Any, pointer: Any, index: Any, scope: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(builder.gep(args[0], [args[1]]))
        _alone(builder.module, value, scope.literal_value)
        return value

    return pointer.dtype(pointer, types.int64, scope), generate


def _store(typing: Any, pointer: Any, index: Any, scope: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        done = builder.store(args[3], builder.gep(args[0], [args[1]]))
        _alone(builder.module, done, scope.literal_value)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, scope, pointer.dtype), generate


def _shift(typing: Any, pointer: Any, index: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.int64), generate


shift = intrinsic(_shift)
load, store = intrinsic(prefer_literal=True)(_load), intrinsic(prefer_literal=True)(_store)


def _tile(typing: Any, h: Any, inner: Any, panel: Any, out: Any, width: Any, rows: Any, lanes: Any) -> Any:
    """`rows` rows of out (., width) = h (., inner) panel, two vectors wide: all sums stay in registers."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v, real = lanes.literal_value, context.get_value_type(h.dtype)
        vector, item = ir.VectorType(real, v), h.dtype.bitwidth // 8
        nothing, first = ir.Constant(vector, ir.Undefined), ir.Constant(ir.IntType(32), 0)
        all_first = ir.Constant(ir.VectorType(ir.IntType(32), v), [0] * v)
        given, stride, weights, to, columns = args[:5]

        def at(pointer: Any, index: Any) -> Any:
            return builder.bitcast(builder.gep(pointer, [index]), vector.as_pointer())

        places = [(r, c) for r in range(rows.literal_value) for c in range(2)]
        sums = {place: cgutils.alloca_once(builder, vector) for place in places}
        for place in sums.values():
            builder.store(ir.Constant(vector, [0.0] * v), place)
        long = stride.type
        with cgutils.for_range(builder, stride) as loop:
            k = builder.mul(loop.index, ir.Constant(long, 2 * v))
            pair = [builder.load(at(weights, builder.add(k, ir.Constant(long, c * v))), align=item) for c in (0, 1)]
            for r in range(rows.literal_value):
                index = builder.add(builder.mul(ir.Constant(long, r), stride), loop.index)
                one = builder.insert_element(nothing, builder.load(builder.gep(given, [index])), first)
                one = builder.shuffle_vector(one, nothing, all_first)
                for c in (0, 1):
                    term = builder.fmul(one, pair[c], flags=("contract",))
                    builder.store(builder.fadd(builder.load(sums[r, c]), term, flags=("contract",)), sums[r, c])
        for (r, c), place in sums.items():
            index = builder.add(builder.mul(ir.Constant(long, r), columns), ir.Constant(long, c * v))
            builder.store(builder.load(place), at(to, index), align=item)
        return context.get_dummy_value()

    integer = types.int64
    return types.void(h, integer, panel, out, integer, rows, lanes), generate


tile = intrinsic(prefer_literal=True)(_tile)


def _bits(typing: Any, n: Any) -> Any:
    """The float64 whose bits these are."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), generate


_float_of_bits = intrinsic(_bits)
_features = llvm.get_host_cpu_features()
_bytes = 64 if _features.get("avx512f") else (32 if _features.get("avx") else 16)
LANES32, LANES64 = _bytes // 4, _bytes // 8
# The sums of a tile's rows, two vectors each, must fit the registers: 32 of them, or 16 on x86 without AVX-512.
_ROWS = 4 if _features.get("sse2") and not _features.get("avx512f") else 8
_compile = njit(fastmath={"contract"}, error_model="numpy")


def _panels(lanes: int) -> Any:
    """h (n, inner) U -> out (n, width) for U in panels of 2 lanes columns, each (inner, 2 lanes), side by side."""

    @_compile
    def panels(h, u, out, n, inner, width):  # type: ignore[no-untyped-def]
        for p in range(0, width, 2 * lanes):
            panel, r = shift(u, p * inner), 0
            while r + _ROWS <= n:
                tile(shift(h, r * inner), inner, panel, shift(out, r * width + p), width, _ROWS, lanes)
                r += _ROWS
            while r + 2 <= n:
                tile(shift(h, r * inner), inner, panel, shift(out, r * width + p), width, 2, lanes)
                r += 2
            if r < n:
                tile(shift(h, r * inner), inner, panel, shift(out, r * width + p), width, 1, lanes)

    return panels


panels32, panels64 = _panels(LANES32), _panels(LANES64)


@_compile
def tanh32(x):  # type: ignore[no-untyped-def]
    """x P(x^2) / Q(x^2), the minimax fraction of Eigen and XLA: below 4 ulp; beyond 8 tanh rounds to 1."""
    f = np.float32
    edge = f(7.99881172180175781)
    x = -edge if x < -edge else (edge if x > edge else x)  # noqa: FURB136 - min would lose NaN
    y = x * x
    top = f(-2.76076847742355e-16) * y + f(2.00018790482477e-13)
    top = top * y + f(-8.60467152213735e-11)
    top = top * y + f(5.12229709037114e-08)
    top = top * y + f(1.48572235717979e-05)
    top = top * y + f(6.37261928875436e-04)
    top = top * y + f(4.89352455891786e-03)
    low = f(1.19825839466702e-06) * y + f(1.18534705686654e-04)
    low = low * y + f(2.26843463243900e-03)
    low = low * y + f(4.89352518554385e-03)
    return x * top / low


@_compile
def _expm1_parts(x):  # type: ignore[no-untyped-def]
    """(2^n, expm1(r)) with x = n log 2 + r, |r| < 0.35, for |x| < 708: a Taylor sum of 14 terms, below half an ulp."""
    n = np.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10
    s = r * (1.0 / 6227020800.0) + (1.0 / 479001600.0)
    s = s * r + (1.0 / 39916800.0)
    s = s * r + (1.0 / 3628800.0)
    s = s * r + (1.0 / 362880.0)
    s = s * r + (1.0 / 40320.0)
    s = s * r + (1.0 / 5040.0)
    s = s * r + (1.0 / 720.0)
    s = s * r + (1.0 / 120.0)
    s = s * r + (1.0 / 24.0)
    s = s * r + (1.0 / 6.0)
    s = s * r + 0.5
    return _float_of_bits((np.int64(n) + 1023) << 52), r + r * r * s


@_compile
def tanh64(x):  # type: ignore[no-untyped-def]
    """expm1(2|x|) / (expm1(2|x|) + 2) with the sign of x: right to the last digits near 0, too."""
    y = 2.0 * abs(x)
    y = 40.0 if y > 40.0 else y  # noqa: FURB136 - min would lose NaN
    whole, part = _expm1_parts(y)
    e = whole * part + (whole - 1.0)
    t = e / (e + 2.0)
    t = x if x != x else t  # the integer inside made a number of NaN
    return -t if x < 0.0 else t


@_compile
def exp64(x):  # type: ignore[no-untyped-def]
    """exp by the same parts; below -708 it is 0 a little before it need be, above 709 infinite."""
    y = -708.0 if x < -708.0 else (708.0 if x > 708.0 else x)  # noqa: FURB136 - min would lose NaN
    whole, part = _expm1_parts(y)
    e = whole + whole * part
    e = 0.0 if x < -708.0 else (np.inf if x > 709.78 else (e * np.exp(x - 708.0) if x > 708.0 else e))
    return x if x != x else e
