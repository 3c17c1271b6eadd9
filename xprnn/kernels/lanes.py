"""What the compiled loops are made of: memory by address, the recurrent product, and functions LLVM can vectorise.

Imported only by generated modules (source.py), because it imports numba.

Loads and stores name a scope, a small number: two accesses of different scopes never touch the same memory. Without
that promise a loop over twenty arrays would need a hundred overlap tests and stay scalar.

numba's wheels carry no vector math library, so a call of tanh or exp in a loop keeps it scalar. `tanh32`, `tanh64`,
`exp32` and `exp64` are branch-free arithmetic instead. NaN goes through all of them.
"""

from typing import Any

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


def _gemm(typing: Any, address: Any, a: Any, b: Any, c: Any, m: Any, n: Any, k: Any) -> Any:
    """c = b a for row-major a (k, m), b (n, k), c (n, m), by the Fortran gemm at this address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        char, integer = ir.IntType(8), ir.IntType(32)
        real = context.get_value_type(a.dtype)

        def held(value: Any, kind: Any) -> Any:
            place = cgutils.alloca_once(builder, kind)  # on the stack once, not once a step
            builder.store(value, place)
            return place

        letter = held(char(ord("N")), char)
        rows, columns, inner = (held(builder.trunc(v, integer), integer) for v in args[4:])
        one, zero = held(real(1.0), real), held(real(0.0), real)
        given = [letter, letter, rows, columns, inner, one, args[1], rows, args[2], inner, zero, args[3], rows]
        kind = ir.FunctionType(ir.VoidType(), [v.type for v in given])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), given)
        return context.get_dummy_value()

    return types.void(types.int64, a, b, c, types.int64, types.int64, types.int64), generate


gemm = intrinsic(_gemm)


def _bits(typing: Any, n: Any) -> Any:
    """The float64 whose bits these are."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), generate


_float_of_bits = intrinsic(_bits)
_compile = njit(fastmath={"contract"}, error_model="numpy")


@_compile
def product(h, u, out, n, inner, width, zero):  # type: ignore[no-untyped-def]
    """out = h u for h (n, inner), u (inner, width), by loops that run along the rows of u."""
    for r in range(n):
        b, o, k = r * inner, r * width, 0
        for j in range(width):
            store(out, o + j, 1, zero)
        while k + 8 <= inner:
            b0, u0 = b + k, k * width
            h0, h1, h2, h3 = load(h, b0, ANY), load(h, b0 + 1, ANY), load(h, b0 + 2, ANY), load(h, b0 + 3, ANY)
            h4, h5, h6, h7 = load(h, b0 + 4, ANY), load(h, b0 + 5, ANY), load(h, b0 + 6, ANY), load(h, b0 + 7, ANY)
            u1, u2, u3, u4 = u0 + width, u0 + 2 * width, u0 + 3 * width, u0 + 4 * width
            u5, u6, u7 = u0 + 5 * width, u0 + 6 * width, u0 + 7 * width
            for j in range(width):
                even = load(out, o + j, 1) + h0 * load(u, u0 + j, 2) + h2 * load(u, u2 + j, 2)
                odd = h1 * load(u, u1 + j, 2) + h3 * load(u, u3 + j, 2) + h5 * load(u, u5 + j, 2)
                even = even + h4 * load(u, u4 + j, 2) + h6 * load(u, u6 + j, 2)
                store(out, o + j, 1, even + (odd + h7 * load(u, u7 + j, 2)))
            k += 8
        while k < inner:
            one = load(h, b + k, ANY)
            for j in range(width):
                store(out, o + j, 1, load(out, o + j, 1) + one * load(u, k * width + j, 2))
            k += 1


@_compile
def tanh32(x):  # type: ignore[no-untyped-def]
    """x P(x^2) / Q(x^2), the minimax fraction of Eigen and XLA: 1.8 ulp; beyond 8 tanh rounds to 1."""
    f = np.float32
    edge = f(7.99881172180175781)
    x = -edge if x < -edge else (edge if x > edge else x)
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
    y = 40.0 if y > 40.0 else y
    whole, part = _expm1_parts(y)
    e = whole * part + (whole - 1.0)
    t = e / (e + 2.0)
    t = x if x != x else t  # the integer inside made a number of NaN
    return -t if x < 0.0 else t


@_compile
def exp64(x):  # type: ignore[no-untyped-def]
    """exp by the same parts; below -708 it is 0 a little before it need be, above 709 infinite."""
    y = -708.0 if x < -708.0 else (708.0 if x > 708.0 else x)
    whole, part = _expm1_parts(y)
    e = whole + whole * part
    e = 0.0 if x < -708.0 else (np.inf if x > 709.78 else (e * np.exp(x - 708.0) if x > 708.0 else e))
    return x if x != x else e
