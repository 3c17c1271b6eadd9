"""Compiled passes of a training step outside the layers: softmax cross-entropy and the updates of the optimisers.

Each reads its inputs once and writes its results once. This module imports numba. Import it only when a kernel is about
to run. Loads and stores name an alias scope, one for each array; see simd.py.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from xprnn.arrays.namespace import Array
from xprnn.kernels.jit import compile_cache
from xprnn.kernels.jit.simd import _expm1_parts, load, store

__all__ = ["UPDATES", "CrossEntropyKernel", "cross_entropy_kernel", "run_cross_entropy", "update_kernel"]

_inline = njit(error_model="numpy", inline="always")
# Rounds each operation, as NumPy does. Without this False, the functions would inherit the kernel's contraction.
_rounding = njit(error_model="numpy", fastmath=False)
_reassociating = njit(error_model="numpy", fastmath={"reassoc", "nsz", "contract"})


def _data_pointer(typing: Any, array: Any) -> Any:
    """Return the pointer to the first element of an array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return make_array(array)(context, builder, args[0]).data

    return types.CPointer(array.dtype)(array), generate


def _maximum_of(typing: Any, a: Any, b: Any) -> Any:
    """Return the larger number, or NaN if one is NaN: the form of a maximum that LLVM vectorises."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        name = f"llvm.maximum.{'f32' if a == types.float32 else 'f64'}"
        kind = ir.FunctionType(args[0].type, [args[0].type] * 2)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)

    return a(a, b), generate


_pointer, _maximum = intrinsic(_data_pointer), intrinsic(_maximum_of)


@_reassociating
def _add(a, b):  # type: ignore[no-untyped-def]
    """a + b in a sum whose terms LLVM may reorder, which it must to vectorise the sum."""
    return a + b


@_inline
def exp_of_nonpositive64(x):  # type: ignore[no-untyped-def]
    """exp(x) for x <= 0. Subnormal results (x < -708) are rounded to 0."""
    scale, fraction = _expm1_parts(-708.0 if x < -708.0 else x)  # noqa: FURB136 - max would lose NaN
    e = 0.0 if x < -708.0 else scale + scale * fraction
    return x if x != x else e


@_inline
def cross_entropy_into(exp, logits, targets, weights, gradient, value):  # type: ignore[no-untyped-def]
    """value[0] = -sum(w log p[target]), gradient = w (p - onehot(target)), p = softmax of each row of logits.

    `weights` holds w of each row, or one w for all. A row of weight 0 has gradient 0, and its numbers are not read.

    Returns:
        The number of rows whose target is not a class; if there is any, `value` and `gradient` are not valid.
    """
    rows, num_classes = logits.shape
    x, d, invalid, total_loss = _pointer(logits), _pointer(gradient), 0, 0.0
    for row in range(rows):
        w, target, start = weights[row if weights.size > 1 else 0], targets[row], row * num_classes
        if w == 0:
            for k in range(start, start + num_classes):
                store(d, k, 1, w)
            continue
        if target < 0 or target >= num_classes:
            invalid += 1
            continue
        largest = load(x, start, 0)
        for k in range(start, start + num_classes):
            largest = _maximum(largest, load(x, k, 0))
        total = logits.dtype.type(0)
        for k in range(start, start + num_classes):
            e = exp(load(x, k, 0) - largest)
            store(d, k, 1, e)
            total = _add(total, e)
        total_loss += w * (np.log(np.float64(total)) - (load(x, start + target, 0) - largest))
        scale = w / total
        for k in range(start, start + num_classes):
            store(d, k, 1, load(d, k, 1) * scale)
        store(d, start + target, 1, load(d, start + target, 1) - w)
    value[0] = total_loss
    return invalid


@_rounding
def sgd_into(c, p, g, new_p):  # type: ignore[no-untyped-def]
    """p - lr g; c = (lr,)."""
    P, G, P1 = _pointer(p), _pointer(g), _pointer(new_p)
    lr = p.dtype.type(c[0])
    for i in range(p.size):
        store(P1, i, 2, load(P, i, 0) - lr * load(G, i, 1))


@_rounding
def momentum_into(c, p, g, v, new_p, new_v):  # type: ignore[no-untyped-def]
    """v = momentum v + g; p - lr v, or p - lr (g + momentum v) (Nesterov); c = (lr, momentum, 1 for Nesterov's)."""
    P, G, V, P1, V1 = _pointer(p), _pointer(g), _pointer(v), _pointer(new_p), _pointer(new_v)
    lr, momentum, nesterov = p.dtype.type(c[0]), p.dtype.type(c[1]), c[2] != 0
    for i in range(p.size):
        gi = load(G, i, 1)
        vi = momentum * load(V, i, 2) + gi
        store(V1, i, 4, vi)
        store(P1, i, 3, load(P, i, 0) - lr * (gi + momentum * vi if nesterov else vi))


@_rounding
def scaled_into(c, p, g, s, new_p, new_s):  # type: ignore[no-untyped-def]
    """s = a s + b g^2; p - lr g / (sqrt(s) + eps); c = (lr, a, b, eps)."""
    P, G, S, P1, S1 = _pointer(p), _pointer(g), _pointer(s), _pointer(new_p), _pointer(new_s)
    f = p.dtype.type
    lr, a, b, eps = f(c[0]), f(c[1]), f(c[2]), f(c[3])
    for i in range(p.size):
        gi = load(G, i, 1)
        si = a * load(S, i, 2) + b * (gi * gi)
        store(S1, i, 4, si)
        store(P1, i, 3, load(P, i, 0) - lr * gi / (np.sqrt(si) + eps))


@_rounding
def adam_into(c, p, g, m, v, new_p, new_m, new_v):  # type: ignore[no-untyped-def]
    """m = b1 m + a1 g; v = b2 v + a2 g^2; keep p - lr m / (sqrt(v) + eps); c = (lr, b1, a1, b2, a2, eps, keep)."""
    P, G, M, V = _pointer(p), _pointer(g), _pointer(m), _pointer(v)
    P1, M1, V1 = _pointer(new_p), _pointer(new_m), _pointer(new_v)
    f = p.dtype.type
    lr, b1, a1, b2, a2, eps, keep = f(c[0]), f(c[1]), f(c[2]), f(c[3]), f(c[4]), f(c[5]), f(c[6])
    for i in range(p.size):
        gi = load(G, i, 1)
        mi = b1 * load(M, i, 2) + a1 * gi
        vi = b2 * load(V, i, 3) + a2 * (gi * gi)
        store(M1, i, 5, mi)
        store(V1, i, 6, vi)
        store(P1, i, 4, load(P, i, 0) * keep - lr * mi / (np.sqrt(vi) + eps))


UPDATES = {"sgd": 0, "momentum": 1, "scaled": 1, "adam": 2}  # name of the function without _into -> number of moments

_CROSS_ENTROPY_TEMPLATE = '''"""Cross-entropy, printed by xprnn (a cache entry, safe to delete)"""
from xprnn.kernels.jit.{module} import {exp}
from xprnn.kernels.jit.training import cross_entropy_into


def kernel(logits, targets, weights, gradient, value):
    return cross_entropy_into({exp}, logits, targets, weights, gradient, value)
'''
_CROSS_ENTROPY_SOURCE = {  # by the bytes of a float
    4: _CROSS_ENTROPY_TEMPLATE.format(module="simd", exp="exp32"),
    8: _CROSS_ENTROPY_TEMPLATE.format(module="training", exp="exp_of_nonpositive64"),
}
_UPDATE_SOURCE = '''"""Update of an optimiser, printed by xprnn (a cache entry, safe to delete)"""
from xprnn.kernels.jit.training import {name}_into


def kernel(c, {arrays}):
    {name}_into(c, {arrays})
'''


CrossEntropyKernel = Callable[[Array, Array, Array, Array, Array], int]


def _array_type(dtype: str, ndim: int, *, readonly: bool = False) -> str:
    return f"Array({dtype}, {ndim}, 'C'{', True' if readonly else ''})"


def _compile(source: str, signature: str) -> Callable[..., Any] | None:
    return compile_cache.compile_kernel(source, signature) if compile_cache.can_compile(source, signature) else None


@cache
def cross_entropy_kernel(itemsize: int) -> CrossEntropyKernel | None:
    """Return the compiled cross-entropy for floats of `itemsize` bytes; None if it cannot be compiled here."""
    kind = f"float{8 * itemsize}"
    logits, targets, weights = (_array_type(*a, readonly=True) for a in ((kind, 2), ("int64", 1), (kind, 1)))
    outputs = f"{_array_type(kind, 2)}, {_array_type('float64', 1)}"
    return _compile(_CROSS_ENTROPY_SOURCE[itemsize], f"int64({logits}, {targets}, {weights}, {outputs})")


def run_cross_entropy(
    kernel: CrossEntropyKernel, logits: Array, targets: Array, weights: Array
) -> tuple[Any, Array] | None:
    """Compute softmax cross-entropy and its gradient in one pass over the rows.

    Args:
        kernel: from `cross_entropy_kernel` for the dtype of logits.
        logits: (..., V), float32 or float64; V >= 1.
        targets: (...) integers.
        weights: (...), or one number as a 0-d array, in the dtype of logits; zero excludes a row.

    Returns:
        -sum(w log p[target]) and its gradient (..., V); None if the target of a row with a weight is not in 0..V-1.

    >>> run_cross_entropy(cross_entropy_kernel(8), np.zeros((1, 2)), np.asarray([1]), np.ones(()))[1]
    array([[ 0.5, -0.5]])
    """
    rows, gradient, value = (
        np.ascontiguousarray(logits).reshape(-1, logits.shape[-1]),
        np.empty(logits.shape, logits.dtype),
        np.empty(1),
    )
    ids = np.ascontiguousarray(targets, np.int64).reshape(-1)
    if kernel(rows, ids, np.ascontiguousarray(weights).reshape(-1), gradient.reshape(rows.shape), value):
        return None
    return logits.dtype.type(value[0]), gradient


@cache
def update_kernel(name: str, itemsize: int) -> Callable[..., None] | None:
    """Return the compiled update of an optimiser, or None if it cannot be compiled here.

    Args:
        name: a key of UPDATES.
        itemsize: 4 for float32, 8 for float64.

    Returns:
        A function of the constants (float64, as in the docstring of the function `name`_into), p, g, the moments, and
        the outputs: new p and new moments. All but the constants have the same size and dtype, one axis, and no common
        memory.
    """
    count, kind = 1 + UPDATES[name], f"float{8 * itemsize}"
    arrays = ", ".join(f"a{k}" for k in range(2 * count + 1))
    inputs = [_array_type("float64", 1, readonly=True), *[_array_type(kind, 1, readonly=True)] * (count + 1)]
    signature = f"void({', '.join([*inputs, *[_array_type(kind, 1)] * count])})"
    return _compile(_UPDATE_SOURCE.format(name=name, arrays=arrays), signature)
