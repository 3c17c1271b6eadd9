"""Building blocks of compiled loops: pointers from addresses, calls by address, vectorisable tanh and exp.

This module imports numba. Import it only when a kernel is about to run.

Loads and stores name an alias scope, a small number. LLVM may assume that accesses in two different scopes never touch
the same memory. Without that, a loop over twenty arrays would need a hundred overlap tests at run time, and LLVM would
leave it scalar.

numba's wheels contain no vector math library, so a loop that calls tanh or exp stays scalar. `tanh32`, `tanh64` and
`exp64` are branch-free arithmetic instead. They return NaN for NaN.
"""

from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

NUM_ALIAS_SCOPES = 64
ANY_SCOPE = NUM_ALIAS_SCOPES  # an access that may alias every other

_FLOAT32_PTR_TYPE, _FLOAT64_PTR_TYPE = types.CPointer(types.float32), types.CPointer(types.float64)
_UINT8_PTR_TYPE, _INT64_PTR_TYPE = types.CPointer(types.uint8), types.CPointer(types.int64)


def _pointer_cast(kind: Any) -> Any:
    """Make the intrinsic that casts an integer address to a pointer type."""

    def declare(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(kind))

        return kind(types.int64), generate

    return intrinsic(declare)


float32_pointer, float64_pointer, uint8_pointer, int64_pointer = (
    _pointer_cast(_FLOAT32_PTR_TYPE),
    _pointer_cast(_FLOAT64_PTR_TYPE),
    _pointer_cast(_UINT8_PTR_TYPE),
    _pointer_cast(_INT64_PTR_TYPE),
)


def _set_alias_scope(module: Any, instruction: Any, scope: int) -> None:
    """Attach LLVM's alias metadata: the access belongs to `scope` and to no other. ANY_SCOPE attaches nothing."""
    if scope == ANY_SCOPE:
        return
    domain = module.add_metadata(["xprnn"])
    scopes = [module.add_metadata([f"xprnn {k}", domain]) for k in range(NUM_ALIAS_SCOPES)]
    instruction.set_metadata("alias.scope", module.add_metadata([scopes[scope]]))
    instruction.set_metadata("noalias", module.add_metadata(scopes[:scope] + scopes[scope + 1 :]))


def _load(typing: Any, pointer: Any, index: Any, scope: Any) -> Any:
    """Return pointer[index]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(builder.gep(args[0], [args[1]]))
        _set_alias_scope(builder.module, value, scope.literal_value)
        return value

    return pointer.dtype(pointer, types.int64, scope), generate


def _store(typing: Any, pointer: Any, index: Any, scope: Any, value: Any) -> Any:
    """Set pointer[index] = value."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        instruction = builder.store(args[3], builder.gep(args[0], [args[1]]))
        _set_alias_scope(builder.module, instruction, scope.literal_value)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, scope, pointer.dtype), generate


def _offset(typing: Any, pointer: Any, index: Any) -> Any:
    """Return the pointer to pointer[index]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.int64), generate


def _element_address(typing: Any, pointer: Any, index: Any) -> Any:
    """Return the integer address of pointer[index]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(builder.gep(args[0], [args[1]]), ir.IntType(64))

    return types.int64(pointer, types.int64), generate


def _call_address(typing: Any, address: Any, arguments: Any) -> Any:
    """Call the function at an address with a tuple of int64; it returns an int64."""
    count = len(arguments)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        long = ir.IntType(64)
        function = builder.inttoptr(args[0], ir.FunctionType(long, [long] * count).as_pointer())
        return builder.call(function, [builder.extract_value(args[1], k) for k in range(count)])

    return types.int64(types.int64, types.UniTuple(types.int64, count)), generate


def _pointer_like(typing: Any, address: Any, number: Any) -> Any:
    """Cast an integer address to a pointer to elements of the type of `number`."""
    kind = types.CPointer(number)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(types.int64, number), generate


def _lanes_of(typing: Any, number: Any) -> Any:
    """Return the number of elements of the type of `number` that a SIMD vector holds."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(ir.IntType(64), LANES32 if number.bitwidth == 32 else LANES64)

    return types.int64(number), generate


def _data_address(typing: Any, array: Any) -> Any:
    """Return the address of an array's first element as an int64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(array)(context, builder, args[0]).data
        return builder.ptrtoint(data, ir.IntType(64))

    return types.int64(array), generate


def _prefer_widest_vectors(typing: Any) -> Any:
    """Vectorise loops of the calling function with the widest vectors. LLVM's default is half of AVX-512's width."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # llvmlite's AttributeSet.add rejects attributes that have a value.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), generate


prefer_widest_vectors = intrinsic(_prefer_widest_vectors)
offset, element_address, call_address = intrinsic(_offset), intrinsic(_element_address), intrinsic(_call_address)
pointer_like, lanes_of, data_address = intrinsic(_pointer_like), intrinsic(_lanes_of), intrinsic(_data_address)
load, store = intrinsic(prefer_literal=True)(_load), intrinsic(prefer_literal=True)(_store)


def _float64_bitcast(typing: Any, n: Any) -> Any:
    """Reinterpret the bits of an int64 as a float64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), generate


_float64_from_bits = intrinsic(_float64_bitcast)
cpu_features = llvm.get_host_cpu_features()
_vector_bytes = 64 if cpu_features.get("avx512f") else (32 if cpu_features.get("avx") else 16)
LANES32, LANES64 = _vector_bytes // 4, _vector_bytes // 8
_compile = njit(fastmath={"contract"}, error_model="numpy")


@_compile
def tanh32(x):  # type: ignore[no-untyped-def]
    """tanh(x) = x P(x^2) / Q(x^2): the rational minimax approximation of Eigen and XLA, error below 4 ulp.

    Arguments are clamped to +-7.9988, where float32 tanh rounds to +-1.
    """
    f = np.float32
    limit = f(7.99881172180175781)
    x = -limit if x < -limit else (limit if x > limit else x)  # noqa: FURB136 - min would lose NaN
    y = x * x
    p = f(-2.76076847742355e-16) * y + f(2.00018790482477e-13)
    p = p * y + f(-8.60467152213735e-11)
    p = p * y + f(5.12229709037114e-08)
    p = p * y + f(1.48572235717979e-05)
    p = p * y + f(6.37261928875436e-04)
    p = p * y + f(4.89352455891786e-03)
    q = f(1.19825839466702e-06) * y + f(1.18534705686654e-04)
    q = q * y + f(2.26843463243900e-03)
    q = q * y + f(4.89352518554385e-03)
    return x * p / q


@_compile
def _expm1_parts(x):  # type: ignore[no-untyped-def]
    """Return (2^n, expm1(r)) where x = n log 2 + r, |r| < 0.35, for |x| < 708.

    expm1(r) is a Taylor polynomial of 14 terms, with an error below half an ulp.
    """
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
    return _float64_from_bits((np.int64(n) + 1023) << 52), r + r * r * s


@_compile
def tanh64(x):  # type: ignore[no-untyped-def]
    """tanh(|x|) = expm1(2|x|) / (expm1(2|x|) + 2), with the sign of x. Accurate near 0, too."""
    y = 2.0 * abs(x)
    y = 40.0 if y > 40.0 else y  # noqa: FURB136 - min would lose NaN
    scale, fraction = _expm1_parts(y)
    e = scale * fraction + (scale - 1.0)
    t = e / (e + 2.0)
    t = x if x != x else t  # _expm1_parts converts to int64, which loses NaN
    return -t if x < 0.0 else t


@_compile
def exp64(x):  # type: ignore[no-untyped-def]
    """exp(x). Subnormal results (x < -708) are rounded to 0; infinite for x > 709.78."""
    y = -708.0 if x < -708.0 else (708.0 if x > 708.0 else x)  # noqa: FURB136 - min would lose NaN
    scale, fraction = _expm1_parts(y)
    e = scale + scale * fraction
    e = 0.0 if x < -708.0 else (np.inf if x > 709.78 else (e * np.exp(x - 708.0) if x > 708.0 else e))
    return x if x != x else e


def _float32_power_of_two(typing: Any, n: Any) -> Any:
    """Return 2^n for an integral float32 n in -126..127. An int32 in numba's own arithmetic would become an int64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        int32 = ir.IntType(32)
        exponent = builder.add(builder.fptosi(args[0], int32), ir.Constant(int32, 127))
        return builder.bitcast(builder.shl(exponent, ir.Constant(int32, 23)), ir.FloatType())

    return types.float32(types.float32), generate


_power_of_two32 = intrinsic(_float32_power_of_two)


@_compile
def exp32(x):  # type: ignore[no-untyped-def]
    """exp(x) = 2^n exp(r) where x = n log 2 + r, |r| < 0.35: the polynomial of Cephes, error below 1.1 ulp.

    2^n is applied in two factors, so that results are subnormal where they should be; infinite for x > 88.73.
    """
    f = np.float32
    y = f(-104.0) if x < f(-104.0) else (f(89.0) if x > f(89.0) else x)  # noqa: FURB136 - min would lose NaN
    n = np.floor(y * f(1.44269504088896341) + f(0.5))
    r = (y - n * f(0.693359375)) - n * f(-2.12194440e-4)
    s = f(1.9875691500e-4) * r + f(1.3981999507e-3)
    s = s * r + f(8.3334519073e-3)
    s = s * r + f(4.1665795894e-2)
    s = s * r + f(1.6666665459e-1)
    s = s * r + f(5.0000001201e-1)
    half = np.floor(n * f(0.5))
    e = (f(1.0) + (r + r * r * s)) * _power_of_two32(half) * _power_of_two32(n - half)
    return x if x != x else e
